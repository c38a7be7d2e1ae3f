//! NEON with the dot product instructions (Cortex-A76, Neoverse N1 and newer): `sdot` by element
//! multiplies 4 rows x 4 k by four activations of one token, and adds up to i32.
//!
//! The intrinsics are unstable in the oldest Rust that we build with, hence `asm!`.

use super::super::attention::{self, Attend, int8::Dot};
use super::super::float::Floats;
use super::super::layout::Q4_HEADER;
use super::super::{Acts, Form, Kernels};
use super::{QUADS, Step, finish, grouped, neon, offsets, prefetch, scales, unpack, walk};
use std::arch::aarch64::*;
use std::arch::asm;
use std::ops::Range;

pub(in super::super) const KERNELS: Kernels = Kernels {
    name: "dotprod",
    needs: &["dotprod", "neon"],
    gemm_q4,
    gemm_q8,
    gemm_grouped: grouped::gemm_dotprod,
    float: Floats { attend_i8, ..neon::FLOATS },
    ..neon::KERNELS
};

#[target_feature(enable = "dotprod")]
unsafe fn attend_i8(a: &Attend<'_>, out: &mut [f32], scratch: &mut [f32]) {
    // SAFETY: the caller's CPU has the features of this function; `softmax` needs none.
    unsafe { attention::attend::<neon::Lanes4, attention::Int8, Sdot>(a, out, scratch, softmax) }
}

// Apart, as in `instantiate!`.
#[inline(never)]
unsafe fn softmax(row: &mut [f32], seen: Range<usize>, cap: Option<f32>) -> (f32, f32) {
    attention::softmax(row, seen, cap)
}

/// Sixteen sums in two times four registers: of the high bytes of 16-bit integers, and of the low ones.
#[derive(Clone, Copy)]
struct Sdot([int32x4_t; 4], [int32x4_t; 4]);

// SAFETY (for every block of this impl): the code runs only inside `attend_i8`, whose features the CPU has; loads and
// stores are of whole arrays behind references.
impl Dot for Sdot {
    const TILE: usize = 2;
    type Line = [int8x16_t; 4];
    type Four = int8x16_t;

    #[inline(always)]
    fn zero() -> Self {
        // SAFETY: see above.
        let zero = [unsafe { vdupq_n_s32(0) }; 4];
        Sdot(zero, zero)
    }
    #[inline(always)]
    fn pack(q: &mut [[i16; 4]]) {
        for q in q {
            // The low byte is signed, which the high one makes up for.
            let [high, low] = [q.map(|q| ((q + 128) >> 8) as u8), q.map(|q| q as u8)];
            let two = |bytes: [u8; 4], i| i16::from_le_bytes([bytes[i], bytes[i + 1]]);
            *q = [two(high, 0), two(high, 2), two(low, 0), two(low, 2)];
        }
    }
    #[inline(always)]
    fn line(bytes: &[u8; 64]) -> Self::Line {
        // SAFETY: see above.
        std::array::from_fn(|h| unsafe { vld1q_s8(bytes.as_ptr().add(16 * h).cast()) })
    }
    #[inline(always)]
    fn four(q: &[i16; 4]) -> Self::Four {
        // SAFETY: see above.
        unsafe {
            let four = vreinterpret_s8_s16(vld1_s16(q.as_ptr()));
            vcombine_s8(four, four)
        }
    }
    #[inline(always)]
    fn add(mut self, line: Self::Line, q: Self::Four) -> Self {
        for h in 0..4 {
            // SAFETY: see above.
            unsafe {
                self.0[h] = sdot::<0>(self.0[h], line[h], q);
                self.1[h] = sdot::<1>(self.1[h], line[h], q);
            }
        }
        self
    }
    #[inline(always)]
    fn store(self, out: &mut [f32; 16]) {
        for h in 0..4 {
            // SAFETY: see above.
            unsafe {
                let sums = vaddq_s32(vshlq_n_s32::<8>(self.0[h]), self.1[h]);
                vst1q_f32(out.as_mut_ptr().add(4 * h), vcvtq_f32_s32(sums));
            }
        }
    }
}

/// Tokens up to which int4 weights are read as they lie; more pay for unpacking.
const DIRECT: usize = 8;

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
pub(super) fn sdot<const LANE: usize>(mut acc: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
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

/// One or two tokens against a stored int4 block.
///
/// # Safety
/// As [`super::Tile`].
#[target_feature(enable = "dotprod")]
unsafe fn tile_q4(step: &Step<'_>, t: usize) -> usize {
    // SAFETY: the caller's promise; there are that many tokens.
    unsafe { if step.a.m - t > 1 { direct::<2>(step, t) } else { direct::<1>(step, t) } }
}

/// `M` tokens. Gives `M`.
///
/// # Safety
/// As [`super::Tile`], with at least `M` tokens from `t` on.
#[inline]
#[target_feature(enable = "dotprod")]
unsafe fn direct<const M: usize>(step: &Step<'_>, t: usize) -> usize {
    // SAFETY: every address lies in the block or among its activations.
    unsafe {
        let mut sum: [[int32x4_t; QUADS]; M] = std::array::from_fn(|i| offsets(step, t + i));
        for s in 0..step.len() / 64 {
            let mut c = [[[vdupq_n_s32(0); QUADS]; M]; 2];
            for half in 0..2 {
                let at = 64 * s + 16 * half;
                let x = [at, at + 32].map(|at| -> [int8x16_t; M] {
                    std::array::from_fn(|i| vld1q_s8(step.q(t + i).add(at)))
                });
                let lines = step.block.add(Q4_HEADER + 512 * s + 256 * half);
                line_q4::<0, M>(lines, &x, &mut c);
                line_q4::<1, M>(lines, &x, &mut c);
                line_q4::<2, M>(lines, &x, &mut c);
                line_q4::<3, M>(lines, &x, &mut c);
            }
            for (c, sc) in c.iter().zip(scales(step.block, s)) {
                for h in 0..QUADS {
                    let sc = widen(sc, h);
                    for i in 0..M {
                        sum[i][h] = vmlaq_s32(sum[i][h], c[i][h], sc);
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
/// That line can be read.
#[inline]
#[target_feature(enable = "dotprod")]
unsafe fn line_q4<const LANE: usize, const M: usize>(
    lines: *const u8,
    x: &[[int8x16_t; M]; 2],
    c: &mut [[[int32x4_t; QUADS]; M]; 2],
) {
    let line = lines.wrapping_add(64 * LANE);
    prefetch(line);
    for h in 0..QUADS {
        // SAFETY: the caller's promise.
        let v = unsafe { vld1q_u8(line.add(16 * h)) };
        let low = vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(0x0f)));
        let high = vreinterpretq_s8_u8(vshrq_n_u8::<4>(v));
        for i in 0..M {
            c[0][i][h] = sdot::<LANE>(c[0][i][h], low, x[0][i]);
            c[1][i][h] = sdot::<LANE>(c[1][i][h], high, x[1][i]);
        }
    }
}

/// Bytes `4 * quad..` as four i32.
#[inline]
#[target_feature(enable = "neon")]
fn widen(bytes: uint8x16_t, quad: usize) -> int32x4_t {
    let wide = if quad < 2 { vmovl_u8(vget_low_u8(bytes)) } else { vmovl_high_u8(bytes) };
    let wide =
        if quad.is_multiple_of(2) { vmovl_u16(vget_low_u16(wide)) } else { vmovl_high_u16(wide) };
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
            2.. => int8::<2, STORED>(step, t),
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
            line_q8::<0, M, STORED>(lines, &x, &mut sum);
            line_q8::<1, M, STORED>(lines, &x, &mut sum);
            line_q8::<2, M, STORED>(lines, &x, &mut sum);
            line_q8::<3, M, STORED>(lines, &x, &mut sum);
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
unsafe fn line_q8<const LANE: usize, const M: usize, const STORED: bool>(
    lines: *const u8,
    x: &[int8x16_t; M],
    sum: &mut [[int32x4_t; QUADS]; M],
) {
    let line = lines.wrapping_add(64 * LANE);
    if STORED {
        prefetch(line);
    }
    for h in 0..QUADS {
        // SAFETY: the caller's promise.
        let v = unsafe { vld1q_s8(line.add(16 * h).cast()) };
        for i in 0..M {
            sum[i][h] = sdot::<LANE>(sum[i][h], v, x[i]);
        }
    }
}
