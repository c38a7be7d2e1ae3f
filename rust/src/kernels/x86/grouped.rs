//! The grouped forms on AVX2, with and without VNNI; `grouped512` is for AVX-512. Linear codes are multiplied as they are; of others a shuffle of bytes looks up the values,
//! and the integer instructions of each set multiply those. A group's integer meets its scale in one float step.
//!
//! Products are of unsigned by signed bytes. So a table holds the values plus what makes the least of them 0 (the
//! *bias*), and a sum over a group starts at minus the bias times the sum of its activations.

use super::super::grouped::Header;
use super::super::layout::{grouped_header, grouped_lines};
use super::super::{Acts, Form};
use super::avx2::{self, Ymm2};
use crate::quant::{BLOCK, Codes, Grouped, UNITS};
use std::arch::x86_64::*;
use std::slice;

/// What a shuffle looks up for 16 codes: their values plus the bias; and the bias.
pub(super) fn biased(how: Grouped) -> ([u8; 16], i32) {
    let bias = match how.codes {
        Codes::Linear(_) | Codes::Linear5(_) | Codes::Linear6(_) => 0,
        Codes::Fp4 => 12,
        Codes::Uneven => 127,
    };
    (std::array::from_fn(|q| (i32::from(how.value(q as u8)) + bias) as u8), bias)
}

/// For the units of block `b` of token `t`: the sum of activations as the bits of an f32, or `-bias` times it as an i32.
/// A unit is 32 inputs, or half of that: `SPLIT` is 1 or 2.
///
/// # Safety
/// There are such a block and token.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn sums<const SPLIT: usize>(
    bias: Option<i32>,
    a: &Acts<'_>,
    b: usize,
    t: usize,
    out: &mut [i32; UNITS],
) {
    let len = a.len(b);
    // SAFETY: the caller's promise; a block has sums of eight groups and a multiple of 64 values.
    unsafe {
        if SPLIT == 1 {
            let sums = a.sums.get_unchecked(b * a.m + t);
            let sums = _mm256_cvtepi16_epi32(_mm_loadu_si128(sums.as_ptr().cast()));
            _mm256_storeu_si256(out.as_mut_ptr().cast(), sums);
        } else {
            let q = a.q.as_ptr().add(b * BLOCK * a.m + t * len);
            let (one, ones) = (_mm256_set1_epi8(1), _mm256_set1_epi16(1));
            for i in 0..len / 64 {
                let x = _mm256_loadu_si256(q.add(64 * i).cast());
                let y = _mm256_loadu_si256(q.add(64 * i + 32).cast());
                let x = _mm256_madd_epi16(_mm256_maddubs_epi16(one, x), ones);
                let y = _mm256_madd_epi16(_mm256_maddubs_epi16(one, y), ones);
                let x = _mm256_hadd_epi32(x, y);
                let x = _mm256_hadd_epi32(x, x);
                let (low, high) = (_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
                _mm_storeu_si128(out.as_mut_ptr().add(4 * i).cast(), _mm_unpacklo_epi32(low, high));
            }
        }
        for h in 0..SPLIT {
            let out = out.as_mut_ptr().add(8 * h).cast();
            let sums = _mm256_loadu_si256(out);
            let sums = match bias {
                None => _mm256_castps_si256(_mm256_cvtepi32_ps(sums)),
                Some(bias) => _mm256_mullo_epi32(sums, _mm256_set1_epi32(-bias)),
            };
            _mm256_storeu_si256(out, sums);
        }
    }
}

/// Codes are multiplied as they are, and have an offset.
const LINEAR: u8 = 0;
/// Values plus the bias are looked up, and at most 24, or any with VNNI.
const NARROW: u8 = 1;
/// Values are looked up, and at most 127 in magnitude.
const WIDE: u8 = 2;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn gemm_avx2(how: Grouped, w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    // SAFETY: the shapes were checked by `Kernels::gemm`.
    unsafe {
        match (how.codes, how.unit()) {
            (Codes::Fp4, 32) => all_rows::<NARROW, 0, 1, false>(how, w, a, y),
            (Codes::Fp4, _) => all_rows::<NARROW, 0, 2, false>(how, w, a, y),
            (Codes::Uneven, 32) => all_rows::<WIDE, 0, 1, false>(how, w, a, y),
            (Codes::Uneven, _) => all_rows::<WIDE, 0, 2, false>(how, w, a, y),
            (Codes::Linear(_), 32) => all_rows::<LINEAR, 0, 1, false>(how, w, a, y),
            (Codes::Linear(_), _) => all_rows::<LINEAR, 0, 2, false>(how, w, a, y),
            (Codes::Linear5(_), 32) => all_rows::<LINEAR, 1, 1, false>(how, w, a, y),
            (Codes::Linear5(_), _) => all_rows::<LINEAR, 1, 2, false>(how, w, a, y),
            (Codes::Linear6(_), 32) => all_rows::<LINEAR, 2, 1, false>(how, w, a, y),
            (Codes::Linear6(_), _) => all_rows::<LINEAR, 2, 2, false>(how, w, a, y),
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
pub(super) unsafe fn gemm_avxvnni(how: Grouped, w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    // SAFETY: the shapes were checked by `Kernels::gemm`.
    unsafe {
        match (how.codes, how.unit()) {
            (Codes::Fp4 | Codes::Uneven, 32) => all_rows::<NARROW, 0, 1, true>(how, w, a, y),
            (Codes::Fp4 | Codes::Uneven, _) => all_rows::<NARROW, 0, 2, true>(how, w, a, y),
            (Codes::Linear(_), 32) => all_rows::<LINEAR, 0, 1, true>(how, w, a, y),
            (Codes::Linear(_), _) => all_rows::<LINEAR, 0, 2, true>(how, w, a, y),
            (Codes::Linear5(_), 32) => all_rows::<LINEAR, 1, 1, true>(how, w, a, y),
            (Codes::Linear5(_), _) => all_rows::<LINEAR, 1, 2, true>(how, w, a, y),
            (Codes::Linear6(_), 32) => all_rows::<LINEAR, 2, 1, true>(how, w, a, y),
            (Codes::Linear6(_), _) => all_rows::<LINEAR, 2, 2, true>(how, w, a, y),
        }
    }
}

/// # Safety
/// As [`rows`].
unsafe fn all_rows<const CODES: u8, const HIGH: usize, const SPLIT: usize, const VNNI: bool>(
    how: Grouped,
    w: &[u8],
    a: &Acts<'_>,
    y: &mut [f32],
) {
    // SAFETY: the caller's promise.
    unsafe {
        for (rb, w) in w.chunks_exact(Form::Grouped(how).row_block_bytes(a.k)).enumerate() {
            let mut t = 0;
            while t < a.m {
                t += match (a.m - t, VNNI) {
                    (6.., true) => rows_avxvnni::<6, 1, CODES, HIGH, SPLIT>(how, w, a, y, rb, t),
                    (4.., true) => rows_avxvnni::<4, 1, CODES, HIGH, SPLIT>(how, w, a, y, rb, t),
                    (2.., true) => rows_avxvnni::<2, 2, CODES, HIGH, SPLIT>(how, w, a, y, rb, t),
                    (_, true) => rows_avxvnni::<1, 2, CODES, HIGH, SPLIT>(how, w, a, y, rb, t),
                    (4.., _) => rows_avx2::<4, 1, CODES, HIGH, SPLIT>(how, w, a, y, rb, t),
                    (2.., _) => rows_avx2::<2, 2, CODES, HIGH, SPLIT>(how, w, a, y, rb, t),
                    _ => rows_avx2::<1, 2, CODES, HIGH, SPLIT>(how, w, a, y, rb, t),
                };
            }
        }
    }
}

/// The bits beyond 4 of the codes in nibble `g` of half `h` of line `j`, in their place.
///
/// # Safety
/// `lines` are those of 64 k, at a multiple of 64, of codes with `HIGH` such bits.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn high<const HIGH: usize>(lines: *const u8, j: usize, g: usize, h: usize) -> __m256i {
    // As `layout::places` says.
    let shared = 3 - HIGH;
    let bit = HIGH * (2 * (j & ((1 << shared) - 1)) + g);
    // SAFETY: the caller's promise.
    let x = unsafe { _mm256_load_si256(lines.add(64 * (8 + (j >> shared)) + 32 * h).cast()) };
    let x = _mm256_srl_epi16(x, _mm_cvtsi32_si128(bit as i32));
    _mm256_slli_epi16::<4>(_mm256_and_si256(x, _mm256_set1_epi8((1 << HIGH) - 1)))
}

macro_rules! rows {
    ($name:ident, $features:literal, $vnni:literal) => {
        /// [`rows`] for one set.
        ///
        /// # Safety
        /// As [`rows`].
        #[target_feature(enable = $features)]
        unsafe fn $name<
            const M: usize,
            const H: usize,
            const CODES: u8,
            const HIGH: usize,
            const SPLIT: usize,
        >(
            how: Grouped,
            w: &[u8],
            a: &Acts<'_>,
            y: &mut [f32],
            rb: usize,
            t0: usize,
        ) -> usize {
            // SAFETY: the caller's promise.
            unsafe { rows::<M, H, CODES, HIGH, SPLIT, $vnni>(how, w, a, y, rb, t0) }
        }
    };
}

rows!(rows_avx2, "avx2,fma,f16c", false);
rows!(rows_avxvnni, "avx2,fma,f16c,avxvnni", true);

/// Row block `rb` against tokens `t0..t0 + M`, `H` halves of 8 rows at once. Gives `M`.
///
/// Without VNNI `vpmaddubsw` adds pairs in i16. Four of them fit (31 * 127 * 2 * 4 = 31496 < 2^15) if codes have up to 5
/// bits or values are narrow, two of 6 bits (63 * 127 * 2 * 2 = 32004). Of wide values one does (127 * 127 * 2 = 32258),
/// and their signs move to the activations.
///
/// # Safety
/// The CPU has AVX2, FMA and F16C, and AVX-VNNI if `VNNI`. Shapes are as `Kernels::gemm` checks them, `t0 + M <= a.m`, and
/// `how` has such codes, `HIGH` bits beyond 4, and units of 32 / `SPLIT`.
#[inline(always)]
unsafe fn rows<
    const M: usize,
    const H: usize,
    const CODES: u8,
    const HIGH: usize,
    const SPLIT: usize,
    const VNNI: bool,
>(
    how: Grouped,
    w: &[u8],
    a: &Acts<'_>,
    y: &mut [f32],
    rb: usize,
    t0: usize,
) -> usize {
    // Lines of a unit, and of those whose products are added up in i16.
    let (unit, fit) = (8 / SPLIT, if HIGH == 2 { 2 } else { 4 });
    let signed = CODES == WIDE && !VNNI;
    let (mut table, bias) = biased(how);
    if signed {
        table = table.map(|value| value.wrapping_sub(bias as u8));
    }
    let bias = (CODES != LINEAR).then_some(if signed { 0 } else { bias });
    let head = grouped_header(how);
    let mut header = Header::ZERO;
    let mut sum = [[0; UNITS]; M];
    // SAFETY: the CPU has the instructions; every address below lies in this row block of the weights, in `a` or in `y`.
    unsafe {
        let nibble = _mm256_set1_epi8(0x0f);
        let ones = _mm256_set1_epi16(1);
        let zero = _mm256_setzero_si256();
        let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
        let mut p = w.as_ptr();
        let mut acc = [[_mm256_setzero_ps(); M]; 2];
        for b in 0..a.blocks() {
            let len = a.len(b);
            let q = a.q.as_ptr().add(b * BLOCK * a.m + t0 * len);
            for line in 0..head / 64 {
                avx2::prefetch(p.add(64 * line));
            }
            header.read::<Ymm2>(how, slice::from_raw_parts(p, head));
            for i in 0..M {
                sums::<SPLIT>(bias, a, b, t0 + i, &mut sum[i]);
            }
            for h0 in (0..2).step_by(H) {
                let mut part = [[_mm256_setzero_ps(); H]; M];
                // Two units at a time: a line has codes of both.
                for pair in 0..len / (8 * unit) {
                    let u = 2 * pair;
                    let lines = p.add(head + grouped_lines(how) * (pair / SPLIT));
                    let first = pair % SPLIT * unit;
                    let mut dots = [[[zero; H]; M]; 2];
                    if CODES != LINEAR {
                        for g in 0..2 {
                            for i in 0..M {
                                let start = *sum[i].get_unchecked(u + g);
                                dots[g][i] = [_mm256_set1_epi32(start); H];
                            }
                        }
                    }
                    for some in 0..unit / fit {
                        let mut c = [[[zero; H]; M]; 2];
                        for j in fit * some..fit * (some + 1) {
                            let line = lines.add(64 * (first + j));
                            if h0 == 0 {
                                avx2::prefetch(line);
                                if HIGH > 0 && j % 4 == 0 {
                                    // One or two of these lines for four of the others.
                                    let at = 8 * 64 + HIGH * 16 * (first + j);
                                    avx2::prefetch(lines.add(at));
                                    avx2::prefetch(lines.add(at + 64 * (HIGH - 1)));
                                }
                            }
                            let mut v = [[zero; H]; 2];
                            for h in 0..H {
                                let x = _mm256_load_si256(line.add(32 * (h0 + h)).cast());
                                v[0][h] = x;
                                v[1][h] = _mm256_srli_epi16::<4>(x);
                                for g in 0..2 {
                                    v[g][h] = _mm256_and_si256(v[g][h], nibble);
                                    if CODES != LINEAR {
                                        v[g][h] = _mm256_shuffle_epi8(table, v[g][h]);
                                    }
                                    if HIGH > 0 {
                                        let x = high::<HIGH>(lines, first + j, g, h0 + h);
                                        v[g][h] = _mm256_or_si256(v[g][h], x);
                                    }
                                }
                            }
                            for i in 0..M {
                                let q = q.add(i * len + 8 * unit * pair);
                                for g in 0..2 {
                                    let x = avx2::four(q, j + unit * g);
                                    for h in 0..H {
                                        let dot = &mut dots[g][i][h];
                                        if VNNI {
                                            *dot = _mm256_dpbusd_avx_epi32(*dot, v[g][h], x);
                                        } else if CODES == WIDE {
                                            let x = _mm256_sign_epi8(x, v[g][h]);
                                            let w = _mm256_abs_epi8(v[g][h]);
                                            let x = _mm256_maddubs_epi16(w, x);
                                            let x = _mm256_madd_epi16(x, ones);
                                            *dot = _mm256_add_epi32(*dot, x);
                                        } else {
                                            let x = _mm256_maddubs_epi16(v[g][h], x);
                                            c[g][i][h] = _mm256_add_epi16(c[g][i][h], x);
                                        }
                                    }
                                }
                            }
                        }
                        if CODES != WIDE && !VNNI {
                            for g in 0..2 {
                                for i in 0..M {
                                    for h in 0..H {
                                        let x = _mm256_madd_epi16(c[g][i][h], ones);
                                        dots[g][i][h] = _mm256_add_epi32(dots[g][i][h], x);
                                    }
                                }
                            }
                        }
                    }
                    for (g, dots) in dots.iter().enumerate() {
                        let u = u + g;
                        for h in 0..H {
                            let at = 8 * (h0 + h);
                            let s = _mm256_load_ps(header.s.get_unchecked(u).as_ptr().add(at));
                            let o = _mm256_load_ps(header.o.get_unchecked(u).as_ptr().add(at));
                            for i in 0..M {
                                let dot = _mm256_cvtepi32_ps(dots[i][h]);
                                part[i][h] = _mm256_fmadd_ps(dot, s, part[i][h]);
                                if CODES == LINEAR {
                                    let sum = _mm256_set1_epi32(*sum[i].get_unchecked(u));
                                    let sum = _mm256_castsi256_ps(sum);
                                    part[i][h] = _mm256_fmadd_ps(sum, o, part[i][h]);
                                }
                            }
                        }
                    }
                }
                for i in 0..M {
                    let s = _mm256_set1_ps(*a.s.get_unchecked(b * a.m + t0 + i));
                    for h in 0..H {
                        acc[h0 + h][i] = _mm256_fmadd_ps(part[i][h], s, acc[h0 + h][i]);
                    }
                }
            }
            p = p.add(head + len / 64 * grouped_lines(how));
        }
        avx2::store(&acc, y, a.m, rb, t0);
    }
    M
}
