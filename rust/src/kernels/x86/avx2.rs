//! AVX2 with FMA and F16C: 16 rows are two registers of 8 lanes.
//!
//! int4: `vpmaddubsw` multiplies codes by activations and adds pairs in i16. Eight of them fit
//! (15 * 127 * 2 * 8 = 30480 < 2^15), which is one group; `vpmaddwd` with the group's scale makes i32.
//! int8: `vpmaddubsw` takes unsigned times signed, so the sign of the weight moves to the activation;
//! |w|, |a| <= 127 keeps a pair below 2^15 (127 * 127 * 2 = 32258).

use super::super::attention::int8::Dot;
use super::super::layout::{Q4_HEADER, Q8_HEADER, ROWS};
use super::super::simd::F32x16;
use super::super::{Acts, Form, Kernels, float, scalar};
use super::grouped;
use crate::quant::BLOCK;
use std::arch::x86_64::*;

float::instantiate!(Ymm2, YmmSums, "avx2,fma,f16c");

pub(in super::super) const KERNELS: Kernels = Kernels {
    name: "avx2",
    needs: &["avx2", "fma", "f16c"],
    gemm_q4,
    gemm_q8,
    gemm_grouped: grouped::gemm_avx2,
    float: FLOATS,
    ..scalar::KERNELS
};

/// Sixteen sums in four registers: what `vpmaddwd` gives of 4 x 4 products, two lanes a sum.
#[derive(Clone, Copy)]
pub(super) struct YmmSums([__m256i; 4]);

// SAFETY (for every block of this impl): as for `Ymm2`, below.
impl Dot for YmmSums {
    const TILE: usize = 2;
    type Line = [__m256i; 4];
    type Four = __m256i;

    #[inline(always)]
    fn zero() -> Self {
        // SAFETY: see above.
        YmmSums([unsafe { _mm256_setzero_si256() }; 4])
    }
    #[inline(always)]
    fn line(bytes: &[u8; 64]) -> Self::Line {
        let mut line = Self::zero().0;
        for h in 0..4 {
            // SAFETY: see above.
            unsafe {
                let part = _mm_loadu_si128(bytes.as_ptr().add(16 * h).cast());
                line[h] = _mm256_cvtepi8_epi16(part);
            }
        }
        line
    }
    #[inline(always)]
    fn four(q: &[i16; 4]) -> Self::Four {
        // SAFETY: see above.
        unsafe { _mm256_broadcastq_epi64(_mm_loadl_epi64(q.as_ptr().cast())) }
    }
    #[inline(always)]
    fn add(mut self, line: Self::Line, q: Self::Four) -> Self {
        for h in 0..4 {
            // SAFETY: see above.
            self.0[h] = unsafe { _mm256_add_epi32(self.0[h], _mm256_madd_epi16(line[h], q)) };
        }
        self
    }
    #[inline(always)]
    fn store(self, out: &mut [f32; 16]) {
        for h in 0..2 {
            // SAFETY: see above.
            unsafe {
                // Sums 0 1 4 5 2 3 6 7 of eight.
                let sums = _mm256_hadd_epi32(self.0[2 * h], self.0[2 * h + 1]);
                let sums = _mm256_permute4x64_epi64::<0b11_01_10_00>(sums);
                _mm256_storeu_ps(out.as_mut_ptr().add(8 * h), _mm256_cvtepi32_ps(sums));
            }
        }
    }
}

/// Sixteen f32 in two registers.
///
/// Every method is inlined into a function compiled for AVX2, which only this set's callers reach.
#[derive(Clone, Copy)]
pub(super) struct Ymm2(__m256, __m256);

// SAFETY (for every block of this impl): the code runs only inside `FLOATS` of this set, whose CPU
// features were checked, and the loads and stores are of whole arrays behind references.
impl F32x16 for Ymm2 {
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: see above.
        let x = unsafe { _mm256_set1_ps(x) };
        Ymm2(x, x)
    }
    #[inline(always)]
    fn load(x: &[f32; 16]) -> Self {
        // SAFETY: see above.
        unsafe { Ymm2(_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))) }
    }
    #[inline(always)]
    fn load_f16(x: &[u16; 16]) -> Self {
        // SAFETY: see above.
        unsafe {
            let p = x.as_ptr();
            Ymm2(
                _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast())),
            )
        }
    }
    #[inline(always)]
    fn load_bf16(x: &[u16; 16]) -> Self {
        // SAFETY: see above.
        unsafe {
            let wide = |p: *const u16| {
                let x = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x))
            };
            Ymm2(wide(x.as_ptr()), wide(x.as_ptr().add(8)))
        }
    }
    #[inline(always)]
    fn load_i8(x: &[i8; 16]) -> Self {
        // SAFETY: see above.
        unsafe {
            let wide =
                |p: *const i8| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())));
            Ymm2(wide(x.as_ptr()), wide(x.as_ptr().add(8)))
        }
    }
    #[inline(always)]
    fn lookup(table: &[f32; 16], i: &[u32; 16]) -> Self {
        // SAFETY: see above.
        unsafe {
            let table = [_mm256_loadu_ps(table.as_ptr()), _mm256_loadu_ps(table.as_ptr().add(8))];
            let eight = |i: *const u32| {
                let i = _mm256_loadu_si256(i.cast());
                let low = _mm256_permutevar8x32_ps(table[0], i);
                let high = _mm256_permutevar8x32_ps(table[1], i);
                // Bit 3 of the index in the sign.
                _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(i)))
            };
            Ymm2(eight(i.as_ptr()), eight(i.as_ptr().add(8)))
        }
    }
    #[inline(always)]
    fn store(self, out: &mut [f32; 16]) {
        // SAFETY: see above.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), self.0);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), self.1);
        }
    }
    #[inline(always)]
    fn store_f16(self, out: &mut [u16; 16]) {
        // SAFETY: see above.
        unsafe {
            let p = out.as_mut_ptr();
            let half = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0);
            _mm_storeu_si128(p.cast(), half);
            let half = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.1);
            _mm_storeu_si128(p.add(8).cast(), half);
        }
    }
    #[inline(always)]
    fn fma(self, a: Self, b: Self) -> Self {
        // SAFETY: see above.
        unsafe { Ymm2(_mm256_fmadd_ps(self.0, a.0, b.0), _mm256_fmadd_ps(self.1, a.1, b.1)) }
    }
    #[inline(always)]
    fn mul(self, a: Self) -> Self {
        // SAFETY: see above.
        unsafe { Ymm2(_mm256_mul_ps(self.0, a.0), _mm256_mul_ps(self.1, a.1)) }
    }
    #[inline(always)]
    fn add(self, a: Self) -> Self {
        // SAFETY: see above.
        unsafe { Ymm2(_mm256_add_ps(self.0, a.0), _mm256_add_ps(self.1, a.1)) }
    }
    #[inline(always)]
    fn sub(self, a: Self) -> Self {
        // SAFETY: see above.
        unsafe { Ymm2(_mm256_sub_ps(self.0, a.0), _mm256_sub_ps(self.1, a.1)) }
    }
    #[inline(always)]
    fn div(self, a: Self) -> Self {
        // SAFETY: see above.
        unsafe { Ymm2(_mm256_div_ps(self.0, a.0), _mm256_div_ps(self.1, a.1)) }
    }
    #[inline(always)]
    fn min(self, a: Self) -> Self {
        // SAFETY: see above.
        unsafe { Ymm2(_mm256_min_ps(self.0, a.0), _mm256_min_ps(self.1, a.1)) }
    }
    #[inline(always)]
    fn max(self, a: Self) -> Self {
        // SAFETY: see above.
        unsafe { Ymm2(_mm256_max_ps(self.0, a.0), _mm256_max_ps(self.1, a.1)) }
    }
    #[inline(always)]
    fn abs(self) -> Self {
        // SAFETY: see above.
        unsafe {
            let sign = _mm256_set1_ps(-0.0);
            Ymm2(_mm256_andnot_ps(sign, self.0), _mm256_andnot_ps(sign, self.1))
        }
    }
    #[inline(always)]
    fn floor(self) -> Self {
        // SAFETY: see above.
        unsafe { Ymm2(_mm256_floor_ps(self.0), _mm256_floor_ps(self.1)) }
    }
    #[inline(always)]
    fn round(self) -> Self {
        const EVEN: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        // SAFETY: see above.
        unsafe { Ymm2(_mm256_round_ps::<EVEN>(self.0), _mm256_round_ps::<EVEN>(self.1)) }
    }
    #[inline(always)]
    fn if_less(self, a: Self, yes: Self, no: Self) -> Self {
        // SAFETY: see above.
        unsafe {
            let less = _mm256_cmp_ps::<_CMP_LT_OQ>(self.0, a.0);
            let first = _mm256_blendv_ps(no.0, yes.0, less);
            let less = _mm256_cmp_ps::<_CMP_LT_OQ>(self.1, a.1);
            Ymm2(first, _mm256_blendv_ps(no.1, yes.1, less))
        }
    }
    #[inline(always)]
    fn transpose(x: &mut [Self; 16]) {
        // SAFETY: see above.
        unsafe {
            // 4 x 4 numbers of each 128 bits, then the 4 x 4 of these.
            for x in x.as_chunks_mut::<4>().0 {
                let first = [x[0].0, x[1].0, x[2].0, x[3].0];
                let second = [x[0].1, x[1].1, x[2].1, x[3].1];
                let (first, second) = (transpose_4(first), transpose_4(second));
                for i in 0..4 {
                    x[i] = Ymm2(first[i], second[i]);
                }
            }
            for i in 0..4 {
                let [a, b, c, d] = [x[i], x[i + 4], x[i + 8], x[i + 12]];
                const LOW: i32 = 0x20;
                const HIGH: i32 = 0x31;
                x[i] = Ymm2(
                    _mm256_permute2f128_ps::<LOW>(a.0, b.0),
                    _mm256_permute2f128_ps::<LOW>(c.0, d.0),
                );
                x[i + 4] = Ymm2(
                    _mm256_permute2f128_ps::<HIGH>(a.0, b.0),
                    _mm256_permute2f128_ps::<HIGH>(c.0, d.0),
                );
                x[i + 8] = Ymm2(
                    _mm256_permute2f128_ps::<LOW>(a.1, b.1),
                    _mm256_permute2f128_ps::<LOW>(c.1, d.1),
                );
                x[i + 12] = Ymm2(
                    _mm256_permute2f128_ps::<HIGH>(a.1, b.1),
                    _mm256_permute2f128_ps::<HIGH>(c.1, d.1),
                );
            }
        }
    }
    #[inline(always)]
    fn prefetch(p: *const u8) {
        // SAFETY: a prefetch reads nothing that the program sees and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
}

/// Number `j` of each 128 bits of vector `i` becomes number `i` of vector `j`.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose_4([a, b, c, d]: [__m256; 4]) -> [__m256; 4] {
    let [e, f] = [_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)];
    let [g, h] = [_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d)];
    [
        _mm256_shuffle_ps::<0x44>(e, g),
        _mm256_shuffle_ps::<0xee>(e, g),
        _mm256_shuffle_ps::<0x44>(f, h),
        _mm256_shuffle_ps::<0xee>(f, h),
    ]
}

/// Bytes read ahead of the multiplication. Speed only, never results.
const NEAR: usize = 4608;

#[target_feature(enable = "avx2,fma")]
unsafe fn gemm_q4(w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    // SAFETY: the shapes were checked by `Kernels::gemm`.
    unsafe {
        for (rb, w) in w.chunks_exact(Form::Q4.row_block_bytes(a.k)).enumerate() {
            let mut t = 0;
            while t < a.m {
                t += match a.m - t {
                    4.. => rows_q4::<4, 1>(w, a, y, rb, t),
                    2.. => rows_q4::<2, 2>(w, a, y, rb, t),
                    _ => rows_q4::<1, 2>(w, a, y, rb, t),
                };
            }
        }
    }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn gemm_q8(w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    // SAFETY: the shapes were checked by `Kernels::gemm`.
    unsafe {
        for (rb, w) in w.chunks_exact(Form::Q8.row_block_bytes(a.k)).enumerate() {
            let mut t = 0;
            while t < a.m {
                t += match a.m - t {
                    4.. => rows_q8::<4, 1>(w, a, y, rb, t),
                    2.. => rows_q8::<2, 2>(w, a, y, rb, t),
                    _ => rows_q8::<1, 2>(w, a, y, rb, t),
                };
            }
        }
    }
}

/// Four consecutive int8 in every 32-bit lane.
///
/// # Safety
/// Four bytes from `p + 4 * j` on can be read.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn four(p: *const i8, j: usize) -> __m256i {
    // SAFETY: the caller's promise; the read may be unaligned.
    _mm256_set1_epi32(unsafe { p.add(4 * j).cast::<i32>().read_unaligned() })
}

/// Asks for the line that this stream needs next.
#[inline]
#[target_feature(enable = "sse")]
pub(super) fn prefetch(p: *const u8) {
    _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(NEAR).cast());
}

/// The scales of two groups for 8 rows, as i32 lanes: `codes` points at their 8 bytes.
///
/// # Safety
/// Eight bytes from `codes` on can be read.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn scales(codes: *const u8) -> (__m256i, __m256i) {
    // SAFETY: the caller's promise.
    let codes = _mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(codes.cast()) });
    let one = _mm256_set1_epi32(1);
    let low = _mm256_and_si256(codes, _mm256_set1_epi32(15));
    (_mm256_add_epi32(low, one), _mm256_add_epi32(_mm256_srli_epi32::<4>(codes), one))
}

/// Row block `rb` against tokens `t0..t0 + M`, `H` halves of 8 rows at once (both, where the registers hold
/// them). Gives `M`.
///
/// # Safety
/// Shapes as `Kernels::gemm` checks them, and `t0 + M <= a.m`.
#[target_feature(enable = "avx2,fma")]
unsafe fn rows_q4<const M: usize, const H: usize>(
    w: &[u8],
    a: &Acts<'_>,
    y: &mut [f32],
    rb: usize,
    t0: usize,
) -> usize {
    let nibble = _mm256_set1_epi8(0x0f);
    let zero = _mm256_setzero_si256();
    // SAFETY: every address below lies in this row block of the weights, in `a` or in `y`.
    unsafe {
        let mut p = w.as_ptr();
        let mut acc = [[_mm256_setzero_ps(); M]; 2];
        for b in 0..a.blocks() {
            let len = a.len(b);
            let q = a.q.as_ptr().add(b * BLOCK * a.m + t0 * len);
            let at = b * a.m + t0;
            for line in 0..Q4_HEADER / 64 {
                prefetch(p.add(64 * line));
            }
            for h0 in (0..2).step_by(H) {
                let mut sum = [[zero; H]; M];
                for t in 0..len / 64 {
                    let lines = p.add(Q4_HEADER + 512 * t + 32 * h0);
                    let (mut c0, mut c1) = ([[zero; H]; M], [[zero; H]; M]);
                    for j in 0..8 {
                        if h0 == 0 {
                            prefetch(lines.add(64 * j));
                        }
                        let (mut lo, mut hi) = ([zero; H], [zero; H]);
                        for h in 0..H {
                            let v = _mm256_load_si256(lines.add(64 * j + 32 * h).cast());
                            lo[h] = _mm256_and_si256(v, nibble);
                            hi[h] = _mm256_and_si256(_mm256_srli_epi16::<4>(v), nibble);
                        }
                        for i in 0..M {
                            let q = q.add(i * len + 64 * t);
                            let (x0, x1) = (four(q, j), four(q, j + 8));
                            for h in 0..H {
                                let x = _mm256_maddubs_epi16(lo[h], x0);
                                c0[i][h] = _mm256_add_epi16(c0[i][h], x);
                                let x = _mm256_maddubs_epi16(hi[h], x1);
                                c1[i][h] = _mm256_add_epi16(c1[i][h], x);
                            }
                        }
                    }
                    for h in 0..H {
                        let (s0, s1) = scales(p.add(64 + 16 * t + 8 * (h0 + h)));
                        // The scale in both halves of a lane: vpmaddwd multiplies and adds the two sums.
                        let s0 = _mm256_or_si256(s0, _mm256_slli_epi32::<16>(s0));
                        let s1 = _mm256_or_si256(s1, _mm256_slli_epi32::<16>(s1));
                        let mn = _mm_load_si128(p.add(128 + 32 * t + 16 * (h0 + h)).cast());
                        let mn = _mm256_cvtepi8_epi16(mn);
                        for i in 0..M {
                            let x = _mm256_add_epi32(
                                _mm256_madd_epi16(c0[i][h], s0),
                                _mm256_madd_epi16(c1[i][h], s1),
                            );
                            let pair = a.sums.as_ptr().add(at + i).cast::<i32>().add(t);
                            let pair = _mm256_set1_epi32(pair.read_unaligned());
                            let x = _mm256_sub_epi32(x, _mm256_madd_epi16(mn, pair));
                            sum[i][h] = _mm256_add_epi32(sum[i][h], x);
                        }
                    }
                }
                for h in 0..H {
                    let d = _mm256_load_ps(p.cast::<f32>().add(8 * (h0 + h)));
                    for i in 0..M {
                        let scale = _mm256_mul_ps(d, _mm256_set1_ps(*a.s.get_unchecked(at + i)));
                        let dot = _mm256_cvtepi32_ps(sum[i][h]);
                        acc[h0 + h][i] = _mm256_fmadd_ps(dot, scale, acc[h0 + h][i]);
                    }
                }
            }
            p = p.add(Q4_HEADER + len / 2 * ROWS);
        }
        store(&acc, y, a.m, rb, t0);
    }
    M
}

/// As [`rows_q4`], for int8 weights.
///
/// # Safety
/// As [`rows_q4`].
#[target_feature(enable = "avx2,fma")]
unsafe fn rows_q8<const M: usize, const H: usize>(
    w: &[u8],
    a: &Acts<'_>,
    y: &mut [f32],
    rb: usize,
    t0: usize,
) -> usize {
    let ones = _mm256_set1_epi16(1);
    // SAFETY: as in `rows_q4`.
    unsafe {
        let mut p = w.as_ptr();
        let mut acc = [[_mm256_setzero_ps(); M]; 2];
        for b in 0..a.blocks() {
            let len = a.len(b);
            let q = a.q.as_ptr().add(b * BLOCK * a.m + t0 * len);
            let at = b * a.m + t0;
            prefetch(p);
            for h0 in (0..2).step_by(H) {
                let lines = p.add(Q8_HEADER + 32 * h0);
                let mut sum = [[_mm256_setzero_si256(); H]; M];
                for j in 0..len / 4 {
                    if h0 == 0 {
                        prefetch(lines.add(64 * j));
                    }
                    let mut v = [_mm256_setzero_si256(); H];
                    for h in 0..H {
                        v[h] = _mm256_load_si256(lines.add(64 * j + 32 * h).cast());
                    }
                    for i in 0..M {
                        let x = four(q.add(i * len), j);
                        for h in 0..H {
                            let x = _mm256_sign_epi8(x, v[h]);
                            let x = _mm256_maddubs_epi16(_mm256_abs_epi8(v[h]), x);
                            sum[i][h] = _mm256_add_epi32(sum[i][h], _mm256_madd_epi16(x, ones));
                        }
                    }
                }
                for h in 0..H {
                    let d = _mm256_load_ps(p.cast::<f32>().add(8 * (h0 + h)));
                    for i in 0..M {
                        let scale = _mm256_mul_ps(d, _mm256_set1_ps(*a.s.get_unchecked(at + i)));
                        let dot = _mm256_cvtepi32_ps(sum[i][h]);
                        acc[h0 + h][i] = _mm256_fmadd_ps(dot, scale, acc[h0 + h][i]);
                    }
                }
            }
            p = p.add(Q8_HEADER + len * ROWS);
        }
        store(&acc, y, a.m, rb, t0);
    }
    M
}

/// Writes the sums of `M` tokens from `t0` on to row block `rb` of `y`, which has `m` rows.
///
/// # Safety
/// `t0 + M <= m`, and `y` is `[m, 16 * row blocks]` with more than `rb` row blocks.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn store<const M: usize>(
    acc: &[[__m256; M]; 2],
    y: &mut [f32],
    m: usize,
    rb: usize,
    t0: usize,
) {
    let width = y.len() / m;
    for (h, acc) in acc.iter().enumerate() {
        for (i, &acc) in acc.iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe {
                let y = y.as_mut_ptr().add((t0 + i) * width + rb * ROWS + 8 * h);
                _mm256_storeu_ps(y, acc);
            }
        }
    }
}
