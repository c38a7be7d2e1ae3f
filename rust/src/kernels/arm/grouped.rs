//! The grouped forms on ARM: linear codes as they are, others looked up by `tbl`, are multiplied by the integer
//! instructions of each set. A group's integer meets its scale in one float step.

use super::super::grouped::Header;
use super::super::layout::{ROWS, grouped_header};
use super::super::{Acts, Form};
use super::neon::Lanes4;
use super::{QUADS, dotprod, four, prefetch};
use crate::quant::{BLOCK, Codes, GROUPS, Grouped};
use std::arch::aarch64::*;

/// The integers of both groups of 64 k of 16 rows for `M` tokens.
type Dots<const M: usize> = [[[int32x4_t; QUADS]; M]; 2];

/// Multiplies 8 lines by 64 activations of each of `M` tokens. The table has what the codes stand for.
///
/// # Safety
/// The CPU has the instructions of the function's set. 8 lines, and 64 activations from each pointer on, can be read.
type Multiply<const M: usize> = unsafe fn(int8x16_t, *const u8, &[*const i8; M]) -> Dots<M>;

pub(super) unsafe fn gemm_neon(how: Grouped, w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    let multiply: Multiply<1> = match how.codes {
        Codes::Linear(_) => multiply::<true, false>,
        Codes::Fp4 => multiply::<false, false>,
        Codes::Uneven => multiply::<false, true>,
    };
    for t in 0..a.m {
        // SAFETY: the shapes were checked by `Kernels::gemm`.
        unsafe { rows::<1>(how, w, a, y, t, multiply) }
    }
}

pub(super) unsafe fn gemm_dotprod(how: Grouped, w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    let (one, two): (Multiply<1>, Multiply<2>) = match how.codes {
        Codes::Linear(_) => (multiply_dotprod::<1, true>, multiply_dotprod::<2, true>),
        _ => (multiply_dotprod::<1, false>, multiply_dotprod::<2, false>),
    };
    let mut t = 0;
    while t < a.m {
        // SAFETY: the shapes were checked by `Kernels::gemm`, the CPU has dotprod.
        unsafe {
            if a.m - t >= 2 {
                rows::<2>(how, w, a, y, t, two);
                t += 2;
            } else {
                rows::<1>(how, w, a, y, t, one);
                t += 1;
            }
        }
    }
}

/// Tokens `t..t + M` against all rows.
///
/// # Safety
/// Shapes as `Kernels::gemm` checks them, `t + M <= a.m`, the CPU has what `multiply` needs, and that is for the codes
/// of `how`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn rows<const M: usize>(
    how: Grouped,
    w: &[u8],
    a: &Acts<'_>,
    y: &mut [f32],
    t: usize,
    multiply: Multiply<M>,
) {
    let size = Form::Grouped(how).row_block_bytes(a.k);
    let (width, head) = (w.len() / size * ROWS, grouped_header(how));
    let linear = matches!(how.codes, Codes::Linear(_));
    let mut header = Header::ZERO;
    for (rb, w) in w.chunks_exact(size).enumerate() {
        let mut acc = [[vdupq_n_f32(0.0); QUADS]; M];
        let mut p = w.as_ptr();
        // SAFETY: every address lies in this row block, among the activations of its blocks, or in `y`; a table has 16
        // bytes.
        unsafe {
            let table = vld1q_s8(how.table().as_ptr());
            for b in 0..a.blocks() {
                let len = a.len(b);
                let q: [*const i8; M] = std::array::from_fn(|i| {
                    a.q.as_ptr().wrapping_add(b * BLOCK * a.m + (t + i) * len)
                });
                header.read::<Lanes4>(how, std::slice::from_raw_parts(p, head));
                let mut sum = [[0.0; GROUPS]; M];
                for i in 0..M {
                    for g in 0..GROUPS {
                        sum[i][g] = f32::from(a.sums.get_unchecked(b * a.m + t + i)[g]);
                    }
                }
                let mut part = [[vdupq_n_f32(0.0); QUADS]; M];
                for s in 0..len / 64 {
                    let lines = p.add(head + 512 * s);
                    let dots = multiply(table, lines, &q.map(|q| q.add(64 * s)));
                    for (g, dots) in dots.iter().enumerate() {
                        let g = 2 * s + g;
                        for h in 0..QUADS {
                            let s = vld1q_f32(header.s[g].as_ptr().add(4 * h));
                            let o = vld1q_f32(header.o[g].as_ptr().add(4 * h));
                            for i in 0..M {
                                part[i][h] = vfmaq_f32(part[i][h], vcvtq_f32_s32(dots[i][h]), s);
                                if linear {
                                    part[i][h] = vfmaq_n_f32(part[i][h], o, sum[i][g]);
                                }
                            }
                        }
                    }
                }
                for i in 0..M {
                    let s = *a.s.get_unchecked(b * a.m + t + i);
                    for h in 0..QUADS {
                        acc[i][h] = vfmaq_n_f32(acc[i][h], part[i][h], s);
                    }
                }
                p = p.add(head + len / 2 * ROWS);
            }
            for (i, acc) in acc.iter().enumerate() {
                for (h, &acc) in acc.iter().enumerate() {
                    vst1q_f32(y.as_mut_ptr().add((t + i) * width + rb * ROWS + 4 * h), acc);
                }
            }
        }
    }
}

/// What the low and the high codes of register `h` of a line stand for.
///
/// # Safety
/// That register can be read.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn codes<const LINEAR: bool>(table: int8x16_t, line: *const u8, h: usize) -> [int8x16_t; 2] {
    // SAFETY: the caller's promise.
    let v = unsafe { vld1q_u8(line.add(16 * h)) };
    let (low, high) = (vandq_u8(v, vdupq_n_u8(0x0f)), vshrq_n_u8::<4>(v));
    if LINEAR {
        return [vreinterpretq_s8_u8(low), vreinterpretq_s8_u8(high)];
    }
    [vqtbl1q_s8(table, low), vqtbl1q_s8(table, high)]
}

/// [`Multiply`] for baseline NEON. The eight products of a row's group in each of two lanes fit in i16 (15 * 127 * 8 =
/// 15240), and so do their pairs. Of `WIDE` values two do (127 * 127 * 2 = 32258).
///
/// # Safety
/// As [`Multiply`].
#[target_feature(enable = "neon")]
unsafe fn multiply<const LINEAR: bool, const WIDE: bool>(
    table: int8x16_t,
    lines: *const u8,
    q: &[*const i8; 1],
) -> Dots<1> {
    let zero = vdupq_n_s16(0);
    let mut c = [[[zero; 2]; QUADS]; 2];
    let mut dots = [[[vdupq_n_s32(0); 2]; QUADS]; 2];
    // SAFETY: the caller's promise.
    unsafe {
        for j in (0..8).step_by(2) {
            let line = lines.add(64 * j);
            prefetch(line);
            prefetch(line.add(64));
            let q = q[0].add(4 * j);
            let x = [[four(q), four(q.add(4))], [four(q.add(32)), four(q.add(36))]];
            for h in 0..QUADS {
                let v = [codes::<LINEAR>(table, line, h), codes::<LINEAR>(table, line.add(64), h)];
                for g in 0..2 {
                    let mut sum = if WIDE { [zero; 2] } else { c[g][h] };
                    for i in 0..2 {
                        let (v, x) = (v[i][g], x[g][i]);
                        sum[0] = vmlal_s8(sum[0], vget_low_s8(v), vget_low_s8(x));
                        sum[1] = vmlal_high_s8(sum[1], v, x);
                    }
                    if WIDE {
                        dots[g][h][0] = vpadalq_s16(dots[g][h][0], sum[0]);
                        dots[g][h][1] = vpadalq_s16(dots[g][h][1], sum[1]);
                    } else {
                        c[g][h] = sum;
                    }
                }
            }
        }
    }
    if WIDE {
        return dots.map(|dots| [dots.map(|[a, b]| vpaddq_s32(a, b))]);
    }
    c.map(|c| [c.map(|[a, b]| vpaddlq_s16(vpaddq_s16(a, b)))])
}

/// [`Multiply`] with `sdot`.
///
/// # Safety
/// As [`Multiply`].
#[target_feature(enable = "dotprod")]
unsafe fn multiply_dotprod<const M: usize, const LINEAR: bool>(
    table: int8x16_t,
    lines: *const u8,
    q: &[*const i8; M],
) -> Dots<M> {
    let mut c = [[[vdupq_n_s32(0); QUADS]; M]; 2];
    // SAFETY: the caller's promise.
    unsafe {
        for half in 0..2 {
            let x = [16 * half, 16 * half + 32].map(|at| q.map(|q| vld1q_s8(q.add(at))));
            let lines = lines.add(256 * half);
            line::<0, M, LINEAR>(table, lines, &x, &mut c);
            line::<1, M, LINEAR>(table, lines, &x, &mut c);
            line::<2, M, LINEAR>(table, lines, &x, &mut c);
            line::<3, M, LINEAR>(table, lines, &x, &mut c);
        }
    }
    c
}

/// Line `LANE` of four, both groups.
///
/// # Safety
/// That line can be read.
#[inline]
#[target_feature(enable = "dotprod")]
unsafe fn line<const LANE: usize, const M: usize, const LINEAR: bool>(
    table: int8x16_t,
    lines: *const u8,
    x: &[[int8x16_t; M]; 2],
    c: &mut Dots<M>,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let line = lines.add(64 * LANE);
        prefetch(line);
        for h in 0..QUADS {
            let v = codes::<LINEAR>(table, line, h);
            for g in 0..2 {
                for i in 0..M {
                    c[g][i][h] = dotprod::sdot::<LANE>(c[g][i][h], v[g], x[g][i]);
                }
            }
        }
    }
}
