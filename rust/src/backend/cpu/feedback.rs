//! Packs matrices whose inputs are known: each weight makes up for the errors of those before it. Slow; never at load.

use super::memory::{Disjoint, Line};
use super::{Cpu, Form, NotFinite, Parts};
use crate::kernels::layout::{self, ROWS};
use crate::quant::{BLOCK, BlockGrouped, BlockQ4, BlockQ8, Feedback};
use std::sync::Mutex;

/// How much of the mean of H's diagonal is added to it: what calibration did not see may come, too.
const DAMP: f32 = 0.01;
/// Columns of H that are factored at once.
const COLUMNS: usize = 4 * ROWS;

impl Cpu {
    /// As [`Cpu::pack_into`], with the sums over the inputs that [`Inputs`](super::Inputs) has, which are used up.
    pub fn pack_knowing(
        &self,
        form: Form,
        parts: &Parts<'_>,
        mut sums: Vec<f32>,
        out: &mut [u8],
    ) -> Result<(), NotFinite> {
        let known = matches!(form, Form::Q4 | Form::Q8 | Form::INT5 | Form::INT6);
        if !known || !self.factor(&mut sums, parts.k) {
            return self.pack_into(form, parts, out);
        }
        let (n, k) = (parts.n(), parts.k);
        let feedback = Feedback::new(&sums, k);
        drop(sums);
        let bad: Mutex<Option<NotFinite>> = Mutex::new(None);
        self.fill(form.row_block_bytes(k), n.div_ceil(ROWS), out, |rb, out| {
            if let Err(at) = self.pack_rows_knowing(form, parts, &feedback, rb, out) {
                let mut bad = bad.lock().unwrap_or_else(|e| e.into_inner());
                *bad = Some(bad.map_or(at, |other| other.min(at)));
            }
        });
        bad.into_inner().unwrap_or_else(|e| e.into_inner()).map_or(Ok(()), Err)
    }

    fn pack_rows_knowing(
        &self,
        form: Form,
        parts: &Parts<'_>,
        feedback: &Feedback,
        rb: usize,
        out: &mut [u8],
    ) -> Result<(), NotFinite> {
        let k = parts.k;
        let mut rows = vec![0.0f32; ROWS * k];
        for (r, row) in rows.chunks_mut(k).enumerate() {
            parts.row(rb * ROWS + r, row)?;
        }
        // Of the 16 rows side by side: what each weight was before, minus what it is.
        let mut errors = vec![Line::ZERO; k];
        let mut passed = [0.0; BLOCK * ROWS];
        let mut done = 0;
        for b in 0..k.div_ceil(BLOCK) {
            let first = b * BLOCK;
            let len = BLOCK.min(k - first);
            let bytes = form.row_block_bytes(len);
            let out = &mut out[done..done + bytes];
            done += bytes;
            if b > 0 {
                let (errors, passed) = (Line::bytes(&errors[..first]), &mut passed[..len * ROWS]);
                self.kernels.gemm_float(Form::F32, errors, first, feedback.before(b), passed);
            }
            // Gives the block of each row, and keeps its errors.
            let mut each = |quantize: &mut dyn FnMut(usize, &[f32], &[f32]) -> [f32; BLOCK]| {
                for r in 0..ROWS {
                    let x = &rows[r * k + first..][..len];
                    let mut v = [0.0; BLOCK];
                    for i in 0..len {
                        v[i] = x[i] + passed[i * ROWS + r];
                    }
                    let found = quantize(r, x, &v[..len]);
                    for i in 0..len {
                        errors[first + i].0[r] = x[i] - found[i];
                    }
                }
            };
            match form {
                Form::Q4 => {
                    let mut block = [BlockQ4::ZERO; ROWS];
                    each(&mut |r, x, v| {
                        block[r] = feedback.q4(b, x, v);
                        block[r].dequantize()
                    });
                    layout::pack_q4(&block, out);
                }
                Form::Grouped(how) => {
                    let mut block = [BlockGrouped::ZERO; ROWS];
                    each(&mut |r, x, v| {
                        block[r] = feedback.grouped(how, b, x, v);
                        block[r].dequantize(how)
                    });
                    for (r, row) in block.iter().enumerate() {
                        if let (Some(at), Some((p, i))) =
                            (row.not_finite(how), parts.locate(rb * ROWS + r))
                        {
                            return Err((p, i, first + at));
                        }
                    }
                    layout::pack_grouped(how, &block, out);
                }
                _ => {
                    let mut block = [BlockQ8::ZERO; ROWS];
                    each(&mut |r, x, v| {
                        block[r] = feedback.q8(b, x, v);
                        block[r].dequantize()
                    });
                    layout::pack_q8(&block, out);
                }
            }
        }
        Ok(())
    }

    /// Turns `H`, `[k][k]`, into the upper triangular `M` with `M M^T = H + damping`; reads and writes what is on and above
    /// the diagonal. False, with nothing done, if `H` is zero or not finite.
    fn factor(&self, h: &mut [f32], k: usize) -> bool {
        assert_eq!(h.len(), k * k);
        let mean = (0..k).map(|i| f64::from(h[i * k + i])).sum::<f64>() / k as f64;
        let finite = mean.is_finite() && mean < f64::from(f32::MAX);
        if !finite || mean < f64::from(f32::MIN_POSITIVE) {
            return false;
        }
        let damp = DAMP * mean as f32;
        for i in 0..k {
            h[i * k + i] += damp;
        }
        // Columns from the last on: `M_ij = (H_ij - sum over n > j of M_in M_jn) / M_jj`, those beyond the present
        // columns by the kernels.
        let mut end = k;
        while end > 0 {
            let first = (end - 1) / COLUMNS * COLUMNS;
            let (width, rest) = (end - first, k - end);
            let mut known = vec![Line::ZERO; COLUMNS / ROWS * rest];
            if rest > 0 {
                for (j, lines) in (first..end).zip((0..COLUMNS).map(|j| j / ROWS * rest)) {
                    for (line, m) in known[lines..][..rest].iter_mut().zip(&h[j * k + end..]) {
                        line.0[j % ROWS] = *m;
                    }
                }
            }
            let subtract = |rows: &mut [f32]| {
                let beyond = rows.chunks_exact(k).flat_map(|row| row[end..].iter().copied());
                let beyond: Vec<f32> = beyond.collect();
                let mut products = vec![0.0; rows.len() / k * COLUMNS];
                let known = Line::bytes(&known);
                self.kernels.gemm_float(Form::F32, known, rest, &beyond, &mut products);
                for (row, products) in rows.chunks_exact_mut(k).zip(products.chunks(COLUMNS)) {
                    for (m, product) in row[first..end].iter_mut().zip(products) {
                        *m -= product;
                    }
                }
            };
            // The corner, from its last row on.
            if rest > 0 {
                subtract(&mut h[first * k..end * k]);
            }
            let mut corner = [[0.0f32; COLUMNS]; COLUMNS];
            for i in (0..width).rev() {
                let mut row = [0.0; COLUMNS];
                row[..width].copy_from_slice(&h[(first + i) * k + first..][..width]);
                for j in (i..width).rev() {
                    let other = |n: usize| if j == i { row[n] } else { corner[j][n] };
                    let known: f32 = (j + 1..width).map(|n| row[n] * other(n)).sum();
                    let rest = row[j] - known;
                    // No pivot is less than the smallest eigenvalue, which is at least the damping.
                    row[j] = if j == i { rest.max(damp).sqrt() } else { rest / corner[j][j] };
                }
                corner[i] = row;
                h[(first + i) * k + first..][..width].copy_from_slice(&row[..width]);
            }
            // The rows above it.
            let above = Disjoint::new(&mut h[..first * k]);
            self.each(first.div_ceil(ROWS), 1, |block| {
                let rows = block * ROWS..first.min((block + 1) * ROWS);
                // SAFETY: each block of rows is claimed by one thread.
                let part = unsafe { above.part(rows.start * k..rows.end * k) };
                if rest > 0 {
                    subtract(part);
                }
                for row in part.chunks_exact_mut(k) {
                    let row = &mut row[first..end];
                    for j in (0..width).rev() {
                        let known: f32 = (j + 1..width).map(|n| row[n] * corner[j][n]).sum();
                        row[j] = (row[j] - known) / corner[j][j];
                    }
                }
            });
            end = first;
        }
        true
    }
}

#[cfg(test)]
mod tests;
