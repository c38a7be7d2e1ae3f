//! How long products take on a device, by its own clock. For `benches/gpu.py`; nothing else calls it.

use super::device::Memory;
use super::{Buf, Cuda, Into, Mat, pack};
use crate::Result;
use crate::backend::Form;

impl Cuda {
    /// Microseconds of one product of `tokens` rows with an `[n, k]` matrix, and the bytes of the matrix: for each of
    /// `samples` the mean over `sets` different matrices, which together should be several times the cache. The numbers
    /// are random.
    pub fn time_product(
        &self,
        form: Form,
        [n, k, tokens]: [usize; 3],
        sets: usize,
        samples: usize,
    ) -> Result<(Vec<f32>, usize)> {
        let bytes = pack::bytes(form, n, k).unwrap_or(0);
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        let numbers: Vec<u8> = (0..bytes).map(|_| next()).collect();
        let x: Vec<f32> = (0..tokens * k).map(|_| f32::from(next()) / 128.0 - 1.0).collect();
        let x = self.upload(&x, k);
        let mut mats = Vec::with_capacity(sets);
        for _ in 0..sets {
            let memory = self.device.alloc(bytes)?;
            self.device.upload(memory.at, &numbers);
            mats.push(Mat { form, n, k, memory });
        }
        let mut out = Buf::new(&self.device);
        let mut all = || {
            for w in &mats {
                self.product(w, None, &x, Into::Store, &mut out);
            }
        };
        // Twice before the clock runs: launch by launch, then as a graph.
        for _ in 0..2 {
            all();
            self.device.finish()?;
        }
        let mut times = Vec::with_capacity(samples);
        for _ in 0..samples {
            times.push(self.device.timed(&mut all)? * 1000.0 / sets as f32);
        }
        Ok((times, bytes))
    }

    /// Microseconds of copies of `bytes` on the device, each of which reads and writes them.
    pub fn time_copy(&self, bytes: usize, samples: usize) -> Result<Vec<f32>> {
        let (from, to): (Memory, Memory) = (self.device.alloc(bytes)?, self.device.alloc(bytes)?);
        self.device.clear(&from)?;
        let copy = || self.device.copy(to.at, from.at, bytes);
        copy();
        (0..samples).map(|_| Ok(self.device.timed(&mut || copy())? * 1000.0)).collect()
    }
}
