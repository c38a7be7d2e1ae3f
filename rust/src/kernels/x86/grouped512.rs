//! The grouped forms on AVX-512 with VNNI: as `grouped`. Few tokens read codes as they lie, many a panel of bytes.

use super::super::grouped::Header;
use super::super::layout::{ROWS, block_offset, grouped_header, grouped_lines};
use super::super::{Acts, Form};
use super::avx512vnni;
use super::grouped::{biased, sums};
use super::zmm::Zmm;
use crate::quant::{BLOCK, Codes, Grouped, UNITS};
use std::arch::x86_64::*;
use std::slice;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn gemm(how: Grouped, w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    // SAFETY: the shapes were checked by `Kernels::gemm`.
    unsafe {
        match (how.codes, how.unit()) {
            (Codes::Fp4 | Codes::Uneven, 32) => all::<false, 0, 1>(how, w, a, y),
            (Codes::Fp4 | Codes::Uneven, _) => all::<false, 0, 2>(how, w, a, y),
            (Codes::Linear(_), 32) => all::<true, 0, 1>(how, w, a, y),
            (Codes::Linear(_), _) => all::<true, 0, 2>(how, w, a, y),
            (Codes::Linear5(_), 32) => all::<true, 1, 1>(how, w, a, y),
            (Codes::Linear5(_), _) => all::<true, 1, 2>(how, w, a, y),
            (Codes::Linear6(_), 32) => all::<true, 2, 1>(how, w, a, y),
            (Codes::Linear6(_), _) => all::<true, 2, 2>(how, w, a, y),
        }
    }
}

/// # Safety
/// Shapes as `Kernels::gemm` checks them, and `how` has codes that are `LINEAR` or not, `HIGH` bits beyond 4, and units of
/// 32 / `SPLIT`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn all<const LINEAR: bool, const HIGH: usize, const SPLIT: usize>(
    how: Grouped,
    w: &[u8],
    a: &Acts<'_>,
    y: &mut [f32],
) {
    // SAFETY: the caller's promise.
    unsafe {
        match a.m {
            1 => direct::<1, LINEAR, HIGH, SPLIT>(how, w, a, y),
            2 => direct::<2, LINEAR, HIGH, SPLIT>(how, w, a, y),
            3 => direct::<3, LINEAR, HIGH, SPLIT>(how, w, a, y),
            4 => direct::<4, LINEAR, HIGH, SPLIT>(how, w, a, y),
            _ => panels::<LINEAR, HIGH, SPLIT>(how, w, a, y),
        }
    }
}

/// The codes in the low and the high nibbles of line `j`, or their values plus the bias.
///
/// # Safety
/// `lines` are those of 64 k, at a multiple of 64, of codes with `HIGH` bits beyond 4.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn codes<const LINEAR: bool, const HIGH: usize>(
    table: __m512i,
    lines: *const u8,
    j: usize,
) -> [__m512i; 2] {
    let nibble = _mm512_set1_epi8(0x0f);
    // SAFETY: the caller's promise.
    let x = unsafe { _mm512_load_si512(lines.add(64 * j).cast()) };
    let mut v = [x, _mm512_srli_epi16::<4>(x)];
    for g in 0..2 {
        v[g] = _mm512_and_si512(v[g], nibble);
        if !LINEAR {
            v[g] = _mm512_shuffle_epi8(table, v[g]);
        }
        if HIGH > 0 {
            // As `layout::places` says.
            let shared = 3 - HIGH;
            let bit = HIGH * (2 * (j & ((1 << shared) - 1)) + g);
            // SAFETY: the caller's promise.
            let x = unsafe { _mm512_load_si512(lines.add(64 * (8 + (j >> shared))).cast()) };
            // To bit 4 of each byte.
            let x = _mm512_rolv_epi32(x, _mm512_set1_epi32((4 - bit as i32) & 31));
            let mask = _mm512_set1_epi8(((1 << HIGH) - 1) << 4);
            v[g] = _mm512_or_si512(v[g], _mm512_and_si512(x, mask));
        }
    }
    v
}

/// All `M` tokens against weights as they lie.
///
/// # Safety
/// As [`all`], and `a.m == M`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn direct<const M: usize, const LINEAR: bool, const HIGH: usize, const SPLIT: usize>(
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
    // Lines of a unit.
    let unit = 8 / SPLIT;
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
                    sums::<SPLIT>(bias, a, b, i, sum);
                }
                let mut part = [_mm512_setzero_ps(); M];
                // Two units at a time: a line has codes of both.
                for pair in 0..len / (8 * unit) {
                    let lines = p.add(head + grouped_lines(how) * (pair / SPLIT));
                    let first = pair % SPLIT * unit;
                    let mut c = [[_mm512_setzero_si512(); M]; 2];
                    if !LINEAR {
                        for g in 0..2 {
                            for i in 0..M {
                                c[g][i] = _mm512_set1_epi32(*sum[i].get_unchecked(2 * pair + g));
                            }
                        }
                    }
                    for j in 0..unit {
                        avx512vnni::prefetch(lines.add(64 * (first + j)));
                        if HIGH > 0 && j % 4 == 0 {
                            // One or two of these lines for four of the others.
                            let at = 8 * 64 + HIGH * 16 * (first + j);
                            avx512vnni::prefetch(lines.add(at));
                            avx512vnni::prefetch(lines.add(at + 64 * (HIGH - 1)));
                        }
                        let v = codes::<LINEAR, HIGH>(table, lines, first + j);
                        for i in 0..M {
                            let q = q.add(i * len + 8 * unit * pair);
                            for g in 0..2 {
                                let x = _mm512_set1_epi32(avx512vnni::four(q, j + unit * g));
                                c[g][i] = _mm512_dpbusd_epi32(c[g][i], v[g], x);
                            }
                        }
                    }
                    for g in 0..2 {
                        let s = _mm512_load_ps(header.s.get_unchecked(2 * pair + g).as_ptr());
                        let o = _mm512_load_ps(header.o.get_unchecked(2 * pair + g).as_ptr());
                        for i in 0..M {
                            part[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(c[g][i]), s, part[i]);
                            if LINEAR {
                                let sum = _mm512_set1_epi32(*sum[i].get_unchecked(2 * pair + g));
                                part[i] = _mm512_fmadd_ps(_mm512_castsi512_ps(sum), o, part[i]);
                            }
                        }
                    }
                }
                for i in 0..M {
                    let s = _mm512_set1_ps(*a.s.get_unchecked(b * M + i));
                    acc[i] = _mm512_fmadd_ps(part[i], s, acc[i]);
                }
                p = p.add(head + len / 64 * grouped_lines(how));
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
/// As [`all`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn panels<const LINEAR: bool, const HIGH: usize, const SPLIT: usize>(
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
    let apart = 8 / SPLIT;
    let mut panel = Panels { lines: [[[0; 64]; BLOCK / 4]; 2], headers: [Header::ZERO; 2] };
    // SAFETY: as in `direct`.
    unsafe {
        let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
        let mut rb = 0;
        while rb < row_blocks {
            let pair = (row_blocks - rb).min(2);
            for b in 0..a.blocks() {
                for h in 0..pair {
                    let block = w.as_ptr().add((rb + h) * size + block_offset(form, b));
                    for line in 0..head / 64 {
                        avx512vnni::prefetch(block.add(64 * line));
                    }
                    panel.headers[h].read::<Zmm>(how, slice::from_raw_parts(block, head));
                    for t in 0..a.len(b) / 64 {
                        let lines = block.add(head + grouped_lines(how) * t);
                        for j in 0..8 {
                            avx512vnni::prefetch(lines.add(64 * j));
                            let v = codes::<LINEAR, HIGH>(table, lines, j);
                            let at = 16 * t + j / apart * 2 * apart + j % apart;
                            for g in 0..2 {
                                let out = panel.lines[h][at + g * apart].as_mut_ptr();
                                _mm512_store_si512(out.cast(), v[g]);
                            }
                        }
                        for p in 0..2 * HIGH {
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
