//! Attention over paged keys and values, and writing them into a page; written once for every set.
//!
//! A page holds [`PAGE`] positions of one key/value head:
//!
//! ```text
//! f32, f16   K: 4 x [d][16] | V: [64][dp]                                     dp = d rounded up to 16
//! int8   K: 4 x [d / 4][16][4] | V: [dp / 16][16][16][4] | f32 K scale [64] | f32 V scale [64]
//! ```
//!
//! Where the values are a part of the keys (latent attention), V and its scales are left out, and int8 keys stand as
//! those of the others do. int8 is multiplied in integers ([`int8`]); what follows is for floats.
//!
//! A lane is a key while scores are made and a dimension while values are summed, so nothing is added
//! across lanes. The order, whatever the tile, the batch or the chunk of a prompt: keys in chunks of
//! [`CHUNK`] by absolute position; a score is one chain of fused multiply-adds over the dimensions; the
//! sum of a chunk's weights is by key modulo 16 and a tree; its values are one chain over keys (values that
//! are a part of the keys: by key modulo 16 and a tree); chunks are merged in ascending order (Milakov &
//! Gimelshein 2018; Dao et al. 2022), a sink last.

pub(super) mod int8;
pub(super) mod write;

use super::float::{exp, softcap, tree};
use super::simd::F32x16;
use super::{array, array_mut, cast};
use int8::Dot;
use std::ops::Range;

/// Positions of a page.
pub const PAGE: usize = 64;
/// Keys of a chunk: part of the definition, not a tuning value.
const CHUNK: usize = 512;
/// Rows that one call may have.
pub const MAX_ROWS: usize = 16;

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvDtype {
    /// Single precision: as computed.
    F32,
    /// IEEE half precision.
    F16,
    /// int8 with one f32 scale per position and head, `amax / 127`.
    Int8,
}

impl KvDtype {
    /// Bytes of one head's page; `values`: it has values beside the keys.
    pub fn page_bytes(self, d: usize, values: bool) -> usize {
        let keys = if self.in_integers(d, values) { d.next_multiple_of(4) } else { d };
        let numbers = PAGE * (keys + if values { d.next_multiple_of(16) } else { 0 });
        match self {
            KvDtype::F32 => 4 * numbers,
            KvDtype::F16 => 2 * numbers,
            KvDtype::Int8 => numbers + (1 + usize::from(values)) * 4 * PAGE,
        }
    }

    /// Whether heads of `d` dimensions are multiplied, and therefore stored, as [`int8`] says.
    fn in_integers(self, d: usize, values: bool) -> bool {
        self == KvDtype::Int8 && values && d <= int8::MAX_DIM
    }
}

/// Rows of queries that share a key/value head, and the keys that each sees.
pub struct Attend<'a> {
    /// `[rows, d]`, at most [`MAX_ROWS`] rows.
    pub q: &'a [f32],
    /// Dimensions of a key.
    pub d: usize,
    /// The values are the last so many numbers of the keys. `None`: they stand beside them, `d` wide.
    pub latent: Option<usize>,
    /// Multiplies each score.
    pub scale: f32,
    /// `cap * tanh(score / cap)`.
    pub softcap: Option<f32>,
    /// For each row the score of a key that every position sees and whose value is zero (Xiao et al. 2023, as
    /// gpt-oss learns it): it takes part in the softmax as it is, without scale and cap.
    pub sinks: Option<&'a [f32]>,
    /// For each row the positions it sees, `from..to`, not empty.
    pub seen: &'a [(u32, u32)],
    /// The pages of one layer.
    pub kv: &'a [u8],
    /// Page of each 64 positions.
    pub table: &'a [u32],
    /// Bytes from a page to the next.
    pub page_stride: usize,
    /// Where in a page this head begins.
    pub head_offset: usize,
}

impl Attend<'_> {
    /// Width of a row of the output: dimensions of a value, rounded up to 16.
    pub fn out_width(&self) -> usize {
        self.latent.unwrap_or(self.d).next_multiple_of(16)
    }
}

/// Floats of scratch that a call needs for `rows` rows of values of at most `d` dimensions.
pub fn scratch_len(rows: usize, d: usize) -> usize {
    rows * (CHUNK + d.next_multiple_of(16))
}

/// How a stored element becomes lanes.
pub(super) trait Stored {
    const DTYPE: KvDtype;
    const WIDTH: usize;
    fn load<V: F32x16>(line: &[u8]) -> V;
}
pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Int8;

impl Stored for F32 {
    const DTYPE: KvDtype = KvDtype::F32;
    const WIDTH: usize = 4;
    #[inline(always)]
    fn load<V: F32x16>(line: &[u8]) -> V {
        V::load(cast(line))
    }
}

impl Stored for F16 {
    const DTYPE: KvDtype = KvDtype::F16;
    const WIDTH: usize = 2;
    #[inline(always)]
    fn load<V: F32x16>(line: &[u8]) -> V {
        V::load_f16(cast(line))
    }
}
impl Stored for Int8 {
    const DTYPE: KvDtype = KvDtype::Int8;
    const WIDTH: usize = 1;
    #[inline(always)]
    fn load<V: F32x16>(line: &[u8]) -> V {
        V::load_i8(cast(line))
    }
}

/// One page of one head.
struct Page<'a> {
    /// Where the next page begins, for prefetching only.
    next: *const u8,
    keys: &'a [u8],
    values: &'a [u8],
    key_scales: &'a [u8],
    value_scales: &'a [u8],
}

/// Where this head's part of page `index` begins.
#[inline(always)]
fn start(a: &Attend<'_>, index: usize) -> usize {
    a.table[index] as usize * a.page_stride + a.head_offset
}

/// The same as an address, of the last page if there are fewer. For prefetching only.
#[inline(always)]
fn address(a: &Attend<'_>, index: usize) -> *const u8 {
    a.kv.as_ptr().wrapping_add(start(a, index.min(a.table.len() - 1)))
}

#[inline(always)]
fn page<'a, S: Stored>(a: &Attend<'a>, index: usize) -> Page<'a> {
    let start = start(a, index);
    let bytes = &a.kv[start..][..S::DTYPE.page_bytes(a.d, a.latent.is_none())];
    let next = address(a, index + 1);
    let whole = S::DTYPE.in_integers(a.d, a.latent.is_none());
    let d = if whole { a.d.next_multiple_of(4) } else { a.d };
    let (keys, rest) = bytes.split_at(PAGE * d * S::WIDTH);
    let values = if a.latent.is_none() { PAGE * a.d.next_multiple_of(16) * S::WIDTH } else { 0 };
    let (values, scales) = rest.split_at(values);
    let (key_scales, value_scales) = scales.split_at(scales.len().min(4 * PAGE));
    Page { next, keys, values, key_scales, value_scales }
}

/// Scores of one row to weights, `e^(score - max)`, and 0 outside of `seen`. Gives the maximum and the sum
/// of the weights.
#[inline(always)]
pub(super) fn softmax(row: &mut [f32], seen: Range<usize>, cap: Option<f32>) -> (f32, f32) {
    row[..seen.start].fill(f32::NEG_INFINITY);
    row[seen.end..].fill(f32::NEG_INFINITY);
    if let Some(cap) = cap {
        softcap(&mut row[seen], cap);
    }
    let mut lanes = [f32::NEG_INFINITY; 16];
    for s in row.as_chunks::<16>().0 {
        for i in 0..16 {
            lanes[i] = lanes[i].max(s[i]);
        }
    }
    let m = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let mut lanes = [0.0f32; 16];
    for s in row.as_chunks_mut::<16>().0 {
        for i in 0..16 {
            s[i] = exp(s[i] - m);
            lanes[i] += s[i];
        }
    }
    (m, tree(lanes))
}

/// `out`: `[rows, dp]`. `scratch`: [`scratch_len`] floats. `softmax` is [`softmax`] compiled for the set.
///
/// # Safety
/// The CPU has the features that `softmax` was compiled for.
#[inline(always)]
pub(super) unsafe fn attend<V: F32x16, S: Stored, D: Dot>(
    a: &Attend<'_>,
    out: &mut [f32],
    scratch: &mut [f32],
    softmax: unsafe fn(&mut [f32], Range<usize>, Option<f32>) -> (f32, f32),
) {
    let rows = a.seen.len();
    let dp = a.out_width();
    let integers = S::DTYPE.in_integers(a.d, a.latent.is_none());
    let (scores, sums) = scratch.split_at_mut(rows * CHUNK);
    let mut max = [f32::NEG_INFINITY; MAX_ROWS];
    let mut total = [0.0f32; MAX_ROWS];
    out.fill(0.0);
    let from = a.seen.iter().map(|s| s.0).min().unwrap_or(0) as usize;
    let to = a.seen.iter().map(|s| s.1).max().unwrap_or(0) as usize;
    let mut start = from;
    while start < to {
        let chunk = start / CHUNK * CHUNK;
        let end = to.min(chunk + CHUNK);
        // Whole 16-key blocks; keys outside start..end are masked below.
        let blocks = (start - chunk) / 16 * 16..(end - chunk).next_multiple_of(16);
        let mut r = 0;
        if integers {
            int8::scores::<V, D>(a, scores, chunk, &blocks);
            r = rows;
        }
        while r < rows {
            r += match rows - r {
                8.. if V::WIDE => score::<V, S, 8, 2>(a, r, scores, chunk, &blocks),
                4.. if V::WIDE => score::<V, S, 4, 4>(a, r, scores, chunk, &blocks),
                2.. if V::WIDE => score::<V, S, 2, 4>(a, r, scores, chunk, &blocks),
                2.. => score::<V, S, 2, 2>(a, r, scores, chunk, &blocks),
                _ => score::<V, S, 1, 4>(a, r, scores, chunk, &blocks),
            };
        }
        let mut chunk_max = [f32::NEG_INFINITY; MAX_ROWS];
        let mut chunk_total = [0.0f32; MAX_ROWS];
        for r in 0..rows {
            let row = &mut scores[r * CHUNK..][blocks.clone()];
            let first = chunk + blocks.start;
            let seen = (a.seen[r].0 as usize).clamp(first, first + row.len()) - first
                ..(a.seen[r].1 as usize).clamp(first, first + row.len()) - first;
            if seen.is_empty() {
                row.fill(0.0);
                continue;
            }
            // SAFETY: the caller's set, whose features the CPU has.
            (chunk_max[r], chunk_total[r]) = unsafe { softmax(row, seen, a.softcap) };
        }
        let mut r = rows;
        if integers {
            int8::values::<V, D>(a, scores, sums, start..end, chunk);
        } else if a.latent.is_some() {
            latent_sum::<V, S>(a, scores, sums, &blocks, chunk);
        } else {
            r = 0;
        }
        while r < rows {
            r += match rows - r {
                8.. if V::WIDE => sum::<V, S, 8>(a, r, scores, sums, start..end, chunk),
                4.. if V::WIDE => sum::<V, S, 4>(a, r, scores, sums, start..end, chunk),
                2.. => sum::<V, S, 2>(a, r, scores, sums, start..end, chunk),
                _ => sum::<V, S, 1>(a, r, scores, sums, start..end, chunk),
            };
        }
        for r in 0..rows {
            if chunk_max[r] == f32::NEG_INFINITY {
                continue;
            }
            let m = max[r].max(chunk_max[r]);
            let (old, new) = (exp(max[r] - m), exp(chunk_max[r] - m));
            max[r] = m;
            total[r] = chunk_total[r].mul_add(new, total[r] * old);
            for (o, &s) in out[r * dp..][..dp].iter_mut().zip(&sums[r * dp..][..dp]) {
                *o = s.mul_add(new, *o * old);
            }
        }
        start = end;
    }
    for r in 0..rows {
        let inv = match a.sinks {
            None => 1.0 / total[r],
            Some(sinks) => {
                let m = max[r].max(sinks[r]);
                let keep = exp(max[r] - m);
                keep / total[r].mul_add(keep, exp(sinks[r] - m))
            }
        };
        for o in &mut out[r * dp..][..dp] {
            *o *= inv;
        }
    }
}

/// Scores of rows `r..r + R` with the blocks of a chunk, at most `B` blocks at a time. Gives `R`.
#[inline(always)]
fn score<V: F32x16, S: Stored, const R: usize, const B: usize>(
    a: &Attend<'_>,
    r: usize,
    scores: &mut [f32],
    chunk: usize,
    blocks: &Range<usize>,
) -> usize {
    let mut key = blocks.start;
    while key < blocks.end {
        let page = page::<S>(a, (chunk + key) / PAGE);
        let first = key % PAGE / 16;
        key += 16
            * if first + B <= 4 && key + 16 * B <= blocks.end {
                keys::<V, S, R, B>(a, r, &page, first, scores, key)
            } else {
                keys::<V, S, R, 1>(a, r, &page, first, scores, key)
            };
    }
    R
}

/// Scores of rows `r..r + R` with blocks `first..first + B` of a page, whose keys are `key` and on in the
/// chunk. Gives `B`.
#[inline(always)]
fn keys<V: F32x16, S: Stored, const R: usize, const B: usize>(
    a: &Attend<'_>,
    r: usize,
    page: &Page<'_>,
    first: usize,
    scores: &mut [f32],
    key: usize,
) -> usize {
    let queries: [&[f32]; R] = std::array::from_fn(|i| &a.q[(r + i) * a.d..][..a.d]);
    let line = 16 * S::WIDTH;
    let lines: [&[u8]; B] =
        std::array::from_fn(|b| &page.keys[(first + b) * a.d * line..][..a.d * line]);
    let mut acc = [[V::splat(0.0); B]; R];
    for i in 0..a.d {
        let mut k = [V::splat(0.0); B];
        for b in 0..B {
            k[b] = S::load(&lines[b][i * line..][..line]);
            V::prefetch(page.next.wrapping_add(((first + b) * a.d + i) * line));
        }
        for r in 0..R {
            let q = V::splat(queries[r][i]);
            for b in 0..B {
                acc[r][b] = k[b].fma(q, acc[r][b]);
            }
        }
    }
    let scale = V::splat(a.scale);
    for i in 0..R {
        for b in 0..B {
            let acc = match S::DTYPE {
                KvDtype::F32 | KvDtype::F16 => acc[i][b],
                KvDtype::Int8 => acc[i][b].mul(scales(page.key_scales, first + b)),
            };
            acc.mul(scale).store(array_mut(scores, (r + i) * CHUNK + key + 16 * b));
        }
    }
    B
}

/// Sixteen scales of a page.
#[inline(always)]
fn scales<V: F32x16>(bytes: &[u8], block: usize) -> V {
    V::load(cast(&bytes[block * 64..][..64]))
}

/// Weighted sums of the values at `keys` for rows `r..r + R`. Gives `R`.
#[inline(always)]
fn sum<V: F32x16, S: Stored, const R: usize>(
    a: &Attend<'_>,
    r: usize,
    scores: &[f32],
    sums: &mut [f32],
    keys: Range<usize>,
    chunk: usize,
) -> usize {
    let dp = a.d.next_multiple_of(16);
    let mut d = 0;
    while d < dp {
        d += match (dp - d) / 16 {
            4.. if V::WIDE && R <= 4 => strips::<V, S, R, 4>(a, r, scores, sums, &keys, chunk, d),
            2.. => strips::<V, S, R, 2>(a, r, scores, sums, &keys, chunk, d),
            _ => strips::<V, S, R, 1>(a, r, scores, sums, &keys, chunk, d),
        };
    }
    R
}

/// Dimensions `d..d + 16 * N` of [`sum`]. Gives their number.
#[inline(always)]
fn strips<V: F32x16, S: Stored, const R: usize, const N: usize>(
    a: &Attend<'_>,
    r: usize,
    scores: &[f32],
    sums: &mut [f32],
    keys: &Range<usize>,
    chunk: usize,
    d: usize,
) -> usize {
    let dp = a.d.next_multiple_of(16);
    let mut acc = [[V::splat(0.0); N]; R];
    let mut key = keys.start;
    while key < keys.end {
        let page = page::<S>(a, key / PAGE);
        let n = (PAGE - key % PAGE).min(keys.end - key);
        let weights: [&[f32]; R] =
            std::array::from_fn(|i| &scores[(r + i) * CHUNK + key - chunk..][..n]);
        let rows = page.values.chunks_exact(dp * S::WIDTH).skip(key % PAGE);
        for (i, row) in (0..n).zip(rows) {
            let row = &row[d * S::WIDTH..][..16 * N * S::WIDTH];
            let next =
                page.next.wrapping_add(page.keys.len() + ((key % PAGE + i) * dp + d) * S::WIDTH);
            for at in (0..16 * N * S::WIDTH).step_by(64) {
                V::prefetch(next.wrapping_add(at));
            }
            let mut v = [V::splat(0.0); N];
            for n in 0..N {
                v[n] = S::load(&row[16 * n * S::WIDTH..][..16 * S::WIDTH]);
            }
            let scale = match S::DTYPE {
                KvDtype::F32 | KvDtype::F16 => 1.0,
                KvDtype::Int8 => {
                    f32::from_le_bytes(*array(page.value_scales, (key % PAGE + i) * 4))
                }
            };
            for r in 0..R {
                let w = V::splat(weights[r][i] * scale);
                for n in 0..N {
                    acc[r][n] = v[n].fma(w, acc[r][n]);
                }
            }
        }
        key += n;
    }
    for i in 0..R {
        for n in 0..N {
            acc[i][n].store(array_mut(sums, (r + i) * dp + d + 16 * n));
        }
    }
    16 * N
}

/// Weighted sums, for all rows, of values that are the last numbers of the keys in the blocks of a chunk. A lane
/// is a key, as in [`keys`]. A block may reach beyond the keys that are there: their weights are 0, and what
/// stands in a page is finite.
#[inline(always)]
fn latent_sum<V: F32x16, S: Stored>(
    a: &Attend<'_>,
    scores: &[f32],
    sums: &mut [f32],
    blocks: &Range<usize>,
    chunk: usize,
) {
    let (rows, dv) = (a.seen.len(), a.latent.unwrap_or(a.d));
    let mut i = 0;
    while i < dv {
        // Rows inside: the lines of a few dimensions stay in L1 for all of them.
        let wide = dv - i >= 4;
        let mut r = 0;
        while r < rows {
            r += match rows - r {
                4.. if V::WIDE && wide => lines::<V, S, 4, 4>(a, r, scores, sums, blocks, chunk, i),
                2.. if wide => lines::<V, S, 2, 4>(a, r, scores, sums, blocks, chunk, i),
                _ if wide => lines::<V, S, 1, 4>(a, r, scores, sums, blocks, chunk, i),
                _ => lines::<V, S, 1, 1>(a, r, scores, sums, blocks, chunk, i),
            };
        }
        i += if wide { 4 } else { 1 };
    }
}

/// Dimensions `first..first + N` of the values of [`latent_sum`] for rows `r..r + R`. Gives `R`.
#[inline(always)]
fn lines<V: F32x16, S: Stored, const R: usize, const N: usize>(
    a: &Attend<'_>,
    r: usize,
    scores: &[f32],
    sums: &mut [f32],
    blocks: &Range<usize>,
    chunk: usize,
    first: usize,
) -> usize {
    let (dv, dp) = (a.latent.unwrap_or(a.d), a.out_width());
    let line = 16 * S::WIDTH;
    let mut acc = [[V::splat(0.0); N]; R];
    let mut key = blocks.start;
    while key < blocks.end {
        let page = page::<S>(a, (chunk + key) / PAGE);
        let last = blocks.end.min((chunk + key) / PAGE * PAGE + PAGE - chunk);
        while key < last {
            let block = (chunk + key) % PAGE / 16;
            let keys = &page.keys[(block * a.d + a.d - dv + first) * line..][..N * line];
            let mut w = [V::splat(0.0); R];
            for i in 0..R {
                w[i] = V::load(array(scores, (r + i) * CHUNK + key));
                if S::DTYPE == KvDtype::Int8 {
                    w[i] = w[i].mul(scales(page.key_scales, block));
                }
            }
            for n in 0..N {
                let v: V = S::load(&keys[n * line..][..line]);
                for i in 0..R {
                    acc[i][n] = v.fma(w[i], acc[i][n]);
                }
            }
            key += 16;
        }
    }
    for i in 0..R {
        for n in 0..N {
            let mut lanes = [0.0; 16];
            acc[i][n].store(&mut lanes);
            sums[(r + i) * dp + first + n] = tree(lanes);
        }
    }
    R
}

/// `most / m` and `m / most`, where m is the largest magnitude; both 0 for (nearly) zeros.
#[inline(always)]
fn integer_scale(x: &[f32], most: f32) -> (f32, f32) {
    let amax = crate::quant::amax(x);
    if amax < crate::quant::TINY { (0.0, 0.0) } else { (most / amax, amax / most) }
}
