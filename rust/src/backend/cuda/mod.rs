//! The CUDA back end: operations become launches of the kernels in `kernels/`, which keep the CPU's order of every sum,
//! so that results have the CPU's bits. Knows no family and no file. Nothing here touches the driver before
//! [`probe`] has.

mod attention;
mod buf;
mod check;
mod device;
mod draw;
mod experts;
mod kv;
mod latent;
mod launch;
mod modules;
mod pack;
mod probe;
mod product;
mod recurrent;
mod split;
mod time;

pub use buf::Buf;
pub use kv::Kv;
pub use probe::{DeviceInfo, DriverInfo, Unavailable, probe};
pub use recurrent::States;
pub use split::Split;

use super::cpu::{self, Cpu};
use super::{
    Activation, Attention, Backend, Draw, Expert, Form, HeadRows, KvDtype, KvLayer, Latent,
    NotFinite, Parts, Place, QkNorm, Recurrent, Routing, Span,
};
use crate::Result;
use device::{Device, Memory};
use experts::Work;
use product::Into;
use std::sync::{Arc, Mutex};

/// Threads of the kernels in `rows.cu`.
const THREADS: usize = 256;

/// One CUDA device.
pub struct Cuda {
    device: Arc<Device>,
    /// Packs weights.
    cpu: Cpu,
    /// Parts of attention that is split over chunks of keys.
    parts: Mutex<Memory>,
    /// What drawing tokens keeps between its kernels, and the tokens.
    drawn: Mutex<Memory>,
    /// What operations of several launches keep between them.
    work: Mutex<Work>,
}

/// A matrix in tiles.
pub struct Mat {
    form: Form,
    n: usize,
    k: usize,
    memory: Memory,
}

/// A vector.
pub struct Row {
    memory: Memory,
    len: usize,
}

impl Cuda {
    /// Device `ordinal`, or the first that kernels run on; `cpu` packs weights.
    pub fn new(ordinal: Option<usize>, cpu: Cpu) -> Result<Cuda> {
        let (parts, drawn) = (Mutex::new(Memory::none()), Mutex::new(Memory::none()));
        let device = Device::open(ordinal)?;
        let work = Mutex::new(Work::new(&device));
        Ok(Cuda { device, cpu, parts, drawn, work })
    }
    /// The device in use.
    pub fn info(&self) -> &DeviceInfo {
        &self.device.info
    }
    /// Free bytes on the device, and all. Where its memory is the computer's, what the computer says: the driver does
    /// not count what the system would give back, such as pages of files.
    pub fn memory(&self) -> (u64, u64) {
        let (free, total) = self.device.memory();
        let free = if self.info().integrated { cpu::memory().available } else { free };
        (free.min(total), total)
    }
    /// Activations with these values.
    pub fn upload(&self, values: &[f32], width: usize) -> Buf {
        let mut buf = Buf::new(&self.device);
        self.fill(&mut buf, values, width);
        buf
    }
    /// The same in a buffer that is there.
    fn fill(&self, buf: &mut Buf, values: &[f32], width: usize) {
        buf.shape(values.len() / width, width);
        self.device.upload(buf.at, values);
    }

    fn launch<P: launch::Params>(
        &self,
        kernel: &'static str,
        grid: [usize; 3],
        block: usize,
        params: &P,
    ) {
        self.device.launch(kernel, grid, block as u32, params);
    }

    /// An operation of `rows.cu` on every number of `x`; `Each` in it has the kinds.
    fn each(&self, kind: u32, x: u64, y: u64, out: &Buf, more: launch::Each) {
        let params = launch::Each {
            kind,
            x,
            y,
            out: out.at,
            width: out.width as u32,
            rows: out.rows as u32,
            ..more
        };
        let blocks = (out.rows * out.width).div_ceil(THREADS);
        self.launch("each", [blocks, 1, 1], THREADS, &params);
        out.fresh.set(false);
    }

    /// Norms of pieces as wide as `width` of rows that begin at `x` and are `row` numbers apart.
    fn norm(
        &self,
        (x, in_row): (u64, usize),
        (out, out_row): (u64, usize),
        [rows, pieces, width]: [usize; 3],
        gain: &Row,
        bias: Option<&Row>,
        (centred, eps): (bool, f32),
        acts: Option<launch::Acts>,
    ) {
        let params = launch::Norm {
            x,
            out,
            in_row: in_row as u32,
            out_row: out_row as u32,
            width: width as u32,
            gain: gain.memory.at,
            gain_width: gain.len as u32,
            bias: bias.map_or(0, |bias| bias.memory.at),
            eps,
            centred: centred.into(),
            blocks: acts.map_or(0, |_| pack::groups(width).1 as u32),
            acts: acts.unwrap_or_default(),
            pad: 0,
        };
        self.launch("norm", [rows, pieces, 1], THREADS, &params);
    }

    fn norm_rows(&self, x: &Buf, gain: &Row, bias: Option<&Row>, how: (bool, f32), out: &mut Buf) {
        assert!(x.width.is_multiple_of(gain.len));
        out.shape(x.rows, x.width);
        let pieces = x.width / gain.len;
        // What follows is nearly always a product.
        let acts = (pieces == 1).then(|| out.acts());
        let shape = [x.rows, pieces, gain.len];
        self.norm((x.at, x.width), (out.at, x.width), shape, gain, bias, how, acts);
        out.fresh.set(acts.is_some());
    }

    /// `out` = the rows of `x` that stand at `rows` on the device.
    fn gather(&self, x: u64, rows: u64, out: &Buf) {
        let (out, width, count) = (out.at, out.width as u32, out.rows);
        let params = launch::Select { x, rows, out, width, row: width, heads: 0, count: 0 };
        self.launch("select_rows", [count, 1, 1], THREADS, &params);
    }

    fn altup(&self, coefficients: &Buf, seen: Option<&Buf>, streams: &mut [Buf]) {
        let mut params = launch::AltUp {
            coefficients: coefficients.at,
            seen: seen.map_or(0, |seen| seen.at),
            n: streams.len() as u32,
            width: streams[0].width as u32,
            correct: seen.is_some().into(),
            rows: streams[0].rows as u32,
            ..launch::AltUp::default()
        };
        if streams.len() > params.streams.len() {
            return self.device.refuse("more than 8 residual streams");
        }
        for (at, stream) in params.streams.iter_mut().zip(streams.iter()) {
            *at = stream.at;
            stream.fresh.set(false);
        }
        let numbers = streams[0].rows * streams[0].width;
        self.launch("altup", [numbers.div_ceil(THREADS), 1, 1], THREADS, &params);
    }
}

impl Backend for Cuda {
    type Buf = Buf;
    type Mat = Mat;
    type Row = Row;
    type Kv = Kv;
    type States = States;

    fn buf(&self) -> Buf {
        Buf::new(&self.device)
    }

    fn row(&self, _at: Place, values: &[f32]) -> Row {
        let mut memory = Memory::none();
        self.device.grow(&mut memory, size_of_val(values));
        self.device.upload(memory.at, values);
        Row { memory, len: values.len() }
    }

    fn packer(&self) -> &Cpu {
        &self.cpu
    }

    fn place(&self, _at: Place, packed: cpu::Mat) -> Result<Mat> {
        let mat = self.copied(&packed);
        packed.release(); // where memory is one, it would be there twice
        mat
    }

    fn stored(mat: &Mat) -> (Form, usize) {
        (mat.form, mat.memory.bytes)
    }

    fn holds(&self, _: Place) -> bool {
        self.device.info.integrated
    }

    fn random(&self, form: Form, n: usize, k: usize) -> Result<Mat> {
        Cuda::random(self, form, n, k)
    }
    fn finish(&self) -> Result<()> {
        self.device.finish()
    }

    fn pack(&self, form: Form, parts: &Parts<'_>) -> Result<std::result::Result<Mat, NotFinite>> {
        self.cpu
            .pack(form, parts)?
            .map(|mat| self.place(Place::End, mat))
            .map_or_else(|at| Ok(Err(at)), |mat| mat.map(Ok))
    }

    fn kv(&self, dtype: KvDtype, layers: &[KvLayer]) -> Result<Kv> {
        Kv::new(&self.device, dtype, layers)
    }

    fn copy_page(&self, kv: &mut Kv, layer: usize, from: u32, to: u32) {
        let pages = kv.pages(layer);
        let at = |page: u32| pages.bytes + u64::from(page) * u64::from(pages.page);
        self.device.copy(at(to), at(from), pages.page as usize);
    }

    fn states(&self, layers: &[(usize, usize)]) -> Result<States> {
        States::new(&self.device, layers)
    }

    fn embed(&self, table: &Mat, ids: &[u32], scale: f32, out: &mut Buf) {
        out.shape(ids.len(), table.k);
        let params = launch::Embed {
            table: table.memory.at,
            ids: self.device.input(ids),
            out: out.at,
            form: pack::code(table.form),
            width: table.k as u32,
            scale,
            pad: 0,
            how: match table.form {
                Form::Grouped(how) => table.grouped(how),
                _ => launch::Grouped::default(),
            },
        };
        self.launch("embed", [ids.len(), 1, 1], THREADS, &params);
    }

    fn rms_norm(&self, x: &Buf, gain: &Row, eps: f32, out: &mut Buf) {
        self.norm_rows(x, gain, None, (false, eps), out);
    }

    fn layer_norm(&self, x: &Buf, gain: &Row, bias: Option<&Row>, eps: f32, out: &mut Buf) {
        self.norm_rows(x, gain, bias, (true, eps), out);
    }

    fn linear(&self, w: &Mat, bias: Option<&Row>, x: &Buf, out: &mut Buf) {
        self.product(w, bias, x, Into::Store, out);
    }

    fn linear_add(&self, w: &Mat, bias: Option<&Row>, x: &Buf, out: &mut Buf) {
        self.product(w, bias, x, Into::Add, out);
    }

    fn gated(
        &self,
        w: &Mat,
        bias: Option<&Row>,
        act: Activation,
        width: usize,
        x: &Buf,
        out: &mut Buf,
    ) {
        assert_eq!(w.n, width.next_multiple_of(16) * 2, "gate and up, interleaved");
        self.product(w, bias, x, Into::Gate(act, width), out);
    }

    fn activated(&self, w: &Mat, bias: Option<&Row>, act: Activation, x: &Buf, out: &mut Buf) {
        self.product(w, bias, x, Into::Act(act), out);
    }

    fn linear_heads(&self, w: &Mat, heads: usize, x: &Buf, out: &mut Buf) {
        self.product_heads(w, heads, x, out);
    }

    fn latent_qk(
        &self,
        w: &Mat,
        norm: (&Row, f32),
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
        correction: Option<&Row>,
        scales: Option<&Row>,
        experts: &[Expert<&Mat, &Row>],
        act: Activation,
        width: usize,
        x: &Buf,
        out: &mut Buf,
    ) {
        self.mixture(how, logits, [correction, scales], experts, (act, width), x, out);
    }

    fn add_gated(&self, gate: &mut Buf, y: &Buf, out: &mut Buf) {
        assert!(gate.width == 1 && gate.rows == y.rows && out.width == y.width);
        self.each(6, y.at, gate.at, out, launch::Each::default());
    }

    fn gate_with(&self, x: &mut Buf, act: Activation, y: &Buf, from: usize) {
        assert!(y.rows == x.rows && from + x.width <= y.width);
        let more = launch::Each {
            act: act.into(),
            y_row: y.width as u32,
            y_first: from as u32,
            ..launch::Each::default()
        };
        self.each(5, x.at, y.at, x, more);
    }

    fn cut_and_gate(&self, x: &Buf, times: f32, act: Activation, width: usize, out: &mut Buf) {
        assert_eq!(x.width, width.next_multiple_of(16) * 2, "gate and up, interleaved");
        out.shape(x.rows, width);
        let params = launch::Cut {
            x: x.at,
            out: out.at,
            width: width as u32,
            in_row: x.width as u32,
            times,
            pad: 0,
        };
        self.launch("cut", [x.rows, 1, 1], THREADS, &params);
        let more =
            launch::Each { act: act.into(), y_row: x.width as u32, ..launch::Each::default() };
        self.each(8, out.at, x.at, out, more);
    }

    fn altup_predict(&self, coefficients: &Buf, streams: &mut [Buf]) {
        self.altup(coefficients, None, streams);
    }

    fn altup_correct(&self, coefficients: &Buf, seen: &Buf, streams: &mut [Buf]) {
        self.altup(coefficients, Some(seen), streams);
    }

    fn multiply(&self, x: &Buf, gain: &Row, out: &mut Buf) {
        assert_eq!(x.width, gain.len);
        out.shape(x.rows, x.width);
        self.each(4, x.at, gain.memory.at, out, launch::Each::default());
    }

    fn copy(&self, x: &Buf, out: &mut Buf) {
        out.shape(x.rows, x.width);
        self.each(9, x.at, x.at, out, launch::Each::default());
    }

    fn match_power(&self, x: &mut Buf, to: &Buf, least: f32) {
        assert!(x.rows == to.rows && x.width == to.width);
        let params = launch::MatchPower { x: x.at, to: to.at, width: x.width as u32, least };
        self.launch("match_power", [x.rows, 1, 1], THREADS, &params);
        x.fresh.set(false);
    }

    fn add(&self, x: &mut Buf, y: &Buf) {
        assert!(x.rows == y.rows && x.width == y.width);
        let more = launch::Each { y_row: y.width as u32, ..launch::Each::default() };
        self.each(0, x.at, y.at, x, more);
    }

    fn add_scaled(&self, x: &mut Buf, scale: f32, y: &Buf) {
        assert!(x.rows == y.rows && x.width == y.width);
        let more = launch::Each { y_row: y.width as u32, scale, ..launch::Each::default() };
        self.each(1, x.at, y.at, x, more);
    }

    fn rope_table(
        &self,
        positions: &[u32],
        long: &[bool],
        inv_freq: [&[f32]; 2],
        scale: f32,
    ) -> Buf {
        let table = self.cpu.rope_table(positions, long, inv_freq, scale);
        let words: Vec<u32> = table.values().iter().map(|x| x.to_bits()).collect();
        let mut buf = Buf::new(&self.device);
        buf.at = self.device.input(&words);
        (buf.rows, buf.width) = (positions.len(), 2 * inv_freq[0].len());
        buf
    }

    fn rotate_and_store(
        &self,
        qkv: &mut Buf,
        how: &Attention,
        norms: Option<QkNorm<'_, Row>>,
        table: Option<&Buf>,
        kv: &mut Kv,
        layer: usize,
        spans: &[Span<'_>],
    ) {
        self.rotate(qkv, how, norms, table, kv, layer, spans);
    }

    fn attend(
        &self,
        qkv: &Buf,
        how: &Attention,
        sinks: Option<&Row>,
        kv: &Kv,
        layer: usize,
        spans: &[Span<'_>],
        out: &mut Buf,
    ) {
        self.attention(qkv, how, sinks, kv, layer, spans, out);
    }

    fn gate_heads(&self, qkv: &Buf, how: &Attention, out: &mut Buf) {
        let first = how.qkv_width();
        // Columns of out that share a gate, which the kernel takes as a float.
        let each = out.width / (qkv.width - first);
        let more = launch::Each {
            y_row: qkv.width as u32,
            y_first: first as u32,
            scale: each as f32,
            ..launch::Each::default()
        };
        self.each(7, out.at, qkv.at, out, more);
    }

    fn conv(
        &self,
        x: &mut Buf,
        how: &Recurrent,
        taps: &Row,
        bias: Option<&Row>,
        states: &mut States,
        layer: usize,
        spans: &[Span<'_>],
        out: &mut Buf,
    ) {
        self.convolve(x, how, (taps, bias), (states, layer), spans, out);
    }

    fn recur(
        &self,
        x: &Buf,
        rates: &Buf,
        conv: &mut Buf,
        how: &Recurrent,
        rows: &HeadRows<&Row>,
        eps: f32,
        states: &mut States,
        layer: usize,
        spans: &[Span<'_>],
        out: &mut Buf,
    ) {
        self.recurrence((x, rates), conv, how, rows, eps, (states, layer), spans, out);
    }

    fn select(&self, x: &Buf, rows: &[usize], out: &mut Buf) {
        assert!(rows.iter().all(|&r| r < x.rows));
        out.shape(rows.len(), x.width);
        let words: Vec<u32> = rows.iter().map(|&r| r as u32).collect();
        self.gather(x.at, self.device.input(&words), out);
    }

    fn scale(&self, x: &mut Buf, scale: f32) {
        self.each(2, x.at, 0, x, launch::Each { scale, ..launch::Each::default() });
    }

    fn softcap(&self, x: &mut Buf, cap: f32) {
        self.each(3, x.at, 0, x, launch::Each { scale: cap, ..launch::Each::default() });
    }

    fn draw(&self, logits: &Buf, how: &[Draw<'_>]) -> Vec<Option<u32>> {
        self.draw_tokens(logits, how)
    }

    fn read(&self, x: &Buf) -> Vec<f32> {
        self.device.download(x.at, x.rows * x.width)
    }
}

#[cfg(test)]
mod tests;
