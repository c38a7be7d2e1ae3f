//! Doors to the quantized matrix product for benchmark scripts and tests. Never computes: the back
//! end does.

use super::convert::exception;
use crate::backend::cpu::{Buf, Bytes, Cpu, Mat, Tiles, topology};
use crate::backend::{Backend, Form, Part, Parts};
use crate::{Error, Result};
use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::prelude::*;
use std::time::Instant;

/// A quantized weight matrix [n, k], packed for one kernel set.
#[pyclass(frozen, module = "ferrule._core")]
pub(super) struct QMatrix {
    cpu: Cpu,
    mat: Mat,
}

/// int4 form of `w` [n, k]; threads and kernel set as of a model.
#[pyfunction]
#[pyo3(signature = (w, *, threads=None, isa=None))]
pub(super) fn quantize_int4(
    py: Python<'_>,
    w: PyReadonlyArray2<'_, f32>,
    threads: Option<usize>,
    isa: Option<String>,
) -> PyResult<QMatrix> {
    quantize(py, Form::Q4, &w, threads, isa)
}

/// int8 form of `w` [n, k]; threads and kernel set as of a model.
#[pyfunction]
#[pyo3(signature = (w, *, threads=None, isa=None))]
pub(super) fn quantize_int8(
    py: Python<'_>,
    w: PyReadonlyArray2<'_, f32>,
    threads: Option<usize>,
    isa: Option<String>,
) -> PyResult<QMatrix> {
    quantize(py, Form::Q8, &w, threads, isa)
}

fn quantize(
    py: Python<'_>,
    form: Form,
    w: &PyReadonlyArray2<'_, f32>,
    threads: Option<usize>,
    isa: Option<String>,
) -> PyResult<QMatrix> {
    let (n, k) = (w.shape()[0], w.shape()[1]);
    let bytes: Vec<u8> = w.as_array().iter().flat_map(|x| x.to_le_bytes()).collect();
    let pack = || {
        if n == 0 || k == 0 {
            return Err(Error::parameter("w", format!("shape [{n}, {k}]"), "at least [1, 1]"));
        }
        let isa = isa.or_else(|| std::env::var("FERRULE_ISA").ok());
        let threads = threads.unwrap_or_else(|| topology::auto().count);
        let cpu = Cpu::new(threads, isa.as_deref())?;
        let part = Part::floats(Form::F32, n, k, &bytes);
        let mat = cpu.pack(form, &Parts { parts: vec![part], k, interleaved: false })?;
        let mat = mat.map_err(|(_, r, c)| {
            Error::parameter("w", format!("no finite number at [{r}, {c}]"), "finite numbers")
        })?;
        Ok(QMatrix { cpu, mat })
    };
    py.detach(pack).map_err(|error| exception(py, &error))
}

#[pymethods]
impl QMatrix {
    /// (n, k).
    #[getter]
    fn shape(&self) -> (usize, usize) {
        self.mat.shape()
    }

    /// Bytes in memory.
    #[getter]
    fn nbytes(&self) -> usize {
        self.mat.bytes().len()
    }

    /// Bits in memory for each weight, padding included.
    #[getter]
    fn bits_per_weight(&self) -> f64 {
        let (n, k) = self.mat.shape();
        8.0 * self.mat.bytes().len() as f64 / (n as f64 * k as f64)
    }

    /// `x w^T` [m, n] for activations `x` [m, k], which are quantized to int8 on the way.
    fn matmul<'py>(
        &self,
        py: Python<'py>,
        x: PyReadonlyArray2<'py, f32>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let (n, k) = self.mat.shape();
        let (m, width) = (x.shape()[0], x.shape()[1]);
        let multiply = |data: Vec<f32>| -> Result<Vec<f32>> {
            if width != k {
                return Err(Error::parameter("x", format!("[{m}, {width}]"), format!("[m, {k}]")));
            }
            if m == 0 {
                return Ok(Vec::new());
            }
            if let Some(i) = data.iter().position(|x| !x.is_finite()) {
                let at = format!("{} at [{}, {}]", data[i], i / k, i % k);
                return Err(Error::parameter("x", at, "finite numbers"));
            }
            let mut out = Buf::default();
            self.cpu.linear(&self.mat, None, &Buf::new(data, k), &mut out);
            Ok(self.cpu.read(&out))
        };
        let data: Vec<f32> = x.as_array().iter().copied().collect();
        let y = py.detach(|| multiply(data)).map_err(|error| exception(py, &error))?;
        PyArray1::from_vec(py, y).reshape([m, n])
    }

    /// The weights as the product sees them, [n, k].
    fn dequantize<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let (n, k) = self.mat.shape();
        let mut w = vec![0.0; n * k];
        py.detach(|| {
            let rows = w.chunks_exact_mut(k).enumerate();
            rows.for_each(|(r, row)| self.mat.unpack_row(r, row));
        });
        PyArray1::from_vec(py, w).reshape([n, k])
    }
}

/// A matrix of int4 weights [n, k] of no meaning, to try settings on; their values do not change the speed.
#[pyclass(frozen, module = "ferrule._core")]
pub(super) struct Trial(Mat);

#[pymethods]
impl Trial {
    #[new]
    fn new(py: Python<'_>, n: usize, k: usize) -> PyResult<Trial> {
        let make = || {
            let size = n.checked_mul(k).filter(|&size| size > 0 && size as u64 <= 1 << 36);
            if size.is_none() {
                return Err(Error::parameter("shape", format!("[{n}, {k}]"), "1 to 2^36 weights"));
            }
            let mut bytes = Bytes::zeroed(Form::Q4.bytes(n, k), "weights to try")?;
            bytes.get_mut().fill(1); // pages that are never written are all the same one
            Mat::new(Form::Q4, n, k, bytes)
        };
        py.detach(make).map(Trial).map_err(|error| exception(py, &error))
    }

    /// Seconds of one product with `m` rows of activations, after one that is not timed.
    fn seconds(
        &self,
        py: Python<'_>,
        m: usize,
        threads: usize,
        tile_tokens: usize,
        claim_bytes: usize,
    ) -> PyResult<f64> {
        let run = || {
            let isa = std::env::var("FERRULE_ISA").ok();
            let tiles = Tiles { tokens: tile_tokens, claim: claim_bytes };
            let cpu = Cpu::new(threads, isa.as_deref())?.with_tiles(tiles)?;
            let (_, k) = self.0.shape();
            let (x, mut out) = (Buf::new(vec![1.0; m * k], k), Buf::default());
            cpu.linear(&self.0, None, &x, &mut out);
            let start = Instant::now();
            cpu.linear(&self.0, None, &x, &mut out);
            Ok(start.elapsed().as_secs_f64())
        };
        py.detach(run).map_err(|error| exception(py, &error))
    }
}
