//! AVX2 with AVX-VNNI (client CPUs since Alder Lake, Zen 5): `vpdpbusd` on 8 lanes, no AVX-512.
//!
//! As `avx512vnni`: few tokens read packed int4 weights as they lie; more tokens unpack a block of 16
//! rows to int8 once (4 KiB, in L1). int8 weights are always read as they lie. The float kernels are
//! those of `avx2`.

use super::super::layout::{Q4_HEADER, Q8_HEADER, ROWS, block_offset};
use super::super::{Acts, Form, Kernels};
use super::{avx2, grouped};
use crate::quant::BLOCK;
use std::arch::x86_64::*;

pub(in super::super) const KERNELS: Kernels = Kernels {
    name: "avxvnni",
    needs: &["avxvnni", "avx2", "fma", "f16c"],
    gemm_q4,
    gemm_q8,
    gemm_grouped: grouped::gemm_avxvnni,
    ..avx2::KERNELS
};

/// Tokens up to which packed int4 weights are read directly.
const DIRECT: usize = 4;
/// Tokens of a tile: 12 sums, 2 registers of weights and one of activations fill the 16 registers.
const TILE: usize = 6;

#[target_feature(enable = "avx2,fma,avxvnni")]
unsafe fn gemm_q4(w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    // SAFETY: the shapes were checked by `Kernels::gemm`.
    unsafe {
        if a.m > DIRECT {
            return tiles::<true>(w, a, y);
        }
        for (rb, w) in w.chunks_exact(Form::Q4.row_block_bytes(a.k)).enumerate() {
            match a.m {
                1 => direct::<1>(w, a, y, rb),
                2 => direct::<2>(w, a, y, rb),
                3 => direct::<3>(w, a, y, rb),
                _ => direct::<DIRECT>(w, a, y, rb),
            }
        }
    }
}

#[target_feature(enable = "avx2,fma,avxvnni")]
unsafe fn gemm_q8(w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    // SAFETY: the shapes were checked by `Kernels::gemm`.
    unsafe { tiles::<false>(w, a, y) }
}

/// All `M` tokens against int4 row block `rb` as it lies. Sums of groups are added up in f32, exactly,
/// as in `avx512vnni`.
///
/// # Safety
/// Shapes as `Kernels::gemm` checks them, and `a.m == M`.
#[target_feature(enable = "avx2,fma,avxvnni")]
unsafe fn direct<const M: usize>(w: &[u8], a: &Acts<'_>, y: &mut [f32], rb: usize) {
    let low = _mm256_set1_epi8(0x0f);
    let high = _mm256_set1_epi8(0xf0u8 as i8);
    // The high nibbles carry a factor of 16.
    let sixteenth = _mm256_set1_ps(1.0 / 16.0);
    // SAFETY: every address below lies in this row block of the weights, in `a` or in `y`.
    unsafe {
        let mut p = w.as_ptr();
        let mut acc = [[_mm256_setzero_ps(); M]; 2];
        for b in 0..a.blocks() {
            let len = a.len(b);
            let q = a.q.as_ptr().add(b * BLOCK * M);
            for line in 0..Q4_HEADER / 64 {
                avx2::prefetch(p.add(64 * line));
            }
            for (h, acc) in acc.iter_mut().enumerate() {
                let mut sum = [_mm256_setzero_ps(); M];
                let mut mins = [_mm256_setzero_si256(); M];
                for t in 0..len / 64 {
                    let lines = p.add(Q4_HEADER + 512 * t + 32 * h);
                    let mut c0 = [_mm256_setzero_si256(); M];
                    let mut c1 = [_mm256_setzero_si256(); M];
                    for j in 0..8 {
                        avx2::prefetch(lines.add(64 * j));
                        let v = _mm256_load_si256(lines.add(64 * j).cast());
                        let (lo, hi) = (_mm256_and_si256(v, low), _mm256_and_si256(v, high));
                        for i in 0..M {
                            let q = q.add(i * len + 64 * t);
                            c0[i] = _mm256_dpbusd_avx_epi32(c0[i], lo, avx2::four(q, j));
                            c1[i] = _mm256_dpbusd_avx_epi32(c1[i], hi, avx2::four(q, j + 8));
                        }
                    }
                    let (s0, s1) = avx2::scales(p.add(64 + 16 * t + 8 * h));
                    let s0 = _mm256_cvtepi32_ps(s0);
                    let s1 = _mm256_mul_ps(_mm256_cvtepi32_ps(s1), sixteenth);
                    let mn = _mm_load_si128(p.add(128 + 32 * t + 16 * h).cast());
                    let mn = _mm256_cvtepi8_epi16(mn);
                    for i in 0..M {
                        sum[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(c0[i]), s0, sum[i]);
                        sum[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(c1[i]), s1, sum[i]);
                        let pair = a.sums.as_ptr().add(b * M + i).cast::<i32>().add(t);
                        let pair = _mm256_set1_epi32(pair.read_unaligned());
                        mins[i] = _mm256_dpwssd_avx_epi32(mins[i], mn, pair);
                    }
                }
                let d = _mm256_load_ps(p.cast::<f32>().add(8 * h));
                for i in 0..M {
                    let dot = _mm256_sub_ps(sum[i], _mm256_cvtepi32_ps(mins[i]));
                    let scale = _mm256_mul_ps(d, _mm256_set1_ps(*a.s.get_unchecked(b * M + i)));
                    acc[i] = _mm256_fmadd_ps(dot, scale, acc[i]);
                }
            }
            p = p.add(Q4_HEADER + len / 2 * ROWS);
        }
        avx2::store(&acc, y, M, rb, 0);
    }
}

/// int8 weights of one block of a row block, plus 128 each.
#[repr(C, align(64))]
struct Panel([[u8; 64]; BLOCK / 4]);

/// Any number of tokens: block by block along K, all tokens against each.
///
/// # Safety
/// Shapes as `Kernels::gemm` checks them.
#[target_feature(enable = "avx2,fma,avxvnni")]
unsafe fn tiles<const Q4: bool>(w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    let form = if Q4 { Form::Q4 } else { Form::Q8 };
    let size = form.row_block_bytes(a.k);
    let ld = w.len() / size * ROWS;
    let mut panel = Panel([[0; 64]; BLOCK / 4]);
    // SAFETY: as in `direct`.
    unsafe {
        for (rb, w) in w.chunks_exact(size).enumerate() {
            for b in 0..a.blocks() {
                let block = w.as_ptr().add(block_offset(form, b));
                let lines =
                    if Q4 { panel.0.as_mut_ptr().cast() } else { block.add(Q8_HEADER).cast_mut() };
                if Q4 {
                    unpack(block, a.len(b), lines);
                }
                let d = block.cast();
                let mut t = 0;
                while t < a.m {
                    let y = y.as_mut_ptr().add(t * ld + rb * ROWS);
                    t += match a.m - t {
                        TILE.. => tile::<TILE, Q4>(lines, d, a, b, t, y, ld),
                        4.. => tile::<4, Q4>(lines, d, a, b, t, y, ld),
                        2.. => tile::<2, Q4>(lines, d, a, b, t, y, ld),
                        _ => tile::<1, Q4>(lines, d, a, b, t, y, ld),
                    };
                }
            }
        }
    }
}

/// Unpacks one int4 block of 16 rows and `len` k to int8 plus 128: line `j` at `out + 64 * j`.
///
/// # Safety
/// `block` is an int4 block of `len` k; `out` has room for `16 * len` bytes; both are 64-byte aligned.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn unpack(block: *const u8, len: usize, out: *mut u8) {
    let nibble = _mm256_set1_epi8(0x0f);
    let flip = _mm256_set1_epi8(-128);
    // Times this, the low byte of a lane stands in all four.
    let all = _mm256_set1_epi32(0x0101_0101);
    // SAFETY: the caller's promise.
    unsafe {
        for line in 0..Q4_HEADER / 64 {
            avx2::prefetch(block.add(64 * line));
        }
        for t in 0..len / 64 {
            for h in 0..2 {
                let (s0, s1) = avx2::scales(block.add(64 + 16 * t + 8 * h));
                // sc <= 16 and q <= 15: both products of a 16-bit half stay in their bytes.
                let s0 = _mm256_or_si256(s0, _mm256_slli_epi32::<16>(s0));
                let s1 = _mm256_or_si256(s1, _mm256_slli_epi32::<16>(s1));
                let mn = _mm_load_si128(block.add(128 + 32 * t + 16 * h).cast());
                let mn = _mm256_cvtepu16_epi32(mn);
                let m0 = _mm256_and_si256(mn, _mm256_set1_epi32(255));
                let m1 = _mm256_srli_epi32::<8>(mn);
                let m0 = _mm256_xor_si256(_mm256_mullo_epi32(m0, all), flip);
                let m1 = _mm256_xor_si256(_mm256_mullo_epi32(m1, all), flip);
                for j in 0..8 {
                    let line = block.add(Q4_HEADER + 512 * t + 64 * j + 32 * h);
                    avx2::prefetch(line);
                    let v = _mm256_load_si256(line.cast());
                    let lo = _mm256_and_si256(v, nibble);
                    let hi = _mm256_and_si256(_mm256_srli_epi16::<4>(v), nibble);
                    // Modulo 256: subtracting mn ^ 0x80 is subtracting mn and adding 128.
                    let lo = _mm256_sub_epi8(_mm256_mullo_epi16(lo, s0), m0);
                    let hi = _mm256_sub_epi8(_mm256_mullo_epi16(hi, s1), m1);
                    let out = out.add(1024 * t + 64 * j + 32 * h);
                    _mm256_store_si256(out.cast(), lo);
                    _mm256_store_si256(out.add(512).cast(), hi);
                }
            }
        }
    }
}

/// Tokens `t..t + T` against the lines of block `b` of 16 rows: exact integers, then the float step into
/// `y`. Block 0 starts from zero. Gives `T`.
///
/// `vpdpbusd` takes unsigned times signed: the weights are read plus 128 (xor 0x80, or `UNPACKED` so), and
/// the sum starts at -128 times the sum of the activations.
///
/// # Safety
/// `lines` are `16 * a.len(b)` bytes, `d` are 16 scales, both at multiples of 32 bytes; `t + T <= a.m`;
/// `y` has `T` rows `ld` apart with 16 values each.
#[inline]
#[target_feature(enable = "avx2,fma,avxvnni")]
unsafe fn tile<const T: usize, const UNPACKED: bool>(
    lines: *const u8,
    d: *const f32,
    a: &Acts<'_>,
    b: usize,
    t: usize,
    y: *mut f32,
    ld: usize,
) -> usize {
    let len = a.len(b);
    let flip = _mm256_set1_epi8(-128);
    // SAFETY: the caller's promise.
    unsafe {
        let q = a.q.as_ptr().add(b * BLOCK * a.m + t * len);
        let mut c = [[_mm256_setzero_si256(); 2]; T];
        for (i, c) in c.iter_mut().enumerate() {
            *c = [_mm256_set1_epi32(-128 * *a.totals.get_unchecked(b * a.m + t + i)); 2];
        }
        for j in 0..len / 4 {
            let line = lines.add(64 * j);
            let mut w = [_mm256_load_si256(line.cast()), _mm256_load_si256(line.add(32).cast())];
            if !UNPACKED {
                avx2::prefetch(line);
                w = [_mm256_xor_si256(w[0], flip), _mm256_xor_si256(w[1], flip)];
            }
            for (i, c) in c.iter_mut().enumerate() {
                let x = avx2::four(q.add(i * len), j);
                c[0] = _mm256_dpbusd_avx_epi32(c[0], w[0], x);
                c[1] = _mm256_dpbusd_avx_epi32(c[1], w[1], x);
            }
        }
        for (i, c) in c.iter().enumerate() {
            let s = _mm256_set1_ps(*a.s.get_unchecked(b * a.m + t + i));
            for (h, &c) in c.iter().enumerate() {
                let d = _mm256_load_ps(d.add(8 * h));
                let y = y.add(i * ld + 8 * h);
                let acc = if b == 0 { _mm256_setzero_ps() } else { _mm256_loadu_ps(y) };
                let acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(c), _mm256_mul_ps(d, s), acc);
                _mm256_storeu_ps(y, acc);
            }
        }
    }
    T
}
