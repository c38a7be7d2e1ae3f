//! MXFP4 (OCP Microscaling Formats 1.0): 4.25 bits a weight. Kept as it comes, never made from floats.

use super::{BLOCK, GROUPS};

/// One row's next [`BLOCK`] weights: `w[k] = TWICE[q[k]] / 2 * scale(e[k / 32])`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockMxfp4 {
    /// Exponent of each group.
    pub e: [u8; GROUPS],
    /// One E2M1 code in each byte.
    pub q: [u8; BLOCK],
}

/// Twice the value of each E2M1 code: a sign bit, two bits of exponent, one of mantissa.
pub const TWICE: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

impl BlockMxfp4 {
    /// The exponent that stands for "not a number".
    pub const NAN: u8 = 255;
    /// All weights zero.
    pub const ZERO: BlockMxfp4 = BlockMxfp4 { e: [0; GROUPS], q: [0; BLOCK] };

    /// `2^(e - 127)`. The least of them, for `e = 0`, is 0 here: no sum would notice.
    #[inline(always)]
    pub fn scale(e: u8) -> f32 {
        f32::from_bits(u32::from(e) << 23)
    }

    /// The weights as f32.
    pub fn dequantize(&self) -> [f32; BLOCK] {
        std::array::from_fn(|k| {
            f32::from(TWICE[usize::from(self.q[k])]) * 0.5 * BlockMxfp4::scale(self.e[k / 32])
        })
    }
}
