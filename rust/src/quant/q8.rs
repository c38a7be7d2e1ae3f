//! The int8 form.

use super::{BLOCK, MAX, TINY, amax};

/// One row's next [`BLOCK`] weights: `w[k] = d * q[k]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockQ8 {
    /// Scale.
    pub d: f32,
    /// Values in -127..=127.
    pub q: [i8; BLOCK],
}

impl BlockQ8 {
    /// All weights zero.
    pub const ZERO: BlockQ8 = BlockQ8 { d: 0.0, q: [0; BLOCK] };

    /// Rounds to nearest (ties to even) with `d = amax / 127`. `x` holds at most [`BLOCK`] finite
    /// weights; missing ones are zero.
    #[inline(always)] // so that `kernels` compiles it for each instruction set
    pub fn quantize(x: &[f32]) -> BlockQ8 {
        let m = amax(x);
        if m < TINY {
            return BlockQ8::ZERO;
        }
        let inv = MAX / m;
        let mut q = [0i8; BLOCK];
        for (q, &x) in q.iter_mut().zip(x) {
            *q = (x * inv).round_ties_even() as i8;
        }
        BlockQ8 { d: m / MAX, q }
    }

    /// The weights as f32.
    pub fn dequantize(&self) -> [f32; BLOCK] {
        self.q.map(|q| self.d * f32::from(q))
    }
}
