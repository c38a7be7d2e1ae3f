//! The grouped forms on ARM: linear codes as they are, others looked up by `tbl`, are multiplied by the integer
//! instructions of each set. A group's integer meets its scale in one float step.

use super::super::grouped::Header;
use super::super::layout::{ROWS, grouped_header, grouped_lines};
use super::super::{Acts, Form};
use super::neon::Lanes4;
use super::{QUADS, dotprod, four, prefetch};
use crate::quant::{BLOCK, Codes, Grouped, UNITS};
use std::arch::aarch64::*;

/// The integers of two units of 16 rows for `M` tokens.
type Dots<const M: usize> = [[[int32x4_t; QUADS]; M]; 2];

/// Multiplies the pair of units of the given number in 64 k (0, or 1 if units are of 16) by activations of each of `M`
/// tokens. The table has what the codes stand for.
///
/// # Safety
/// The CPU has the instructions of the function's set. The lines of 64 k, and 64 activations from each pointer on, can
/// be read.
type Multiply<const M: usize> = unsafe fn(int8x16_t, *const u8, usize, &[*const i8; M]) -> Dots<M>;

pub(super) unsafe fn gemm_neon(how: Grouped, w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    fn multiplier<const SPLIT: usize>(codes: Codes) -> Multiply<1> {
        match codes {
            Codes::Linear(_) => multiply::<true, false, 0, SPLIT>,
            Codes::Linear5(_) => multiply::<true, true, 1, SPLIT>,
            Codes::Linear6(_) => multiply::<true, true, 2, SPLIT>,
            Codes::Fp4 => multiply::<false, false, 0, SPLIT>,
            Codes::Uneven => multiply::<false, true, 0, SPLIT>,
        }
    }
    let two = how.unit() == 16;
    let multiply = if two { multiplier::<2>(how.codes) } else { multiplier::<1>(how.codes) };
    for t in 0..a.m {
        // SAFETY: the shapes were checked by `Kernels::gemm`.
        unsafe { rows::<1>(how, w, a, y, t, multiply) }
    }
}

pub(super) unsafe fn gemm_dotprod(how: Grouped, w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    fn multiplier<const M: usize, const SPLIT: usize>(codes: Codes) -> Multiply<M> {
        match codes {
            Codes::Linear(_) => multiply_dotprod::<M, true, 0, SPLIT>,
            Codes::Linear5(_) => multiply_dotprod::<M, true, 1, SPLIT>,
            Codes::Linear6(_) => multiply_dotprod::<M, true, 2, SPLIT>,
            Codes::Fp4 | Codes::Uneven => multiply_dotprod::<M, false, 0, SPLIT>,
        }
    }
    let (one, two) = if how.unit() == 16 {
        (multiplier::<1, 2>(how.codes), multiplier::<2, 2>(how.codes))
    } else {
        (multiplier::<1, 1>(how.codes), multiplier::<2, 1>(how.codes))
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
    let (linear, unit) = (how.offset().is_some(), how.unit());
    let mut header = Header::ZERO;
    for (rb, w) in w.chunks_exact(size).enumerate() {
        let mut acc = [[vdupq_n_f32(0.0); QUADS]; M];
        let mut p = w.as_ptr();
        // SAFETY: every address lies in this row block, among the activations of its blocks, or in `y`; a table has 16
        // bytes.
        unsafe {
            let table: [i8; 16] = std::array::from_fn(|q| how.value(q as u8));
            let table = vld1q_s8(table.as_ptr());
            for b in 0..a.blocks() {
                let len = a.len(b);
                let q: [*const i8; M] = std::array::from_fn(|i| {
                    a.q.as_ptr().wrapping_add(b * BLOCK * a.m + (t + i) * len)
                });
                header.read::<Lanes4>(how, std::slice::from_raw_parts(p, head));
                let mut sum = [[0.0; UNITS]; M];
                for i in 0..M {
                    for u in 0..len / unit {
                        sum[i][u] = f32::from(if unit == 16 {
                            vaddlvq_s8(vld1q_s8(q[i].add(16 * u)))
                        } else {
                            a.sums.get_unchecked(b * a.m + t + i)[u]
                        });
                    }
                }
                let mut part = [[vdupq_n_f32(0.0); QUADS]; M];
                for pair in 0..len / (2 * unit) {
                    let s = pair * unit / 32;
                    let lines = p.add(head + grouped_lines(how) * s);
                    let half = pair & (32 / unit - 1);
                    let dots = multiply(table, lines, half, &q.map(|q| q.add(64 * s)));
                    for (g, dots) in dots.iter().enumerate() {
                        let u = 2 * pair + g;
                        for h in 0..QUADS {
                            let s = vld1q_f32(header.s[u].as_ptr().add(4 * h));
                            let o = vld1q_f32(header.o[u].as_ptr().add(4 * h));
                            for i in 0..M {
                                part[i][h] = vfmaq_f32(part[i][h], vcvtq_f32_s32(dots[i][h]), s);
                                if linear {
                                    part[i][h] = vfmaq_n_f32(part[i][h], o, sum[i][u]);
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
                p = p.add(head + len / 64 * grouped_lines(how));
            }
            for (i, acc) in acc.iter().enumerate() {
                for (h, &acc) in acc.iter().enumerate() {
                    vst1q_f32(y.as_mut_ptr().add((t + i) * width + rb * ROWS + 4 * h), acc);
                }
            }
        }
    }
}

/// What the low and the high codes of register `h` of line `j` stand for.
///
/// # Safety
/// That register can be read, and of the lines with higher bits.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn codes<const LINEAR: bool, const HIGH: usize>(
    table: int8x16_t,
    lines: *const u8,
    j: usize,
    h: usize,
) -> [int8x16_t; 2] {
    // SAFETY: the caller's promise.
    let v = unsafe { vld1q_u8(lines.add(64 * j + 16 * h)) };
    let mut v = [vandq_u8(v, vdupq_n_u8(0x0f)), vshrq_n_u8::<4>(v)];
    if !LINEAR {
        return [vqtbl1q_s8(table, v[0]), vqtbl1q_s8(table, v[1])];
    }
    if HIGH > 0 {
        // As `layout::places` says; a shift to the left by less than nothing is one to the right.
        let shared = 3 - HIGH;
        // SAFETY: the caller's promise.
        let x = unsafe { vld1q_u8(lines.add(64 * (8 + (j >> shared)) + 16 * h)) };
        for g in 0..2 {
            let bit = HIGH * (2 * (j & ((1 << shared) - 1)) + g);
            let x = vshlq_u8(x, vdupq_n_s8(4 - bit as i8));
            v[g] = vorrq_u8(v[g], vandq_u8(x, vdupq_n_u8(((1 << HIGH) - 1) << 4)));
        }
    }
    [vreinterpretq_s8_u8(v[0]), vreinterpretq_s8_u8(v[1])]
}

/// [`Multiply`] for baseline NEON. The eight products of a row's unit in each of two lanes fit in i16 (15 * 127 * 8 =
/// 15240), and so do their pairs. Of `WIDE` values two do (127 * 127 * 2 = 32258).
///
/// # Safety
/// As [`Multiply`], units of 32 / `SPLIT`, and the codes as `LINEAR` and `HIGH` say.
#[target_feature(enable = "neon")]
unsafe fn multiply<const LINEAR: bool, const WIDE: bool, const HIGH: usize, const SPLIT: usize>(
    table: int8x16_t,
    lines: *const u8,
    pair: usize,
    q: &[*const i8; 1],
) -> Dots<1> {
    let zero = vdupq_n_s16(0);
    let mut c = [[[zero; 2]; QUADS]; 2];
    let mut dots = [[[vdupq_n_s32(0); 2]; QUADS]; 2];
    let apart = 8 / SPLIT;
    // SAFETY: the caller's promise.
    unsafe {
        for j in (0..apart).step_by(2) {
            let q = q[0].add(4 * (2 * apart * pair + j));
            let j = apart * pair + j;
            prefetch(lines.add(64 * j));
            prefetch(lines.add(64 * j + 64));
            let second = q.add(4 * apart);
            let x = [[four(q), four(q.add(4))], [four(second), four(second.add(4))]];
            for h in 0..QUADS {
                let v = [
                    codes::<LINEAR, HIGH>(table, lines, j, h),
                    codes::<LINEAR, HIGH>(table, lines, j + 1, h),
                ];
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
/// As [`multiply`].
#[target_feature(enable = "dotprod")]
unsafe fn multiply_dotprod<
    const M: usize,
    const LINEAR: bool,
    const HIGH: usize,
    const SPLIT: usize,
>(
    table: int8x16_t,
    lines: *const u8,
    pair: usize,
    q: &[*const i8; M],
) -> Dots<M> {
    let mut c = [[[vdupq_n_s32(0); QUADS]; M]; 2];
    let apart = 8 / SPLIT;
    // SAFETY: the caller's promise.
    unsafe {
        for four in 0..apart / 4 {
            let at = 4 * (2 * apart * pair + 4 * four);
            let x = [at, at + 4 * apart].map(|at| q.map(|q| vld1q_s8(q.add(at))));
            let j = apart * pair + 4 * four;
            line::<0, M, LINEAR, HIGH>(table, lines, j, &x, &mut c);
            line::<1, M, LINEAR, HIGH>(table, lines, j, &x, &mut c);
            line::<2, M, LINEAR, HIGH>(table, lines, j, &x, &mut c);
            line::<3, M, LINEAR, HIGH>(table, lines, j, &x, &mut c);
        }
    }
    c
}

/// Line `LANE` of the four from `j` on, both units.
///
/// # Safety
/// That line can be read, and those with higher bits.
#[inline]
#[target_feature(enable = "dotprod")]
unsafe fn line<const LANE: usize, const M: usize, const LINEAR: bool, const HIGH: usize>(
    table: int8x16_t,
    lines: *const u8,
    j: usize,
    x: &[[int8x16_t; M]; 2],
    c: &mut Dots<M>,
) {
    let j = j + LANE;
    // SAFETY: the caller's promise.
    unsafe {
        prefetch(lines.add(64 * j));
        for h in 0..QUADS {
            let v = codes::<LINEAR, HIGH>(table, lines, j, h);
            for g in 0..2 {
                for i in 0..M {
                    c[g][i][h] = dotprod::sdot::<LANE>(c[g][i][h], v[g], x[g][i]);
                }
            }
        }
    }
}
