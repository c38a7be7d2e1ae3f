//! Kernel sets for aarch64, weakest first: neon, dotprod, i8mm. Here is what they share: the walk over
//! the blocks of a matrix, the integers of an int4 block's header, and the one float step per block.
//!
//! A 64-byte line of the packed order is four registers of 4 rows x 4 k. Each set multiplies one block
//! by some tokens in a *tile*; the tile's exact integers meet `y` in [`finish`]. A tile reads a block as
//! it lies, or as a *panel*: int8 lines made once per block, when enough tokens pay for it.

pub(super) mod dotprod;
mod grouped;
pub(super) mod i8mm;
pub(super) mod neon;

use super::layout::{Q4_HEADER, Q8_HEADER, ROWS, block_offset};
use super::{Acts, Form};
use crate::quant::BLOCK;
use std::arch::aarch64::*;
use std::arch::asm;

/// Bytes read ahead of the multiplication. Speed only, never results; a guess until it is tuned on
/// hardware.
const AHEAD: usize = 2048;

/// Registers of a line.
const QUADS: usize = 4;

/// The int8 lines of one block of 16 rows, 64 bytes each.
#[repr(C, align(64))]
struct Panel([u8; ROWS * BLOCK]);

/// One block of 16 rows, and where its sums go.
struct Step<'a> {
    /// The block as stored: the header.
    block: *const u8,
    /// The lines to multiply: the block's own, or a panel's.
    lines: *const u8,
    a: &'a Acts<'a>,
    /// Index of the block along K.
    b: usize,
    /// The 16 outputs of token 0.
    y: *mut f32,
    /// From a token's outputs to the next token's.
    width: usize,
}

impl Step<'_> {
    /// Inputs of this block.
    #[inline(always)]
    fn len(&self) -> usize {
        self.a.len(self.b)
    }
    /// Activations of token `t`.
    #[inline(always)]
    fn q(&self, t: usize) -> *const i8 {
        self.a.q.as_ptr().wrapping_add(self.b * BLOCK * self.a.m + t * self.len())
    }
}

/// Multiplies a block by some tokens from the given one on, and gives their number.
///
/// # Safety
/// The CPU has the instructions of the tile's set. `Step` is one that [`walk`] made, with lines in the
/// order that the tile wants. There is such a token.
type Tile = unsafe fn(&Step<'_>, usize) -> usize;

/// Makes the panel of a stored block of the given number of inputs.
///
/// # Safety
/// The block is of the form that the function wants, and the panel has room for its lines.
type Prepare = unsafe fn(*const u8, usize, *mut u8);

/// Multiplies all blocks by all tokens.
///
/// # Safety
/// Shapes as `Kernels::gemm` checks them. The CPU has what `tile` needs. `prepare` and `tile` suit
/// `form` and each other.
unsafe fn walk(
    form: Form,
    prepare: Option<Prepare>,
    tile: Tile,
    w: &[u8],
    a: &Acts<'_>,
    y: &mut [f32],
) {
    let header = if form == Form::Q4 { Q4_HEADER } else { Q8_HEADER };
    let size = form.row_block_bytes(a.k);
    let width = w.len() / size * ROWS;
    let mut panel = Panel([0; ROWS * BLOCK]);
    for (rb, w) in w.chunks_exact(size).enumerate() {
        for b in 0..a.blocks() {
            // SAFETY: the block lies in the row block and the outputs in `y`, by the shapes; the rest is
            // the caller's promise.
            unsafe {
                let block = w.as_ptr().add(block_offset(form, b));
                let lines = match prepare {
                    None => block.add(header),
                    Some(prepare) => {
                        prepare(block, a.len(b), panel.0.as_mut_ptr());
                        panel.0.as_ptr()
                    }
                };
                let y = y.as_mut_ptr().add(rb * ROWS);
                let step = Step { block, lines, a, b, y, width };
                let mut t = 0;
                while t < a.m {
                    t += tile(&step, t);
                }
            }
        }
    }
}

/// `y = fma(dot, d * s, y)` for the 16 outputs of token `t`.
///
/// # Safety
/// `step` is one that [`walk`] made, and `t < step.a.m`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn finish(step: &Step<'_>, t: usize, dots: &[int32x4_t; QUADS]) {
    // SAFETY: a block begins with 16 scales d; `y` has 16 outputs for each token.
    unsafe {
        let s = *step.a.s.get_unchecked(step.b * step.a.m + t);
        for (h, &dot) in dots.iter().enumerate() {
            let y = step.y.add(t * step.width + 4 * h);
            let acc = if step.b == 0 { vdupq_n_f32(0.0) } else { vld1q_f32(y) };
            let d = vld1q_f32(step.block.cast::<f32>().add(4 * h));
            vst1q_f32(y, vfmaq_f32(acc, vcvtq_f32_s32(dot), vmulq_n_f32(d, s)));
        }
    }
}

/// Asks for the line that this stream needs next.
#[inline(always)]
fn prefetch(p: *const u8) {
    let p = p.addr().wrapping_add(AHEAD);
    // SAFETY: a prefetch reads nothing that the program sees and never faults.
    unsafe {
        asm!("prfm pldl1keep, [{}]", in(reg) p, options(nomem, nostack, preserves_flags));
    }
}

/// Four bytes in every 32-bit lane. `asm!`, because the compiler forgets `smlal2` where it sees that
/// both halves of an operand are the same.
///
/// # Safety
/// Four bytes from `p` on can be read.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn four(p: *const i8) -> int8x16_t {
    let x;
    // SAFETY: the caller's promise; the read may be unaligned.
    unsafe {
        asm!(
            "ld1r {{{0:v}.4s}}, [{1}]", out(vreg) x, in(reg) p,
            options(pure, readonly, nostack, preserves_flags)
        );
    }
    x
}

/// Minus the offsets of an int4 block times the group sums of token `t`, for 16 rows.
///
/// # Safety
/// `step` is one that [`walk`] made for int4 weights, and `t < step.a.m`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn offsets(step: &Step<'_>, t: usize) -> [int32x4_t; QUADS] {
    // Two groups of a row are neighbours: products of i16 side by side, added at the end.
    let mut sum = [[vdupq_n_s32(0); 2]; QUADS];
    // SAFETY: a header has 32 offsets at 128 for each 64 k; `sums` has an entry for each token and block.
    unsafe {
        let sums = step.a.sums.get_unchecked(step.b * step.a.m + t).as_ptr().cast::<i8>();
        for s in 0..step.len() / 64 {
            let pair = vreinterpretq_s16_s8(four(sums.add(4 * s)));
            for (h, sum) in sum.iter_mut().enumerate() {
                let mn = vmovl_s8(vld1_s8(step.block.add(128 + 32 * s + 8 * h).cast()));
                sum[0] = vmlsl_s16(sum[0], vget_low_s16(mn), vget_low_s16(pair));
                sum[1] = vmlsl_high_s16(sum[1], mn, pair);
            }
        }
    }
    sum.map(|[a, b]| vpaddq_s32(a, b))
}

/// The scales of both groups of the 64 k at `s`, for 16 rows.
///
/// # Safety
/// `block` is an int4 block with more than `64 * s` inputs.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn scales(block: *const u8, s: usize) -> [uint8x16_t; 2] {
    // SAFETY: a header has 16 scale codes at 64 for each 64 k.
    let codes = unsafe { vld1q_u8(block.add(64 + 16 * s)) };
    let one = vdupq_n_u8(1);
    [vaddq_u8(vandq_u8(codes, vdupq_n_u8(0x0f)), one), vaddq_u8(vshrq_n_u8::<4>(codes), one)]
}

/// Makes the int8 lines of an int4 block, `w8 = sc * q - mn`. With `PAIRED`, lines 2i and 2i+1 become
/// rows of 8 k, two rows in a register.
///
/// # Safety
/// As [`Prepare`], for int4 blocks.
#[target_feature(enable = "neon")]
unsafe fn unpack<const PAIRED: bool>(block: *const u8, len: usize, out: *mut u8) {
    let nibble = vdupq_n_u8(0x0f);
    // A row's byte for its four k.
    let spread: [u8; 16] = std::array::from_fn(|i| i as u8 / 4);
    // SAFETY: the caller's promise.
    unsafe {
        let spread = vld1q_u8(spread.as_ptr());
        for s in 0..len / 64 {
            let scales = scales(block, s);
            let offsets = vld2q_u8(block.add(128 + 32 * s));
            for h in 0..QUADS {
                let rows = vaddq_u8(spread, vdupq_n_u8(4 * h as u8));
                let (sc0, sc1) = (vqtbl1q_u8(scales[0], rows), vqtbl1q_u8(scales[1], rows));
                let (mn0, mn1) = (vqtbl1q_u8(offsets.0, rows), vqtbl1q_u8(offsets.1, rows));
                let lines = block.add(Q4_HEADER + 512 * s + 16 * h);
                // Bytes wrap, the result does not: |w8| <= 127.
                let low = |v| vsubq_u8(vmulq_u8(vandq_u8(v, nibble), sc0), mn0);
                let high = |v| vsubq_u8(vmulq_u8(vshrq_n_u8::<4>(v), sc1), mn1);
                for j in (0..8).step_by(2) {
                    if h == 0 {
                        prefetch(lines.add(64 * j));
                        prefetch(lines.add(64 * j + 64));
                    }
                    let v = [vld1q_u8(lines.add(64 * j)), vld1q_u8(lines.add(64 * j + 64))];
                    put::<PAIRED>(out, 16 * s + j, h, v.map(low));
                    put::<PAIRED>(out, 16 * s + 8 + j, h, v.map(high));
                }
            }
        }
    }
}

/// Writes register `h` of lines `j` and `j + 1` of a panel, `j` even.
///
/// # Safety
/// The panel at `out` has these lines.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn put<const PAIRED: bool>(out: *mut u8, j: usize, h: usize, v: [uint8x16_t; 2]) {
    // SAFETY: the caller's promise.
    unsafe {
        if PAIRED {
            let v = v.map(|v| vreinterpretq_u32_u8(v));
            let out = out.add(64 * j + 32 * h).cast();
            vst1q_u32(out, vzip1q_u32(v[0], v[1]));
            vst1q_u32(out.add(4), vzip2q_u32(v[0], v[1]));
        } else {
            vst1q_u8(out.add(64 * j + 16 * h), v[0]);
            vst1q_u8(out.add(64 * j + 64 + 16 * h), v[1]);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::kernels::choose;

    /// `tools/arm/test.sh` says what the CPU that it emulates has: no set is left out unseen.
    #[test]
    fn the_expected_set_is_the_best_one() {
        if let Ok(expected) = std::env::var("FERRULE_EXPECT_ISA") {
            assert_eq!(choose(None).unwrap().name(), expected);
        }
    }
}
