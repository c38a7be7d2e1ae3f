//! What the inputs of matrices look like: sums for the calibration of a quantizer. Costs a comparison where nobody asks.

use super::memory::{Disjoint, Line};
use super::product::Job;
use super::{Buf, Cpu, Mat};
use crate::kernels::Form;
use crate::kernels::layout::ROWS;
use std::collections::HashMap;
use std::sync::Mutex;

/// For each matrix of `k` inputs the sum over positions of `x x^T`, `[k][k]`: on and above the diagonal, what is below it
/// is not specified.
#[derive(Default)]
pub struct Inputs(HashMap<usize, Vec<f32>>);

impl Inputs {
    /// Of matrix `w`; `None` if nothing met it.
    pub fn take(&mut self, w: usize) -> Option<Vec<f32>> {
        self.0.remove(&w).filter(|sums| !sums.is_empty())
    }
}

impl Mat {
    /// What tells this matrix from others while it lives.
    pub fn id(&self) -> usize {
        self.bytes().as_ptr().addr()
    }
}

impl Cpu {
    /// From now on sums the inputs of these matrices that whole rows meet.
    pub fn watch_inputs(&mut self, of: impl Iterator<Item = usize>) {
        self.inputs = Some(Mutex::new(Inputs(of.map(|w| (w, Vec::new())).collect())));
    }

    /// The sums so far; no more are made.
    pub fn take_inputs(&mut self) -> Inputs {
        let inputs = self.inputs.take().unwrap_or_default();
        inputs.into_inner().unwrap_or_else(|e| e.into_inner())
    }

    /// Adds the rows of `jobs`.
    pub(super) fn sum_inputs(&self, jobs: &[Job<'_>], x: &Buf) {
        let Some(inputs) = &self.inputs else { return };
        let mut inputs = inputs.lock().unwrap_or_else(|e| e.into_inner());
        let k = x.width;
        for job in jobs {
            let (Some(sums), m) = (inputs.0.get_mut(&job.w.id()), job.rows.len()) else { continue };
            sums.resize(k * k, 0.0);
            // `x^T x` is a product of 16 columns of x, which are packed as they lie, with all columns before them.
            let blocks = k.div_ceil(ROWS);
            let mut columns = vec![0.0f32; k * m];
            for (t, r) in job.rows.clone().enumerate() {
                for (i, &x) in x.row(r).iter().enumerate() {
                    columns[i * m + t] = x;
                }
            }
            let sums = Disjoint::new(sums);
            self.each(blocks, 1, |block| {
                let first = block * ROWS;
                let n = ROWS.min(k - first);
                let mut packed = vec![Line::ZERO; m];
                for (packed, r) in packed.iter_mut().zip(job.rows.clone()) {
                    packed.0[..n].copy_from_slice(&x.row(r)[first..first + n]);
                }
                let mut products = vec![0.0; (first + n) * ROWS];
                let (packed, with) = (Line::bytes(&packed), &columns[..(first + n) * m]);
                self.kernels.gemm_float(Form::F32, packed, m, with, &mut products);
                for (i, products) in products.chunks_exact(ROWS).enumerate() {
                    // SAFETY: these columns of all rows are claimed by one thread.
                    let sums = unsafe { sums.part(i * k + first..i * k + first + n) };
                    for (sum, product) in sums.iter_mut().zip(products) {
                        *sum += product;
                    }
                }
            });
        }
    }
}
