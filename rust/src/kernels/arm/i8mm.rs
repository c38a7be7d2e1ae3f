//! NEON with the int8 matrix instructions (Neoverse V1, N2 and newer): `smmla` multiplies 2 tokens x 8 k
//! by 2 rows x 8 k. It wants 8 k of a row side by side, so many tokens run against a panel of paired
//! lines; few tokens use the kernels of dotprod.

use super::super::layout::Q8_HEADER;
use super::super::{Acts, Form, Kernels};
use super::{QUADS, Step, dotprod, finish, prefetch, put, unpack, walk};
use std::arch::aarch64::*;
use std::arch::asm;

pub(in super::super) const KERNELS: Kernels = Kernels {
    name: "i8mm",
    needs: &["i8mm", "dotprod", "neon"],
    gemm_q4,
    gemm_q8,
    ..dotprod::KERNELS
};

/// Tokens up to which weights are read as they lie; more pay for a panel.
const DIRECT: usize = 4;

unsafe fn gemm_q4(w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    // SAFETY: the shapes were checked by `Kernels::gemm`, the CPU has dotprod and i8mm; the forms and
    // the order of the panel agree.
    unsafe {
        if a.m <= DIRECT {
            dotprod::gemm_q4(w, a, y)
        } else {
            walk(Form::Q4, Some(unpack::<true>), tile, w, a, y)
        }
    }
}

unsafe fn gemm_q8(w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    // SAFETY: as in `gemm_q4`.
    unsafe {
        if a.m <= DIRECT {
            dotprod::gemm_q8(w, a, y)
        } else {
            walk(Form::Q8, Some(pair), tile, w, a, y)
        }
    }
}

/// Makes the paired lines of an int8 block.
///
/// # Safety
/// As [`super::Prepare`], for int8 blocks.
#[target_feature(enable = "neon")]
unsafe fn pair(block: *const u8, len: usize, out: *mut u8) {
    for j in (0..len / 4).step_by(2) {
        // SAFETY: the caller's promise.
        unsafe {
            let lines = block.add(Q8_HEADER + 64 * j);
            prefetch(lines);
            prefetch(lines.add(64));
            for h in 0..QUADS {
                let v = [vld1q_u8(lines.add(16 * h)), vld1q_u8(lines.add(64 + 16 * h))];
                put::<true>(out, j, h, v);
            }
        }
    }
}

/// `acc[2t + r] += sum over k of x[8t + k] * w[8r + k]`.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn smmla(mut acc: int32x4_t, x: int8x16_t, w: int8x16_t) -> int32x4_t {
    // SAFETY: arithmetic on registers; the function's own features include the instruction.
    unsafe {
        asm!(
            "smmla {0:v}.4s, {1:v}.16b, {2:v}.16b",
            inout(vreg) acc, in(vreg) x, in(vreg) w,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    acc
}

/// At most four tokens against paired lines.
///
/// # Safety
/// As [`super::Tile`].
#[target_feature(enable = "neon,i8mm")]
unsafe fn tile(step: &Step<'_>, t: usize) -> usize {
    // SAFETY: the caller's promise.
    unsafe { if step.a.m - t > 2 { pairs::<2>(step, t) } else { pairs::<1>(step, t) } }
}

/// Tokens `t..` in `P` pairs. The last pair may lack a token or both: then the last token stands in,
/// and its sums are not stored again. Gives the number of tokens.
///
/// # Safety
/// As [`super::Tile`].
#[inline]
#[target_feature(enable = "neon,i8mm")]
unsafe fn pairs<const P: usize>(step: &Step<'_>, t: usize) -> usize {
    let last = step.a.m - 1;
    // One register: 2 tokens x 2 rows.
    let mut c = [[vdupq_n_s32(0); 2 * QUADS]; P];
    // SAFETY: every address lies in the lines or among the block's activations.
    unsafe {
        let q: [[*const i8; 2]; P] = std::array::from_fn(|p| {
            [step.q((t + 2 * p).min(last)), step.q((t + 2 * p + 1).min(last))]
        });
        for k in (0..step.len()).step_by(16) {
            let x: [[int8x16_t; 2]; P] = q.map(|q| {
                let x = q.map(|q| vld1q_s64(q.add(k).cast()));
                [
                    vreinterpretq_s8_s64(vzip1q_s64(x[0], x[1])),
                    vreinterpretq_s8_s64(vzip2q_s64(x[0], x[1])),
                ]
            });
            for half in 0..2 {
                for r in 0..2 * QUADS {
                    let w = vld1q_s8(step.lines.add(16 * k + 128 * half + 16 * r).cast());
                    for p in 0..P {
                        c[p][r] = smmla(c[p][r], x[p][half], w);
                    }
                }
            }
        }
        for (p, c) in c.iter().enumerate() {
            let c = c.map(|c| vreinterpretq_s64_s32(c));
            for i in 0..2 {
                let t = t + 2 * p + i;
                if t > last {
                    break;
                }
                let dots = std::array::from_fn(|h| {
                    let (a, b) = (c[2 * h], c[2 * h + 1]);
                    let dots = if i == 0 { vzip1q_s64(a, b) } else { vzip2q_s64(a, b) };
                    vreinterpretq_s32_s64(dots)
                });
                finish(step, t, &dots);
            }
        }
    }
    (2 * P).min(last + 1 - t)
}
