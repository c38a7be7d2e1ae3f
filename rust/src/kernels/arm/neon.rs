//! Baseline NEON (Cortex-A72 and older: no dot product instruction): 16 rows are four registers.
//!
//! `smull`/`smlal` multiply bytes to i16, four sums a row. int4: the eight products of a group fit
//! (15 * 127 * 8 = 15240), and so do pairs of these sums (30480); `smlal` with the group's scale makes
//! i32. int8: two products fit (127 * 127 * 2 = 32258), then `sadalp` adds pairs to i32.

use super::super::attention::int8::Dot;
use super::super::layout::Q4_HEADER;
use super::super::simd::F32x16;
use super::super::{Acts, Form, Kernels, float, scalar};
use super::{QUADS, Step, finish, four, grouped, offsets, prefetch, scales, unpack, walk};
use std::arch::aarch64::*;

float::instantiate!(Lanes4, Mlal);

pub(in super::super) const KERNELS: Kernels = Kernels {
    name: "neon",
    needs: &["neon"],
    gemm_q4,
    gemm_q8,
    gemm_grouped: grouped::gemm_neon,
    float: FLOATS,
    ..scalar::KERNELS
};

/// Sixteen sums in four registers: `smlal` by element, after `ld4` has put number `j` of each four side by side.
#[derive(Clone, Copy)]
pub(super) struct Mlal([int32x4_t; 4]);

// SAFETY (for every block of this impl): as for `Lanes4`, below.
impl Dot for Mlal {
    const TILE: usize = 4;
    type Line = [int8x16_t; 4];
    type Four = int16x4_t;

    #[inline(always)]
    fn zero() -> Self {
        // SAFETY: see above.
        Mlal([unsafe { vdupq_n_s32(0) }; 4])
    }
    #[inline(always)]
    fn line(bytes: &[u8; 64]) -> Self::Line {
        // SAFETY: see above.
        let line = unsafe { vld4q_s8(bytes.as_ptr().cast()) };
        [line.0, line.1, line.2, line.3]
    }
    #[inline(always)]
    fn four(q: &[i16; 4]) -> Self::Four {
        // SAFETY: see above.
        unsafe { vld1_s16(q.as_ptr()) }
    }
    #[inline(always)]
    fn add(self, [a, b, c, d]: Self::Line, q: Self::Four) -> Self {
        self.lane::<0>(a, q).lane::<1>(b, q).lane::<2>(c, q).lane::<3>(d, q)
    }
    #[inline(always)]
    fn store(self, out: &mut [f32; 16]) {
        for h in 0..4 {
            // SAFETY: see above.
            unsafe { vst1q_f32(out.as_mut_ptr().add(4 * h), vcvtq_f32_s32(self.0[h])) }
        }
    }
}

impl Mlal {
    /// Lane `i` gains `line[i] * q[J]`.
    #[inline(always)]
    fn lane<const J: i32>(mut self, line: int8x16_t, q: int16x4_t) -> Self {
        // SAFETY: see above.
        unsafe {
            let (low, high) = (vmovl_s8(vget_low_s8(line)), vmovl_high_s8(line));
            self.0[0] = vmlal_lane_s16::<J>(self.0[0], vget_low_s16(low), q);
            self.0[1] = vmlal_high_lane_s16::<J>(self.0[1], low, q);
            self.0[2] = vmlal_lane_s16::<J>(self.0[2], vget_low_s16(high), q);
            self.0[3] = vmlal_high_lane_s16::<J>(self.0[3], high, q);
        }
        self
    }
}

/// Sixteen f32 in four registers.
#[derive(Clone, Copy)]
pub(super) struct Lanes4([float32x4_t; 4]);

// SAFETY (for every block of this impl): NEON is part of every aarch64 target that we build for, and
// the loads and stores are of whole arrays behind references, lane `i` of register `h` at `4 * h + i`.
impl F32x16 for Lanes4 {
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: see above.
        Lanes4([unsafe { vdupq_n_f32(x) }; 4])
    }
    #[inline(always)]
    fn load(x: &[f32; 16]) -> Self {
        // SAFETY: see above.
        Lanes4(std::array::from_fn(|h| unsafe { vld1q_f32(x.as_ptr().add(4 * h)) }))
    }
    #[inline(always)]
    fn load_f16(x: &[u16; 16]) -> Self {
        // SAFETY: see above.
        Lanes4(std::array::from_fn(|h| unsafe {
            vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x.as_ptr().add(4 * h))))
        }))
    }
    #[inline(always)]
    fn load_bf16(x: &[u16; 16]) -> Self {
        // SAFETY: see above.
        Lanes4(std::array::from_fn(|h| unsafe {
            vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(x.as_ptr().add(4 * h))))
        }))
    }
    #[inline(always)]
    fn load_i8(x: &[i8; 16]) -> Self {
        // SAFETY: see above.
        unsafe {
            let x = vld1q_s8(x.as_ptr());
            let (low, high) = (vmovl_s8(vget_low_s8(x)), vmovl_high_s8(x));
            Lanes4([
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
                vcvtq_f32_s32(vmovl_high_s16(low)),
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
                vcvtq_f32_s32(vmovl_high_s16(high)),
            ])
        }
    }
    #[inline(always)]
    fn lookup(table: &[f32; 16], i: &[u32; 16]) -> Self {
        // SAFETY: see above; four registers are the bytes of the table.
        unsafe {
            let p = table.as_ptr().cast::<u8>();
            let table = uint8x16x4_t(
                vld1q_u8(p),
                vld1q_u8(p.add(16)),
                vld1q_u8(p.add(32)),
                vld1q_u8(p.add(48)),
            );
            Lanes4(std::array::from_fn(|h| {
                // The four bytes from 4 i on.
                let i = vld1q_u32(i.as_ptr().add(4 * h));
                let bytes = vmlaq_n_u32(vdupq_n_u32(0x0302_0100), i, 0x0404_0404);
                vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(bytes)))
            }))
        }
    }
    #[inline(always)]
    fn store(self, out: &mut [f32; 16]) {
        for (h, x) in self.0.into_iter().enumerate() {
            // SAFETY: see above.
            unsafe { vst1q_f32(out.as_mut_ptr().add(4 * h), x) }
        }
    }
    #[inline(always)]
    fn store_f16(self, out: &mut [u16; 16]) {
        for (h, x) in self.0.into_iter().enumerate() {
            // SAFETY: see above.
            unsafe {
                let half = vreinterpret_u16_f16(vcvt_f16_f32(x));
                vst1_u16(out.as_mut_ptr().add(4 * h), half);
            }
        }
    }
    #[inline(always)]
    fn fma(self, a: Self, b: Self) -> Self {
        // SAFETY: see above.
        Lanes4(std::array::from_fn(|h| unsafe { vfmaq_f32(b.0[h], self.0[h], a.0[h]) }))
    }
    #[inline(always)]
    fn mul(self, a: Self) -> Self {
        // SAFETY: see above.
        Lanes4(std::array::from_fn(|h| unsafe { vmulq_f32(self.0[h], a.0[h]) }))
    }
    #[inline(always)]
    fn add(self, a: Self) -> Self {
        // SAFETY: see above.
        Lanes4(std::array::from_fn(|h| unsafe { vaddq_f32(self.0[h], a.0[h]) }))
    }
    #[inline(always)]
    fn sub(self, a: Self) -> Self {
        // SAFETY: see above.
        Lanes4(std::array::from_fn(|h| unsafe { vsubq_f32(self.0[h], a.0[h]) }))
    }
    #[inline(always)]
    fn div(self, a: Self) -> Self {
        // SAFETY: see above.
        Lanes4(std::array::from_fn(|h| unsafe { vdivq_f32(self.0[h], a.0[h]) }))
    }
    #[inline(always)]
    fn min(self, a: Self) -> Self {
        // SAFETY: see above.
        Lanes4(std::array::from_fn(|h| unsafe { vminq_f32(self.0[h], a.0[h]) }))
    }
    #[inline(always)]
    fn max(self, a: Self) -> Self {
        // SAFETY: see above.
        Lanes4(std::array::from_fn(|h| unsafe { vmaxq_f32(self.0[h], a.0[h]) }))
    }
    #[inline(always)]
    fn abs(self) -> Self {
        // SAFETY: see above.
        Lanes4(self.0.map(|x| unsafe { vabsq_f32(x) }))
    }
    #[inline(always)]
    fn floor(self) -> Self {
        // SAFETY: see above.
        Lanes4(self.0.map(|x| unsafe { vrndmq_f32(x) }))
    }
    #[inline(always)]
    fn round(self) -> Self {
        // SAFETY: see above.
        Lanes4(self.0.map(|x| unsafe { vrndnq_f32(x) }))
    }
    #[inline(always)]
    fn if_less(self, a: Self, yes: Self, no: Self) -> Self {
        // SAFETY: see above.
        Lanes4(std::array::from_fn(|h| unsafe {
            vbslq_f32(vcltq_f32(self.0[h], a.0[h]), yes.0[h], no.0[h])
        }))
    }
    #[inline(always)]
    fn transpose(x: &mut [Self; 16]) {
        // 4 x 4 numbers of each register, then the 4 x 4 of these.
        for x in x.as_chunks_mut::<4>().0 {
            for h in 0..4 {
                let four = transpose_4([x[0].0[h], x[1].0[h], x[2].0[h], x[3].0[h]]);
                for i in 0..4 {
                    x[i].0[h] = four[i];
                }
            }
        }
        for i in 0..4 {
            let four = [x[i].0, x[i + 4].0, x[i + 8].0, x[i + 12].0];
            for h in 0..4 {
                x[i + 4 * h] = Lanes4([four[0][h], four[1][h], four[2][h], four[3][h]]);
            }
        }
    }
}

/// Number `j` of register `i` becomes number `i` of register `j`.
#[inline(always)]
fn transpose_4([a, b, c, d]: [float32x4_t; 4]) -> [float32x4_t; 4] {
    // SAFETY: NEON, as above.
    unsafe {
        let pairs = |a, b| vreinterpretq_f64_f32(vtrn1q_f32(a, b));
        let odd = |a, b| vreinterpretq_f64_f32(vtrn2q_f32(a, b));
        let [e, f, g, h] = [pairs(a, b), odd(a, b), pairs(c, d), odd(c, d)];
        [vtrn1q_f64(e, g), vtrn1q_f64(f, h), vtrn2q_f64(e, g), vtrn2q_f64(f, h)]
            .map(|x| vreinterpretq_f32_f64(x))
    }
}

/// Tokens up to which unpacking costs more than the direct kernel's group scales.
const DIRECT: usize = 8;

unsafe fn gemm_q4(w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    // SAFETY: the shapes were checked by `Kernels::gemm`; the forms agree.
    unsafe {
        if a.m <= DIRECT {
            walk(Form::Q4, None, tile_q4, w, a, y)
        } else {
            walk(Form::Q4, Some(unpack::<false>), tile_q8::<false>, w, a, y)
        }
    }
}

unsafe fn gemm_q8(w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    // SAFETY: the shapes were checked by `Kernels::gemm`; the forms agree.
    unsafe { walk(Form::Q8, None, tile_q8::<true>, w, a, y) }
}

/// One token against a stored int4 block.
///
/// # Safety
/// As [`super::Tile`].
#[target_feature(enable = "neon")]
unsafe fn tile_q4(step: &Step<'_>, t: usize) -> usize {
    let zero = [[vdupq_n_s16(0); 2]; QUADS];
    let nibble = vdupq_n_u8(0x0f);
    // Two sums a row.
    let mut sum = [[vdupq_n_s32(0); 2]; QUADS];
    // SAFETY: every address lies in the block or among its activations.
    let dots = unsafe {
        for s in 0..step.len() / 64 {
            let q = step.q(t).add(64 * s);
            let lines = step.block.add(Q4_HEADER + 512 * s);
            let mut c = [zero; 2];
            for j in 0..8 {
                prefetch(lines.add(64 * j));
                let x = [four(q.add(4 * j)), four(q.add(32 + 4 * j))];
                for h in 0..QUADS {
                    let v = vld1q_u8(lines.add(64 * j + 16 * h));
                    let v = [vandq_u8(v, nibble), vshrq_n_u8::<4>(v)];
                    for g in 0..2 {
                        let v = vreinterpretq_s8_u8(v[g]);
                        c[g][h][0] = vmlal_s8(c[g][h][0], vget_low_s8(v), vget_low_s8(x[g]));
                        c[g][h][1] = vmlal_high_s8(c[g][h][1], v, x[g]);
                    }
                }
            }
            for (c, sc) in c.iter().zip(scales(step.block, s)) {
                // Each scale twice, as there are two sums a row.
                let sc = [vzip1q_u8(sc, sc), vzip2q_u8(sc, sc)];
                for (h, sum) in sum.iter_mut().enumerate() {
                    let sc = if h % 2 == 0 {
                        vmovl_u8(vget_low_u8(sc[h / 2]))
                    } else {
                        vmovl_high_u8(sc[h / 2])
                    };
                    let sc = vreinterpretq_s16_u16(sc);
                    let pairs = vpaddq_s16(c[h][0], c[h][1]);
                    sum[0] = vmlal_s16(sum[0], vget_low_s16(pairs), vget_low_s16(sc));
                    sum[1] = vmlal_high_s16(sum[1], pairs, sc);
                }
            }
        }
        let offsets = offsets(step, t);
        std::array::from_fn(|h| vaddq_s32(offsets[h], vpaddq_s32(sum[h][0], sum[h][1])))
    };
    // SAFETY: the caller's promise.
    unsafe { finish(step, t, &dots) };
    1
}

/// One token against int8 lines; `STORED` if they come from memory.
///
/// # Safety
/// As [`super::Tile`].
#[target_feature(enable = "neon")]
unsafe fn tile_q8<const STORED: bool>(step: &Step<'_>, t: usize) -> usize {
    // Two sums a row.
    let mut sum = [[vdupq_n_s32(0); 2]; QUADS];
    // SAFETY: every address lies in the lines or among the block's activations.
    unsafe {
        let q = step.q(t);
        for j in (0..step.len() / 4).step_by(2) {
            let lines = step.lines.add(64 * j);
            if STORED {
                prefetch(lines);
                prefetch(lines.add(64));
            }
            let x = [four(q.add(4 * j)), four(q.add(4 * j + 4))];
            for (h, sum) in sum.iter_mut().enumerate() {
                let v0 = vld1q_s8(lines.add(16 * h).cast());
                let v1 = vld1q_s8(lines.add(64 + 16 * h).cast());
                let low = vmull_s8(vget_low_s8(v0), vget_low_s8(x[0]));
                let low = vmlal_s8(low, vget_low_s8(v1), vget_low_s8(x[1]));
                let high = vmlal_high_s8(vmull_high_s8(v0, x[0]), v1, x[1]);
                sum[0] = vpadalq_s16(sum[0], low);
                sum[1] = vpadalq_s16(sum[1], high);
            }
        }
        finish(step, t, &sum.map(|[a, b]| vpaddq_s32(a, b)));
    }
    1
}
