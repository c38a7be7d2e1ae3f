//! The CPU back end: owns the threads and the packed weights, cuts each operation into pieces, and calls the
//! kernels. Knows no family and no file.

mod attention;
mod latent;
mod memory;
mod moe;
mod pool;
mod recurrent;
mod streams;
pub mod topology;

pub use attention::Kv;
pub use memory::Bytes;
pub use recurrent::States;

use super::{
    Activation, Attention, Backend, Expert, HeadRows, KvDtype, KvLayer, Latent, NotFinite, Part,
    Parts, QkNorm, Recurrent, Routing, Score, Span,
};
use crate::kernels::{Acts, Form, Kernels, layout};
use crate::quant::{BLOCK, BlockMxfp4, GROUP, GROUPS};
use crate::{Error, Result};
use layout::ROWS;
use memory::Disjoint;
use pool::{Claims, Pool};
use std::borrow::Cow;
use std::ops::Range;
use std::sync::Mutex;

/// Tokens from which an operation on rows is worth a parallel region.
const MANY: usize = 8;
/// Tokens of a tile of a matrix product: its f32 sums (128 bytes a token) stay in L2.
const TOKENS: usize = 512;
/// Bytes of weights that a thread claims at once when they are read once: long streams, small remainders.
const CLAIM: usize = 128 << 10;

/// The CPU: one kernel set and one pool of threads.
pub struct Cpu {
    kernels: &'static Kernels,
    pool: Pool,
    acts: Mutex<ActBuf>,
    moe: Mutex<moe::Scratch>,
    heads: Mutex<latent::Scratch>,
}

/// Quantized activations of the operation that runs.
#[derive(Default)]
struct ActBuf {
    q: Vec<i8>,
    s: Vec<f32>,
    sums: Vec<[i16; GROUPS]>,
    totals: Vec<i32>,
    /// Where the values begin in `q`.
    start: usize,
}

impl ActBuf {
    /// The activations of `m` rows with `rows` before them, of `width` inputs.
    fn of(&self, rows: usize, m: usize, width: usize) -> Acts<'_> {
        let k = layout::padded_k(width);
        let (from, n) = (rows * k.div_ceil(BLOCK), m * k.div_ceil(BLOCK));
        Acts {
            m,
            k,
            q: &self.q[self.start + rows * k..][..m * k],
            s: &self.s[from..][..n],
            sums: &self.sums[from..][..n],
            totals: &self.totals[from..][..n],
        }
    }
}

/// Activations `[rows, width]`.
#[derive(Clone, Debug, Default)]
pub struct Buf {
    data: Vec<f32>,
    rows: usize,
    width: usize,
}

impl Buf {
    /// Activations with these values.
    pub fn new(data: Vec<f32>, width: usize) -> Buf {
        Buf { rows: data.len() / width, data, width }
    }
    /// Makes room; the values are unspecified.
    fn shape(&mut self, rows: usize, width: usize) {
        (self.rows, self.width) = (rows, width);
        if self.data.len() < rows * width {
            self.data.resize(rows * width, 0.0);
        }
    }
    /// All values.
    pub fn values(&self) -> &[f32] {
        &self.data[..self.rows * self.width]
    }
    fn values_mut(&mut self) -> &mut [f32] {
        &mut self.data[..self.rows * self.width]
    }
    fn row(&self, r: usize) -> &[f32] {
        &self.data[r * self.width..][..self.width]
    }
}

/// A packed matrix `[n, k]`.
pub struct Mat {
    form: Form,
    n: usize,
    k: usize,
    bytes: Bytes,
}

impl Mat {
    /// A matrix from bytes in the packed order, as [`Mat::bytes`] gave them.
    pub fn new(form: Form, n: usize, k: usize, bytes: Bytes) -> Result<Mat> {
        let (found, expected) = (bytes.get().len(), form.bytes(n, k));
        if found != expected || n == 0 || k == 0 {
            let value = format!("{found} bytes for a {} matrix [{n}, {k}]", form.name());
            return Err(Error::parameter("packed matrix", value, format!("{expected} bytes")));
        }
        Ok(Mat { form, n, k, bytes })
    }
    /// How the weights are stored.
    pub fn form(&self) -> Form {
        self.form
    }
    /// Rows and inputs.
    pub fn shape(&self) -> (usize, usize) {
        (self.n, self.k)
    }
    /// The packed bytes.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get()
    }
    /// Row `r` as f32.
    pub fn unpack_row(&self, r: usize, out: &mut [f32]) {
        layout::unpack_row(self.form, self.bytes(), r, out);
    }
}

/// A matrix, or some of its row blocks, against some rows of the activations; the same rows of the output take
/// the product.
struct Job<'a> {
    w: &'a Mat,
    /// First row block.
    block: usize,
    /// Rows from there on.
    n: usize,
    bias: Option<&'a Vec<f32>>,
    /// At most [`TOKENS`].
    rows: Range<usize>,
}

/// What happens to a finished tile of a product.
#[derive(Clone, Copy)]
enum Into {
    Store,
    Add,
    Act(Activation),
    /// Gate and up are interleaved; their columns, padding left out, are as many as this.
    Gate(Activation, usize),
}

impl Cpu {
    /// A CPU with `threads` threads and the set that `isa` names (the best one if `None`).
    pub fn new(threads: usize, isa: Option<&str>) -> Result<Cpu> {
        if threads == 0 || threads > 4096 {
            return Err(Error::parameter("threads", threads, "1 to 4096, or \"auto\""));
        }
        let pool = Pool::new(threads).map_err(|e| Error::io("threads", e))?;
        Ok(Cpu {
            kernels: crate::kernels::choose(isa)?,
            pool,
            acts: Mutex::default(),
            moe: Mutex::default(),
            heads: Mutex::default(),
        })
    }

    /// The kernel set in use.
    pub fn kernels(&self) -> &'static Kernels {
        self.kernels
    }

    /// The threads in use.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Runs `work` on each of `0..total`, in parallel if there are many.
    fn each(&self, total: usize, grain: usize, work: impl Fn(usize) + Sync) {
        if total < MANY || self.pool.threads() == 1 {
            return (0..total).for_each(work);
        }
        let claims = Claims::new(total, self.pool.threads(), grain);
        self.pool.run(&|thread| claims.each(thread, |run| run.for_each(&work)));
    }

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
            let job = &jobs[jobs.partition_point(|job| job.rows.end <= first + r)].rows;
            let (m, before, t) = (job.len(), job.start - first, first + r - job.start);
            for b in 0..blocks {
                let len = BLOCK.min(k - b * BLOCK);
                let start = (b * BLOCK).min(x.width);
                let x = &x.row(first + r)[start..(start + len).min(x.width)];
                let at = before * k + b * BLOCK * m + t * len;
                let i = before * blocks + b * m + t;
                // SAFETY: `(b, r)` names these ranges, and each `r` is claimed by one thread.
                let (q, s, sums, totals) = unsafe {
                    (
                        q.part(at..at + len),
                        s.part(i..i + 1),
                        sums.part(i..i + 1),
                        totals.part(i..i + 1),
                    )
                };
                (s[0], totals[0]) = self.kernels.quantize(x, q, &mut sums[0]);
            }
        });
    }

    /// One matrix product: `out` takes `x w^T + bias` as `into` says.
    fn product(&self, w: &Mat, bias: Option<&Vec<f32>>, x: &Buf, into: Into, out: &mut Buf) {
        match into {
            Into::Store | Into::Act(_) => out.shape(x.rows, w.n),
            Into::Add => assert!(out.rows == x.rows && out.width == w.n),
            Into::Gate(_, width) => out.shape(x.rows, width),
        }
        for t in (0..x.rows).step_by(TOKENS) {
            let rows = t..x.rows.min(t + TOKENS);
            self.products(&[Job { w, block: 0, n: w.n, bias, rows }], x, into, out);
        }
    }

    /// Matrix products side by side. All matrices have one shape; the rows of the jobs follow each other.
    fn products(&self, jobs: &[Job<'_>], x: &Buf, into: Into, out: &mut Buf) {
        let Some(&Job { w, n, .. }) = jobs.first() else { return };
        assert!(jobs.iter().all(|job| job.n == n && job.w.k == x.width));
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
        let few = jobs.iter().all(|job| job.rows.len() <= 4);
        let grain = if few { (CLAIM / (2 * size)).clamp(1, 64) } else { 1 };
        let claims = Claims::new(jobs.len() * pairs, self.pool.threads(), grain);
        let values = Disjoint::new(out.values_mut());
        self.pool.run(&|thread| {
            let mut tile = Vec::new();
            claims.each(thread, |run| {
                let mut piece = run.start;
                while piece < run.end {
                    // A run may go on into the next job.
                    let (job, start) = (&jobs[piece / pairs], piece % pairs);
                    let end = pairs.min(start + run.end - piece);
                    piece += end - start;
                    let blocks = start * 2..(end * 2).min(n.div_ceil(ROWS));
                    let (m, columns) = (job.rows.len(), blocks.len() * ROWS);
                    tile.resize(m * columns, 0.0);
                    let size = job.w.form.row_block_bytes(job.w.k);
                    let weights = &job.w.bytes()[job.block * size..];
                    let weights = &weights[blocks.start * size..blocks.end * size];
                    if job.w.form.is_quantized() {
                        let acts = acts.of(job.rows.start - first, m, x.width);
                        self.kernels.gemm(job.w.form, weights, &acts, &mut tile);
                    } else {
                        let x = &x.values()[job.rows.start * x.width..job.rows.end * x.width];
                        self.kernels.gemm_float(job.w.form, weights, job.w.k, x, &mut tile);
                    }
                    for (i, tile) in tile.chunks_mut(columns).enumerate() {
                        let row = (job.rows.start + i) * width;
                        self.finish(into, n, job.bias, start * 2 * ROWS, tile, &values, row);
                    }
                }
            });
        });
    }

    /// Takes one row of a tile, columns `first..` of the matrix, into the row of `out` that begins at `row`.
    fn finish(
        &self,
        into: Into,
        n: usize,
        bias: Option<&Vec<f32>>,
        first: usize,
        tile: &mut [f32],
        out: &Disjoint<'_, f32>,
        row: usize,
    ) {
        let last = n.min(first + tile.len());
        let tile = &mut tile[..last - first];
        if let Some(bias) = bias {
            self.kernels.add(tile, &bias[first..last]);
        }
        match into {
            Into::Store | Into::Add | Into::Act(_) => {
                if let Into::Act(act) = into {
                    // A gate of what is multiplied by one.
                    for part in tile.chunks_mut(ROWS) {
                        self.kernels.gate(act, part, &[1.0; ROWS][..part.len()]);
                    }
                }
                // SAFETY: columns `first..last` of this row belong to the claimed run of row blocks.
                let out = unsafe { out.part(row + first..row + last) };
                match into {
                    Into::Add => self.kernels.add(out, tile),
                    _ => out.copy_from_slice(tile),
                }
            }
            Into::Gate(act, width) => {
                for (i, pair) in tile.chunks_mut(2 * ROWS).enumerate() {
                    let (gate, up) = pair.split_at_mut(ROWS);
                    self.kernels.gate(act, gate, up);
                    let column = first / 2 + i * ROWS;
                    let n = ROWS.min(width - column);
                    // SAFETY: as above; a pair of row blocks gives half as many columns.
                    unsafe { out.part(row + column..row + column + n) }.copy_from_slice(&gate[..n]);
                }
            }
        }
    }

    /// Packs `parts` into `out`, which is as long as the packed matrix and zero.
    pub fn pack_into(
        &self,
        form: Form,
        parts: &Parts<'_>,
        out: &mut [u8],
    ) -> std::result::Result<(), NotFinite> {
        let (n, k) = (parts.n(), parts.k);
        assert_eq!(out.len(), form.bytes(n, k));
        let size = form.row_block_bytes(k);
        let bad = Mutex::new(None);
        let blocks = n.div_ceil(ROWS);
        let out = Disjoint::new(out);
        let claims = Claims::new(blocks, self.pool.threads(), 4);
        self.pool.run(&|thread| {
            claims.each(thread, |run| {
                for rb in run {
                    // SAFETY: each row block is claimed by one thread.
                    let out = unsafe { out.part(rb * size..(rb + 1) * size) };
                    if let Err(at) = self.pack_row_block(form, parts, rb, out) {
                        let mut bad = bad.lock().unwrap_or_else(|e| e.into_inner());
                        *bad = Some(bad.map_or(at, |b: NotFinite| b.min(at)));
                    }
                }
            });
        });
        bad.into_inner().unwrap_or_else(|e| e.into_inner()).map_or(Ok(()), Err)
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
        if matches!(form, Form::Mxfp4 | Form::Mxfp4Float) {
            return pack_mxfp4(form, parts, rb, out);
        }
        if !form.is_quantized() {
            let width = Part::width(form);
            let rows: Vec<_> =
                (0..ROWS).map(|r| row(r).map(|(p, i)| parts.parts[p].range(i, 0, k))).collect();
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
        let mut rows = [[0.0f32; BLOCK]; ROWS];
        let mut done = 0;
        for b in (0..k).step_by(BLOCK) {
            let len = BLOCK.min(k - b);
            for (r, values) in rows.iter_mut().enumerate() {
                let Some((p, i)) = row(r) else { continue };
                parts.parts[p].values(i, b, &mut values[..len]);
                finite(&values[..len]).map_err(|c| (p, i, b + c))?;
            }
            let bytes = form.row_block_bytes(len);
            self.kernels.pack(form, &rows, len, &mut out[done..done + bytes]);
            done += bytes;
        }
        Ok(())
    }
}

/// Row block `rb` of `parts`, which are MXFP4, as it is.
fn pack_mxfp4(
    form: Form,
    parts: &Parts<'_>,
    rb: usize,
    out: &mut [u8],
) -> std::result::Result<(), NotFinite> {
    let mut done = 0;
    for b in (0..parts.k).step_by(BLOCK) {
        let len = BLOCK.min(parts.k - b);
        let mut rows = [BlockMxfp4::ZERO; ROWS];
        for (r, row) in rows.iter_mut().enumerate() {
            let Some((p, i)) = parts.locate(rb * ROWS + r) else { continue };
            let part = &parts.parts[p];
            let start = i * part.row + b;
            for (j, byte) in part.bytes[start / 2..][..len / 2].iter().enumerate() {
                (row.q[2 * j], row.q[2 * j + 1]) = (byte & 15, byte >> 4);
            }
            let e = &part.scales[start / GROUP..][..len / GROUP];
            row.e[..e.len()].copy_from_slice(e);
            if let Some(g) = e.iter().position(|&e| e == BlockMxfp4::NAN) {
                return Err((p, i, b + g * GROUP));
            }
        }
        let bytes = form.row_block_bytes(len);
        layout::pack_mxfp4(&rows, &mut out[done..done + bytes]);
        done += bytes;
    }
    Ok(())
}

/// `Err` with the index of the first number that is not finite.
fn finite(x: &[f32]) -> std::result::Result<(), usize> {
    // The sum of x * 0 is 0 unless something is not finite; vectors make that cheap.
    let mut lanes = [0.0f32; 16];
    for x in x.chunks(16) {
        for (lane, x) in lanes.iter_mut().zip(x) {
            *lane += x * 0.0;
        }
    }
    if lanes.iter().all(|&l| l == 0.0) {
        return Ok(());
    }
    x.iter().position(|x| !x.is_finite()).map_or(Ok(()), Err)
}

impl Backend for Cpu {
    type Buf = Buf;
    type Mat = Mat;
    type Row = Vec<f32>;
    type Kv = Kv;
    type States = States;

    fn buf(&self) -> Buf {
        Buf::default()
    }

    fn row(&self, values: &[f32]) -> Vec<f32> {
        values.to_vec()
    }

    fn pack(&self, form: Form, parts: &Parts<'_>) -> Result<std::result::Result<Mat, NotFinite>> {
        let (n, k) = (parts.n(), parts.k);
        let mut bytes = Bytes::zeroed(form.bytes(n, k), "packed weights")?;
        if let Err(at) = self.pack_into(form, parts, bytes.get_mut()) {
            return Ok(Err(at));
        }
        Mat::new(form, n, k, bytes).map(Ok)
    }

    fn kv(&self, dtype: KvDtype, layers: &[KvLayer]) -> Result<Kv> {
        Kv::new(dtype, layers)
    }

    fn embed(&self, table: &Mat, ids: &[u32], scale: f32, out: &mut Buf) {
        out.shape(ids.len(), table.k);
        let width = table.k;
        let values = Disjoint::new(out.values_mut());
        self.each(ids.len(), 4, |r| {
            // SAFETY: each row is claimed by one thread.
            let row = unsafe { values.part(r * width..(r + 1) * width) };
            table.unpack_row(ids[r] as usize, row);
            if scale != 1.0 {
                row.iter_mut().for_each(|x| *x *= scale);
            }
        });
    }

    fn rms_norm(&self, x: &Buf, gain: &Vec<f32>, eps: f32, out: &mut Buf) {
        assert!(x.width.is_multiple_of(gain.len()));
        out.shape(x.rows, x.width);
        let width = x.width;
        let values = Disjoint::new(out.values_mut());
        self.each(x.rows, 4, |r| {
            // SAFETY: each row is claimed by one thread.
            let out = unsafe { values.part(r * width..(r + 1) * width) };
            let pieces = x.row(r).chunks_exact(gain.len());
            for (x, out) in pieces.zip(out.chunks_exact_mut(gain.len())) {
                self.kernels.rms_norm(x, gain, eps, out);
            }
        });
    }

    fn layer_norm(
        &self,
        x: &Buf,
        gain: &Vec<f32>,
        bias: Option<&Vec<f32>>,
        eps: f32,
        out: &mut Buf,
    ) {
        out.shape(x.rows, x.width);
        let width = x.width;
        let values = Disjoint::new(out.values_mut());
        self.each(x.rows, 4, |r| {
            // SAFETY: each row is claimed by one thread.
            let out = unsafe { values.part(r * width..(r + 1) * width) };
            self.kernels.layer_norm(x.row(r), gain, bias.map(Vec::as_slice), eps, out);
        });
    }

    fn linear(&self, w: &Mat, bias: Option<&Vec<f32>>, x: &Buf, out: &mut Buf) {
        self.product(w, bias, x, Into::Store, out);
    }

    fn linear_add(&self, w: &Mat, bias: Option<&Vec<f32>>, x: &Buf, out: &mut Buf) {
        self.product(w, bias, x, Into::Add, out);
    }

    fn gated(
        &self,
        w: &Mat,
        bias: Option<&Vec<f32>>,
        act: Activation,
        width: usize,
        x: &Buf,
        out: &mut Buf,
    ) {
        assert_eq!(w.n, width.next_multiple_of(ROWS) * 2, "gate and up, interleaved");
        self.product(w, bias, x, Into::Gate(act, width), out);
    }

    fn linear_heads(&self, w: &Mat, heads: usize, x: &Buf, out: &mut Buf) {
        self.product_heads(w, heads, x, out);
    }

    fn latent_qk(
        &self,
        w: &Mat,
        norm: (&Vec<f32>, f32),
        how: &Latent,
        q: &Buf,
        kv: &Buf,
        out: &mut Buf,
    ) {
        self.latent(w, norm, how, q, kv, out);
    }

    fn moe(
        &self,
        how: &Routing,
        logits: &mut Buf,
        correction: Option<&Vec<f32>>,
        scales: Option<&Vec<f32>>,
        experts: &[Expert<Mat, Vec<f32>>],
        act: Activation,
        width: usize,
        x: &Buf,
        out: &mut Buf,
    ) {
        self.mixture(how, logits, correction, scales, experts, Into::Gate(act, width), x, out);
    }

    fn add_gated(&self, gate: &mut Buf, y: &Buf, out: &mut Buf) {
        assert!(gate.width == 1 && gate.rows == y.rows && out.width == y.width);
        self.kernels.score(Score::Sigmoid, gate.values_mut());
        let width = y.width;
        let values = Disjoint::new(out.values_mut());
        self.each(y.rows, 4, |r| {
            // SAFETY: each row is claimed by one thread.
            let out = unsafe { values.part(r * width..(r + 1) * width) };
            self.kernels.add_scaled(out, gate.row(r)[0], y.row(r));
        });
    }

    fn gate_with(&self, x: &mut Buf, act: Activation, y: &Buf, from: usize) {
        self.gate_rows(x, act, y, from);
    }

    fn cut_and_gate(&self, x: &Buf, times: f32, act: Activation, width: usize, out: &mut Buf) {
        self.cut_rows(x, times, act, width, out);
    }

    fn altup_predict(&self, coefficients: &Buf, streams: &mut [Buf]) {
        self.predict(coefficients, streams);
    }

    fn altup_correct(&self, coefficients: &Buf, seen: &Buf, streams: &mut [Buf]) {
        self.correct(coefficients, seen, streams);
    }

    fn multiply(&self, x: &Buf, gain: &Vec<f32>, out: &mut Buf) {
        self.multiply_rows(x, gain, out);
    }

    fn copy(&self, x: &Buf, out: &mut Buf) {
        out.shape(x.rows, x.width);
        out.values_mut().copy_from_slice(x.values());
    }

    fn match_power(&self, x: &mut Buf, to: &Buf, least: f32) {
        self.match_rows(x, to, least);
    }

    fn activated(&self, w: &Mat, bias: Option<&Vec<f32>>, act: Activation, x: &Buf, out: &mut Buf) {
        self.product(w, bias, x, Into::Act(act), out);
    }

    fn add(&self, x: &mut Buf, y: &Buf) {
        let width = x.width;
        let values = Disjoint::new(x.values_mut());
        self.each(y.rows, 4, |r| {
            // SAFETY: each row is claimed by one thread.
            self.kernels.add(unsafe { values.part(r * width..(r + 1) * width) }, y.row(r));
        });
    }

    fn add_scaled(&self, x: &mut Buf, scale: f32, y: &Buf) {
        let width = x.width;
        let values = Disjoint::new(x.values_mut());
        self.each(y.rows, 4, |r| {
            // SAFETY: each row is claimed by one thread.
            let x = unsafe { values.part(r * width..(r + 1) * width) };
            self.kernels.add_scaled(x, scale, y.row(r));
        });
    }

    fn rope_table(
        &self,
        positions: &[u32],
        long: &[bool],
        inv_freq: [&[f32]; 2],
        scale: f32,
    ) -> Buf {
        let half = inv_freq[0].len();
        let mut out = Buf::default();
        out.shape(positions.len(), 2 * half);
        let values = Disjoint::new(out.values_mut());
        self.each(positions.len(), 4, |r| {
            // SAFETY: each row is claimed by one thread.
            let row = unsafe { values.part(r * 2 * half..(r + 1) * 2 * half) };
            for (i, &f) in inv_freq[usize::from(long[r])].iter().enumerate() {
                // The product is rounded to f32, as in the models' own code; sine and cosine are the
                // `libm` crate's, the same on every machine.
                let (sin, cos) = libm::sincos(f64::from(positions[r] as f32 * f));
                (row[i], row[half + i]) = (cos as f32 * scale, sin as f32 * scale);
            }
        });
        out
    }

    fn rotate_and_store(
        &self,
        qkv: &mut Buf,
        how: &Attention,
        norms: Option<QkNorm<'_, Vec<f32>>>,
        table: Option<&Buf>,
        kv: &mut Kv,
        layer: usize,
        spans: &[Span<'_>],
    ) {
        self.rotate(qkv, how, norms.as_ref(), table);
        if !how.queries_only {
            self.store(qkv, how, kv, layer, spans);
        }
    }

    fn attend(
        &self,
        qkv: &Buf,
        how: &Attention,
        sinks: Option<&Vec<f32>>,
        kv: &Kv,
        layer: usize,
        spans: &[Span<'_>],
        out: &mut Buf,
    ) {
        self.attention(qkv, how, sinks, kv, layer, spans, out);
    }

    fn gate_heads(&self, qkv: &Buf, how: &Attention, out: &mut Buf) {
        let (rows, width, first) = (out.rows, out.width, how.qkv_width());
        let each = width / (qkv.width - first);
        let values = Disjoint::new(out.values_mut());
        self.each(rows, 4, |r| {
            // SAFETY: each row is claimed by one thread.
            let out = unsafe { values.part(r * width..(r + 1) * width) };
            let gates =
                qkv.row(r)[first..].iter().flat_map(|&gate| std::iter::repeat_n(gate, each));
            let mut gates: Vec<f32> = gates.collect();
            self.kernels.gate(Activation::Sigmoid, &mut gates, out);
            out.copy_from_slice(&gates);
        });
    }

    fn states(&self, layers: &[(usize, usize)]) -> Result<States> {
        States::new(layers)
    }

    fn conv(
        &self,
        x: &mut Buf,
        how: &Recurrent,
        taps: &Vec<f32>,
        bias: Option<&Vec<f32>>,
        states: &mut States,
        layer: usize,
        spans: &[Span<'_>],
        out: &mut Buf,
    ) {
        self.convolve(x, how, taps, bias, (states, layer), spans, out);
    }

    fn recur(
        &self,
        x: &Buf,
        rates: &Buf,
        conv: &mut Buf,
        how: &Recurrent,
        rows: &HeadRows<Vec<f32>>,
        eps: f32,
        states: &mut States,
        layer: usize,
        spans: &[Span<'_>],
        out: &mut Buf,
    ) {
        self.recurrence((x, rates), conv, how, rows, eps, (states, layer), spans, out);
    }

    fn select(&self, x: &Buf, rows: &[usize], out: &mut Buf) {
        out.shape(rows.len(), x.width);
        for (i, &r) in rows.iter().enumerate() {
            out.data[i * x.width..][..x.width].copy_from_slice(x.row(r));
        }
    }

    fn scale(&self, x: &mut Buf, scale: f32) {
        let width = x.width;
        let rows = x.rows;
        let values = Disjoint::new(x.values_mut());
        self.each(rows, 1, |r| {
            // SAFETY: each row is claimed by one thread.
            let row = unsafe { values.part(r * width..(r + 1) * width) };
            row.iter_mut().for_each(|x| *x *= scale);
        });
    }

    fn softcap(&self, x: &mut Buf, cap: f32) {
        let width = x.width;
        let rows = x.rows;
        let values = Disjoint::new(x.values_mut());
        self.each(rows, 1, |r| {
            // SAFETY: each row is claimed by one thread.
            self.kernels.softcap(unsafe { values.part(r * width..(r + 1) * width) }, cap);
        });
    }

    fn read(&self, x: &Buf) -> Vec<f32> {
        x.values().to_vec()
    }
}

impl Part<'_> {
    /// Bytes of one stored number.
    fn width(stored: Form) -> usize {
        if stored == Form::F32 { 4 } else { 2 }
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
    fn values(&self, i: usize, from: usize, out: &mut [f32]) {
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
    /// Rows of the packed matrix.
    pub fn n(&self) -> usize {
        let n = self.parts.iter().map(|p| p.n).sum::<usize>();
        if self.interleaved { 2 * (n / 2).next_multiple_of(ROWS) } else { n }
    }

    /// Part and row that packed row `r` comes from; `None` for padding.
    fn locate(&self, r: usize) -> Option<(usize, usize)> {
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

#[cfg(test)]
mod tests;
