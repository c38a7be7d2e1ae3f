//! Matrix products: activations quantized once, row blocks claimed by the threads, finished tiles taken over.

use super::memory::{Disjoint, Line};
use super::pool::Claims;
use super::{Activation, Acts, Buf, Cpu, Mat};
use crate::kernels::layout::{self, ROWS};
use crate::quant::{BLOCK, GROUPS};
use std::ops::Range;

/// How matrix products are cut. Speed only, never results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiles {
    /// Tokens of a tile: its f32 sums (128 bytes a token) stay in L2.
    pub tokens: usize,
    /// Bytes of weights that a thread claims at once when they are read once: long streams, small remainders.
    pub claim: usize,
}

impl Default for Tiles {
    fn default() -> Tiles {
        Tiles { tokens: 512, claim: 128 << 10 }
    }
}

/// Quantized activations of the operation that runs.
#[derive(Default)]
pub(super) struct ActBuf {
    q: Vec<i8>,
    s: Vec<f32>,
    sums: Vec<[i16; GROUPS]>,
    totals: Vec<i32>,
    /// Where the values begin in `q`.
    start: usize,
}

impl ActBuf {
    /// The activations of `m` rows with `rows` before them, of `width` inputs.
    fn of(&self, rows: usize, m: usize, width: usize, tiled: bool) -> Acts<'_> {
        let k = layout::padded_k(width);
        let (from, n) = (rows * k.div_ceil(BLOCK), m * k.div_ceil(BLOCK));
        Acts {
            m,
            k,
            q: &self.q[self.start + rows * k..][..m * k],
            tiled,
            s: &self.s[from..][..n],
            sums: &self.sums[from..][..n],
            totals: &self.totals[from..][..n],
        }
    }
}

/// A matrix, or some of its row blocks, against some rows of the activations; the same rows of the output take
/// the product.
pub(super) struct Job<'a> {
    pub(super) w: &'a Mat,
    /// First row block.
    pub(super) block: usize,
    /// Rows from there on.
    pub(super) n: usize,
    pub(super) bias: Option<&'a Vec<f32>>,
    /// At most [`Cpu::tokens`].
    pub(super) rows: Range<usize>,
}

/// What happens to a finished tile of a product.
#[derive(Clone, Copy)]
pub(super) enum Into {
    Store,
    Add,
    Act(Activation),
    /// Gate and up are interleaved; their columns, padding left out, are as many as this.
    Gate(Activation, usize),
}

impl Cpu {
    /// The rows of `jobs`, quantized, in `buf`: each job's activations stand together, see [`ActBuf::of`].
    fn quantize(&self, jobs: &[Job<'_>], x: &Buf, buf: &mut ActBuf) {
        let k = layout::padded_k(x.width);
        let blocks = k.div_ceil(BLOCK);
        let first = jobs[0].rows.start;
        let rows = jobs[jobs.len() - 1].rows.end - first;
        // The values start at a line of the cache, as the tiles of AMX like them.
        buf.q.resize(rows * k + 64, 0);
        buf.start = buf.q.as_ptr().addr().wrapping_neg() % 64;
        let values = &mut buf.q[buf.start..][..rows * k];
        buf.s.resize(rows * blocks, 0.0);
        buf.sums.resize(rows * blocks, [0; GROUPS]);
        buf.totals.resize(rows * blocks, 0);
        let (q, s) = (Disjoint::new(values), Disjoint::new(&mut buf.s));
        let (sums, totals) = (Disjoint::new(&mut buf.sums), Disjoint::new(&mut buf.totals));
        self.each(rows, 4, |r| {
            let job = &jobs[jobs.partition_point(|job| job.rows.end <= first + r)];
            let (m, before) = (job.rows.len(), job.rows.start - first);
            let t = first + r - job.rows.start;
            let tiled = self.kernels.tiled(job.w.form, m);
            for b in 0..blocks {
                let len = BLOCK.min(k - b * BLOCK);
                let start = (b * BLOCK).min(x.width);
                let x = &x.row(first + r)[start..(start + len).min(x.width)];
                let at = before * k + b * BLOCK * m;
                let i = before * blocks + b * m + t;
                let piece = if tiled { 64 } else { len };
                let mut values = [0; BLOCK];
                let values = &mut values[..len];
                // SAFETY: `(b, r)` names these places, and each `r` is claimed by one thread.
                unsafe {
                    let (s, total) = (&mut s.part(i..i + 1)[0], &mut totals.part(i..i + 1)[0]);
                    (*s, *total) = self.kernels.quantize(x, values, &mut sums.part(i..i + 1)[0]);
                    for (i, values) in values.chunks(piece).enumerate() {
                        let at = at + (i * m + t) * piece;
                        q.part(at..at + piece).copy_from_slice(values);
                    }
                }
            }
        });
    }

    /// Tokens that `w` is multiplied by at a time.
    pub(super) fn tokens(&self, w: &Mat) -> usize {
        // Tiles are read from L2 for every pair of row blocks.
        const NEAR: usize = 1 << 19;
        let tokens = self.tiles.tokens;
        if self.kernels.tiled(w.form, tokens) {
            tokens.min((NEAR / w.k / 32 * 32).max(128))
        } else {
            tokens
        }
    }

    /// One matrix product: `out` takes `x w^T + bias` as `into` says.
    pub(super) fn product(
        &self,
        w: &Mat,
        bias: Option<&Vec<f32>>,
        x: &Buf,
        into: Into,
        out: &mut Buf,
    ) {
        match into {
            Into::Store | Into::Act(_) => out.shape(x.rows, w.n),
            Into::Add => assert!(out.rows == x.rows && out.width == w.n),
            Into::Gate(_, width) => out.shape(x.rows, width),
        }
        let tokens = self.tokens(w);
        for t in (0..x.rows).step_by(tokens) {
            let rows = t..x.rows.min(t + tokens);
            self.products(&[Job { w, block: 0, n: w.n, bias, rows }], x, into, out);
        }
    }

    /// Matrix products side by side. All matrices have one shape; the rows of the jobs follow each other.
    pub(super) fn products(&self, jobs: &[Job<'_>], x: &Buf, into: Into, out: &mut Buf) {
        let Some(&Job { w, n, .. }) = jobs.first() else { return };
        assert!(jobs.iter().all(|job| job.n == n && job.w.k == x.width));
        if self.inputs.is_some() {
            self.sum_inputs(jobs, x);
        }
        let width = out.width;
        let first = jobs[0].rows.start;
        let mut acts = self.acts.lock().unwrap_or_else(|e| e.into_inner());
        if jobs.iter().any(|job| job.w.form.is_quantized()) {
            self.quantize(jobs, x, &mut acts);
        }
        let acts = &*acts;
        // Pairs of row blocks: gate and up stand side by side, and AMX takes two.
        let pairs = n.div_ceil(2 * ROWS);
        let size = w.form.row_block_bytes(w.k);
        let few = jobs.iter().all(|job| job.rows.len() <= 8);
        let grain = if few { (self.tiles.claim / (2 * size)).clamp(1, 64) } else { 1 };
        let claims = Claims::new(jobs.len() * pairs, self.pool.threads(), grain);
        let values = Disjoint::new(out.values_mut());
        self.pool.run(&|thread| {
            let (mut tile, mut spare) = (Vec::new(), Vec::new());
            claims.each(thread, |run| {
                let mut piece = run.start;
                while piece < run.end {
                    // A run may go on into the next job.
                    let (job, start) = (&jobs[piece / pairs], piece % pairs);
                    let end = pairs.min(start + run.end - piece);
                    piece += end - start;
                    let blocks = start * 2..(end * 2).min(n.div_ceil(ROWS));
                    let (m, columns) = (job.rows.len(), blocks.len() * ROWS);
                    tile.resize(m * blocks.len(), Line::ZERO);
                    let tile = Line::floats_mut(&mut tile);
                    let size = job.w.form.row_block_bytes(job.w.k);
                    let weights = &job.w.bytes()[job.block * size..];
                    let weights = &weights[blocks.start * size..blocks.end * size];
                    if job.w.form.is_quantized() {
                        let form = job.w.form;
                        let tiled = self.kernels.tiled(form, m);
                        let acts = acts.of(job.rows.start - first, m, x.width, tiled);
                        self.kernels.gemm(form, weights, &acts, tile);
                    } else {
                        let x = &x.values()[job.rows.start * x.width..job.rows.end * x.width];
                        self.kernels.gemm_float(job.w.form, weights, job.w.k, x, tile);
                    }
                    let first = start * 2 * ROWS;
                    self.finish(into, job, first, columns, tile, &mut spare, &values, width);
                }
            });
        });
    }

    /// Takes a tile, all rows of the job by `columns` of the matrix from `first` on, into `out`, whose rows have `width`.
    /// `spare` is room to work in.
    fn finish(
        &self,
        into: Into,
        job: &Job<'_>,
        first: usize,
        columns: usize,
        tile: &mut [f32],
        spare: &mut Vec<f32>,
        out: &Disjoint<'_, f32>,
        width: usize,
    ) {
        let last = job.n.min(first + columns);
        if let Some(bias) = job.bias {
            for row in tile.chunks_mut(columns) {
                self.kernels.add(&mut row[..last - first], &bias[first..last]);
            }
        }
        if let Into::Gate(act, n) = into {
            let first = first / 2;
            let last = n.min(first + columns / 2);
            spare.resize(tile.len(), 0.0);
            let (gate, up) = spare.split_at_mut(tile.len() / 2);
            let parts = gate.as_chunks_mut::<ROWS>().0.iter_mut().zip(up.as_chunks_mut::<ROWS>().0);
            for ((gate, up), pair) in parts.zip(tile.as_chunks::<{ 2 * ROWS }>().0) {
                gate.copy_from_slice(&pair[..ROWS]);
                up.copy_from_slice(&pair[ROWS..]);
            }
            self.kernels.gate(act, gate, up);
            for (row, gate) in job.rows.clone().zip(gate.chunks(columns / 2)) {
                // SAFETY: columns `first..last` of this row belong to the claimed run of row blocks.
                let out = unsafe { out.part(row * width + first..row * width + last) };
                out.copy_from_slice(&gate[..out.len()]);
            }
            return;
        }
        if let Into::Act(act) = into {
            // A gate of what is multiplied by one.
            const ONES: [f32; BLOCK] = [1.0; BLOCK];
            for part in tile.chunks_mut(BLOCK) {
                self.kernels.gate(act, part, &ONES[..part.len()]);
            }
        }
        for (row, tile) in job.rows.clone().zip(tile.chunks(columns)) {
            // SAFETY: as above.
            let out = unsafe { out.part(row * width + first..row * width + last) };
            let tile = &tile[..out.len()];
            match into {
                Into::Add => self.kernels.add(out, tile),
                _ => out.copy_from_slice(tile),
            }
        }
    }
}
