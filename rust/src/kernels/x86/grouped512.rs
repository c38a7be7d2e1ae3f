//! The grouped forms on AVX-512 with VNNI: as `grouped`. Few tokens read 4-bit codes with groups of 32 or more as they
//! lie; all else goes by way of a panel of bytes.

use super::super::grouped::Header;
use super::super::layout::{ROWS, block_offset, grouped_header, grouped_lines};
use super::super::{Acts, Form};
use super::avx512vnni::{self, Zmm};
use super::grouped::{biased, sums};
use crate::quant::{BLOCK, Grouped, UNITS};
use std::arch::x86_64::*;
use std::slice;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn gemm(how: Grouped, w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    // SAFETY: the shapes were checked by `Kernels::gemm`.
    unsafe {
        let plain = how.unit() == 32 && how.high() == 0;
        match (how.offset().is_some(), if plain { a.m } else { usize::MAX }) {
            (true, 1) => direct::<1, true>(how, w, a, y),
            (true, 2) => direct::<2, true>(how, w, a, y),
            (true, 3) => direct::<3, true>(how, w, a, y),
            (true, 4) => direct::<4, true>(how, w, a, y),
            (false, 1) => direct::<1, false>(how, w, a, y),
            (false, 2) => direct::<2, false>(how, w, a, y),
            (false, 3) => direct::<3, false>(how, w, a, y),
            (false, 4) => direct::<4, false>(how, w, a, y),
            (true, _) if how.unit() == 32 => panels::<true, 1>(how, w, a, y),
            (true, _) => panels::<true, 2>(how, w, a, y),
            (false, _) if how.unit() == 32 => panels::<false, 1>(how, w, a, y),
            (false, _) => panels::<false, 2>(how, w, a, y),
        }
    }
}

/// The low and the high codes of a line, or their values plus the bias.
///
/// # Safety
/// `line` points at 64 bytes at a multiple of 64.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn codes<const LINEAR: bool>(table: __m512i, line: *const u8) -> [__m512i; 2] {
    let nibble = _mm512_set1_epi8(0x0f);
    // SAFETY: the caller's promise.
    let v = unsafe { _mm512_load_si512(line.cast()) };
    let high = _mm512_and_si512(_mm512_srli_epi16::<4>(v), nibble);
    let low = _mm512_and_si512(v, nibble);
    if LINEAR {
        return [low, high];
    }
    [_mm512_shuffle_epi8(table, low), _mm512_shuffle_epi8(table, high)]
}

/// All `M` tokens against weights as they lie.
///
/// # Safety
/// Shapes as `Kernels::gemm` checks them, `a.m == M`, and `LINEAR` says of codes what `how` does: units are of 32, codes
/// of 4 bits.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn direct<const M: usize, const LINEAR: bool>(
    how: Grouped,
    w: &[u8],
    a: &Acts<'_>,
    y: &mut [f32],
) {
    let size = Form::Grouped(how).row_block_bytes(a.k);
    let (row_blocks, head) = (w.len() / size, grouped_header(how));
    let (table, bias) = biased(how);
    let mut header = Header::ZERO;
    let bias = (!LINEAR).then_some(bias);
    let mut sum = [[0; UNITS]; M];
    // SAFETY: every address below lies in block `b` of row block `rb` of `w`, in `a` or in `y`, whose lengths were
    // checked; prefetches never fault.
    unsafe {
        let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
        for rb in 0..row_blocks {
            let mut p = w.as_ptr().add(rb * size);
            let mut acc = [_mm512_setzero_ps(); M];
            for b in 0..a.blocks() {
                let len = a.len(b);
                let q = a.q.as_ptr().add(b * BLOCK * M);
                for line in 0..head / 64 {
                    avx512vnni::prefetch(p.add(64 * line));
                }
                header.read::<Zmm>(how, slice::from_raw_parts(p, head));
                for (i, sum) in sum.iter_mut().enumerate() {
                    sums::<1>(bias, a, b, i, sum);
                }
                let mut part = [_mm512_setzero_ps(); M];
                for t in 0..len / 64 {
                    let lines = p.add(head + 512 * t);
                    let mut c = [[_mm512_setzero_si512(); M]; 2];
                    if !LINEAR {
                        for g in 0..2 {
                            for i in 0..M {
                                c[g][i] = _mm512_set1_epi32(*sum[i].get_unchecked(2 * t + g));
                            }
                        }
                    }
                    for j in 0..8 {
                        avx512vnni::prefetch(lines.add(64 * j));
                        let v = codes::<LINEAR>(table, lines.add(64 * j));
                        for i in 0..M {
                            let q = q.add(i * len + 64 * t);
                            for g in 0..2 {
                                let x = _mm512_set1_epi32(avx512vnni::four(q, j + 8 * g));
                                c[g][i] = _mm512_dpbusd_epi32(c[g][i], v[g], x);
                            }
                        }
                    }
                    for g in 0..2 {
                        let s = _mm512_load_ps(header.s.get_unchecked(2 * t + g).as_ptr());
                        let o = _mm512_load_ps(header.o.get_unchecked(2 * t + g).as_ptr());
                        for i in 0..M {
                            part[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(c[g][i]), s, part[i]);
                            if LINEAR {
                                let sum = _mm512_set1_epi32(*sum[i].get_unchecked(2 * t + g));
                                part[i] = _mm512_fmadd_ps(_mm512_castsi512_ps(sum), o, part[i]);
                            }
                        }
                    }
                }
                for i in 0..M {
                    let s = _mm512_set1_ps(*a.s.get_unchecked(b * M + i));
                    acc[i] = _mm512_fmadd_ps(part[i], s, acc[i]);
                }
                p = p.add(head + len / 2 * ROWS);
            }
            for (i, acc) in acc.into_iter().enumerate() {
                let y = y.as_mut_ptr().add((i * row_blocks + rb) * ROWS);
                _mm512_storeu_ps(y, acc);
            }
        }
    }
}

/// A block of two row blocks: its codes, or their values plus the bias, line `j` of row block `h` at `[h][j]`.
#[repr(C, align(64))]
struct Panels {
    lines: [[[u8; 64]; BLOCK / 4]; 2],
    headers: [Header; 2],
}

/// Tokens of a tile: 12 sums of integers and 12 of floats.
const TILE: usize = 6;

/// Many tokens: look up a block of two row blocks, run all tokens against it, go on along K.
///
/// # Safety
/// Shapes as `Kernels::gemm` checks them, `LINEAR` says of codes what `how` does, and units are of 32 / `SPLIT`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn panels<const LINEAR: bool, const SPLIT: usize>(
    how: Grouped,
    w: &[u8],
    a: &Acts<'_>,
    y: &mut [f32],
) {
    let form = Form::Grouped(how);
    let size = form.row_block_bytes(a.k);
    let (row_blocks, head) = (w.len() / size, grouped_header(how));
    let (table, bias) = biased(how);
    let bias = (!LINEAR).then_some(bias);
    let (h, apart) = (how.high(), 8 / SPLIT);
    let mask = _mm512_set1_epi8((1 << h) - 1);
    let mut panel = Panels { lines: [[[0; 64]; BLOCK / 4]; 2], headers: [Header::ZERO; 2] };
    // SAFETY: as in `direct`.
    unsafe {
        let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
        let mut rb = 0;
        while rb < row_blocks {
            let pair = (row_blocks - rb).min(2);
            for b in 0..a.blocks() {
                for h0 in 0..pair {
                    let block = w.as_ptr().add((rb + h0) * size + block_offset(form, b));
                    for line in 0..head / 64 {
                        avx512vnni::prefetch(block.add(64 * line));
                    }
                    panel.headers[h0].read::<Zmm>(how, slice::from_raw_parts(block, head));
                    for t in 0..a.len(b) / 64 {
                        let lines = block.add(head + grouped_lines(how) * t);
                        for j in 0..8 {
                            avx512vnni::prefetch(lines.add(64 * j));
                            let mut v = codes::<LINEAR>(table, lines.add(64 * j));
                            for g in 0..2 {
                                if h > 0 {
                                    // As `layout::places` says.
                                    let shared = 3 - h;
                                    let x = lines.add(64 * (8 + (j >> shared)));
                                    let bit = h * (2 * (j & ((1 << shared) - 1)) + g);
                                    let bit = _mm_cvtsi32_si128(bit as i32);
                                    let x = _mm512_srl_epi16(_mm512_load_si512(x.cast()), bit);
                                    let x = _mm512_slli_epi16::<4>(_mm512_and_si512(x, mask));
                                    v[g] = _mm512_or_si512(v[g], x);
                                }
                                let at = 16 * t + j / apart * 2 * apart + j % apart + g * apart;
                                let out = panel.lines[h0][at].as_mut_ptr();
                                _mm512_store_si512(out.cast(), v[g]);
                            }
                        }
                        for p in 0..2 * h {
                            avx512vnni::prefetch(lines.add(64 * (8 + p)));
                        }
                    }
                }
                let mut t = 0;
                while t < a.m {
                    let out = y.as_mut_ptr().add((t * row_blocks + rb) * ROWS);
                    let ld = row_blocks * ROWS;
                    t += match (pair, a.m - t) {
                        (2, TILE..) => {
                            tile::<TILE, 2, LINEAR, SPLIT>(&panel, bias, a, b, t, out, ld)
                        }
                        (2, 2..) => tile::<2, 2, LINEAR, SPLIT>(&panel, bias, a, b, t, out, ld),
                        (2, _) => tile::<1, 2, LINEAR, SPLIT>(&panel, bias, a, b, t, out, ld),
                        (_, TILE..) => {
                            tile::<TILE, 1, LINEAR, SPLIT>(&panel, bias, a, b, t, out, ld)
                        }
                        _ => tile::<1, 1, LINEAR, SPLIT>(&panel, bias, a, b, t, out, ld),
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
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2")]
unsafe fn tile<const T: usize, const R: usize, const LINEAR: bool, const SPLIT: usize>(
    panel: &Panels,
    bias: Option<i32>,
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
        let mut sum = [[0; UNITS]; T];
        for (i, sum) in sum.iter_mut().enumerate() {
            sums::<SPLIT>(bias, a, b, t + i, sum);
        }
        let mut part = [[_mm512_setzero_ps(); R]; T];
        let lines = 8 / SPLIT;
        for u in 0..len / 4 / lines {
            let mut c = [[_mm512_setzero_si512(); R]; T];
            if !LINEAR {
                for i in 0..T {
                    c[i] = [_mm512_set1_epi32(*sum[i].get_unchecked(u)); R];
                }
            }
            for j in lines * u..lines * (u + 1) {
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
                let header = panel.headers.get_unchecked(h);
                let s = _mm512_load_ps(header.s.get_unchecked(u).as_ptr());
                let o = _mm512_load_ps(header.o.get_unchecked(u).as_ptr());
                for i in 0..T {
                    let dot = _mm512_cvtepi32_ps(c[i][h]);
                    part[i][h] = _mm512_fmadd_ps(dot, s, part[i][h]);
                    if LINEAR {
                        let sum = _mm512_set1_epi32(*sum[i].get_unchecked(u));
                        let sum = _mm512_castsi512_ps(sum);
                        part[i][h] = _mm512_fmadd_ps(sum, o, part[i][h]);
                    }
                }
            }
        }
        for i in 0..T {
            let s = _mm512_set1_ps(*a.s.get_unchecked(b * a.m + t + i));
            for h in 0..R {
                let y = y.add(i * ld + h * ROWS);
                let acc = if b == 0 { _mm512_setzero_ps() } else { _mm512_loadu_ps(y) };
                _mm512_storeu_ps(y, _mm512_fmadd_ps(part[i][h], s, acc));
            }
        }
    }
    T
}
