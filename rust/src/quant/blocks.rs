//! The blocks of ggml's quantized types, as GGUF files hold them: bytes -> f32, bit by bit what ggml's reference
//! (`gguf.quants.dequantize`) gives. Only reads them; knows no file.

use super::{BLOCK, BlockGrouped, BlockQ4, GROUPS, Grouped, TWICE, UNEVEN, grids, half_power};

/// The canonical form that a type of blocks is kept in where no other is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// [`BlockQ4`], exactly.
    Q4,
    /// [`BlockGrouped`], exactly.
    Grouped(Grouped),
    /// [`BlockQ8`](super::BlockQ8): no form holds it exactly, and this one nearly.
    Q8,
}

macro_rules! kept {
    (Q4) => {
        Kept::Q4
    };
    (Q8) => {
        Kept::Q8
    };
    ($how:ident) => {
        Kept::Grouped(Grouped::$how)
    };
}

macro_rules! blocks {
    ($($name:ident $ggml:literal $weights:literal $bytes:literal $decode:ident $kept:tt)*) => {
        /// A type of block.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(non_camel_case_types, missing_docs)] // ggml's own names
        pub enum Blocks { $($name),* }

        impl Blocks {
            /// Every type.
            pub const ALL: &[Blocks] = &[$(Blocks::$name),*];

            /// ggml's name.
            pub const fn name(self) -> &'static str {
                match self { $(Blocks::$name => stringify!($name)),* }
            }

            /// ggml's number.
            pub const fn ggml(self) -> u32 {
                match self { $(Blocks::$name => $ggml),* }
            }

            /// Weights of a block: a divisor of [`BLOCK`](super::BLOCK).
            pub const fn weights(self) -> usize {
                match self { $(Blocks::$name => $weights),* }
            }

            /// Bytes of a block.
            pub const fn bytes(self) -> usize {
                match self { $(Blocks::$name => $bytes),* }
            }

            /// The form that it is kept in.
            pub const fn kept(self) -> Kept {
                match self { $(Blocks::$name => kept!($kept)),* }
            }

            /// The weights of whole blocks.
            pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
                match self {
                    $(Blocks::$name => {
                        let blocks = bytes.as_chunks::<$bytes>().0;
                        for (block, out) in blocks.iter().zip(out.as_chunks_mut::<$weights>().0) {
                            $decode(block, out);
                        }
                    })*
                }
            }
        }
    };
}

// Name, ggml's number, weights of a block, its bytes, the function that reads it, the form that it is kept in.
blocks! {
    Q4_0 2 32 18 q4_0 Q4_0
    Q4_1 3 32 20 q4_1 Q4_1
    Q5_0 6 32 22 q5_0 Q5_0
    Q5_1 7 32 24 q5_1 Q5_1
    Q8_0 8 32 34 q8_0 Q8
    Q2_K 10 256 84 q2_k Q2_K
    Q3_K 11 256 110 q3_k Q3_K
    Q4_K 12 256 144 q4_k Q4_K
    Q5_K 13 256 176 q5_k Q5_K
    Q6_K 14 256 210 q6_k Q6_K
    IQ2_XXS 16 256 66 iq2_xxs Q8
    IQ2_XS 17 256 74 iq2_xs Q8
    IQ3_XXS 18 256 98 iq3_xxs Q8
    IQ1_S 19 256 50 iq1_s Q8
    IQ4_NL 20 32 18 iq4_nl IQ4_NL
    IQ3_S 21 256 110 iq3_s Q8
    IQ2_S 22 256 82 iq2_s Q8
    IQ4_XS 23 256 136 iq4_xs IQ4_XS
    IQ1_M 29 256 56 iq1_m Q8
    TQ1_0 34 256 54 tq1_0 Q4
    TQ2_0 35 256 66 tq2_0 Q4
    MXFP4 39 32 17 mxfp4 MXFP4
    NVFP4 40 64 36 nvfp4 NVFP4
}

fn u16_at(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([b[at], b[at + 1]])
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

fn f16_at(b: &[u8], at: usize) -> f32 {
    half::f16::from_bits(u16_at(b, at)).to_f32()
}

/// Nibble `i` of `b`, the low one of a byte first.
fn nibble(b: &[u8], i: usize) -> u8 {
    b[i / 2] >> (4 * (i % 2)) & 15
}

/// Code `i` of `bits` bits where `run` bytes hold the lowest bits of as many codes, then the next bits of the next.
fn code(b: &[u8], run: usize, bits: usize, i: usize) -> u8 {
    let (slot, within) = (i / run, i % run);
    let slots = 8 / bits;
    b[slot / slots * run + within] >> (bits * (slot % slots)) & ((1 << bits) - 1)
}

fn q4_0(b: &[u8; 18], out: &mut [f32; 32]) {
    let d = f16_at(b, 0);
    for (i, x) in out.iter_mut().enumerate() {
        *x = d * (f32::from(code(&b[2..], 16, 4, i)) - 8.0);
    }
}

fn q4_1(b: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (f16_at(b, 0), f16_at(b, 2));
    for (i, x) in out.iter_mut().enumerate() {
        *x = d * f32::from(code(&b[4..], 16, 4, i)) + m;
    }
}

fn q5_0(b: &[u8; 22], out: &mut [f32; 32]) {
    let (d, high) = (f16_at(b, 0), u32_at(b, 2));
    for (i, x) in out.iter_mut().enumerate() {
        let q = code(&b[6..], 16, 4, i) | ((high >> i & 1) as u8) << 4;
        *x = d * (f32::from(q) - 16.0);
    }
}

fn q5_1(b: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m, high) = (f16_at(b, 0), f16_at(b, 2), u32_at(b, 4));
    for (i, x) in out.iter_mut().enumerate() {
        let q = code(&b[8..], 16, 4, i) | ((high >> i & 1) as u8) << 4;
        *x = d * f32::from(q) + m;
    }
}

fn q8_0(b: &[u8; 34], out: &mut [f32; 32]) {
    let d = f16_at(b, 0);
    for (i, x) in out.iter_mut().enumerate() {
        *x = d * f32::from(b[2 + i] as i8);
    }
}

fn q2_k(b: &[u8; 84], out: &mut [f32; 256]) {
    let (d, dmin) = (f16_at(b, 80), f16_at(b, 82));
    for (g, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let (scale, min) = (d * f32::from(b[g] & 15), dmin * f32::from(b[g] >> 4));
        for (i, x) in out.iter_mut().enumerate() {
            *x = scale * f32::from(code(&b[16..], 32, 2, 16 * g + i)) - min;
        }
    }
}

fn q3_k_scale(b: &[u8], g: usize) -> i8 {
    // Six bits each: sixteen times four low ones, then four times two high ones in each of four bytes.
    let scale = code(&b[96..], 8, 4, g) | code(&b[104..], 4, 2, g) << 4;
    scale as i8 - 32
}

fn q3_k(b: &[u8; 110], out: &mut [f32; 256]) {
    let d = f16_at(b, 108);
    for (g, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = d * f32::from(q3_k_scale(b, g));
        for (i, x) in out.iter_mut().enumerate() {
            let i = 16 * g + i;
            // A clear mask bit subtracts 4.
            let q = code(&b[32..], 32, 2, i) | code(b, 32, 1, i) << 2;
            *x = scale * (f32::from(q) - 4.0);
        }
    }
}

/// Scale and minimum `g` of the eight that 12 bytes hold, six bits each.
fn scale_min(b: &[u8], g: usize) -> (u16, u16) {
    let (scale, min) = if g < 4 {
        (b[g] & 63, b[g + 4] & 63)
    } else {
        (b[g + 4] & 15 | b[g - 4] >> 6 << 4, b[g + 4] >> 4 | b[g] >> 6 << 4)
    };
    (u16::from(scale), u16::from(min))
}

fn q4_k(b: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (f16_at(b, 0), f16_at(b, 2));
    for (g, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = scale_min(&b[4..16], g);
        let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
        for (i, x) in out.iter_mut().enumerate() {
            *x = scale * f32::from(code(&b[16..], 32, 4, 32 * g + i)) - min;
        }
    }
}

fn q5_k(b: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin) = (f16_at(b, 0), f16_at(b, 2));
    for (g, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = scale_min(&b[4..16], g);
        let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
        for (i, x) in out.iter_mut().enumerate() {
            let i = 32 * g + i;
            let q = code(&b[48..], 32, 4, i) | code(&b[16..], 32, 1, i) << 4;
            *x = scale * f32::from(q) - min;
        }
    }
}

fn q6_k(b: &[u8; 210], out: &mut [f32; 256]) {
    let d = f16_at(b, 208);
    for (g, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = d * f32::from(b[192 + g] as i8);
        for (i, x) in out.iter_mut().enumerate() {
            let i = 16 * g + i;
            let q = code(b, 64, 4, i) | code(&b[128..], 32, 2, i) << 4;
            *x = scale * (f32::from(q) - 32.0);
        }
    }
}

/// Magnitudes of the 2-bit I-quants.
const MAGNITUDES: [f32; 4] = [8.0, 25.0, 43.0, 0.0];

/// Eight numbers of a codebook entry, times `scale`, with the signs that `signs` has bits for.
fn signed8(entry: u16, scale: f32, signs: u8, out: &mut [f32; 8]) {
    for (i, x) in out.iter_mut().enumerate() {
        let magnitude = scale * MAGNITUDES[usize::from(entry >> (2 * i) & 3)];
        *x = if signs >> i & 1 == 0 { magnitude } else { -magnitude };
    }
}

/// The eighth sign makes their number even.
fn eight_signs(seven: u32) -> u8 {
    let seven = (seven & 127) as u8;
    seven | (seven.count_ones() as u8 & 1) << 7
}

fn iq2_xxs(b: &[u8; 66], out: &mut [f32; 256]) {
    let d = f16_at(b, 0);
    for (g, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let signs = u32_at(b, 2 + 8 * g + 4);
        let scale = d * (0.5 + (signs >> 28) as f32) * 0.25;
        for (l, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let entry = grids::IQ2_XXS[usize::from(b[2 + 8 * g + l])];
            signed8(entry, scale, eight_signs(signs >> (7 * l)), out);
        }
    }
}

fn iq2_xs(b: &[u8; 74], out: &mut [f32; 256]) {
    let d = f16_at(b, 0);
    for (l, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let q = u16_at(b, 2 + 2 * l);
        let scale = d * (0.5 + f32::from(nibble(&b[66..], l / 2))) * 0.25;
        signed8(grids::IQ2_XS[usize::from(q & 511)], scale, eight_signs(u32::from(q >> 9)), out);
    }
}

fn iq2_s(b: &[u8; 82], out: &mut [f32; 256]) {
    let d = f16_at(b, 0);
    for (l, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let high = b[66 + l / 4] >> (2 * (l % 4)) & 3;
        let scale = d * (0.5 + f32::from(nibble(&b[74..], l / 2))) * 0.25;
        let entry = grids::IQ2_S[usize::from(b[2 + l]) | usize::from(high) << 8];
        signed8(entry, scale, b[34 + l], out);
    }
}

/// Four numbers of a codebook entry, times `scale`, with the signs that `signs` has bits for.
fn signed4(entry: u16, magnitudes: &[f32; 8], scale: f32, signs: u8, out: &mut [f32]) {
    for (i, x) in out.iter_mut().enumerate() {
        let magnitude = scale * magnitudes[usize::from(entry >> (4 * i) & 7)];
        *x = if signs >> i & 1 == 0 { magnitude } else { -magnitude };
    }
}

fn iq3_xxs(b: &[u8; 98], out: &mut [f32; 256]) {
    const MAGNITUDES: [f32; 8] = [4.0, 12.0, 20.0, 28.0, 36.0, 44.0, 52.0, 62.0];
    let d = f16_at(b, 0);
    for (l, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let signs = u32_at(b, 66 + l / 4 * 4);
        let scale = d * (0.5 + (signs >> 28) as f32) * 0.5;
        let signs = eight_signs(signs >> (7 * (l % 4)));
        for (h, out) in out.chunks_exact_mut(4).enumerate() {
            let entry = grids::IQ3_XXS[usize::from(b[2 + 2 * l + h])];
            signed4(entry, &MAGNITUDES, scale, signs >> (4 * h), out);
        }
    }
}

fn iq3_s(b: &[u8; 110], out: &mut [f32; 256]) {
    const MAGNITUDES: [f32; 8] = [1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0];
    let d = f16_at(b, 0);
    for (j, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        let scale = d * f32::from(1 + 2 * nibble(&b[106..], j / 8));
        let high = b[66 + j / 8] >> (j % 8) & 1;
        let entry = grids::IQ3_S[usize::from(b[2 + j]) | usize::from(high) << 8];
        signed4(entry, &MAGNITUDES, scale, b[74 + j / 2] >> (4 * (j % 2)), out);
    }
}

/// Eight of -1, 0, 1, moved by an eighth.
fn shifted(index: usize, scale: f32, down: bool, out: &mut [f32; 8]) {
    let (entry, shift) = (grids::IQ1[index], if down { -0.125 } else { 0.125 });
    for (i, x) in out.iter_mut().enumerate() {
        *x = scale * (f32::from(entry >> (2 * i) & 3) - 1.0 + shift);
    }
}

fn iq1_s(b: &[u8; 50], out: &mut [f32; 256]) {
    let d = f16_at(b, 0);
    for (l, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let high = u16_at(b, 34 + l / 4 * 2);
        let scale = d * f32::from(2 * (high >> 12 & 7) + 1);
        let index = usize::from(b[2 + l]) | usize::from(high >> (3 * (l % 4)) & 7) << 8;
        shifted(index, scale, high >> 15 == 1, out);
    }
}

fn iq1_m(b: &[u8; 56], out: &mut [f32; 256]) {
    let word = |i: usize| u16_at(b, 48 + 2 * i);
    // The f16 scale is spread over the highest nibbles of four words.
    let d = (0..4).fold(0, |d, i| d | word(i) >> 12 << (4 * i));
    let d = half::f16::from_bits(d).to_f32();
    for (l, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let scale = d * f32::from(2 * (word(l / 8) >> (3 * (l / 2 % 4)) & 7) + 1);
        let high = nibble(&b[32..], l);
        let index = usize::from(b[l]) | usize::from(high & 7) << 8;
        shifted(index, scale, high >> 3 == 1, out);
    }
}

fn iq4_nl(b: &[u8; 18], out: &mut [f32; 32]) {
    let d = f16_at(b, 0);
    for (i, x) in out.iter_mut().enumerate() {
        *x = d * f32::from(UNEVEN[usize::from(code(&b[2..], 16, 4, i))]);
    }
}

fn iq4_xs_scale(b: &[u8], g: usize) -> i8 {
    let scale = nibble(&b[4..], g) | ((u16_at(b, 2) >> (2 * g) & 3) as u8) << 4;
    scale as i8 - 32
}

fn iq4_xs(b: &[u8; 136], out: &mut [f32; 256]) {
    let d = f16_at(b, 0);
    for (g, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let scale = d * f32::from(iq4_xs_scale(b, g));
        for (i, x) in out.iter_mut().enumerate() {
            *x = scale * f32::from(UNEVEN[usize::from(code(&b[8 + 16 * g..], 16, 4, i))]);
        }
    }
}

/// Number `i` of a ternary block, and 1.
fn tq1_0_code(b: &[u8], i: usize) -> u8 {
    // Five base-3 digits in a byte, the first of 32 bytes, then the second of them, ...; then of 16; four of 4.
    let (byte, digit) = match i {
        0..160 => (i % 32, i / 32),
        160..240 => (32 + i % 16, (i - 160) / 16),
        _ => (48 + i % 4, (i - 240) / 4),
    };
    // A byte is ceil(256 / 243 * digits), so that the next digit is the carry of a multiplication by 3.
    let rest = b[byte].wrapping_mul([1, 3, 9, 27, 81][digit]);
    ((u16::from(rest) * 3) >> 8) as u8
}

fn tq1_0(b: &[u8; 54], out: &mut [f32; 256]) {
    let d = f16_at(b, 52);
    for (i, x) in out.iter_mut().enumerate() {
        *x = d * (f32::from(tq1_0_code(b, i)) - 1.0);
    }
}

fn tq2_0(b: &[u8; 66], out: &mut [f32; 256]) {
    let d = f16_at(b, 64);
    for (i, x) in out.iter_mut().enumerate() {
        *x = d * (f32::from(code(b, 32, 2, i)) - 1.0);
    }
}

impl Blocks {
    /// Whether its weights are -d, 0 and d.
    pub fn is_ternary(self) -> bool {
        matches!(self, Blocks::TQ1_0 | Blocks::TQ2_0)
    }

    /// A ternary block, exactly.
    pub fn ternary(self, b: &[u8]) -> Option<BlockQ4> {
        let mut q = [0; BLOCK];
        let d = match self {
            Blocks::TQ1_0 => {
                q.iter_mut().enumerate().for_each(|(i, q)| *q = tq1_0_code(b, i));
                f16_at(b, 52)
            }
            Blocks::TQ2_0 => {
                q.iter_mut().enumerate().for_each(|(i, q)| *q = code(b, 32, 2, i));
                f16_at(b, 64)
            }
            _ => return None,
        };
        Some(BlockQ4 { d, sc: [1; GROUPS], mn: [1; GROUPS], q })
    }

    /// Whole blocks of at most [`BLOCK`] weights, exactly; `None` if [`Blocks::kept`] says otherwise.
    pub fn grouped(self, bytes: &[u8]) -> Option<BlockGrouped> {
        let Kept::Grouped(how) = self.kept() else { return None };
        let unit = how.unit();
        let mut row = BlockGrouped::ZERO;
        let blocks = bytes.chunks_exact(self.bytes());
        for (b, q) in blocks.clone().zip(row.q.chunks_exact_mut(self.weights())) {
            match self {
                Blocks::Q4_0 | Blocks::IQ4_NL => fill(q, |i| code(&b[2..], 16, 4, i)),
                Blocks::Q4_1 => fill(q, |i| code(&b[4..], 16, 4, i)),
                Blocks::Q5_0 => fill(q, |i| code(&b[6..], 16, 4, i) | bit(&b[2..], i) << 4),
                Blocks::Q5_1 => fill(q, |i| code(&b[8..], 16, 4, i) | bit(&b[4..], i) << 4),
                Blocks::Q2_K => fill(q, |i| code(&b[16..], 32, 2, i)),
                // From -4..4 to 4..12, of which 8 are subtracted.
                Blocks::Q3_K => {
                    fill(q, |i| (code(&b[32..], 32, 2, i) | code(b, 32, 1, i) << 2) + 4)
                }
                Blocks::Q4_K => fill(q, |i| code(&b[16..], 32, 4, i)),
                Blocks::Q5_K => {
                    fill(q, |i| code(&b[48..], 32, 4, i) | code(&b[16..], 32, 1, i) << 4)
                }
                Blocks::Q6_K => fill(q, |i| code(b, 64, 4, i) | code(&b[128..], 32, 2, i) << 4),
                Blocks::IQ4_XS => fill(q, |i| code(&b[8..], 16, 4, i)),
                Blocks::MXFP4 => fill(q, |i| code(&b[1..], 16, 4, i)),
                _ => fill(q, |i| code(&b[4..], 8, 4, i)), // NVFP4
            }
        }
        let scales = row.s.iter_mut().zip(&mut row.o);
        let groups = blocks.flat_map(|b| (0..self.weights() / unit).map(move |g| (b, g)));
        for ((s, o), (b, g)) in scales.zip(groups) {
            (*s, *o) = match self {
                Blocks::Q4_1 | Blocks::Q5_1 => (u16_at(b, 0), u16_at(b, 2)),
                Blocks::Q2_K => (u16::from(b[g] & 15), u16::from(b[g] >> 4)),
                Blocks::Q3_K => (q3_k_scale(b, g) as u16, 0),
                Blocks::Q4_K | Blocks::Q5_K => scale_min(&b[4..16], g),
                Blocks::Q6_K => (u16::from(b[192 + g]), 0),
                Blocks::IQ4_XS => (iq4_xs_scale(b, g) as u16, 0),
                Blocks::MXFP4 => (u16::from(b[0]), 0),
                Blocks::NVFP4 => (half::f16::from_f32(nvfp4_scale(b[g])).to_bits(), 0),
                _ => (u16_at(b, 0), 0),
            };
        }
        // Minima are subtracted.
        let minus = |at| u16_at(bytes, at) ^ 0x8000;
        match self {
            Blocks::Q2_K => (row.d, row.e) = (u16_at(bytes, 80), minus(82)),
            Blocks::Q3_K => row.d = u16_at(bytes, 108),
            Blocks::Q4_K | Blocks::Q5_K => (row.d, row.e) = (u16_at(bytes, 0), minus(2)),
            Blocks::Q6_K => row.d = u16_at(bytes, 208),
            Blocks::IQ4_XS => row.d = u16_at(bytes, 0),
            _ => {}
        }
        Some(row)
    }
}

fn fill(out: &mut [u8], code: impl Fn(usize) -> u8) {
    out.iter_mut().enumerate().for_each(|(i, q)| *q = code(i));
}

/// Bit `i`.
fn bit(b: &[u8], i: usize) -> u8 {
    b[i / 8] >> (i % 8) & 1
}

fn mxfp4(b: &[u8; 17], out: &mut [f32; 32]) {
    let d = half_power(b[0]);
    for (i, x) in out.iter_mut().enumerate() {
        *x = d * f32::from(TWICE[usize::from(code(&b[1..], 16, 4, i))]);
    }
}

/// Half of an 8-bit float (E4M3) without a sign.
fn nvfp4_scale(x: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(x >> 3 & 15), f32::from(x & 7));
    let d = match exponent {
        _ if x == 0x7f => 0.0,
        0 => mantissa / 512.0,
        e => (1.0 + mantissa / 8.0) * f32::from_bits(((e - 7 + 127) as u32) << 23),
    };
    d * 0.5
}

fn nvfp4(b: &[u8; 36], out: &mut [f32; 64]) {
    for (g, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let d = nvfp4_scale(b[g]);
        for (i, x) in out.iter_mut().enumerate() {
            *x = d * f32::from(TWICE[usize::from(code(&b[4 + 8 * g..], 8, 4, i))]);
        }
    }
}
