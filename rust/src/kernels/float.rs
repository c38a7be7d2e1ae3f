//! The float kernels, written once for every instruction set: plain loops that a compiler may put into
//! vectors without changing a bit, and loops over [`F32x16`]. `instantiate!` compiles them for one set.
//! Everything on the way is inlined into a function with the set's CPU features; a closure handed to the
//! standard library might not be, so none touches an [`F32x16`], and arrays of them are indexed.
//!
//! Orders that every set keeps: a dot product is one chain of fused multiply-adds, k ascending, one chain
//! per output; a sum over a row is 16 partial sums by index modulo 16, ascending, then a tree 8-4-2-1.

pub(super) use super::activation::{Activation, exp, gate, sigmoid};
use super::layout::{self, ROWS};
use super::simd::F32x16;
use crate::quant::{self, BLOCK, BlockGrouped, BlockQ8, GROUP, GROUPS, Grouped};

/// What a router makes of its logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// `e^x / sum of e^x` over all experts.
    Softmax,
    /// `1 / (1 + e^-x)`.
    Sigmoid,
}

/// The float kernels of one instruction set; the fields of `Kernels` of the same names say what they do.
#[derive(Clone, Copy)]
pub(super) struct Floats {
    pub(super) gemm_f32: unsafe fn(&[u8], usize, &[f32], &mut [f32]),
    pub(super) gemm_f16: unsafe fn(&[u8], usize, &[f32], &mut [f32]),
    pub(super) gemm_bf16: unsafe fn(&[u8], usize, &[f32], &mut [f32]),
    pub(super) gemm_grouped: unsafe fn(Grouped, &[u8], usize, &[f32], &mut [f32]),
    pub(super) quantize: unsafe fn(&[f32], &mut [i8], &mut [i16; GROUPS]) -> (f32, i32),
    pub(super) pack_q4: unsafe fn(&[[f32; BLOCK]; ROWS], usize, &mut [u8]),
    pub(super) pack_q8: unsafe fn(&[[f32; BLOCK]; ROWS], usize, &mut [u8]),
    pub(super) quantize_grouped:
        unsafe fn(Grouped, &[[f32; BLOCK]; ROWS], usize, &mut [BlockGrouped; ROWS]),
    pub(super) rms_norm: unsafe fn(&[f32], &[f32], f32, &mut [f32]),
    pub(super) mean_square: unsafe fn(&[f32]) -> f32,
    pub(super) cut: unsafe fn(&mut [f32], f32),
    pub(super) layer_norm: unsafe fn(&[f32], &[f32], Option<&[f32]>, f32, &mut [f32]),
    pub(super) rope: unsafe fn(&mut [f32], &[f32], bool),
    pub(super) gate: unsafe fn(Activation, &mut [f32], &[f32]),
    pub(super) add: unsafe fn(&mut [f32], &[f32]),
    pub(super) add_scaled: unsafe fn(&mut [f32], f32, &[f32]),
    pub(super) score: unsafe fn(Score, &mut [f32]),
    pub(super) softcap: unsafe fn(&mut [f32], f32),
    pub(super) attend_f32: unsafe fn(&super::Attend<'_>, &mut [f32], &mut [f32]),
    pub(super) attend_f16: unsafe fn(&super::Attend<'_>, &mut [f32], &mut [f32]),
    pub(super) attend_i8: unsafe fn(&super::Attend<'_>, &mut [f32], &mut [f32]),
    pub(super) write_f32: unsafe fn(&[f32], &[f32], usize, &mut [u8]),
    pub(super) write_f16: unsafe fn(&[f32], &[f32], usize, &mut [u8]),
    pub(super) write_i8: unsafe fn(&[f32], &[f32], usize, &mut [u8]),
    pub(super) conv: unsafe fn(&[&[f32]], &[&[f32]], Option<&[f32]>, bool, &mut [f32]),
    pub(super) recur: unsafe fn(&super::Recur<'_>, &mut [f32], &mut [f32; 16]),
}

/// Compiles every float kernel with `$v` as the vector, `$dot` for int8 keys and values, and the given target features,
/// as `FLOATS`.
macro_rules! instantiate {
    ($v:ty, $dot:ty $(, $features:literal)?) => {
        pub(super) const FLOATS: crate::kernels::float::Floats = {
            use crate::kernels::float::{self, Activation, Floats, Score};
            use crate::kernels::layout::ROWS;
            use crate::kernels::{Attend, Recur, attention, grouped, recurrent};
            use crate::quant::{BLOCK, BlockGrouped, GROUPS, Grouped};
            type Rows = [[f32; BLOCK]; ROWS];

            $(#[target_feature(enable = $features)])?
            unsafe fn gemm_f32(w: &[u8], k: usize, x: &[f32], y: &mut [f32]) {
                float::gemm::<$v, float::F32>(w, k, x, y)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn gemm_f16(w: &[u8], k: usize, x: &[f32], y: &mut [f32]) {
                float::gemm::<$v, float::F16>(w, k, x, y)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn gemm_bf16(w: &[u8], k: usize, x: &[f32], y: &mut [f32]) {
                float::gemm::<$v, float::Bf16>(w, k, x, y)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn gemm_grouped(
                how: Grouped,
                w: &[u8],
                k: usize,
                x: &[f32],
                y: &mut [f32],
            ) {
                grouped::gemm::<$v>(how, w, k, x, y)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn quantize(x: &[f32], q: &mut [i8], sums: &mut [i16; GROUPS]) -> (f32, i32) {
                float::quantize(x, q, sums)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn pack_q4(x: &Rows, k: usize, out: &mut [u8]) {
                crate::kernels::pack::pack_q4::<$v>(x, k, out)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn pack_q8(x: &Rows, k: usize, out: &mut [u8]) {
                float::pack_q8(x, k, out)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn quantize_grouped(
                how: Grouped,
                x: &Rows,
                k: usize,
                out: &mut [BlockGrouped; ROWS],
            ) {
                crate::kernels::pack::quantize_grouped::<$v>(how, x, k, out)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn rms_norm(x: &[f32], gain: &[f32], eps: f32, out: &mut [f32]) {
                float::rms_norm(x, gain, eps, out)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn mean_square(x: &[f32]) -> f32 {
                float::mean_square(x)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn cut(x: &mut [f32], times: f32) {
                float::cut(x, times)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn layer_norm(
                x: &[f32],
                gain: &[f32],
                bias: Option<&[f32]>,
                eps: f32,
                out: &mut [f32],
            ) {
                float::layer_norm(x, gain, bias, eps, out)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn rope(x: &mut [f32], cos_sin: &[f32], interleaved: bool) {
                float::rope(x, cos_sin, interleaved)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn gate(act: Activation, gate: &mut [f32], up: &[f32]) {
                float::gate(act, gate, up)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn add(x: &mut [f32], y: &[f32]) {
                float::add(x, y)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn add_scaled(x: &mut [f32], scale: f32, y: &[f32]) {
                float::add_scaled(x, scale, y)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn score(score: Score, x: &mut [f32]) {
                float::score(score, x)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn softcap(x: &mut [f32], cap: f32) {
                float::softcap(x, cap)
            }
            // Apart, or the constants of `exp` would take registers from the loops around it.
            #[inline(never)]
            $(#[target_feature(enable = $features)])?
            unsafe fn softmax(
                row: &mut [f32],
                seen: std::ops::Range<usize>,
                cap: Option<f32>,
            ) -> (f32, f32) {
                attention::softmax(row, seen, cap)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn attend_f32(a: &Attend<'_>, out: &mut [f32], scratch: &mut [f32]) {
                // SAFETY: the caller's CPU has the features of this function, which are `softmax`'s.
                unsafe { attention::attend::<$v, attention::F32, $dot>(a, out, scratch, softmax) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn attend_f16(a: &Attend<'_>, out: &mut [f32], scratch: &mut [f32]) {
                // SAFETY: as in `attend_f32`.
                unsafe { attention::attend::<$v, attention::F16, $dot>(a, out, scratch, softmax) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn attend_i8(a: &Attend<'_>, out: &mut [f32], scratch: &mut [f32]) {
                // SAFETY: as in `attend_f32`.
                unsafe { attention::attend::<$v, attention::Int8, $dot>(a, out, scratch, softmax) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn write_f32(k: &[f32], v: &[f32], slot: usize, page: &mut [u8]) {
                attention::write::write_f32(k, v, slot, page)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn write_f16(k: &[f32], v: &[f32], slot: usize, page: &mut [u8]) {
                attention::write::write_f16::<$v>(k, v, slot, page)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn write_i8(k: &[f32], v: &[f32], slot: usize, page: &mut [u8]) {
                attention::write::write_i8(k, v, slot, page)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn conv(
                rows: &[&[f32]],
                taps: &[&[f32]],
                bias: Option<&[f32]>,
                silu: bool,
                out: &mut [f32],
            ) {
                recurrent::conv(rows, taps, bias, silu, out)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn recur(r: &Recur<'_>, state: &mut [f32], out: &mut [f32; 16]) {
                recurrent::recur::<$v>(r, state, out)
            }
            Floats {
                gemm_f32,
                gemm_f16,
                gemm_bf16,
                gemm_grouped,
                quantize,
                pack_q4,
                pack_q8,
                quantize_grouped,
                rms_norm,
                mean_square,
                cut,
                layer_norm,
                rope,
                gate,
                add,
                add_scaled,
                score,
                softcap,
                attend_f32,
                attend_f16,
                attend_i8,
                write_f32,
                write_f16,
                write_i8,
                conv,
                recur,
            }
        };
    };
}
pub(super) use instantiate;

/// How a stored float becomes lanes.
pub(super) trait Stored {
    const WIDTH: usize;
    fn load<V: F32x16>(line: &[u8]) -> V;
}
pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Bf16;

impl Stored for F32 {
    const WIDTH: usize = 4;
    #[inline(always)]
    fn load<V: F32x16>(line: &[u8]) -> V {
        V::load(super::cast(line))
    }
}
impl Stored for F16 {
    const WIDTH: usize = 2;
    #[inline(always)]
    fn load<V: F32x16>(line: &[u8]) -> V {
        V::load_f16(super::cast(line))
    }
}
impl Stored for Bf16 {
    const WIDTH: usize = 2;
    #[inline(always)]
    fn load<V: F32x16>(line: &[u8]) -> V {
        V::load_bf16(super::cast(line))
    }
}

/// `y[t][n] = sum over k of x[t][k] * w[n][k]`, one chain of fused multiply-adds per output.
/// `w`: row blocks of stored floats; `x`: `[m, k]`; `y`: `[m, 16 * row blocks]`.
#[inline(always)]
pub(super) fn gemm<V: F32x16, S: Stored>(w: &[u8], k: usize, x: &[f32], y: &mut [f32]) {
    let size = k * ROWS * S::WIDTH;
    let width = w.len() / size * ROWS;
    let m = x.len() / k;
    let mut t = 0;
    while t < m {
        // Tokens share each loaded line; row blocks share nothing but hide the latency of a chain.
        let step = match m - t {
            4.. => 4,
            2.. => 2,
            _ => 1,
        };
        let (x, y) = (&x[t * k..(t + step) * k], &mut y[t * width..(t + step) * width]);
        let mut n = 0;
        while n < width {
            let blocks = if V::WIDE && width - n >= 4 * ROWS { 4 } else { 1 };
            let w = &w[n / ROWS * size..][..blocks * size];
            match (step, blocks) {
                (4, 4) => tile::<V, S, 4, 4>(w, k, x, y, n, width),
                (4, _) => tile::<V, S, 4, 1>(w, k, x, y, n, width),
                (2, 4) => tile::<V, S, 2, 4>(w, k, x, y, n, width),
                (2, _) => tile::<V, S, 2, 1>(w, k, x, y, n, width),
                (_, 4) => tile::<V, S, 1, 4>(w, k, x, y, n, width),
                _ => tile::<V, S, 1, 1>(w, k, x, y, n, width),
            }
            n += blocks * ROWS;
        }
        t += step;
    }
}

#[inline(always)]
fn tile<V: F32x16, S: Stored, const M: usize, const R: usize>(
    w: &[u8],
    k: usize,
    x: &[f32],
    y: &mut [f32],
    n: usize,
    width: usize,
) {
    let mut acc = [[V::splat(0.0); R]; M];
    let line = ROWS * S::WIDTH;
    let rows: [&[u8]; R] = std::array::from_fn(|r| &w[r * k * line..][..k * line]);
    let xs: [&[f32]; M] = std::array::from_fn(|t| &x[t * k..][..k]);
    for i in 0..k {
        let mut w = [V::splat(0.0); R];
        for r in 0..R {
            w[r] = S::load(&rows[r][i * line..][..line]);
        }
        for t in 0..M {
            let x = V::splat(xs[t][i]);
            for r in 0..R {
                acc[t][r] = w[r].fma(x, acc[t][r]);
            }
        }
    }
    for t in 0..M {
        for r in 0..R {
            acc[t][r].store(super::array_mut(y, t * width + n + r * ROWS));
        }
    }
}

/// Quantizes at most [`BLOCK`] activations: `s = amax / 127`, `q = rne(x * (127 / amax))`. `q` may be
/// longer than `x`; the rest becomes zero. Gives the scale and the sum of all `q`; `sums` are by group.
#[inline(always)]
pub(super) fn quantize(x: &[f32], q: &mut [i8], sums: &mut [i16; GROUPS]) -> (f32, i32) {
    let amax = quant::amax(x);
    *sums = [0; GROUPS];
    if amax < quant::TINY {
        q.fill(0);
        return (0.0, 0);
    }
    let inv = quant::MAX / amax;
    // 1.5 * 2^23: adding it rounds to an integer, ties to even, that stands in the low mantissa bits.
    const MAGIC: f32 = 12_582_912.0;
    let (head, rest) = q.split_at_mut(x.len());
    for (q, &x) in head.iter_mut().zip(x) {
        *q = (x * inv + MAGIC).to_bits() as i8;
    }
    rest.fill(0);
    for (sum, q) in sums.iter_mut().zip(q.chunks(GROUP)) {
        *sum = q.iter().map(|&q| i16::from(q)).sum();
    }
    (amax / quant::MAX, sums.iter().map(|&s| i32::from(s)).sum())
}

/// Quantizes one block of 16 rows of `k` weights each and packs it.
#[inline(always)]
pub(super) fn pack_q8(x: &[[f32; BLOCK]; ROWS], k: usize, out: &mut [u8]) {
    let mut rows = [BlockQ8::ZERO; ROWS];
    for (row, x) in rows.iter_mut().zip(x) {
        *row = BlockQ8::quantize(&x[..k]);
    }
    layout::pack_q8(&rows, out);
}

/// Sixteen partial sums, then a tree 8-4-2-1.
#[inline(always)]
pub(super) fn tree(mut a: [f32; 16]) -> f32 {
    let mut n = 8;
    while n > 0 {
        for i in 0..n {
            a[i] += a[i + n];
        }
        n /= 2;
    }
    a[0]
}

/// `mean((x - from)^2)`.
#[inline(always)]
fn mean_square_from(x: &[f32], from: f32) -> f32 {
    let mut sums = [0.0f32; 16];
    let (chunks, rest) = x.as_chunks::<16>();
    for x in chunks {
        for i in 0..16 {
            sums[i] = (x[i] - from).mul_add(x[i] - from, sums[i]);
        }
    }
    for (sum, &x) in sums.iter_mut().zip(rest) {
        *sum = (x - from).mul_add(x - from, *sum);
    }
    tree(sums) / x.len() as f32
}

/// `mean(x^2)`.
#[inline(always)]
pub(super) fn mean_square(x: &[f32]) -> f32 {
    mean_square_from(x, 0.0)
}

/// `x = max(0, x - mean(x) - times * sqrt(mean((x - mean(x))^2)))`: of normally distributed numbers, what stands out
/// (Gemma 3n).
#[inline(always)]
pub(super) fn cut(x: &mut [f32], times: f32) {
    let mut sums = [0.0f32; 16];
    let (chunks, rest) = x.as_chunks::<16>();
    for x in chunks {
        for i in 0..16 {
            sums[i] += x[i];
        }
    }
    for (sum, &x) in sums.iter_mut().zip(rest) {
        *sum += x;
    }
    let mean = tree(sums) / x.len() as f32;
    let bar = mean_square_from(x, mean).sqrt().mul_add(times, mean);
    for x in x {
        *x = (*x - bar).max(0.0);
    }
}

/// `out = x / sqrt(mean(x^2) + eps) * gain` (Zhang & Sennrich 2019).
#[inline(always)]
pub(super) fn rms_norm(x: &[f32], gain: &[f32], eps: f32, out: &mut [f32]) {
    let inv = 1.0 / (mean_square(x) + eps).sqrt();
    for ((out, &x), &gain) in out.iter_mut().zip(x).zip(gain) {
        *out = x * inv * gain;
    }
}

/// `out = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * gain + bias` (Ba et al. 2016).
#[inline(always)]
pub(super) fn layer_norm(x: &[f32], gain: &[f32], bias: Option<&[f32]>, eps: f32, out: &mut [f32]) {
    let (chunks, rest) = x.as_chunks::<16>();
    let mut sums = [0.0f32; 16];
    for x in chunks {
        for i in 0..16 {
            sums[i] += x[i];
        }
    }
    for (sum, &x) in sums.iter_mut().zip(rest) {
        *sum += x;
    }
    let mean = tree(sums) / x.len() as f32;
    let mut sums = [0.0f32; 16];
    for x in chunks {
        for i in 0..16 {
            sums[i] = (x[i] - mean).mul_add(x[i] - mean, sums[i]);
        }
    }
    for (sum, &x) in sums.iter_mut().zip(rest) {
        *sum = (x - mean).mul_add(x - mean, *sum);
    }
    let inv = 1.0 / (tree(sums) / x.len() as f32 + eps).sqrt();
    for ((out, &x), &gain) in out.iter_mut().zip(x).zip(gain) {
        *out = (x - mean) * inv * gain;
    }
    if let Some(bias) = bias {
        add(out, bias);
    }
}

/// Rotates one head (Su et al. 2021): `x[i]` and `x[i + half]` are a pair, or `x[2 i]` and `x[2 i + 1]` if
/// `interleaved`. `cos_sin`: `half` cosines, then `half` sines.
#[inline(always)]
pub(super) fn rope(x: &mut [f32], cos_sin: &[f32], interleaved: bool) {
    let half = cos_sin.len() / 2;
    let (cos, sin) = cos_sin.split_at(half);
    if interleaved {
        for (i, pair) in x[..2 * half].chunks_exact_mut(2).enumerate() {
            let (p, q) = (pair[0], pair[1]);
            pair[0] = p.mul_add(cos[i], -(q * sin[i]));
            pair[1] = q.mul_add(cos[i], p * sin[i]);
        }
        return;
    }
    let (a, b) = x[..2 * half].split_at_mut(half);
    for i in 0..half {
        let (p, q) = (a[i], b[i]);
        a[i] = p.mul_add(cos[i], -(q * sin[i]));
        b[i] = q.mul_add(cos[i], p * sin[i]);
    }
}

/// `x += y`.
#[inline(always)]
pub(super) fn add(x: &mut [f32], y: &[f32]) {
    for (x, &y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// `x = fma(scale, y, x)`.
#[inline(always)]
pub(super) fn add_scaled(x: &mut [f32], scale: f32, y: &[f32]) {
    for (x, &y) in x.iter_mut().zip(y) {
        *x = scale.mul_add(y, *x);
    }
}

/// Scores of logits; see [`Score`].
#[inline(always)]
pub(super) fn score(score: Score, x: &mut [f32]) {
    match score {
        Score::Sigmoid => {
            for x in x {
                *x = sigmoid(*x);
            }
        }
        Score::Softmax => {
            let mut max = f32::NEG_INFINITY;
            for &x in &*x {
                max = max.max(x);
            }
            let mut sums = [0.0f32; 16];
            for x in x.chunks_mut(16) {
                for (x, sum) in x.iter_mut().zip(&mut sums) {
                    *x = exp(*x - max);
                    *sum += *x;
                }
            }
            let total = tree(sums);
            for x in x {
                *x /= total;
            }
        }
    }
}

/// `x = cap * tanh(x / cap)` (Gemma 2's soft cap).
#[inline(always)]
pub(super) fn softcap(x: &mut [f32], cap: f32) {
    let twice = 2.0 / cap;
    for x in x {
        // tanh(z) = 2 * sigmoid(2 z) - 1
        *x = cap * sigmoid(*x * twice).mul_add(2.0, -1.0);
    }
}
