//! MXFP4 weights against f32 activations, written once for every instruction set as the kernels of `float`: 16 rows by
//! [`BLOCK`] inputs become f32, then meet all tokens.

use super::layout::{Form, MXFP4_HEADER, ROWS, blocks};
use super::simd::F32x16;
use super::{array, array_mut};
use crate::quant::{BLOCK, BlockMxfp4};

/// As [`float::gemm`](super::float::gemm), for MXFP4 weights.
#[inline(always)]
pub(super) fn gemm<V: F32x16>(w: &[u8], k: usize, x: &[f32], y: &mut [f32]) {
    let form = Form::Mxfp4Float;
    let size = form.row_block_bytes(k);
    let (width, m) = (w.len() / size * ROWS, x.len() / k);
    let mut panel = [[0.0f32; ROWS]; BLOCK];
    for (rb, row_block) in w.chunks_exact(size).enumerate() {
        for (b, block) in blocks(form, row_block).enumerate() {
            let len = BLOCK.min(k - b * BLOCK);
            dequantize(block, &mut panel);
            let mut t = 0;
            while t < m {
                let (x, y) = (&x[t * k + b * BLOCK..], &mut y[t * width + rb * ROWS..]);
                let tile = (&panel[..len], x, k, y, width, b == 0);
                t += match m - t {
                    4.. => chain::<V, 4>(tile),
                    _ => chain::<V, 1>(tile),
                };
            }
        }
    }
}

/// The weights of an MXFP4 block of 16 rows.
#[inline(always)]
fn dequantize(block: &[u8], panel: &mut [[f32; ROWS]; BLOCK]) {
    let (header, lines) = block.split_at(MXFP4_HEADER);
    for (t, lines) in lines.chunks_exact(512).enumerate() {
        for half in 0..2 {
            let mut scale = [0.0; ROWS];
            for (scale, &e) in scale.iter_mut().zip(&header[16 * (2 * t + half)..]) {
                *scale = 0.5 * BlockMxfp4::scale(e);
            }
            for (j, line) in lines.as_chunks::<64>().0.iter().enumerate() {
                let mut lanes = [0; ROWS];
                for (lane, bytes) in lanes.iter_mut().zip(line.as_chunks().0) {
                    *lane = u32::from_le_bytes(*bytes) >> (4 * half);
                }
                for i in 0..4 {
                    let out = &mut panel[64 * t + 32 * half + 4 * j + i];
                    for r in 0..ROWS {
                        // TWICE as arithmetic, for vectors.
                        let code = (lanes[r] >> (8 * i)) as i32;
                        let (mantissa, exponent) = (code & 1, code >> 1 & 3);
                        let twice = (mantissa | 2) << (exponent.max(1) - 1);
                        let twice = if exponent == 0 { mantissa } else { twice };
                        let sign = 1 - (code >> 2 & 2);
                        out[r] = (sign * twice) as f32 * scale[r];
                    }
                }
            }
        }
    }
}

/// `M` tokens `k` apart against a panel, on top of the sums in `y`, whose rows are `width` apart. Gives `M`.
#[inline(always)]
fn chain<V: F32x16, const M: usize>(
    (panel, x, k, y, width, first): (&[[f32; ROWS]], &[f32], usize, &mut [f32], usize, bool),
) -> usize {
    let mut acc = [V::splat(0.0); M];
    if !first {
        for t in 0..M {
            acc[t] = V::load(array(y, t * width));
        }
    }
    for (i, w) in panel.iter().enumerate() {
        let w = V::load(w);
        for t in 0..M {
            acc[t] = w.fma(V::splat(x[t * k + i]), acc[t]);
        }
    }
    for t in 0..M {
        acc[t].store(array_mut(y, t * width));
    }
    M
}
