//! The CPU back end: owns the threads and the packed weights, cuts each operation into pieces, and calls the
//! kernels. Knows no family and no file.

mod attention;
mod available;
mod bandwidth;
mod exact;
mod feedback;
mod latent;
mod memory;
mod moe;
mod pack;
mod pool;
mod product;
mod recurrent;
mod statistics;
mod streams;
pub mod topology;

pub use attention::Kv;
pub use available::{Memory, memory};
pub use bandwidth::Reader;
pub use memory::Bytes;
pub use product::Tiles;
pub use recurrent::States;
pub use statistics::Inputs;

use super::{
    Activation, Attention, Backend, Draw, Expert, HeadRows, KvDtype, KvLayer, Latent, NotFinite,
    Part, Parts, Place, QkNorm, Recurrent, Routing, Score, Span,
};
use crate::kernels::{Acts, Form, Kernels, layout};
use crate::sample::Scratch;
use crate::{Error, Result};
use layout::ROWS;
use memory::Disjoint;
use pool::{Claims, Pool};
use product::{ActBuf, Into};
use std::sync::Mutex;

/// Tokens from which an operation on rows is worth a parallel region.
const MANY: usize = 8;
/// The CPU: one kernel set and one pool of threads.
pub struct Cpu {
    kernels: &'static Kernels,
    pool: Pool,
    tiles: Tiles,
    acts: Mutex<ActBuf>,
    moe: Mutex<moe::Scratch>,
    heads: Mutex<latent::Scratch>,
    /// Of each thread.
    draws: Vec<Mutex<Scratch>>,
    /// Sums over what matrices are multiplied by, while they are asked for.
    inputs: Option<Mutex<Inputs>>,
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
    /// Numbers of a row.
    #[cfg(feature = "cuda")]
    pub(super) fn width(&self) -> usize {
        self.width
    }
    fn row(&self, r: usize) -> &[f32] {
        &self.data[r * self.width..][..self.width]
    }
}

/// A packed matrix `[n, k]`. A copy is the same memory.
#[derive(Clone)]
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
    /// Says that the bytes are not needed any more: those of a mapped file leave this process's memory.
    #[cfg(feature = "cuda")]
    pub(super) fn release(self) {
        self.bytes.release();
    }
    /// Row `r` as f32.
    pub fn unpack_row(&self, r: usize, out: &mut [f32]) {
        layout::unpack_row(self.form, self.bytes(), r, out);
    }
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
            tiles: Tiles::default(),
            acts: Mutex::default(),
            moe: Mutex::default(),
            heads: Mutex::default(),
            draws: (0..threads).map(|_| Mutex::default()).collect(),
            inputs: None,
        })
    }

    /// This CPU, with matrix products cut as `tiles` says.
    pub fn with_tiles(self, tiles: Tiles) -> Result<Cpu> {
        let Tiles { tokens, claim } = tiles;
        if !(1..=1 << 16).contains(&tokens) {
            return Err(Error::parameter("tile_tokens", tokens, "1 to 65536"));
        }
        if !(1 << 10..=1 << 30).contains(&claim) {
            return Err(Error::parameter("claim_bytes", claim, "1 KiB to 1 GiB"));
        }
        Ok(Cpu { tiles, ..self })
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
}

impl Backend for Cpu {
    type Buf = Buf;
    type Mat = Mat;
    type Row = Vec<f32>;
    type Kv = Kv;
    type States = States;

    fn packer(&self) -> &Cpu {
        self
    }

    fn place(&self, _at: Place, packed: Mat) -> Result<Mat> {
        Ok(packed)
    }

    fn stored(mat: &Mat) -> (Form, usize) {
        (mat.form, mat.bytes().len())
    }

    fn buf(&self) -> Buf {
        Buf::default()
    }

    fn row(&self, _at: Place, values: &[f32]) -> Vec<f32> {
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

    fn copy_page(&self, kv: &mut Kv, layer: usize, from: u32, to: u32) {
        kv.copy_page(layer, from, to);
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
        experts: &[Expert<&Mat, &Vec<f32>>],
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
        rows: &HeadRows<&Vec<f32>>,
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

    fn draw(&self, logits: &Buf, how: &[Draw<'_>]) -> Vec<Option<u32>> {
        let ids = Mutex::new(vec![None; how.len()]);
        let threads = self.pool.threads().min(how.len());
        let claims = Claims::new(how.len(), threads.max(1), 1);
        let work = |thread: usize| {
            claims.each(thread, |rows| {
                let mut scratch = self.draws[thread].lock().unwrap_or_else(|e| e.into_inner());
                for r in rows {
                    let id = how[r].token(logits.row(r), &mut scratch);
                    ids.lock().unwrap_or_else(|e| e.into_inner())[r] = id;
                }
            });
        };
        if threads > 1 {
            self.pool.run(&work)
        } else {
            work(0)
        }
        ids.into_inner().unwrap_or_else(|e| e.into_inner())
    }

    fn read(&self, x: &Buf) -> Vec<f32> {
        x.values().to_vec()
    }
}

#[cfg(test)]
mod tests;
