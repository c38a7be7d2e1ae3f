//! Attention over int8 keys and values, in integers: exact sums, so their order does not matter. Latent attention
//! and heads of more than [`MAX_DIM`] dimensions take the float path of the parent module instead.
//!
//! A query becomes `Q[i] = round(q[i] * 32639 / m)`, `m = max |q|`, and its score with a key is
//! `(sum of Q[i] * K[i]) * key scale * (m / 32639 * scale)`. The weights `w` of a chunk's keys are multiplied by the scales of their
//! values, `p = w * value scale`, become `P = round(p * 32639 / max p)`, and a value of the chunk is
//! `(sum of P * V) * (max p / 32639)`. 32639 is 127 * 257: both bytes of it are int8 (for instructions that
//! multiply bytes), and a sum of 512 products with int8 stays below 2^31.

use super::super::array_mut;
use super::super::simd::F32x16;
use super::{Attend, CHUNK, Int8, PAGE, Page, address, integer_scale, page, scales};
use std::ops::Range;

/// Dimensions of a head up to which the sums fit.
pub(super) const MAX_DIM: usize = 512;
/// Pages from the one whose keys are read to the one that is asked for.
const AHEAD: usize = 4;
/// The largest integer.
const MAX: f32 = 32639.0;
/// `x + MAGIC` has `round(x)`, ties to even, in its low bits, for |x| < 2^22.
const MAGIC: f32 = 12_582_912.0;

/// Sixteen i32 sums of products of four, in the registers of an instruction set.
pub(in super::super) trait Dot: Copy {
    /// How many of these, with what they multiply, the CPU's registers hold.
    const TILE: usize;
    /// 64 int8, ready to be multiplied.
    type Line: Copy;
    /// What multiplies each four of them.
    type Four: Copy;

    fn zero() -> Self;
    /// Integers of magnitude 32639 or less as [`four`](Dot::four) reads them, in place.
    #[inline(always)]
    fn pack(_: &mut [[i16; 4]]) {}
    fn four(q: &[i16; 4]) -> Self::Four;
    fn line(bytes: &[u8; 64]) -> Self::Line;
    /// Lane `i` gains the sum of `line[4 * i + j] * q[j]`.
    fn add(self, line: Self::Line, q: Self::Four) -> Self;
    /// The sums as f32.
    fn store(self, out: &mut [f32; 16]);
}

/// The specification of [`Dot`].
#[derive(Clone, Copy)]
pub(in super::super) struct Sums([i32; 16]);

impl Dot for Sums {
    const TILE: usize = 1;
    type Line = [i8; 64];
    type Four = [i16; 4];

    fn zero() -> Self {
        Sums([0; 16])
    }
    fn four(q: &[i16; 4]) -> [i16; 4] {
        *q
    }
    fn line(bytes: &[u8; 64]) -> [i8; 64] {
        bytes.map(|x| x as i8)
    }
    fn add(self, line: [i8; 64], q: [i16; 4]) -> Self {
        Sums(std::array::from_fn(|i| {
            (0..4).fold(self.0[i], |sum, j| sum + i32::from(line[4 * i + j]) * i32::from(q[j]))
        }))
    }
    fn store(self, out: &mut [f32; 16]) {
        *out = self.0.map(|x| x as f32);
    }
}

/// Numbers as integers, in fours, and what one is worth.
#[derive(Clone, Copy)]
struct Integers([[i16; 4]; CHUNK / 4], f32);

impl Integers {
    const NONE: Integers = Integers([[0; 4]; CHUNK / 4], 0.0);

    /// At most 512 numbers, from the four `at` on.
    #[inline(always)]
    fn set<D: Dot>(&mut self, at: usize, x: &[f32]) {
        let (inv, worth) = integer_scale(x, MAX);
        let fours = &mut self.0[at..][..x.len().div_ceil(4)];
        for (q, x) in fours.as_flattened_mut().iter_mut().zip(x) {
            *q = (x * inv + MAGIC).to_bits() as i16;
        }
        D::pack(fours);
        self.1 = worth;
    }
}

/// Scores of all rows with the blocks of a chunk.
#[inline(always)]
pub(super) fn scores<V: F32x16, D: Dot>(
    a: &Attend<'_>,
    scores: &mut [f32],
    chunk: usize,
    blocks: &Range<usize>,
) {
    let (rows, mut r) = (a.seen.len(), 0);
    while r < rows {
        r += match rows - r {
            4.. if D::TILE >= 8 => score::<V, D, 4, 2>(a, r, scores, chunk, blocks),
            4.. if D::TILE >= 4 => score::<V, D, 4, 1>(a, r, scores, chunk, blocks),
            2.. if D::TILE >= 8 => score::<V, D, 2, 4>(a, r, scores, chunk, blocks),
            2.. if D::TILE >= 2 => score::<V, D, 2, 1>(a, r, scores, chunk, blocks),
            _ if D::TILE >= 8 => score::<V, D, 1, 4>(a, r, scores, chunk, blocks),
            _ => score::<V, D, 1, 1>(a, r, scores, chunk, blocks),
        };
    }
}

/// Scores of rows `r..r + R`, at most `B` blocks at a time. Gives `R`.
#[inline(always)]
fn score<V: F32x16, D: Dot, const R: usize, const B: usize>(
    a: &Attend<'_>,
    r: usize,
    scores: &mut [f32],
    chunk: usize,
    blocks: &Range<usize>,
) -> usize {
    let mut q = [Integers::NONE; R];
    for i in 0..R {
        q[i].set::<D>(0, &a.q[(r + i) * a.d..][..a.d]);
    }
    let mut key = blocks.start;
    while key < blocks.end {
        let index = (chunk + key) / PAGE;
        let page = Page { next: address(a, index + AHEAD), ..page::<Int8>(a, index) };
        let first = key % PAGE / 16;
        key += 16
            * if first + B <= 4 && key + 16 * B <= blocks.end {
                keys::<V, D, R, B>(a, r, &q, &page, first, scores, key)
            } else {
                keys::<V, D, R, 1>(a, r, &q, &page, first, scores, key)
            };
    }
    R
}

/// Scores of rows `r..r + R` with blocks `first..first + B` of a page, whose keys are `key` and on in the
/// chunk. Gives `B`.
#[inline(always)]
fn keys<V: F32x16, D: Dot, const R: usize, const B: usize>(
    a: &Attend<'_>,
    r: usize,
    q: &[Integers; R],
    page: &Page<'_>,
    first: usize,
    scores: &mut [f32],
    key: usize,
) -> usize {
    let fours = a.d.div_ceil(4);
    let mut sums = [[D::zero(); B]; R];
    let at = first * fours * 64;
    // Of the next page the same lines, and the scales of both.
    let next = page.next.wrapping_add(at);
    for b in first..first + B {
        let scales = page.next.wrapping_add(page.keys.len() + page.values.len() + b * 64);
        V::prefetch(scales);
        V::prefetch(scales.wrapping_add(4 * PAGE));
    }
    dots::<V, D, R, B>(&mut sums, &page.keys[at..], next, fours * 64, q, 0..fours);
    for i in 0..R {
        let scale = V::splat(q[i].1 * a.scale);
        for b in 0..B {
            let mut lanes = [0.0; 16];
            sums[i][b].store(&mut lanes);
            let score = V::load(&lanes).mul(scales(page.key_scales, first + b)).mul(scale);
            score.store(array_mut(scores, (r + i) * CHUNK + key + 16 * b));
        }
    }
    B
}

/// `sums[r][b]` gain the products of `q[r]` with the lines of `bytes` from `b * across` on, one for each of `fours`. Lines
/// from `next` on are asked for meanwhile.
#[inline(always)]
fn dots<V: F32x16, D: Dot, const R: usize, const B: usize>(
    sums: &mut [[D; B]; R],
    bytes: &[u8],
    next: *const u8,
    across: usize,
    q: &[Integers; R],
    fours: Range<usize>,
) {
    // Slices of one length, so that the loop has no checks.
    let n = fours.len();
    let q: [&[[i16; 4]]; R] = std::array::from_fn(|r| &q[r].0[fours.start..][..n]);
    let lines: [&[[u8; 64]]; B] =
        std::array::from_fn(|b| &bytes[b * across..][..n * 64].as_chunks().0[..n]);
    for i in 0..n {
        let mut by = [D::four(&[0; 4]); R];
        for r in 0..R {
            by[r] = D::four(&q[r][i]);
        }
        for b in 0..B {
            V::prefetch(next.wrapping_add(b * across + i * 64));
            let line = D::line(&lines[b][i]);
            for r in 0..R {
                sums[r][b] = sums[r][b].add(line, by[r]);
            }
        }
    }
}

/// Weighted sums, for all rows, of the values of a chunk's `keys`; `scores` are the weights, and are used up.
#[inline(always)]
pub(super) fn values<V: F32x16, D: Dot>(
    a: &Attend<'_>,
    scores: &mut [f32],
    sums: &mut [f32],
    keys: Range<usize>,
    chunk: usize,
) {
    let (rows, mut r) = (a.seen.len(), 0);
    while r < rows {
        r += match rows - r {
            4.. if D::TILE >= 4 => sum::<V, D, 4>(a, r, scores, sums, &keys, chunk),
            2.. if D::TILE >= 2 => sum::<V, D, 2>(a, r, scores, sums, &keys, chunk),
            _ => sum::<V, D, 1>(a, r, scores, sums, &keys, chunk),
        };
    }
}

/// The same for rows `r..r + R`. Gives `R`.
#[inline(always)]
fn sum<V: F32x16, D: Dot, const R: usize>(
    a: &Attend<'_>,
    r: usize,
    scores: &mut [f32],
    sums: &mut [f32],
    keys: &Range<usize>,
    chunk: usize,
) -> usize {
    let mut p = [Integers::NONE; R];
    // Whole fours; the weights of keys outside of `keys` are 0.
    let fours = (keys.start - chunk) / 4..(keys.end - chunk).div_ceil(4);
    for i in 0..R {
        let row = &mut scores[(r + i) * CHUNK..][..CHUNK];
        row[fours.start * 4..keys.start - chunk].fill(0.0);
        let end = row.len().min(fours.end * 4);
        row[keys.end - chunk..end].fill(0.0);
        let mut key = keys.start;
        while key < keys.end {
            let page = page::<Int8>(a, key / PAGE);
            let to = keys.end.min((key / PAGE + 1) * PAGE);
            let scales = page.value_scales.as_chunks::<4>().0;
            let weights = &mut row[key - chunk..to - chunk];
            for (w, scale) in weights.iter_mut().zip(&scales[key % PAGE..]) {
                *w *= f32::from_le_bytes(*scale);
            }
            key = to;
        }
        p[i].set::<D>(fours.start, &row[4 * fours.start..end]);
    }
    let dp = a.d.next_multiple_of(16);
    let mut d = 0;
    while d < dp {
        d += match (dp - d) / 16 {
            4.. if D::TILE >= 4 * R => strips::<V, D, R, 4>(a, r, &p, sums, &fours, chunk, d),
            2.. if D::TILE >= 2 * R => strips::<V, D, R, 2>(a, r, &p, sums, &fours, chunk, d),
            _ => strips::<V, D, R, 1>(a, r, &p, sums, &fours, chunk, d),
        };
    }
    R
}

/// Dimensions `d..d + 16 * N` of [`sum`]. Gives their number.
#[inline(always)]
fn strips<V: F32x16, D: Dot, const R: usize, const N: usize>(
    a: &Attend<'_>,
    r: usize,
    p: &[Integers; R],
    sums: &mut [f32],
    fours: &Range<usize>,
    chunk: usize,
    d: usize,
) -> usize {
    const FOURS: usize = PAGE / 4;
    let dp = a.d.next_multiple_of(16);
    let mut acc = [[D::zero(); N]; R];
    let mut four = fours.start;
    while four < fours.end {
        let to = fours.end.min((four / FOURS + 1) * FOURS);
        let index = (chunk + 4 * four) / PAGE;
        let page = page::<Int8>(a, index);
        let at = (d / 16 * FOURS + four % FOURS) * 64;
        // The next dimensions of this chunk or the first of the next one: a page ahead would be too late.
        let (next, later) = match d + 16 * N < dp {
            true => (page.values.as_ptr(), at + N * FOURS * 64),
            false => (address(a, index + CHUNK / PAGE), page.keys.len() + four % FOURS * 64),
        };
        let next = next.wrapping_add(later);
        dots::<V, D, R, N>(&mut acc, &page.values[at..], next, FOURS * 64, p, four..to);
        four = to;
    }
    for i in 0..R {
        let worth = V::splat(p[i].1);
        for n in 0..N {
            let mut lanes = [0.0; 16];
            acc[i][n].store(&mut lanes);
            V::load(&lanes).mul(worth).store(array_mut(sums, (r + i) * dp + d + 16 * n));
        }
    }
    16 * N
}

/// Where number `i` of the key in slot `slot` stands in a head's page: `4 x [d / 4][16][4]`, for each 16 keys.
#[inline(always)]
pub(super) fn key_at(d: usize, slot: usize, i: usize) -> usize {
    ((slot / 16 * d.div_ceil(4) + i / 4) * 16 + slot % 16) * 4 + i % 4
}

/// Where number `i` of the value in slot `slot` stands among the values: `[dp / 16][16][16][4]`, the last four of keys.
#[inline(always)]
pub(super) fn value_at(slot: usize, i: usize) -> usize {
    ((i / 16 * (PAGE / 4) + slot / 4) * 16 + i % 16) * 4 + slot % 4
}
