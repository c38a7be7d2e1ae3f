//! A matrix as a quantized safetensors checkpoint holds it: codes, and scales and zero points of groups of them.
//! `w[i][j] = scale * (code - zero)`. The files beside this one say what each format's bytes mean; here they become
//! f32, rounded once, or integers. Knows no file, no name; what it is made from has been checked.

use super::{
    BLOCK, BlockGrouped, BlockQ4, BlockQ8, GROUP, Grouped, Kept, MAX, Offset, Scales, TINY, TWICE,
    half_power,
};

/// A matrix of `k` columns, row-major.
#[derive(Clone, Copy, Debug)]
pub struct Encoded<'a> {
    /// Columns.
    pub k: usize,
    /// The number (row * k + column) that [`Encoded::decode`] calls 0.
    pub first: usize,
    pub(super) codes: Codes<'a>,
    pub(super) groups: Groups<'a>,
    pub(super) scales: Scaling<'a>,
    pub(super) zeros: Zeros<'a>,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Codes<'a> {
    /// Unsigned integers.
    Words(Words<'a>),
    /// Signed bytes, row-major.
    Int8(&'a [u8]),
    /// E4M3 (Micikevicius et al. 2022), row-major.
    Float8(&'a [u8]),
    /// E2M1, two in a byte, the first in the low nibble, row-major.
    Fp4(&'a [u8]),
    /// Two in a byte, the first in the high nibble, row-major; the f32 that each of 16 stands for.
    Nibbles(&'a [u8], &'a [u8]),
}

/// Unsigned integers of a few bits, several beside or below one another in a 32-bit word: integer `(i, j)` is in word
/// `(i >> tall) * down + (j >> wide) * right`, at bit `shifts[i % 2^tall + j % 2^wide]`; `tall` or `wide` is 0.
#[derive(Clone, Copy, Debug)]
pub(super) struct Words<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) bits: u32,
    pub(super) shifts: [u8; 8],
    pub(super) tall: u32,
    pub(super) down: usize,
    pub(super) wide: u32,
    pub(super) right: usize,
}

impl Words<'_> {
    /// The first in the lowest bits.
    pub(super) fn ascending(bits: u32) -> [u8; 8] {
        std::array::from_fn(|slot| (slot as u32 * bits % 32) as u8)
    }

    /// Calls `each` with integers `(i, j)`, `(i, j + 1)`, ... for each place of `out`.
    #[inline(always)]
    fn read<T>(&self, i: usize, j: usize, out: &mut [T], each: impl Fn(i32) -> T) {
        let words = self.bytes.as_chunks::<4>().0;
        let (row, above) = ((i >> self.tall) * self.down, i & ((1 << self.tall) - 1));
        let (mask, before) = ((1 << self.bits) - 1, (1 << self.wide) - 1);
        for (j, out) in (j..).zip(out) {
            let word = u32::from_le_bytes(words[row + (j >> self.wide) * self.right]);
            *out = each((word >> self.shifts[above + (j & before)] & mask) as i32);
        }
    }

    fn get(&self, i: usize, j: usize) -> i32 {
        let mut out = [0];
        self.read(i, j, &mut out, |q| q);
        out[0]
    }
}

/// Which columns share a scale and a zero point.
#[derive(Clone, Copy, Debug)]
pub enum Groups<'a> {
    /// So many side by side; where a format counts through rows, also numbers of all rows.
    Even(usize),
    /// The group of each column, i32.
    Of(&'a [u8]),
}

impl Groups<'_> {
    /// The group of column `j`, and how many columns from there on are in it: at most `most`.
    fn run(&self, j: usize, most: usize) -> (usize, usize) {
        match *self {
            Groups::Even(size) => (j / size, most.min(size - j % size)),
            Groups::Of(bytes) => {
                let of = &bytes.as_chunks::<4>().0[j..];
                let len = of.iter().take(most).take_while(|&g| *g == of[0]).count();
                (u32::from_le_bytes(of[0]) as usize, len)
            }
        }
    }
}

/// Floats of a tensor.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub enum Floats<'a> {
    F32(&'a [u8]),
    F16(&'a [u8]),
    Bf16(&'a [u8]),
    /// E4M3.
    Float8(&'a [u8]),
    /// E8M0: the exponent of a power of two, `2^(x - 127)`.
    Power(&'a [u8]),
    /// Codes for f32 of a map, each times the f32 of its `every` neighbours, plus an offset: a second quantization.
    Nested {
        codes: &'a [u8],
        map: &'a [u8],
        scales: &'a [u8],
        every: usize,
        offset: f32,
    },
}

impl Floats<'_> {
    fn get(&self, at: usize) -> f32 {
        let f32_at = |bytes: &[u8], at: usize| f32::from_le_bytes(bytes.as_chunks::<4>().0[at]);
        match *self {
            Floats::F32(bytes) => f32_at(bytes, at),
            Floats::F16(bytes) => half::f16::from_le_bytes(bytes.as_chunks::<2>().0[at]).to_f32(),
            Floats::Bf16(bytes) => half::bf16::from_le_bytes(bytes.as_chunks::<2>().0[at]).to_f32(),
            Floats::Float8(bytes) => super::float8::E4M3[usize::from(bytes[at])],
            Floats::Power(bytes) if bytes[at] == 255 => f32::NAN,
            Floats::Power(bytes) => 2.0 * half_power(bytes[at]),
            Floats::Nested { codes, map, scales, every, offset } => {
                f32_at(map, usize::from(codes[at])) * f32_at(scales, at / every) + offset
            }
        }
    }
}

/// The scale of row `i` and group `g` is float `i / rows * down + g * right`, times `times`.
#[derive(Clone, Copy, Debug)]
pub struct Scaling<'a> {
    /// The floats.
    pub floats: Floats<'a>,
    /// Rows that share one.
    pub rows: usize,
    /// From one to the one below it.
    pub down: usize,
    /// From one to that of the next group.
    pub right: usize,
    /// See above.
    pub times: f32,
}

impl Scaling<'_> {
    /// The bits of the scale of row `i` and group `g` as a grouped form has them.
    fn bits(&self, i: usize, g: usize) -> u16 {
        let at = i / self.rows * self.down + g * self.right;
        match self.floats {
            Floats::F16(bytes) | Floats::Bf16(bytes) => {
                u16::from_le_bytes(bytes.as_chunks::<2>().0[at])
            }
            Floats::Power(bytes) => u16::from(bytes[at]),
            // NVFP4's codes are twice their values, its scales f16.
            Floats::Float8(_) => half::f16::from_f32(0.5 * self.get(i, g)).to_bits(),
            Floats::F32(_) | Floats::Nested { .. } => 0,
        }
    }

    fn get(&self, i: usize, g: usize) -> f32 {
        self.floats.get(i / self.rows * self.down + g * self.right) * self.times
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Zeros<'a> {
    /// The same everywhere.
    All(i32),
    /// Packed like codes, at (row, group), and this more.
    Words(Words<'a>, i32),
    /// Signed bytes, where the scales are.
    Int8(&'a [u8]),
}

impl<'a> Zeros<'a> {
    /// `words` and `more`, or what they all are: symmetric formats spell it out.
    pub(super) fn of(words: Words<'a>, more: i32) -> Zeros<'a> {
        let first = words.bytes.first().copied().unwrap_or_default();
        let whole = words.bits == 8 || first >> 4 == first & 15;
        match whole && words.bytes.iter().all(|&byte| byte == first) {
            true => Zeros::All((i32::from(first) & ((1 << words.bits) - 1)) + more),
            false => Zeros::Words(words, more),
        }
    }
}

impl Encoded<'_> {
    /// Row, column.
    fn place(&self, at: usize) -> (usize, usize) {
        let at = self.first + at;
        (at / self.k, at % self.k)
    }

    fn zero(&self, i: usize, g: usize) -> i32 {
        match self.zeros {
            Zeros::All(zero) => zero,
            Zeros::Words(words, more) => words.get(i, g) + more,
            Zeros::Int8(bytes) => {
                let Scaling { rows, down, right, .. } = self.scales;
                i32::from(bytes[i / rows * down + g * right] as i8)
            }
        }
    }

    /// Numbers `at..`, all of one row.
    pub fn decode(&self, at: usize, mut out: &mut [f32]) {
        let (i, mut j) = self.place(at);
        while !out.is_empty() {
            let (g, len) = self.groups.run(j, out.len());
            let (now, rest) = out.split_at_mut(len);
            let scale = self.scales.get(i, g);
            let bytes = i * self.k + j;
            match self.codes {
                Codes::Words(words) => {
                    let zero = self.zero(i, g);
                    words.read(i, j, now, |q| scale * (q - zero) as f32);
                }
                Codes::Int8(codes) => {
                    let zero = self.zero(i, g);
                    for (w, &q) in now.iter_mut().zip(&codes[bytes..]) {
                        *w = scale * (i32::from(q as i8) - zero) as f32;
                    }
                }
                Codes::Float8(codes) => {
                    for (w, &q) in now.iter_mut().zip(&codes[bytes..]) {
                        *w = scale * super::float8::E4M3[usize::from(q)];
                    }
                }
                Codes::Fp4(codes) => {
                    for (at, w) in (bytes..).zip(now) {
                        let q = codes[at / 2] >> (4 * (at % 2)) & 15;
                        *w = scale * (0.5 * f32::from(TWICE[usize::from(q)]));
                    }
                }
                Codes::Nibbles(codes, map) => {
                    let map = map.as_chunks::<4>().0;
                    for (at, w) in (bytes..).zip(now) {
                        let q = codes[at / 2] >> (4 * (1 - at % 2)) & 15;
                        *w = scale * f32::from_le_bytes(map[usize::from(q)]);
                    }
                }
            }
            out = rest;
            j += len;
        }
    }

    /// How many inputs, counted from a multiple of that, always share a scale; all of a row: [`BLOCK`] or more.
    fn shared(&self) -> usize {
        match self.groups {
            Groups::Even(size) if size >= self.k => BLOCK,
            Groups::Even(size) => size,
            Groups::Of(_) => 1,
        }
    }

    /// The form that it is kept in where no other is asked for.
    pub fn kept(&self) -> Kept {
        match self.fits_grouped() {
            _ if self.fits_q4() => Kept::Q4,
            Some(how) => Kept::Grouped(how),
            None => Kept::Q8,
        }
    }

    /// Whether [`Encoded::kept`] holds a grouped form exactly: not scales that are products, rounded to f16.
    pub fn is_exact(&self) -> bool {
        !matches!(self.scales.floats, Floats::Float8(_))
    }

    /// The grouped form that holds it exactly ([`Encoded::is_exact`]), if there is one: for 4-bit integers with scales
    /// of groups of 32, of f16 or bfloat16; for MXFP4; and for NVFP4.
    fn fits_grouped(&self) -> Option<Grouped> {
        let size = match self.groups {
            Groups::Even(size) => size.min(self.k),
            Groups::Of(_) => return None,
        };
        if let (Codes::Fp4(_), Floats::Float8(_)) = (self.codes, self.scales.floats) {
            let whole = size == Grouped::NVFP4.group && self.k.is_multiple_of(size);
            return whole.then_some(Grouped::NVFP4);
        }
        let divides = |group: &usize| size.is_multiple_of(*group) && self.k.is_multiple_of(*group);
        let group = [128, 64, GROUP].into_iter().find(divides)?;
        if let (Codes::Fp4(_), Floats::Power(_)) = (self.codes, self.scales.floats) {
            return (group == GROUP).then_some(Grouped::MXFP4);
        }
        let scales = match self.scales {
            Scaling { times: 1.0, floats: Floats::F16(_), .. } => Scales::F16,
            Scaling { times: 1.0, floats: Floats::Bf16(_), .. } => Scales::Bf16,
            _ => return None,
        };
        let offset = match self.zeros {
            Zeros::All(8) => Offset::Signed,
            _ => Offset::Zero,
        };
        let four = matches!(self.codes, Codes::Words(Words { bits: 4, .. }));
        four.then_some(Grouped { codes: super::Codes::Linear(offset), scales, group })
    }

    /// `len` numbers from `at` on, of one block, if [`Encoded::kept`] is a grouped form.
    pub fn grouped(&self, at: usize, len: usize) -> BlockGrouped {
        let (i, j) = self.place(at);
        let mut block = BlockGrouped::ZERO;
        match self.codes {
            Codes::Words(words) => words.read(i, j, &mut block.q[..len], |q| q as u8),
            Codes::Fp4(codes) => {
                for (at, q) in (i * self.k + j..).zip(&mut block.q[..len]) {
                    *q = codes[at / 2] >> (4 * (at % 2)) & 15;
                }
            }
            _ => {}
        }
        let unit = self.fits_grouped().map_or(GROUP, Grouped::unit);
        for (n, (s, o)) in block.s.iter_mut().zip(&mut block.o).enumerate() {
            if n * unit < len {
                let g = self.groups.run(j + n * unit, 1).0;
                *s = self.scales.bits(i, g);
                *o = -self.zero(i, g) as u16;
            }
        }
        block
    }

    /// Whether [`BlockQ4`] holds it exactly: 4-bit integers with one scale for each [`BLOCK`] of a row.
    pub fn fits_q4(&self) -> bool {
        matches!(self.codes, Codes::Words(Words { bits: 4, .. }))
            && self.shared().is_multiple_of(BLOCK)
    }

    /// Whether [`BlockQ8`] holds it exactly, but for weights of -128: integers with one scale for each [`BLOCK`] of a
    /// row, around zero.
    pub fn fits_q8(&self) -> bool {
        let small = match (self.codes, self.zeros) {
            (Codes::Words(words), Zeros::All(zero)) => zero == 1 << (words.bits - 1),
            (Codes::Words(words), _) => words.bits == 4,
            (Codes::Int8(_), zeros) => matches!(zeros, Zeros::All(0)),
            _ => false,
        };
        small && self.shared().is_multiple_of(BLOCK)
    }

    /// A block's scale; `None` if it is not finite. One so small that the block is zero is 0, see [`TINY`].
    fn scale(&self, i: usize, j: usize) -> Option<f32> {
        let scale = self.scales.get(i, self.groups.run(j, 1).0);
        scale.is_finite().then_some(if scale.abs() * MAX < TINY { 0.0 } else { scale })
    }

    /// `len` numbers from `at` on, of one block, if [`Encoded::fits_q4`]; `None`: the scale is not finite.
    pub fn q4(&self, at: usize, len: usize) -> Option<BlockQ4> {
        let (i, j) = self.place(at);
        let mut block = BlockQ4 { d: self.scale(i, j)?, ..BlockQ4::ZERO };
        if let Codes::Words(words) = self.codes {
            words.read(i, j, &mut block.q[..len], |q| q as u8);
        }
        block.mn = [self.zero(i, self.groups.run(j, 1).0) as i8; 8];
        Some(block)
    }

    /// The same for [`BlockQ8`]. A weight of -128 becomes -127.
    pub fn q8(&self, at: usize, len: usize) -> Option<BlockQ8> {
        let (i, j) = self.place(at);
        let mut block = BlockQ8 { d: self.scale(i, j)?, ..BlockQ8::ZERO };
        let zero = self.zero(i, self.groups.run(j, 1).0);
        let out = &mut block.q[..len];
        match self.codes {
            Codes::Words(words) => words.read(i, j, out, |q| (q - zero).max(-127) as i8),
            Codes::Int8(bytes) => {
                for (out, &q) in out.iter_mut().zip(&bytes[i * self.k + j..]) {
                    *out = (q as i8).max(-127);
                }
            }
            _ => {}
        }
        Some(block)
    }
}

#[cfg(test)]
mod tests;
