//! NEON with the dot product instructions (Cortex-A76, Neoverse N1 and newer): `sdot` by element
//! multiplies 4 rows x 4 k by four activations of one token, and adds up to i32.
//!
//! The intrinsics are unstable in the oldest Rust that we build with, hence `asm!`.

use super::super::layout::Q4_HEADER;
use super::super::{Acts, Form, Kernels};
use super::{QUADS, Step, finish, neon, offsets, prefetch, scales, unpack, walk};
use std::arch::aarch64::*;
use std::arch::asm;

pub(in super::super) const KERNELS: Kernels = Kernels {
    name: "dotprod",
    supported: || std::arch::is_aarch64_feature_detected!("dotprod"),
    gemm_q4,
    gemm_q8,
    ..neon::KERNELS
};

/// Tokens up to which the packed weights are read directly.
pub(super) const DIRECT: usize = 4;

pub(super) unsafe fn gemm_q4(w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    // SAFETY: the shapes were checked by `Kernels::gemm`, the CPU has dotprod; the forms agree.
    unsafe {
        if a.m <= DIRECT {
            walk(Form::Q4, None, tile_q4, w, a, y)
        } else {
            walk(Form::Q4, Some(unpack::<false>), tile_q8::<false>, w, a, y)
        }
    }
}

pub(super) unsafe fn gemm_q8(w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    // SAFETY: as in `gemm_q4`.
    unsafe { walk(Form::Q8, None, tile_q8::<true>, w, a, y) }
}

/// `acc[i] += sum over k of w[4i + k] * x[4 LANE + k]`.
#[inline]
#[target_feature(enable = "dotprod")]
fn sdot<const LANE: usize>(mut acc: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: arithmetic on registers; the function's own features include the instruction.
    unsafe {
        asm!(
            "sdot {0:v}.4s, {1:v}.16b, {2:v}.4b[{3}]",
            inout(vreg) acc, in(vreg) w, in(vreg) x, const LANE,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    acc
}

/// At most four tokens against a stored int4 block.
///
/// # Safety
/// As [`super::Tile`].
#[target_feature(enable = "dotprod")]
unsafe fn tile_q4(step: &Step<'_>, t: usize) -> usize {
    // SAFETY: the caller's promise; there are that many tokens.
    unsafe {
        match step.a.m - t {
            4.. => direct::<4, 2>(step, t),
            3 => direct::<3, 2>(step, t),
            2 => direct::<2, 4>(step, t),
            _ => direct::<1, 4>(step, t),
        }
    }
}

/// `M` tokens, `R` registers of a line at a time. Gives `M`.
///
/// # Safety
/// As [`super::Tile`], with at least `M` tokens from `t` on.
#[inline]
#[target_feature(enable = "dotprod")]
unsafe fn direct<const M: usize, const R: usize>(step: &Step<'_>, t: usize) -> usize {
    // SAFETY: every address lies in the block or among its activations.
    unsafe {
        let mut sum: [[int32x4_t; QUADS]; M] = std::array::from_fn(|i| offsets(step, t + i));
        for s in 0..step.len() / 64 {
            let scales = scales(step.block, s);
            for first in (0..QUADS).step_by(R) {
                let mut c = [[[vdupq_n_s32(0); R]; M]; 2];
                for half in 0..2 {
                    let at = 64 * s + 16 * half;
                    let x = [at, at + 32].map(|at| -> [int8x16_t; M] {
                        std::array::from_fn(|i| vld1q_s8(step.q(t + i).add(at)))
                    });
                    let lines = step.block.add(Q4_HEADER + 512 * s + 256 * half);
                    if first == 0 {
                        (0..4).for_each(|j| prefetch(lines.add(64 * j)));
                    }
                    let lines = lines.add(16 * first);
                    line_q4::<0, M, R>(lines, &x, &mut c);
                    line_q4::<1, M, R>(lines, &x, &mut c);
                    line_q4::<2, M, R>(lines, &x, &mut c);
                    line_q4::<3, M, R>(lines, &x, &mut c);
                }
                for (c, &sc) in c.iter().zip(&scales) {
                    for r in 0..R {
                        let sc = widen(sc, first + r);
                        for i in 0..M {
                            sum[i][first + r] = vmlaq_s32(sum[i][first + r], c[i][r], sc);
                        }
                    }
                }
            }
        }
        for (i, dots) in sum.iter().enumerate() {
            finish(step, t + i, dots);
        }
    }
    M
}

/// Line `LANE` of four, both groups.
///
/// # Safety
/// `R` registers of that line can be read from `lines + 64 * LANE` on.
#[inline]
#[target_feature(enable = "dotprod")]
unsafe fn line_q4<const LANE: usize, const M: usize, const R: usize>(
    lines: *const u8,
    x: &[[int8x16_t; M]; 2],
    c: &mut [[[int32x4_t; R]; M]; 2],
) {
    for r in 0..R {
        // SAFETY: the caller's promise.
        let v = unsafe { vld1q_u8(lines.add(64 * LANE + 16 * r)) };
        let low = vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(0x0f)));
        let high = vreinterpretq_s8_u8(vshrq_n_u8::<4>(v));
        for i in 0..M {
            c[0][i][r] = sdot::<LANE>(c[0][i][r], low, x[0][i]);
            c[1][i][r] = sdot::<LANE>(c[1][i][r], high, x[1][i]);
        }
    }
}

/// Bytes `4 * quad..` as four i32.
#[inline]
#[target_feature(enable = "neon")]
fn widen(bytes: uint8x16_t, quad: usize) -> int32x4_t {
    let wide = if quad < 2 { vmovl_u8(vget_low_u8(bytes)) } else { vmovl_high_u8(bytes) };
    let wide = if quad % 2 == 0 { vmovl_u16(vget_low_u16(wide)) } else { vmovl_high_u16(wide) };
    vreinterpretq_s32_u32(wide)
}

/// At most four tokens against int8 lines; `STORED` if they come from memory.
///
/// # Safety
/// As [`super::Tile`].
#[target_feature(enable = "dotprod")]
pub(super) unsafe fn tile_q8<const STORED: bool>(step: &Step<'_>, t: usize) -> usize {
    // SAFETY: the caller's promise; there are that many tokens.
    unsafe {
        match step.a.m - t {
            4.. => int8::<4, STORED>(step, t),
            3 => int8::<3, STORED>(step, t),
            2 => int8::<2, STORED>(step, t),
            _ => int8::<1, STORED>(step, t),
        }
    }
}

/// `M` tokens. Gives `M`.
///
/// # Safety
/// As [`super::Tile`], with at least `M` tokens from `t` on.
#[inline]
#[target_feature(enable = "dotprod")]
unsafe fn int8<const M: usize, const STORED: bool>(step: &Step<'_>, t: usize) -> usize {
    let mut sum = [[vdupq_n_s32(0); QUADS]; M];
    // SAFETY: every address lies in the lines or among the block's activations.
    unsafe {
        for k in (0..step.len()).step_by(16) {
            let x: [int8x16_t; M] = std::array::from_fn(|i| vld1q_s8(step.q(t + i).add(k)));
            let lines = step.lines.add(16 * k);
            if STORED {
                (0..4).for_each(|j| prefetch(lines.add(64 * j)));
            }
            line_q8::<0, M>(lines, &x, &mut sum);
            line_q8::<1, M>(lines, &x, &mut sum);
            line_q8::<2, M>(lines, &x, &mut sum);
            line_q8::<3, M>(lines, &x, &mut sum);
        }
        for (i, dots) in sum.iter().enumerate() {
            finish(step, t + i, dots);
        }
    }
    M
}

/// Line `LANE` of four.
///
/// # Safety
/// That line can be read.
#[inline]
#[target_feature(enable = "dotprod")]
unsafe fn line_q8<const LANE: usize, const M: usize>(
    lines: *const u8,
    x: &[int8x16_t; M],
    sum: &mut [[int32x4_t; QUADS]; M],
) {
    for h in 0..QUADS {
        // SAFETY: the caller's promise.
        let v = unsafe { vld1q_s8(lines.add(64 * LANE + 16 * h).cast()) };
        for i in 0..M {
            sum[i][h] = sdot::<LANE>(sum[i][h], v, x[i]);
        }
    }
}
