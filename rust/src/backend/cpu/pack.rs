//! From a checkpoint's rows to packed matrices: 16 rows at a time, checked for numbers that are not finite.

use super::memory::Disjoint;
use super::pool::Claims;
use super::{Cpu, Form, Mat, NotFinite, Part, Parts, exact};
use crate::kernels::layout::{self, ROWS};
use crate::quant::{self, BLOCK};
use std::borrow::Cow;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// Blocks of a row that are read in one go.
const AT_ONCE: usize = 8;

impl Cpu {
    /// Packs `parts` into `out`, which is as long as the packed matrix.
    pub fn pack_into(
        &self,
        form: Form,
        parts: &Parts<'_>,
        out: &mut [u8],
    ) -> std::result::Result<(), NotFinite> {
        let (n, k) = (parts.n(), parts.k);
        assert_eq!(out.len(), form.bytes(n, k));
        let bad = Mutex::new(None);
        self.fill(form.row_block_bytes(k), n.div_ceil(ROWS), out, |rb, out| {
            if let Err(at) = self.pack_row_block(form, parts, rb, out) {
                let mut bad = bad.lock().unwrap_or_else(|e| e.into_inner());
                *bad = Some(bad.map_or(at, |b: NotFinite| b.min(at)));
            }
        });
        bad.into_inner().unwrap_or_else(|e| e.into_inner()).map_or(Ok(()), Err)
    }

    /// Has `work` fill the first `blocks` pieces of `size` bytes of `out`, in parallel; the rest is zero.
    pub fn fill(
        &self,
        size: usize,
        blocks: usize,
        out: &mut [u8],
        work: impl Fn(usize, &mut [u8]) + Sync,
    ) {
        out[size * blocks..].fill(0);
        let out = Disjoint::new(out);
        let claims = Claims::new(blocks, self.pool.threads(), 4);
        self.pool.run(&|thread| {
            claims.each(thread, |run| {
                for rb in run {
                    // SAFETY: each row block is claimed by one thread.
                    work(rb, unsafe { out.part(rb * size..(rb + 1) * size) });
                }
            });
        });
    }

    /// Whether a matrix that comes from outside holds only what a packer writes: kernels count on it.
    pub fn is_valid(&self, mat: &Mat) -> bool {
        let size = mat.form.row_block_bytes(mat.k);
        let valid = AtomicBool::new(true);
        self.each(mat.bytes().len() / size, 4, |rb| {
            if !layout::is_valid(mat.form, &mat.bytes()[rb * size..][..size]) {
                valid.store(false, Ordering::Relaxed);
            }
        });
        valid.into_inner()
    }

    fn pack_row_block(
        &self,
        form: Form,
        parts: &Parts<'_>,
        rb: usize,
        out: &mut [u8],
    ) -> std::result::Result<(), NotFinite> {
        let k = parts.k;
        let row = |r: usize| parts.locate(rb * ROWS + r);
        if exact::holds(form, parts) {
            return exact::pack(form, parts, rb, out);
        }
        if !form.is_quantized() {
            let width = Part::width(form);
            let rows: Vec<_> = (0..ROWS)
                .map(|r| row(r).map(|(p, i)| parts.parts[p].floats_of(form, i, k)))
                .collect();
            layout::pack_float(width, |r| rows[r].as_deref(), out);
            // Checked like quantized weights: a NaN would spread over every answer.
            let mut values = [0.0; BLOCK];
            for (p, i) in (0..ROWS).filter_map(row) {
                for b in (0..k).step_by(BLOCK) {
                    let len = BLOCK.min(k - b);
                    parts.parts[p].values(i, b, &mut values[..len]);
                    finite(&values[..len]).map_err(|c| (p, i, b + c))?;
                }
            }
            return Ok(());
        }
        // Several blocks of a row are read in one go: short pieces of 16 rows would wait for the memory.
        let mut read = vec![[[0.0f32; BLOCK]; ROWS]; AT_ONCE.min(k.div_ceil(BLOCK))];
        let mut done = 0;
        for first in (0..k).step_by(AT_ONCE * BLOCK) {
            let blocks = || (first..k).step_by(BLOCK).take(AT_ONCE).enumerate();
            for r in 0..ROWS {
                let Some((p, i)) = row(r) else { continue };
                for (at, b) in blocks() {
                    let values = &mut read[at][r][..BLOCK.min(k - b)];
                    parts.parts[p].values(i, b, values);
                    finite(values).map_err(|c| (p, i, b + c))?;
                }
            }
            for (at, b) in blocks() {
                let (rows, len) = (&read[at], BLOCK.min(k - b));
                let bytes = form.row_block_bytes(len);
                let out = &mut out[done..done + bytes];
                done += bytes;
                let Form::Grouped(how) = form else {
                    self.kernels.pack(form, rows, len, out);
                    continue;
                };
                let blocks = self.kernels.quantize_grouped(how, rows, len);
                for (r, block) in blocks.iter().enumerate() {
                    if let (Some(at), Some((p, i))) = (block.not_finite(how), row(r)) {
                        return Err((p, i, b + at));
                    }
                }
                layout::pack_grouped(how, &blocks, out);
            }
        }
        Ok(())
    }
}

/// `Err` with the index of the first number that is not finite.
fn finite(x: &[f32]) -> std::result::Result<(), usize> {
    // The sum of x * 0 is 0 unless something is not finite; vectors make that cheap.
    let mut lanes = [0.0f32; 16];
    let (chunks, rest) = x.as_chunks::<16>();
    for x in chunks {
        for i in 0..16 {
            lanes[i] += x[i] * 0.0;
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += x * 0.0;
    }
    if lanes.iter().all(|&l| l == 0.0) {
        return Ok(());
    }
    x.iter().position(|x| !x.is_finite()).map_or(Ok(()), Err)
}

impl Part<'_> {
    /// Bytes of one stored number.
    fn width(stored: Form) -> usize {
        if stored == Form::F32 { 4 } else { 2 }
    }

    /// The `k` numbers of row `i` in a float form: their own, or F32.
    pub(super) fn floats_of(&self, form: Form, i: usize, k: usize) -> Cow<'_, [u8]> {
        if self.stored == form && self.blocks.is_none() && self.encoded.is_none() {
            return self.range(i, 0, k);
        }
        let mut values = vec![0.0; k];
        self.values(i, 0, &mut values);
        values.iter().flat_map(|x| x.to_le_bytes()).collect()
    }

    /// The bytes of `len` numbers of row `i`, from number `from` on.
    fn range(&self, i: usize, from: usize, len: usize) -> Cow<'_, [u8]> {
        let width = Part::width(self.stored);
        let start = i * self.row + from * self.column;
        if self.column == 1 {
            return Cow::Borrowed(&self.bytes[start * width..][..len * width]);
        }
        let number = |j| &self.bytes[(start + j * self.column) * width..][..width];
        (0..len).flat_map(number).copied().collect()
    }

    /// Numbers `from..from + out.len()` of row `i`.
    pub(super) fn values(&self, i: usize, from: usize, out: &mut [f32]) {
        if let Some(encoded) = &self.encoded {
            let at = i * self.row + from * self.column;
            if self.column == 1 {
                return encoded.decode(at, out);
            }
            let each = out.chunks_mut(1).enumerate();
            return each.for_each(|(j, out)| encoded.decode(at + j * self.column, out));
        }
        if let Some(blocks) = self.blocks {
            let before = (i * self.row + from) / blocks.weights() * blocks.bytes();
            return blocks.decode(&self.bytes[before..], out);
        }
        if self.stored == Form::MXFP4 {
            for (j, out) in out.iter_mut().enumerate() {
                let at = i * self.row + from + j;
                let code = self.bytes[at / 2] >> (4 * (at % 2)) & 15;
                *out = quant::half_power(self.scales[at / 32])
                    * f32::from(quant::TWICE[usize::from(code)]);
            }
            return;
        }
        let bytes = &self.range(i, from, out.len())[..];
        match self.stored {
            Form::F32 => {
                for (out, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *out = f32::from_le_bytes(*b);
                }
            }
            Form::F16 => {
                for (out, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *out = half::f16::from_le_bytes(*b).to_f32();
                }
            }
            _ => {
                for (out, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *out = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
                }
            }
        }
    }
}

impl Parts<'_> {
    /// Packed row `r` as f32, or the place of a number that is not finite; padding is zero.
    pub fn row(&self, r: usize, out: &mut [f32]) -> std::result::Result<(), NotFinite> {
        out.fill(0.0);
        let Some((p, i)) = self.locate(r) else { return Ok(()) };
        for (b, out) in out.chunks_mut(BLOCK).enumerate() {
            self.parts[p].values(i, b * BLOCK, out);
            finite(out).map_err(|c| (p, i, b * BLOCK + c))?;
        }
        Ok(())
    }

    /// Rows of the packed matrix.
    pub fn n(&self) -> usize {
        let n = self.parts.iter().map(|p| p.n).sum::<usize>();
        if self.interleaved { 2 * (n / 2).next_multiple_of(ROWS) } else { n }
    }

    /// Part and row that packed row `r` comes from; `None` for padding.
    pub(super) fn locate(&self, r: usize) -> Option<(usize, usize)> {
        if self.interleaved {
            let (part, row) = (r / ROWS % 2, r / (2 * ROWS) * ROWS + r % ROWS);
            return (row < self.parts[part].n).then_some((part, row));
        }
        let mut row = r;
        for (p, part) in self.parts.iter().enumerate() {
            if row < part.n {
                return Some((p, row));
            }
            row -= part.n;
        }
        None
    }
}
