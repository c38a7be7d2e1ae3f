//! The float kernels on 512-bit registers. No integer product is here.

use super::super::attention::int8::Dot;
use super::super::float;
use super::super::simd::F32x16;
use std::arch::x86_64::*;

float::instantiate!(Zmm, ZmmSums, "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c");

/// Sixteen f32 in one register.
///
/// Every method is inlined into a function compiled for AVX-512, which only this set's callers reach.
#[derive(Clone, Copy)]
pub(super) struct Zmm(__m512);

// SAFETY (for every block of this impl): the code runs only inside `FLOATS` of this set, whose CPU
// features were checked, and the loads and stores are of whole arrays behind references.
impl F32x16 for Zmm {
    const WIDE: bool = true;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: see above.
        Zmm(unsafe { _mm512_set1_ps(x) })
    }
    #[inline(always)]
    fn load(x: &[f32; 16]) -> Self {
        // SAFETY: see above.
        Zmm(unsafe { _mm512_loadu_ps(x.as_ptr()) })
    }
    #[inline(always)]
    fn load_f16(x: &[u16; 16]) -> Self {
        // SAFETY: see above.
        Zmm(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) })
    }
    #[inline(always)]
    fn load_bf16(x: &[u16; 16]) -> Self {
        // SAFETY: see above.
        unsafe {
            let x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
            Zmm(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(x)))
        }
    }
    #[inline(always)]
    fn load_i8(x: &[i8; 16]) -> Self {
        // SAFETY: see above.
        unsafe {
            let x = _mm_loadu_si128(x.as_ptr().cast());
            Zmm(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x)))
        }
    }
    #[inline(always)]
    fn lookup(table: &[f32; 16], i: &[u32; 16]) -> Self {
        // SAFETY: see above.
        unsafe {
            let i = _mm512_loadu_si512(i.as_ptr().cast());
            Zmm(_mm512_permutexvar_ps(i, _mm512_loadu_ps(table.as_ptr())))
        }
    }
    #[inline(always)]
    fn store(self, out: &mut [f32; 16]) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), self.0) }
    }
    #[inline(always)]
    fn store_f16(self, out: &mut [u16; 16]) {
        // SAFETY: see above.
        unsafe {
            let half = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0);
            _mm256_storeu_si256(out.as_mut_ptr().cast(), half);
        }
    }
    #[inline(always)]
    fn fma(self, a: Self, b: Self) -> Self {
        // SAFETY: see above.
        Zmm(unsafe { _mm512_fmadd_ps(self.0, a.0, b.0) })
    }
    #[inline(always)]
    fn mul(self, a: Self) -> Self {
        // SAFETY: see above.
        Zmm(unsafe { _mm512_mul_ps(self.0, a.0) })
    }
    #[inline(always)]
    fn add(self, a: Self) -> Self {
        // SAFETY: see above.
        Zmm(unsafe { _mm512_add_ps(self.0, a.0) })
    }
    #[inline(always)]
    fn sub(self, a: Self) -> Self {
        // SAFETY: see above.
        Zmm(unsafe { _mm512_sub_ps(self.0, a.0) })
    }
    #[inline(always)]
    fn div(self, a: Self) -> Self {
        // SAFETY: see above.
        Zmm(unsafe { _mm512_div_ps(self.0, a.0) })
    }
    #[inline(always)]
    fn min(self, a: Self) -> Self {
        // SAFETY: see above.
        Zmm(unsafe { _mm512_min_ps(self.0, a.0) })
    }
    #[inline(always)]
    fn max(self, a: Self) -> Self {
        // SAFETY: see above.
        Zmm(unsafe { _mm512_max_ps(self.0, a.0) })
    }
    #[inline(always)]
    fn abs(self) -> Self {
        // SAFETY: see above.
        Zmm(unsafe { _mm512_abs_ps(self.0) })
    }
    #[inline(always)]
    fn floor(self) -> Self {
        // SAFETY: see above.
        Zmm(unsafe {
            _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>(self.0)
        })
    }
    #[inline(always)]
    fn round(self) -> Self {
        // SAFETY: see above.
        Zmm(unsafe {
            _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0)
        })
    }
    #[inline(always)]
    fn if_less(self, a: Self, yes: Self, no: Self) -> Self {
        // SAFETY: see above.
        unsafe {
            let less = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, a.0);
            Zmm(_mm512_mask_blend_ps(less, no.0, yes.0))
        }
    }
    #[inline(always)]
    fn transpose(x: &mut [Self; 16]) {
        // SAFETY: see above.
        unsafe {
            // 4 x 4 numbers of each 128 bits, then the 4 x 4 of these.
            for x in x.as_chunks_mut::<4>().0 {
                let [a, b] =
                    [_mm512_unpacklo_ps(x[0].0, x[1].0), _mm512_unpackhi_ps(x[0].0, x[1].0)];
                let [c, d] =
                    [_mm512_unpacklo_ps(x[2].0, x[3].0), _mm512_unpackhi_ps(x[2].0, x[3].0)];
                x[0] = Zmm(_mm512_shuffle_ps::<0x44>(a, c));
                x[1] = Zmm(_mm512_shuffle_ps::<0xee>(a, c));
                x[2] = Zmm(_mm512_shuffle_ps::<0x44>(b, d));
                x[3] = Zmm(_mm512_shuffle_ps::<0xee>(b, d));
            }
            for i in 0..4 {
                let [a, b, c, d] = [x[i].0, x[i + 4].0, x[i + 8].0, x[i + 12].0];
                let [e, f] =
                    [_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b)];
                let [g, h] =
                    [_mm512_shuffle_f32x4::<0x44>(c, d), _mm512_shuffle_f32x4::<0xee>(c, d)];
                x[i] = Zmm(_mm512_shuffle_f32x4::<0x88>(e, g));
                x[i + 4] = Zmm(_mm512_shuffle_f32x4::<0xdd>(e, g));
                x[i + 8] = Zmm(_mm512_shuffle_f32x4::<0x88>(f, h));
                x[i + 12] = Zmm(_mm512_shuffle_f32x4::<0xdd>(f, h));
            }
        }
    }
    #[inline(always)]
    fn prefetch(p: *const u8) {
        // SAFETY: a prefetch reads nothing that the program sees and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
}

/// Sixteen sums in two registers: what `vpdpwssd` adds up of 8 x 4 products, two lanes a sum.
#[derive(Clone, Copy)]
pub(super) struct ZmmSums([__m512i; 2]);

// SAFETY (for every block of this impl): as for `Zmm`.
impl Dot for ZmmSums {
    const TILE: usize = 8;
    type Line = [__m512i; 2];
    type Four = __m512i;

    #[inline(always)]
    fn zero() -> Self {
        // SAFETY: see above.
        ZmmSums([unsafe { _mm512_setzero_si512() }; 2])
    }
    #[inline(always)]
    fn line(bytes: &[u8; 64]) -> Self::Line {
        // SAFETY: see above.
        unsafe {
            let p = bytes.as_ptr();
            [
                _mm512_cvtepi8_epi16(_mm256_loadu_si256(p.cast())),
                _mm512_cvtepi8_epi16(_mm256_loadu_si256(p.add(32).cast())),
            ]
        }
    }
    #[inline(always)]
    fn four(q: &[i16; 4]) -> Self::Four {
        // SAFETY: see above.
        unsafe { _mm512_broadcastq_epi64(_mm_loadl_epi64(q.as_ptr().cast())) }
    }
    #[inline(always)]
    fn add(self, line: Self::Line, q: Self::Four) -> Self {
        // SAFETY: see above.
        unsafe {
            ZmmSums([
                _mm512_dpwssd_epi32(self.0[0], line[0], q),
                _mm512_dpwssd_epi32(self.0[1], line[1], q),
            ])
        }
    }
    #[inline(always)]
    fn store(self, out: &mut [f32; 16]) {
        // SAFETY: see above.
        unsafe {
            let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
            let sums = _mm512_add_epi32(
                _mm512_permutex2var_epi32(self.0[0], even, self.0[1]),
                _mm512_permutex2var_epi32(self.0[0], odd, self.0[1]),
            );
            _mm512_storeu_ps(out.as_mut_ptr(), _mm512_cvtepi32_ps(sums));
        }
    }
}
