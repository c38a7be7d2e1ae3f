//! What all sets share of the grouped forms, written once as the kernels of `float`: the scales and offsets of a block
//! as f32; and the product with f32 activations, for which 16 rows by [`BLOCK`] inputs become f32, then meet all tokens.

use super::layout::{Form, ROWS, blocks, grouped_fields, grouped_header, grouped_lines};
use super::simd::F32x16;
use super::{array, array_mut, cast};
use crate::quant::{BLOCK, Grouped, Offset, Scales, UNITS, half_power};

/// Scales and offsets of each unit of 16 rows.
#[repr(C, align(64))]
pub(super) struct Header {
    pub(super) s: [[f32; ROWS]; UNITS],
    /// If codes have one; else unspecified.
    pub(super) o: [[f32; ROWS]; UNITS],
}

impl Header {
    pub(super) const ZERO: Header = Header { s: [[0.0; ROWS]; UNITS], o: [[0.0; ROWS]; UNITS] };

    /// Reads that of a block.
    #[inline(always)]
    pub(super) fn read<V: F32x16>(&mut self, how: Grouped, block: &[u8]) {
        let [scales, offsets] = grouped_fields(how);
        let (mut d, mut e) = (V::splat(1.0), V::splat(1.0));
        if how.scales == Scales::Integer {
            (d, e) = (V::load_f16(cast(&block[..32])), V::load_f16(cast(&block[32..64])));
        }
        let each = how.group / how.unit();
        for g in 0..how.groups() {
            let field =
                |(start, width): (usize, usize)| &block[start + g * ROWS * width..][..ROWS * width];
            let s = numbers::<V>(how.scales, field(scales), d);
            let o = match how.offset() {
                Some(Offset::Signed) => s.mul(V::splat(f32::from(how.signed()))),
                Some(Offset::Zero) => s.mul(V::load_i8(cast(field(offsets)))),
                Some(Offset::Min) => numbers::<V>(how.scales, field(offsets), e),
                None => s,
            };
            for u in g * each..(g + 1) * each {
                s.store(&mut self.s[u]);
                o.store(&mut self.o[u]);
            }
        }
    }
}

/// Sixteen numbers, integers times `d`.
#[inline(always)]
fn numbers<V: F32x16>(scales: Scales, bytes: &[u8], d: V) -> V {
    match scales {
        Scales::F16 => V::load_f16(cast(bytes)),
        Scales::Bf16 => V::load_bf16(cast(bytes)),
        Scales::Integer => V::load_i8(cast(bytes)).mul(d),
        Scales::Power => {
            let (e, mut powers): (&[u8; ROWS], _) = (cast(bytes), [0.0; ROWS]);
            for r in 0..ROWS {
                powers[r] = half_power(e[r]);
            }
            V::load(&powers)
        }
    }
}

/// As [`float::gemm`](super::float::gemm).
#[inline(always)]
pub(super) fn gemm<V: F32x16>(how: Grouped, w: &[u8], k: usize, x: &[f32], y: &mut [f32]) {
    let form = Form::GroupedFloat(how);
    let size = form.row_block_bytes(k);
    let (width, m) = (w.len() / size * ROWS, x.len() / k);
    let mut header = Header::ZERO;
    let mut panel = [[0.0f32; ROWS]; BLOCK];
    for (rb, row_block) in w.chunks_exact(size).enumerate() {
        for (b, block) in blocks(form, row_block).enumerate() {
            let len = BLOCK.min(k - b * BLOCK);
            header.read::<V>(how, block);
            dequantize::<V>(how, &header, &block[grouped_header(how)..], &mut panel);
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

/// The weights of a block of 16 rows.
#[inline(always)]
fn dequantize<V: F32x16>(
    how: Grouped,
    header: &Header,
    lines: &[u8],
    panel: &mut [[f32; ROWS]; BLOCK],
) {
    let h = how.high();
    // 16 or 32 inputs of a unit; 2 or 4 lines that share one of higher bits. Divisions would take long.
    let (unit, shared) = (how.unit().trailing_zeros(), 3 - h);
    let mut table = [0.0; 16];
    for (q, out) in table.iter_mut().enumerate() {
        *out = f32::from(how.value(q as u8));
    }
    for (t, lines) in lines.chunks_exact(grouped_lines(how)).enumerate() {
        // As `layout::places` says.
        for k in 0..64 {
            let (pair, half, i) = (k >> (unit + 1), k >> unit & 1, k & ((1 << unit) - 1));
            let j = (pair << unit) / 4 + i / 4;
            let mut codes = words(lines, j, 8 * (i % 4) + 4 * half, 15);
            if h > 0 {
                let bit = 8 * (i % 4) + h * (2 * (j & ((1 << shared) - 1)) + half);
                let high = words(lines, 8 + (j >> shared), bit, (1 << h) - 1);
                for r in 0..ROWS {
                    codes[r] |= high[r] << 4;
                }
            }
            let u = (64 * t + k) >> unit;
            let w = if how.offset().is_some() {
                let mut values = [0.0; ROWS];
                for r in 0..ROWS {
                    values[r] = codes[r] as f32;
                }
                let w = V::load(&values).mul(V::load(&header.s[u]));
                w.fma(V::splat(1.0), V::load(&header.o[u]))
            } else {
                V::lookup(&table, &codes).mul(V::load(&header.s[u]))
            };
            w.store(&mut panel[64 * t + k]);
        }
    }
}

/// The bits of `mask` from `bit` on in each of the 16 words of line `j`.
#[inline(always)]
fn words(lines: &[u8], j: usize, bit: usize, mask: u32) -> [u32; ROWS] {
    let mut out = [0; ROWS];
    for (out, bytes) in out.iter_mut().zip(lines[64 * j..64 * j + 64].as_chunks().0) {
        *out = u32::from_le_bytes(*bytes) >> bit & mask;
    }
    out
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
