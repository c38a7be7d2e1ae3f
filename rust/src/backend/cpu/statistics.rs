//! What the inputs of matrices look like: sums for the calibration of a quantizer. Costs a comparison where nobody asks.

use super::memory::Disjoint;
use super::product::Job;
use super::{Buf, Cpu, Mat};
use crate::quant::BLOCK;
use std::collections::HashMap;
use std::sync::Mutex;

/// For each matrix the sum over positions of `x x^T`, of each [`BLOCK`] inputs by themselves: `[blocks][256][256]`.
#[derive(Default)]
pub struct Inputs(HashMap<usize, Vec<f32>>);

impl Inputs {
    /// Of matrix `w`; `None` if nothing met it.
    pub fn take(&mut self, w: usize) -> Option<Vec<f32>> {
        self.0.remove(&w)
    }
}

impl Mat {
    /// What tells this matrix from others while it lives.
    pub fn id(&self) -> usize {
        self.bytes().as_ptr().addr()
    }
}

impl Cpu {
    /// From now on sums the inputs of all matrices that whole rows meet.
    pub fn watch_inputs(&mut self) {
        self.inputs = Some(Mutex::default());
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
        for job in jobs {
            let blocks = x.width.div_ceil(BLOCK);
            let sums = inputs.0.entry(job.w.id()).or_default();
            sums.resize(blocks * BLOCK * BLOCK, 0.0);
            let sums = Disjoint::new(sums);
            // Rows of the sums are shared among the threads; positions ascend in each.
            self.each(blocks * BLOCK / 16, 1, |part| {
                let (b, first) = (part * 16 / BLOCK, part * 16 % BLOCK);
                let len = BLOCK.min(x.width - b * BLOCK);
                for i in first..len.min(first + 16) {
                    let at = (b * BLOCK + i) * BLOCK;
                    // SAFETY: each row is claimed by one thread.
                    let sum = unsafe { sums.part(at..at + len) };
                    for r in job.rows.clone() {
                        let x = &x.row(r)[b * BLOCK..][..len];
                        let xi = x[i];
                        for (sum, x) in sum.iter_mut().zip(x) {
                            *sum += xi * x;
                        }
                    }
                }
            });
        }
    }
}
