//! The grouped forms: 4-bit codes with a floating-point scale for each group of inputs, as checkpoints have them.
//! 4.125 to 5 bits a weight; kept as they come, never made from floats.
//!
//! In group `g` of a row, `w[k] = s[g] * T[q[k]] + o[g]`. What `T` is, how `s` and `o` are stored and how long a
//! group is, [`Grouped`] says for a whole matrix.

use super::{BLOCK, GROUP, GROUPS};
use half::{bf16, f16};

/// How the weights of a matrix are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Grouped {
    /// What codes stand for.
    pub codes: Codes,
    /// What scales, and minima, are stored as.
    pub scales: Scales,
    /// Inputs that share a scale: 32, 64 or 128.
    pub group: usize,
}

/// What codes stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codes {
    /// Themselves, moved by an offset.
    Linear(Offset),
    /// [`UNEVEN`], without an offset.
    Uneven,
    /// [`TWICE`], without an offset.
    Fp4,
}

/// The offset `o` of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Offset {
    /// `-8 s`.
    Eight,
    /// `z s`, of a stored integer `z`: minus the zero point.
    Zero,
    /// Stored as the scale is.
    Min,
}

/// What scales and minima are stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scales {
    /// An f16.
    F16,
    /// A bfloat16.
    Bf16,
    /// An int8, times the f16 `d` (scales) or `e` (minima) of the block.
    Integer,
    /// The exponent of half a power of two: `2^(x - 128)`.
    Power,
}

/// What the codes of IQ4_NL and IQ4_XS stand for.
pub const UNEVEN: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
/// Twice the value of each E2M1 code: a sign bit, two bits of exponent, one of mantissa.
pub const TWICE: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];
const LINEAR: [i8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

impl Grouped {
    /// ggml's Q4_0.
    pub const Q4_0: Grouped = Grouped::ggml(Codes::Linear(Offset::Eight), Scales::F16);
    /// ggml's Q4_1.
    pub const Q4_1: Grouped = Grouped::ggml(Codes::Linear(Offset::Min), Scales::F16);
    /// ggml's Q4_K.
    pub const Q4_K: Grouped = Grouped::ggml(Codes::Linear(Offset::Min), Scales::Integer);
    /// ggml's IQ4_NL.
    pub const IQ4_NL: Grouped = Grouped::ggml(Codes::Uneven, Scales::F16);
    /// ggml's IQ4_XS.
    pub const IQ4_XS: Grouped = Grouped::ggml(Codes::Uneven, Scales::Integer);
    /// MXFP4 (OCP Microscaling Formats 1.0).
    pub const MXFP4: Grouped = Grouped::ggml(Codes::Fp4, Scales::Power);

    const fn ggml(codes: Codes, scales: Scales) -> Grouped {
        Grouped { codes, scales, group: GROUP }
    }

    /// `T`.
    pub fn table(self) -> &'static [i8; 16] {
        match self.codes {
            Codes::Linear(_) => &LINEAR,
            Codes::Uneven => &UNEVEN,
            Codes::Fp4 => &TWICE,
        }
    }

    /// Groups of a block.
    pub fn groups(self) -> usize {
        BLOCK / self.group
    }

    /// A scale from its bits; `d` is that of the block.
    fn number(self, bits: u16, d: u16) -> f32 {
        match self.scales {
            Scales::F16 => f16::from_bits(bits).to_f32(),
            Scales::Bf16 => bf16::from_bits(bits).to_f32(),
            Scales::Integer => f16::from_bits(d).to_f32() * f32::from(bits as i8),
            Scales::Power if bits == BlockGrouped::NAN => f32::NAN,
            Scales::Power => half_power(bits as u8),
        }
    }
}

/// `2^(e - 128)`.
#[inline(always)]
pub(crate) fn half_power(e: u8) -> f32 {
    let e = u32::from(e);
    // The smallest two are subnormal.
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (e - 1) << 23 })
}

/// One row's next [`BLOCK`] weights, as [`Grouped`] says. Scales and offsets are as stored, of each [`GROUP`] inputs:
/// in a longer group all are alike. Integers are two's complement in the low byte.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockGrouped {
    /// Bits of the f16 that integer scales are times.
    pub d: u16,
    /// Bits of the f16 that integer minima are times.
    pub e: u16,
    /// Scales.
    pub s: [u16; GROUPS],
    /// Offsets, if they are stored.
    pub o: [u16; GROUPS],
    /// One code in each byte.
    pub q: [u8; BLOCK],
}

impl BlockGrouped {
    /// All weights zero.
    pub const ZERO: BlockGrouped =
        BlockGrouped { d: 0, e: 0, s: [0; GROUPS], o: [0; GROUPS], q: [0; BLOCK] };
    /// The exponent that stands for "not a number" among [`Scales::Power`].
    pub const NAN: u16 = 255;

    /// `s` of group `g`.
    pub fn scale(&self, how: Grouped, g: usize) -> f32 {
        how.number(self.s[g], self.d)
    }

    /// `o` of group `g`.
    pub fn offset(&self, how: Grouped, g: usize) -> f32 {
        match how.codes {
            Codes::Linear(Offset::Eight) => -8.0 * self.scale(how, g),
            Codes::Linear(Offset::Zero) => f32::from(self.o[g] as i8) * self.scale(how, g),
            Codes::Linear(Offset::Min) => how.number(self.o[g], self.e),
            Codes::Uneven | Codes::Fp4 => 0.0,
        }
    }

    /// The weights as f32.
    pub fn dequantize(&self, how: Grouped) -> [f32; BLOCK] {
        std::array::from_fn(|k| {
            let w = self.scale(how, k / GROUP) * f32::from(how.table()[usize::from(self.q[k])]);
            w + self.offset(how, k / GROUP)
        })
    }

    /// The first input whose group has a scale or an offset that is not finite.
    pub fn not_finite(&self, how: Grouped) -> Option<usize> {
        let finite = |g| self.scale(how, g).is_finite() && self.offset(how, g).is_finite();
        (0..GROUPS).find(|&g| !finite(g)).map(|g| g * GROUP)
    }
}
