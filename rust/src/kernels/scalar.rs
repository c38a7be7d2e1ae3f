//! The specification: what every other set must compute, bit by bit. Written for reading.

use super::attention::int8::Sums;
use super::layout::{Form, ROWS, blocks, unpack_grouped, unpack_q4, unpack_q8};
use super::simd::Lanes;
use super::{Acts, Kernels, float};
use crate::quant::{BLOCK, Grouped};

float::instantiate!(Lanes, Sums);

pub(super) const KERNELS: Kernels = Kernels {
    name: "scalar",
    needs: &[],
    gemm_q4,
    gemm_q8,
    gemm_grouped,
    tiled: usize::MAX,
    float: FLOATS,
};

/// `y[t][n] = sum over blocks b of dot(w8, a8) * (d * s)`: an exact integer over a block, then one
/// fused multiply-add, blocks ascending.
fn gemm(
    form: Form,
    w8: impl Fn(&[u8], usize) -> ([i8; BLOCK], f32),
    w: &[u8],
    a: &Acts<'_>,
    y: &mut [f32],
) {
    let row_blocks: Vec<&[u8]> = w.chunks_exact(form.row_block_bytes(a.k)).collect();
    for (rb, row_block) in row_blocks.iter().enumerate() {
        for r in 0..ROWS {
            for t in 0..a.m {
                let mut acc = 0.0f32;
                for (b, block) in blocks(form, row_block).enumerate() {
                    let (w8, d) = w8(block, r);
                    let q = a.q(b, t);
                    let dot: i32 =
                        q.iter().zip(w8).map(|(&q, w)| i32::from(q) * i32::from(w)).sum();
                    acc = (dot as f32).mul_add(d * a.s(b, t), acc);
                }
                y[t * ROWS * row_blocks.len() + rb * ROWS + r] = acc;
            }
        }
    }
}

unsafe fn gemm_q4(w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    let row = |block: &[u8], r| {
        let row = unpack_q4(block, r);
        (std::array::from_fn(|k| row.w8(k)), row.d)
    };
    gemm(Form::Q4, row, w, a, y);
}

unsafe fn gemm_q8(w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    let row = |block: &[u8], r| {
        let row = unpack_q8(block, r);
        (row.q, row.d)
    };
    gemm(Form::Q8, row, w, a, y);
}

/// `y[t][n] = sum over blocks b of part * s`, one fused multiply-add for each, ascending. `part` is a chain of its own
/// over the units u of a block, ascending: `dot(T[q], a8) * s[u]`, and if codes have an offset `sum(a8) * o[u]`.
unsafe fn gemm_grouped(how: Grouped, w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    let form = Form::Grouped(how);
    let row_blocks: Vec<&[u8]> = w.chunks_exact(form.row_block_bytes(a.k)).collect();
    for (rb, row_block) in row_blocks.iter().enumerate() {
        for r in 0..ROWS {
            for t in 0..a.m {
                let mut acc = 0.0f32;
                for (b, block) in blocks(form, row_block).enumerate() {
                    let row = unpack_grouped(how, block, r);
                    let mut part = 0.0f32;
                    for (u, q) in a.q(b, t).chunks(how.unit()).enumerate() {
                        let w = row.q[u * how.unit()..].iter().map(|&q| i32::from(how.value(q)));
                        let dot: i32 = q.iter().zip(w).map(|(&q, w)| i32::from(q) * w).sum();
                        part = (dot as f32).mul_add(row.scale(how, u), part);
                        if how.offset().is_some() {
                            let sum: i32 = q.iter().map(|&q| i32::from(q)).sum();
                            part = (sum as f32).mul_add(row.offset(how, u), part);
                        }
                    }
                    acc = part.mul_add(a.s(b, t), acc);
                }
                y[t * ROWS * row_blocks.len() + rb * ROWS + r] = acc;
            }
        }
    }
}
