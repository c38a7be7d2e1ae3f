//! MXFP4 weights on x86: a shuffle of bytes looks up 16 codes, and the integer instructions of each set multiply.
//!
//! The table holds twice the value plus 12, 0 to 24, so that products are of unsigned by signed bytes; a sum over a
//! group starts at -12 times the sum of its activations. A group's integer meets its power of two in one float step.

use super::super::layout::{MXFP4_HEADER, ROWS, block_offset};
use super::super::{Acts, Form};
use super::{avx2, avx512vnni};
use crate::quant::{BLOCK, GROUP, GROUPS, TWICE};
use std::arch::x86_64::*;

/// What the table adds to twice the value.
const OFFSET: i32 = 12;

/// The 16 bytes that a shuffle looks up.
static TABLE: [u8; 16] = {
    let mut table = [0; 16];
    let mut i = 0;
    while i < 16 {
        table[i] = (TWICE[i] as i32 + OFFSET) as u8;
        i += 1;
    }
    table
};

/// Where a sum over group `g` of block `b` of token `t` starts.
///
/// # Safety
/// There are such a block and token.
#[inline(always)]
unsafe fn start(a: &Acts<'_>, b: usize, t: usize, g: usize) -> i32 {
    // SAFETY: the caller's promise; a block has sums of eight groups.
    -OFFSET * i32::from(unsafe { *a.sums.get_unchecked(b * a.m + t).get_unchecked(g) })
}

#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn gemm_avx2(w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    // SAFETY: the shapes were checked by `Kernels::gemm`.
    unsafe {
        for (rb, w) in w.chunks_exact(Form::Mxfp4.row_block_bytes(a.k)).enumerate() {
            let mut t = 0;
            while t < a.m {
                t += match a.m - t {
                    4.. => rows::<4, 1>(w, a, y, rb, t),
                    2.. => rows::<2, 2>(w, a, y, rb, t),
                    _ => rows::<1, 2>(w, a, y, rb, t),
                };
            }
        }
    }
}

/// Row block `rb` against tokens `t0..t0 + M`, `H` halves of 8 rows at once. Gives `M`.
///
/// `vpmaddubsw` adds pairs in i16: four of them fit (24 * 127 * 2 * 4 = 24384 < 2^15), half a group.
///
/// # Safety
/// Shapes as `Kernels::gemm` checks them, and `t0 + M <= a.m`.
#[target_feature(enable = "avx2,fma")]
unsafe fn rows<const M: usize, const H: usize>(
    w: &[u8],
    a: &Acts<'_>,
    y: &mut [f32],
    rb: usize,
    t0: usize,
) -> usize {
    let nibble = _mm256_set1_epi8(0x0f);
    let ones = _mm256_set1_epi16(1);
    let zero = _mm256_setzero_si256();
    // SAFETY: every address below lies in this row block of the weights, in `a` or in `y`.
    unsafe {
        let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(TABLE.as_ptr().cast()));
        let mut p = w.as_ptr();
        let mut acc = [[_mm256_setzero_ps(); M]; 2];
        for b in 0..a.blocks() {
            let len = a.len(b);
            let q = a.q.as_ptr().add(b * BLOCK * a.m + t0 * len);
            avx2::prefetch(p);
            avx2::prefetch(p.add(64));
            for h0 in (0..2).step_by(H) {
                for t in 0..len / 64 {
                    let lines = p.add(MXFP4_HEADER + 512 * t + 32 * h0);
                    let mut dots = [[[zero; H]; M]; 2];
                    for (g, dots) in dots.iter_mut().enumerate() {
                        for (i, dots) in dots.iter_mut().enumerate() {
                            *dots = [_mm256_set1_epi32(start(a, b, t0 + i, 2 * t + g)); H];
                        }
                    }
                    for half in 0..2 {
                        let mut c = [[[zero; H]; M]; 2];
                        for j in 4 * half..4 * half + 4 {
                            if h0 == 0 {
                                avx2::prefetch(lines.add(64 * j));
                            }
                            let mut v = [[zero; H]; 2];
                            for h in 0..H {
                                let x = _mm256_load_si256(lines.add(64 * j + 32 * h).cast());
                                let low = _mm256_and_si256(x, nibble);
                                let high = _mm256_and_si256(_mm256_srli_epi16::<4>(x), nibble);
                                v[0][h] = _mm256_shuffle_epi8(table, low);
                                v[1][h] = _mm256_shuffle_epi8(table, high);
                            }
                            for i in 0..M {
                                let q = q.add(i * len + 64 * t);
                                for g in 0..2 {
                                    let x = avx2::four(q, j + 8 * g);
                                    for h in 0..H {
                                        let x = _mm256_maddubs_epi16(v[g][h], x);
                                        c[g][i][h] = _mm256_add_epi16(c[g][i][h], x);
                                    }
                                }
                            }
                        }
                        for g in 0..2 {
                            for i in 0..M {
                                for h in 0..H {
                                    let sum = _mm256_madd_epi16(c[g][i][h], ones);
                                    dots[g][i][h] = _mm256_add_epi32(dots[g][i][h], sum);
                                }
                            }
                        }
                    }
                    for (g, dots) in dots.iter().enumerate() {
                        for h in 0..H {
                            let e = p.add(16 * (2 * t + g) + 8 * (h0 + h));
                            let e = _mm256_cvtepu8_epi32(_mm_loadl_epi64(e.cast()));
                            let d = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(e));
                            for i in 0..M {
                                let s = 0.5 * *a.s.get_unchecked(b * a.m + t0 + i);
                                let scale = _mm256_mul_ps(_mm256_set1_ps(s), d);
                                let dot = _mm256_cvtepi32_ps(dots[i][h]);
                                acc[h0 + h][i] = _mm256_fmadd_ps(dot, scale, acc[h0 + h][i]);
                            }
                        }
                    }
                }
            }
            p = p.add(MXFP4_HEADER + len / 2 * ROWS);
        }
        avx2::store(&acc, y, a.m, rb, t0);
    }
    M
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn gemm_avx512vnni(w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    // SAFETY: the shapes were checked by `Kernels::gemm`.
    unsafe {
        match a.m {
            1 => direct::<1>(w, a, y),
            2 => direct::<2>(w, a, y),
            3 => direct::<3>(w, a, y),
            4 => direct::<4>(w, a, y),
            _ => panels(w, a, y),
        }
    }
}

/// The powers of two of 16 rows.
///
/// # Safety
/// `e` points at their exponents.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn powers(e: *const u8) -> __m512 {
    // SAFETY: the caller's promise.
    let e = _mm512_cvtepu8_epi32(unsafe { _mm_load_si128(e.cast()) });
    _mm512_castsi512_ps(_mm512_slli_epi32::<23>(e))
}

/// The low and the high codes of a line, looked up.
///
/// # Safety
/// `line` points at 64 bytes at a multiple of 64.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn codes(table: __m512i, line: *const u8) -> [__m512i; 2] {
    let nibble = _mm512_set1_epi8(0x0f);
    // SAFETY: the caller's promise.
    let v = unsafe { _mm512_load_si512(line.cast()) };
    let high = _mm512_and_si512(_mm512_srli_epi16::<4>(v), nibble);
    let low = _mm512_and_si512(v, nibble);
    [_mm512_shuffle_epi8(table, low), _mm512_shuffle_epi8(table, high)]
}

#[inline]
#[target_feature(enable = "avx512f")]
fn table() -> __m512i {
    // SAFETY: the table has 16 bytes.
    _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(TABLE.as_ptr().cast()) })
}

/// All `M` tokens against weights as they lie.
///
/// # Safety
/// Shapes as `Kernels::gemm` checks them, and `a.m == M`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn direct<const M: usize>(w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    let size = Form::Mxfp4.row_block_bytes(a.k);
    let row_blocks = w.len() / size;
    let table = table();
    // SAFETY: every address below lies in block `b` of row block `rb` of `w`, in `a` or in `y`, whose lengths were
    // checked; prefetches never fault.
    unsafe {
        for rb in 0..row_blocks {
            let mut p = w.as_ptr().add(rb * size);
            let mut acc = [_mm512_setzero_ps(); M];
            for b in 0..a.blocks() {
                let len = a.len(b);
                let q = a.q.as_ptr().add(b * BLOCK * M);
                avx512vnni::prefetch(p);
                avx512vnni::prefetch(p.add(64));
                let mut s = [_mm512_setzero_ps(); M];
                for i in 0..M {
                    s[i] = _mm512_set1_ps(0.5 * *a.s.get_unchecked(b * M + i));
                }
                for t in 0..len / 64 {
                    let lines = p.add(MXFP4_HEADER + 512 * t);
                    let mut c = [[_mm512_setzero_si512(); M]; 2];
                    for g in 0..2 {
                        for i in 0..M {
                            c[g][i] = _mm512_set1_epi32(start(a, b, i, 2 * t + g));
                        }
                    }
                    for j in 0..8 {
                        avx512vnni::prefetch(lines.add(64 * j));
                        let v = codes(table, lines.add(64 * j));
                        for i in 0..M {
                            let q = q.add(i * len + 64 * t);
                            for g in 0..2 {
                                let x = _mm512_set1_epi32(avx512vnni::four(q, j + 8 * g));
                                c[g][i] = _mm512_dpbusd_epi32(c[g][i], v[g], x);
                            }
                        }
                    }
                    for g in 0..2 {
                        let d = powers(p.add(16 * (2 * t + g)));
                        for i in 0..M {
                            let dot = _mm512_cvtepi32_ps(c[g][i]);
                            acc[i] = _mm512_fmadd_ps(dot, _mm512_mul_ps(s[i], d), acc[i]);
                        }
                    }
                }
                p = p.add(MXFP4_HEADER + len / 2 * ROWS);
            }
            for (i, acc) in acc.into_iter().enumerate() {
                let y = y.as_mut_ptr().add((i * row_blocks + rb) * ROWS);
                _mm512_storeu_ps(y, acc);
            }
        }
    }
}

/// A block of two row blocks, looked up: line `j` of row block `h` at `[h][j]`, and its powers of two.
#[repr(C, align(64))]
struct Panel {
    lines: [[[u8; 64]; BLOCK / 4]; 2],
    powers: [[[f32; ROWS]; GROUPS]; 2],
}

/// Many tokens: look up a block of two row blocks, run all tokens against it, go on along K.
///
/// # Safety
/// Shapes as `Kernels::gemm` checks them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn panels(w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    let size = Form::Mxfp4.row_block_bytes(a.k);
    let row_blocks = w.len() / size;
    let table = table();
    let mut panel = Panel { lines: [[[0; 64]; BLOCK / 4]; 2], powers: [[[0.0; ROWS]; GROUPS]; 2] };
    // SAFETY: as in `direct`.
    unsafe {
        let mut rb = 0;
        while rb < row_blocks {
            let pair = (row_blocks - rb).min(2);
            for b in 0..a.blocks() {
                for h in 0..pair {
                    let block = w.as_ptr().add((rb + h) * size + block_offset(Form::Mxfp4, b));
                    avx512vnni::prefetch(block);
                    avx512vnni::prefetch(block.add(64));
                    for g in 0..a.len(b) / GROUP {
                        let out = panel.powers[h][g].as_mut_ptr();
                        _mm512_store_ps(out, powers(block.add(16 * g)));
                    }
                    for j in 0..a.len(b) / 8 {
                        let line = block.add(MXFP4_HEADER + 64 * j);
                        avx512vnni::prefetch(line);
                        let [low, high] = codes(table, line);
                        let out = &mut panel.lines[h][j / 8 * 16 + j % 8..];
                        _mm512_store_si512(out[0].as_mut_ptr().cast(), low);
                        _mm512_store_si512(out[8].as_mut_ptr().cast(), high);
                    }
                }
                let mut t = 0;
                while t < a.m {
                    let out = y.as_mut_ptr().add((t * row_blocks + rb) * ROWS);
                    let ld = row_blocks * ROWS;
                    t += match (pair, a.m - t) {
                        (2, 4..) => tile::<4, 2>(&panel, a, b, t, out, ld),
                        (2, 2..) => tile::<2, 2>(&panel, a, b, t, out, ld),
                        (2, _) => tile::<1, 2>(&panel, a, b, t, out, ld),
                        (_, 4..) => tile::<4, 1>(&panel, a, b, t, out, ld),
                        _ => tile::<1, 1>(&panel, a, b, t, out, ld),
                    };
                }
            }
            rb += pair;
        }
    }
}

/// `T` tokens against `R` row blocks of the panel, on top of `y`; block 0 starts from zero. Gives `T`.
///
/// # Safety
/// `t + T <= a.m`; `y` has `T` rows `ld` apart with `16 * R` values each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn tile<const T: usize, const R: usize>(
    panel: &Panel,
    a: &Acts<'_>,
    b: usize,
    t: usize,
    y: *mut f32,
    ld: usize,
) -> usize {
    let len = a.len(b);
    // SAFETY: the caller's promise, and the panel has `len / 4` lines for each row block.
    unsafe {
        let q = a.q.as_ptr().add(b * BLOCK * a.m + t * len);
        let mut acc = [[_mm512_setzero_ps(); R]; T];
        if b > 0 {
            for i in 0..T {
                for h in 0..R {
                    acc[i][h] = _mm512_loadu_ps(y.add(i * ld + h * ROWS));
                }
            }
        }
        for g in 0..len / GROUP {
            let mut c = [[_mm512_setzero_si512(); R]; T];
            for i in 0..T {
                c[i] = [_mm512_set1_epi32(start(a, b, t + i, g)); R];
            }
            for j in 8 * g..8 * g + 8 {
                let mut w = [_mm512_setzero_si512(); R];
                for h in 0..R {
                    let line = panel.lines.get_unchecked(h).get_unchecked(j);
                    w[h] = _mm512_load_si512(line.as_ptr().cast());
                }
                for i in 0..T {
                    let x = _mm512_set1_epi32(avx512vnni::four(q.add(i * len), j));
                    for h in 0..R {
                        c[i][h] = _mm512_dpbusd_epi32(c[i][h], w[h], x);
                    }
                }
            }
            for h in 0..R {
                let d = panel.powers.get_unchecked(h).get_unchecked(g);
                let d = _mm512_load_ps(d.as_ptr());
                for i in 0..T {
                    let s = _mm512_set1_ps(0.5 * *a.s.get_unchecked(b * a.m + t + i));
                    let dot = _mm512_cvtepi32_ps(c[i][h]);
                    acc[i][h] = _mm512_fmadd_ps(dot, _mm512_mul_ps(s, d), acc[i][h]);
                }
            }
        }
        for i in 0..T {
            for h in 0..R {
                _mm512_storeu_ps(y.add(i * ld + h * ROWS), acc[i][h]);
            }
        }
    }
    T
}
