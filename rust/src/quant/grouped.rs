//! The grouped forms: codes of 4 to 6 bits with a floating-point scale for each group of inputs, as checkpoints have
//! them. Kept as they come; [`Grouped::INT5`] and [`Grouped::INT6`] are made from floats, too (`feedback.rs`).
//!
//! In group `g` of a row, `w[k] = s[g] * T[q[k]] + o[g]`. What `T` is, how `s` and `o` are stored and how long a
//! group is, [`Grouped`] says for a whole matrix.

use super::{BLOCK, GROUP};
use half::{bf16, f16};

/// How the weights of a matrix are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Grouped {
    /// What codes stand for.
    pub codes: Codes,
    /// What scales, and minima, are stored as.
    pub scales: Scales,
    /// Inputs that share a scale: 16, 32, 64 or 128.
    pub group: usize,
}

/// What codes stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codes {
    /// Themselves, moved by an offset.
    Linear(Offset),
    /// The same, with 5 bits.
    Linear5(Offset),
    /// The same, with 6 bits.
    Linear6(Offset),
    /// [`UNEVEN`], without an offset.
    Uneven,
    /// [`TWICE`], without an offset.
    Fp4,
}

/// The offset `o` of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Offset {
    /// As much as makes the codes signed: `-8 s`, or `-16 s`, or `-32 s`.
    Signed,
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

impl Grouped {
    /// ggml's Q4_0.
    pub const Q4_0: Grouped = Grouped::ggml(Codes::Linear(Offset::Signed), Scales::F16, 32);
    /// ggml's Q4_1.
    pub const Q4_1: Grouped = Grouped::ggml(Codes::Linear(Offset::Min), Scales::F16, 32);
    /// ggml's Q5_0.
    pub const Q5_0: Grouped = Grouped::ggml(Codes::Linear5(Offset::Signed), Scales::F16, 32);
    /// ggml's Q5_1.
    pub const Q5_1: Grouped = Grouped::ggml(Codes::Linear5(Offset::Min), Scales::F16, 32);
    /// ggml's Q2_K, its codes in 4 bits.
    pub const Q2_K: Grouped = Grouped::ggml(Codes::Linear(Offset::Min), Scales::Integer, 16);
    /// ggml's Q3_K, its codes in 4 bits.
    pub const Q3_K: Grouped = Grouped::ggml(Codes::Linear(Offset::Signed), Scales::Integer, 16);
    /// ggml's Q4_K.
    pub const Q4_K: Grouped = Grouped::ggml(Codes::Linear(Offset::Min), Scales::Integer, 32);
    /// ggml's Q5_K.
    pub const Q5_K: Grouped = Grouped::ggml(Codes::Linear5(Offset::Min), Scales::Integer, 32);
    /// ggml's Q6_K.
    pub const Q6_K: Grouped = Grouped::ggml(Codes::Linear6(Offset::Signed), Scales::Integer, 16);
    /// ggml's IQ4_NL.
    pub const IQ4_NL: Grouped = Grouped::ggml(Codes::Uneven, Scales::F16, 32);
    /// ggml's IQ4_XS.
    pub const IQ4_XS: Grouped = Grouped::ggml(Codes::Uneven, Scales::Integer, 32);
    /// MXFP4 (OCP Microscaling Formats 1.0).
    pub const MXFP4: Grouped = Grouped::ggml(Codes::Fp4, Scales::Power, 32);
    /// NVFP4.
    pub const NVFP4: Grouped = Grouped::ggml(Codes::Fp4, Scales::F16, 16);

    /// Signed codes of 5 bits, 5.375 bits a weight: what `int5` means.
    pub const INT5: Grouped = Grouped::ggml(Codes::Linear5(Offset::Signed), Scales::Integer, 32);
    /// Signed codes of 6 bits, 6.625 bits a weight: what `int6` means.
    pub const INT6: Grouped = Grouped::Q6_K;

    const fn ggml(codes: Codes, scales: Scales, group: usize) -> Grouped {
        Grouped { codes, scales, group }
    }

    /// `T`, where codes do not stand for themselves.
    pub fn table(self) -> Option<&'static [i8; 16]> {
        match self.codes {
            Codes::Linear(_) | Codes::Linear5(_) | Codes::Linear6(_) => None,
            Codes::Uneven => Some(&UNEVEN),
            Codes::Fp4 => Some(&TWICE),
        }
    }

    /// What a code stands for.
    pub fn value(self, code: u8) -> i8 {
        self.table().map_or(code as i8, |table| table[usize::from(code)])
    }

    /// The offset, where codes stand for themselves.
    pub fn offset(self) -> Option<Offset> {
        match self.codes {
            Codes::Linear(offset) | Codes::Linear5(offset) | Codes::Linear6(offset) => Some(offset),
            Codes::Uneven | Codes::Fp4 => None,
        }
    }

    /// Bits of a code beyond 4.
    pub fn high(self) -> usize {
        match self.codes {
            Codes::Linear(_) | Codes::Uneven | Codes::Fp4 => 0,
            Codes::Linear5(_) => 1,
            Codes::Linear6(_) => 2,
        }
    }

    /// What [`Offset::Signed`] is times the scale.
    pub fn signed(self) -> i8 {
        -8 << self.high()
    }

    /// Inputs that have an exact integer: a group, or 32 of it.
    pub fn unit(self) -> usize {
        self.group.min(GROUP)
    }

    /// Groups of a block.
    pub fn groups(self) -> usize {
        BLOCK / self.group
    }

    /// What holds weights of both exactly, as files mix types: that with the more bits, stored offsets and the shorter
    /// groups. Both have linear codes and the same scales, f16 or integers.
    pub fn join(self, other: Grouped) -> Option<Grouped> {
        let can = |how: Grouped| {
            matches!(how.offset(), Some(Offset::Signed | Offset::Min))
                && matches!(how.scales, Scales::F16 | Scales::Integer)
        };
        if self.scales != other.scales || !can(self) || !can(other) {
            return None;
        }
        let codes = match self.high().max(other.high()) {
            0 => Codes::Linear(Offset::Min),
            1 => Codes::Linear5(Offset::Min),
            _ => Codes::Linear6(Offset::Min),
        };
        Some(Grouped { codes, scales: self.scales, group: self.group.min(other.group) })
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

/// Most units of a block.
pub const UNITS: usize = BLOCK / 16;

/// One row's next [`BLOCK`] weights, as [`Grouped`] says. Scales and offsets are as stored, of each unit of 32 inputs (in
/// a longer group all are alike) or 16. Integers are two's complement in the low byte.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockGrouped {
    /// Bits of the f16 that integer scales are times.
    pub d: u16,
    /// Bits of the f16 that integer minima are times.
    pub e: u16,
    /// Scales.
    pub s: [u16; UNITS],
    /// Offsets, if they are stored.
    pub o: [u16; UNITS],
    /// One code in each byte.
    pub q: [u8; BLOCK],
}

impl BlockGrouped {
    /// All weights zero.
    pub const ZERO: BlockGrouped =
        BlockGrouped { d: 0, e: 0, s: [0; UNITS], o: [0; UNITS], q: [0; BLOCK] };
    /// The exponent that stands for "not a number" among [`Scales::Power`].
    pub const NAN: u16 = 255;

    /// `s` of unit `u`.
    pub fn scale(&self, how: Grouped, u: usize) -> f32 {
        how.number(self.s[u], self.d)
    }

    /// `o` of unit `u`.
    pub fn offset(&self, how: Grouped, u: usize) -> f32 {
        match how.offset() {
            None => 0.0,
            Some(Offset::Signed) => f32::from(how.signed()) * self.scale(how, u),
            Some(Offset::Zero) => f32::from(self.o[u] as i8) * self.scale(how, u),
            Some(Offset::Min) => how.number(self.o[u], self.e),
        }
    }

    /// The same weights in a form that [`Grouped::join`] gave for theirs.
    pub fn joined(self, from: Grouped, to: Grouped) -> BlockGrouped {
        if from == to {
            return self;
        }
        // Times a power of two; what is then too large for an f16 becomes infinite.
        let signed =
            |x: u16| f16::from_f32(f16::from_bits(x).to_f32() * f32::from(from.signed())).to_bits();
        let mut row = BlockGrouped { d: self.d, e: self.e, q: self.q, ..BlockGrouped::ZERO };
        let integer = from.scales == Scales::Integer;
        let min = from.offset() == Some(Offset::Min);
        if integer && !min {
            row.e = signed(self.d);
        }
        for u in 0..BLOCK / to.unit() {
            let own = u * to.unit() / from.unit();
            row.s[u] = self.s[own];
            row.o[u] = match (min, integer) {
                (true, _) => self.o[own],
                (false, true) => self.s[own],
                (false, false) => signed(self.s[own]),
            };
        }
        row
    }

    /// The weights as f32.
    pub fn dequantize(&self, how: Grouped) -> [f32; BLOCK] {
        let mut w = [0.0; BLOCK];
        for (u, w) in w.chunks_exact_mut(how.unit()).enumerate() {
            let (s, o) = (self.scale(how, u), self.offset(how, u));
            for (w, &q) in w.iter_mut().zip(&self.q[u * how.unit()..]) {
                *w = s * f32::from(how.value(q)) + o;
            }
        }
        w
    }

    /// The first input whose group has a scale or an offset that is not finite.
    pub fn not_finite(&self, how: Grouped) -> Option<usize> {
        let finite = |u| self.scale(how, u).is_finite() && self.offset(how, u).is_finite();
        (0..BLOCK / how.unit()).find(|&u| !finite(u)).map(|u| u * how.unit())
    }
}
