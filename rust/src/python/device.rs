//! Which device a model is loaded onto, and what is said of it. Touches no driver unless CUDA is asked for.

use crate::backend::cpu::Cpu;
use crate::model::LoadOptions;
use crate::{Error, Result};
use pyo3::prelude::*;
use std::path::Path;

/// What `device=` asks for.
#[derive(Clone, Copy)]
pub(super) enum Wanted {
    Cpu,
    /// A device of the driver, or the first that kernels run on.
    Cuda(Option<usize>),
    Auto,
}

impl Wanted {
    pub(super) fn parse(name: &str) -> Result<Wanted> {
        match name {
            "cpu" => Ok(Wanted::Cpu),
            "cuda" => Ok(Wanted::Cuda(None)),
            "auto" => Ok(Wanted::Auto),
            _ => match name.strip_prefix("cuda:").map(str::parse) {
                Some(Ok(ordinal)) => Ok(Wanted::Cuda(Some(ordinal))),
                _ => {
                    let expected = "\"cpu\", \"cuda\", \"cuda:0\" or \"auto\"";
                    Err(Error::parameter("device", format!("{name:?}"), expected))
                }
            },
        }
    }

    /// The CUDA device to load onto; or why it is the CPU, where that was not asked for.
    pub(super) fn on_cuda(
        self,
        folder: &Path,
        load: &LoadOptions,
    ) -> Result<std::result::Result<Option<usize>, String>> {
        match self {
            Wanted::Cpu => Ok(Err(String::new())),
            Wanted::Cuda(ordinal) => available().map(|()| Ok(ordinal)),
            Wanted::Auto => Ok(available()
                .and_then(|()| fits(folder, load))
                .map_or_else(|why| Err(why.to_string()), |()| Ok(None))),
        }
    }
}

/// Whether CUDA can be had.
fn available() -> Result<()> {
    if std::env::var_os("FERRULE_DISABLE_CUDA").is_some_and(|value| value == "1") {
        return Err(Error::CudaUnavailable("FERRULE_DISABLE_CUDA=1 is set; unset it".into()));
    }
    #[cfg(feature = "cuda")]
    return match crate::backend::cuda::probe() {
        Ok(_) => Ok(()),
        Err(why) => Err(Error::CudaUnavailable(why.to_string())),
    };
    #[cfg(not(feature = "cuda"))]
    Err(Error::CudaUnavailable(
        "this build has no CUDA back end; install ferrule from a wheel".into(),
    ))
}

/// Whether the model runs on CUDA, and its weights have room beside keys and values.
#[cfg(feature = "cuda")]
fn fits(folder: &Path, load: &LoadOptions) -> Result<()> {
    let weights = crate::model::for_cuda(folder, load)?;
    let memory = crate::backend::cuda::probe().map_or(0, |driver| driver.devices[0].memory);
    if weights > memory / 10 * 9 {
        return Err(Error::OutOfMemory {
            what: "weights on the CUDA device".into(),
            requested: weights,
            available: memory,
        });
    }
    Ok(())
}
#[cfg(not(feature = "cuda"))]
fn fits(_: &Path, _: &LoadOptions) -> Result<()> {
    Ok(())
}

/// What a loaded model says of its device.
pub(super) struct Machine {
    pub(super) device: String,
    pub(super) isa: String,
    pub(super) threads: usize,
    /// Bytes that keys and values may take unless that is said; of the CPU the budget says it.
    pub(super) free: u64,
}

pub(super) fn cpu(cpu: &Cpu) -> Machine {
    Machine {
        device: "cpu".into(),
        isa: cpu.kernels().name().into(),
        threads: cpu.threads(),
        free: 0,
    }
}

#[cfg(feature = "cuda")]
pub(super) fn cuda(cuda: &crate::backend::cuda::Cuda) -> Machine {
    use crate::backend::Backend;
    let info = cuda.info();
    let (major, minor) = info.capability;
    let (free, total) = cuda.memory();
    Machine {
        device: format!("cuda:{}", info.ordinal),
        isa: format!("sm_{major}{minor}"),
        threads: cuda.packer().threads(),
        // Room for activations and for others.
        free: free.saturating_sub((512 << 20).max(total / 20)),
    }
}

/// The CUDA devices that kernels run on (ordinal, name, compute capability, bytes), and if there are none why.
#[pyfunction]
pub(super) fn cuda_devices() -> (Vec<(i32, String, String, u64)>, String) {
    if let Err(why) = available() {
        return (Vec::new(), why.to_string());
    }
    #[cfg(feature = "cuda")]
    if let Ok(driver) = crate::backend::cuda::probe() {
        let device = |d: &crate::backend::cuda::DeviceInfo| {
            let capability = format!("{}.{}", d.capability.0, d.capability.1);
            (d.ordinal, d.name.clone(), capability, d.memory)
        };
        return (driver.devices.iter().map(device).collect(), String::new());
    }
    (Vec::new(), String::new())
}

/// Microseconds of samples of a product on a CUDA device, and the bytes of its matrix; with `form` "copy" of a copy of
/// `n` bytes. For `benches/gpu.py`.
#[pyfunction]
pub(super) fn cuda_time(
    py: Python<'_>,
    form: &str,
    n: usize,
    k: usize,
    tokens: usize,
    sets: usize,
    samples: usize,
) -> PyResult<(Vec<f32>, usize)> {
    #[cfg(feature = "cuda")]
    let time = || {
        available()?;
        let cuda = crate::backend::cuda::Cuda::new(None, Cpu::new(1, None)?)?;
        if form == "copy" {
            return Ok((cuda.time_copy(n, samples)?, n));
        }
        use crate::backend::Form;
        let forms = [Form::Q4, Form::Q8, Form::Bf16, Form::F16, Form::F32];
        let known = forms.into_iter().find(|known| known.name() == form);
        let known =
            known.ok_or_else(|| Error::parameter("form", form, "a form that runs on CUDA"))?;
        if n == 0 || k == 0 || tokens == 0 || sets == 0 {
            return Err(Error::parameter("shape", 0, "at least 1"));
        }
        cuda.time_product(known, [n, k, tokens], sets, samples)
    };
    #[cfg(not(feature = "cuda"))]
    let time = || {
        let _ = (form, n, k, tokens, sets, samples);
        available().map(|()| (Vec::new(), 0))
    };
    py.detach(time).map_err(super::raise(py))
}
