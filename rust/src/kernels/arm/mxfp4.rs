//! MXFP4 weights on ARM: `tbl` looks up 16 codes, twice their values, and the integer instructions of each set
//! multiply. A group's integer meets its power of two in one float step.

use super::super::layout::{MXFP4_HEADER, ROWS};
use super::super::{Acts, Form};
use super::{QUADS, dotprod, four, prefetch};
use crate::quant::{BLOCK, TWICE};
use std::arch::aarch64::*;

/// The integers of both groups of 64 k of 16 rows for `M` tokens.
type Dots<const M: usize> = [[[int32x4_t; QUADS]; M]; 2];

/// Multiplies 8 lines by 64 activations of each of `M` tokens.
///
/// # Safety
/// The CPU has the instructions of the function's set. 8 lines, and 64 activations from each pointer on, can be read.
type Multiply<const M: usize> = unsafe fn(*const u8, &[*const i8; M]) -> Dots<M>;

pub(super) unsafe fn gemm_neon(w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    for t in 0..a.m {
        // SAFETY: the shapes were checked by `Kernels::gemm`.
        unsafe { rows::<1>(w, a, y, t, multiply) }
    }
}

pub(super) unsafe fn gemm_dotprod(w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    let mut t = 0;
    while t < a.m {
        // SAFETY: the shapes were checked by `Kernels::gemm`, the CPU has dotprod.
        unsafe {
            if a.m - t >= 2 {
                rows::<2>(w, a, y, t, multiply_dotprod::<2>);
                t += 2;
            } else {
                rows::<1>(w, a, y, t, multiply_dotprod::<1>);
                t += 1;
            }
        }
    }
}

/// Tokens `t..t + M` against all rows.
///
/// # Safety
/// Shapes as `Kernels::gemm` checks them, `t + M <= a.m`, and the CPU has what `multiply` needs.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn rows<const M: usize>(
    w: &[u8],
    a: &Acts<'_>,
    y: &mut [f32],
    t: usize,
    multiply: Multiply<M>,
) {
    let size = Form::Mxfp4.row_block_bytes(a.k);
    let width = w.len() / size * ROWS;
    for (rb, w) in w.chunks_exact(size).enumerate() {
        let mut acc = [[vdupq_n_f32(0.0); QUADS]; M];
        let mut p = w.as_ptr();
        // SAFETY: every address lies in this row block, among the activations of its blocks, or in `y`.
        unsafe {
            for b in 0..a.blocks() {
                let len = a.len(b);
                let q: [*const i8; M] = std::array::from_fn(|i| {
                    a.q.as_ptr().wrapping_add(b * BLOCK * a.m + (t + i) * len)
                });
                for s in 0..len / 64 {
                    let dots = multiply(p.add(MXFP4_HEADER + 512 * s), &q.map(|q| q.add(64 * s)));
                    for (g, dots) in dots.iter().enumerate() {
                        let e = vld1q_u8(p.add(16 * (2 * s + g)));
                        let e = [vmovl_u8(vget_low_u8(e)), vmovl_high_u8(e)];
                        for h in 0..QUADS {
                            let e = if h % 2 == 0 {
                                vmovl_u16(vget_low_u16(e[h / 2]))
                            } else {
                                vmovl_high_u16(e[h / 2])
                            };
                            let d = vreinterpretq_f32_u32(vshlq_n_u32::<23>(e));
                            for i in 0..M {
                                let s = 0.5 * *a.s.get_unchecked(b * a.m + t + i);
                                let dot = vcvtq_f32_s32(dots[i][h]);
                                acc[i][h] = vfmaq_f32(acc[i][h], dot, vmulq_n_f32(d, s));
                            }
                        }
                    }
                }
                p = p.add(MXFP4_HEADER + len / 2 * ROWS);
            }
            for (i, acc) in acc.iter().enumerate() {
                for (h, &acc) in acc.iter().enumerate() {
                    vst1q_f32(y.as_mut_ptr().add((t + i) * width + rb * ROWS + 4 * h), acc);
                }
            }
        }
    }
}

/// The low and the high codes of register `h` of a line, looked up.
///
/// # Safety
/// That register can be read.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn codes(table: int8x16_t, line: *const u8, h: usize) -> [int8x16_t; 2] {
    // SAFETY: the caller's promise.
    let v = unsafe { vld1q_u8(line.add(16 * h)) };
    [vqtbl1q_s8(table, vandq_u8(v, vdupq_n_u8(0x0f))), vqtbl1q_s8(table, vshrq_n_u8::<4>(v))]
}

/// [`Multiply`] for baseline NEON: the eight products of a row's group in each of two lanes fit in i16
/// (12 * 127 * 8 = 12192), and so do their pairs.
///
/// # Safety
/// As [`Multiply`].
#[target_feature(enable = "neon")]
unsafe fn multiply(lines: *const u8, q: &[*const i8; 1]) -> Dots<1> {
    let mut c = [[[vdupq_n_s16(0); 2]; QUADS]; 2];
    // SAFETY: the caller's promise; the table has 16 bytes.
    unsafe {
        let table = vld1q_s8(TWICE.as_ptr());
        for j in 0..8 {
            let line = lines.add(64 * j);
            prefetch(line);
            let x = [four(q[0].add(4 * j)), four(q[0].add(32 + 4 * j))];
            for h in 0..QUADS {
                let v = codes(table, line, h);
                for g in 0..2 {
                    c[g][h][0] = vmlal_s8(c[g][h][0], vget_low_s8(v[g]), vget_low_s8(x[g]));
                    c[g][h][1] = vmlal_high_s8(c[g][h][1], v[g], x[g]);
                }
            }
        }
    }
    c.map(|c| [c.map(|[a, b]| vpaddlq_s16(vpaddq_s16(a, b)))])
}

/// [`Multiply`] with `sdot`.
///
/// # Safety
/// As [`Multiply`].
#[target_feature(enable = "dotprod")]
unsafe fn multiply_dotprod<const M: usize>(lines: *const u8, q: &[*const i8; M]) -> Dots<M> {
    let mut c = [[[vdupq_n_s32(0); QUADS]; M]; 2];
    // SAFETY: the caller's promise; the table has 16 bytes.
    unsafe {
        let table = vld1q_s8(TWICE.as_ptr());
        for half in 0..2 {
            let x = [16 * half, 16 * half + 32].map(|at| q.map(|q| vld1q_s8(q.add(at))));
            let lines = lines.add(256 * half);
            line::<0, M>(table, lines, &x, &mut c);
            line::<1, M>(table, lines, &x, &mut c);
            line::<2, M>(table, lines, &x, &mut c);
            line::<3, M>(table, lines, &x, &mut c);
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
unsafe fn line<const LANE: usize, const M: usize>(
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
            let v = codes(table, line, h);
            for g in 0..2 {
                for i in 0..M {
                    c[g][i][h] = dotprod::sdot::<LANE>(c[g][i][h], v[g], x[g][i]);
                }
            }
        }
    }
}
