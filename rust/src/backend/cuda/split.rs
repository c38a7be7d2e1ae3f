//! Two machines for one model: its first layers on the CPU, the others and the head on a CUDA device that has no room
//! for all of it. Operations go where their weights are, those without weights where what they read or change is;
//! activations move when the other side asks for them, which for the residual stream is once a step, at the border.
//! Both sides have the same arithmetic, so where the border is changes no bit. Knows no family. Never computes.

use super::{Cuda, Mat as DeviceMat, Row as DeviceRow};
use crate::Result;
use crate::backend::cpu::{self, Cpu};
use crate::backend::{
    Activation, Attention, Backend, Draw, Expert, Form, HeadRows, KvDtype, KvLayer, Latent,
    NotFinite, Parts, Place, QkNorm, Recurrent, Routing, Span,
};
use std::cell::{Cell, Ref, RefCell};
use std::sync::atomic::{AtomicU64, Ordering};

/// The CPU and a CUDA device.
pub struct Split {
    cuda: Cuda,
    /// The first layer on the device.
    border: usize,
    moves: AtomicU64,
}

#[derive(Clone, Copy, PartialEq)]
enum Side {
    Cpu,
    Cuda,
}

/// Activations `[rows, width]`, on one side or on both.
pub struct Buf {
    cpu: RefCell<cpu::Buf>,
    cuda: RefCell<super::Buf>,
    on_cpu: Cell<bool>,
    on_cuda: Cell<bool>,
}

/// A matrix.
pub enum Mat {
    /// On the CPU.
    Cpu(cpu::Mat),
    /// On the device.
    Cuda(DeviceMat),
    /// The embedding of the one is the head of the other.
    Both(cpu::Mat, DeviceMat),
}

/// A vector, small enough to be on both sides.
pub struct Row {
    cpu: Vec<f32>,
    cuda: DeviceRow,
    home: Side,
}

/// Keys and values of the layers of each side.
pub struct Kv {
    cpu: cpu::Kv,
    cuda: super::Kv,
}

/// States of the layers of each side.
pub struct States {
    cpu: cpu::States,
    cuda: super::States,
}

impl Buf {
    fn side(&self) -> Side {
        if self.on_cuda.get() { Side::Cuda } else { Side::Cpu }
    }
    /// To be written on the CPU.
    fn new_on_cpu(&mut self) -> &mut cpu::Buf {
        self.on_cpu.set(true);
        self.on_cuda.set(false);
        self.cpu.get_mut()
    }
    /// To be written on the device.
    fn new_on_cuda(&mut self) -> &mut super::Buf {
        self.on_cpu.set(false);
        self.on_cuda.set(true);
        self.cuda.get_mut()
    }
}

impl Mat {
    fn side(&self) -> Side {
        if matches!(self, Mat::Cpu(_)) { Side::Cpu } else { Side::Cuda }
    }
    fn cpu(&self) -> &cpu::Mat {
        match self {
            Mat::Cpu(mat) | Mat::Both(mat, _) => mat,
            Mat::Cuda(_) => unreachable!("operations go where their weights are"),
        }
    }
    fn cuda(&self) -> &DeviceMat {
        match self {
            Mat::Cuda(mat) | Mat::Both(_, mat) => mat,
            Mat::Cpu(_) => unreachable!("operations go where their weights are"),
        }
    }
}

impl Row {
    fn cpu(&self) -> &Vec<f32> {
        &self.cpu
    }
    fn cuda(&self) -> &DeviceRow {
        &self.cuda
    }
}

impl Split {
    /// The layers from `border` on and the head on `cuda`, the others on the CPU that packs its weights.
    pub fn new(cuda: Cuda, border: usize) -> Split {
        Split { cuda, border, moves: AtomicU64::new(0) }
    }
    /// The device.
    pub fn cuda(&self) -> &Cuda {
        &self.cuda
    }
    /// The first layer on the device.
    pub fn border(&self) -> usize {
        self.border
    }
    /// How often activations went from one side to the other.
    pub fn moves(&self) -> u64 {
        self.moves.load(Ordering::Relaxed)
    }

    fn cpu(&self) -> &Cpu {
        self.cuda.packer()
    }
    fn of_layer(&self, layer: usize) -> Side {
        if layer < self.border { Side::Cpu } else { Side::Cuda }
    }
    fn side(&self, at: Place) -> Side {
        match at {
            Place::Begin => Side::Cpu,
            Place::Layer(layer) => self.of_layer(layer),
            Place::End | Place::Both => Side::Cuda,
        }
    }

    fn fetch(&self, x: &Buf) {
        if !x.on_cpu.get() {
            let cuda = x.cuda.borrow();
            *x.cpu.borrow_mut() = cpu::Buf::new(self.cuda.read(&cuda), cuda.width.max(1));
            x.on_cpu.set(true);
            self.moves.fetch_add(1, Ordering::Relaxed);
        }
    }
    fn send(&self, x: &Buf) {
        if !x.on_cuda.get() {
            let cpu = x.cpu.borrow();
            self.cuda.fill(&mut x.cuda.borrow_mut(), cpu.values(), cpu.width().max(1));
            x.on_cuda.set(true);
            self.moves.fetch_add(1, Ordering::Relaxed);
        }
    }
    /// To be read on the CPU.
    fn on_cpu<'a>(&self, x: &'a Buf) -> Ref<'a, cpu::Buf> {
        self.fetch(x);
        x.cpu.borrow()
    }
    /// To be read on the device.
    fn on_cuda<'a>(&self, x: &'a Buf) -> Ref<'a, super::Buf> {
        self.send(x);
        x.cuda.borrow()
    }
    /// To be changed on the CPU.
    fn change_on_cpu<'a>(&self, x: &'a mut Buf) -> &'a mut cpu::Buf {
        self.fetch(x);
        x.new_on_cpu()
    }
    /// To be changed on the device.
    fn change_on_cuda<'a>(&self, x: &'a mut Buf) -> &'a mut super::Buf {
        self.send(x);
        x.new_on_cuda()
    }

    /// AltUp, all streams on one side.
    fn altup(&self, coefficients: &Buf, seen: Option<&Buf>, streams: &mut [Buf]) {
        match streams[0].side() {
            Side::Cpu => {
                let mut all: Vec<_> =
                    streams.iter_mut().map(|s| std::mem::take(self.change_on_cpu(s))).collect();
                let coefficients = &self.on_cpu(coefficients);
                match seen {
                    None => self.cpu().altup_predict(coefficients, &mut all),
                    Some(seen) => {
                        self.cpu().altup_correct(coefficients, &self.on_cpu(seen), &mut all)
                    }
                }
                streams.iter_mut().zip(all).for_each(|(s, new)| *s.new_on_cpu() = new);
            }
            Side::Cuda => {
                let take = |s| std::mem::replace(self.change_on_cuda(s), self.cuda.buf());
                let mut all: Vec<_> = streams.iter_mut().map(take).collect();
                let coefficients = &self.on_cuda(coefficients);
                match seen {
                    None => self.cuda.altup_predict(coefficients, &mut all),
                    Some(seen) => {
                        self.cuda.altup_correct(coefficients, &self.on_cuda(seen), &mut all);
                    }
                }
                streams.iter_mut().zip(all).for_each(|(s, new)| *s.new_on_cuda() = new);
            }
        }
    }
}

/// An operation on one side, with each argument as that side has it.
macro_rules! on {
    ($s:ident, $side:expr, $op:ident($($kind:ident $x:expr),* $(,)?)) => {
        match $side {
            Side::Cpu => $s.cpu().$op($(on!(cpu $s $kind $x)),*),
            Side::Cuda => $s.cuda.$op($(on!(cuda $s $kind $x)),*),
        }
    };
    (cpu $s:ident read $x:expr) => { &$s.on_cpu($x) };
    (cuda $s:ident read $x:expr) => { &$s.on_cuda($x) };
    (cpu $s:ident write $x:expr) => { $x.new_on_cpu() };
    (cuda $s:ident write $x:expr) => { $x.new_on_cuda() };
    (cpu $s:ident change $x:expr) => { $s.change_on_cpu($x) };
    (cuda $s:ident change $x:expr) => { $s.change_on_cuda($x) };
    (cpu $s:ident weight $x:expr) => { $x.cpu() };
    (cuda $s:ident weight $x:expr) => { $x.cuda() };
    (cpu $s:ident maybe $x:expr) => { $x.map(Row::cpu) };
    (cuda $s:ident maybe $x:expr) => { $x.map(Row::cuda) };
    (cpu $s:ident pages $x:expr) => { &mut $x.cpu };
    (cuda $s:ident pages $x:expr) => { &mut $x.cuda };
    ($side:ident $s:ident as_is $x:expr) => { $x };
}

impl Backend for Split {
    type Buf = Buf;
    type Mat = Mat;
    type Row = Row;
    type Kv = Kv;
    type States = States;

    fn packer(&self) -> &Cpu {
        self.cpu()
    }

    fn place(&self, at: Place, packed: cpu::Mat) -> Result<Mat> {
        match (at, self.side(at)) {
            (Place::Both, _) => {
                let copy = self.cuda.copied(&packed)?;
                Ok(Mat::Both(packed, copy))
            }
            (_, Side::Cpu) => Ok(Mat::Cpu(packed)),
            (_, Side::Cuda) => self.cuda.place(at, packed).map(Mat::Cuda),
        }
    }

    fn holds(&self, at: Place) -> bool {
        at == Place::Both || self.side(at) == Side::Cpu || self.cuda.holds(at)
    }

    fn stored(mat: &Mat) -> (Form, usize) {
        match mat {
            Mat::Cpu(mat) => Cpu::stored(mat),
            Mat::Cuda(mat) => Cuda::stored(mat),
            Mat::Both(a, b) => (Cpu::stored(a).0, Cpu::stored(a).1 + Cuda::stored(b).1),
        }
    }

    fn finish(&self) -> Result<()> {
        self.cuda.finish()
    }

    fn buf(&self) -> Buf {
        Buf {
            cpu: RefCell::default(),
            cuda: RefCell::new(self.cuda.buf()),
            on_cpu: Cell::new(true),
            on_cuda: Cell::new(false),
        }
    }

    fn row(&self, at: Place, values: &[f32]) -> Row {
        Row { cpu: values.to_vec(), cuda: self.cuda.row(at, values), home: self.side(at) }
    }

    fn pack(&self, form: Form, parts: &Parts<'_>) -> Result<std::result::Result<Mat, NotFinite>> {
        self.cuda.pack(form, parts).map(|mat| mat.map(Mat::Cuda))
    }

    fn kv(&self, dtype: KvDtype, layers: &[KvLayer]) -> Result<Kv> {
        let of = |side| -> Vec<_> {
            let pages = |l, pages| if self.of_layer(l) == side { pages } else { 0 };
            let layers = layers.iter().enumerate();
            layers.map(|(l, layer)| KvLayer { pages: pages(l, layer.pages), ..*layer }).collect()
        };
        let (cpu, cuda) = (of(Side::Cpu), of(Side::Cuda));
        Ok(Kv { cpu: self.cpu().kv(dtype, &cpu)?, cuda: self.cuda.kv(dtype, &cuda)? })
    }

    fn copy_page(&self, kv: &mut Kv, layer: usize, from: u32, to: u32) {
        on!(self, self.of_layer(layer), copy_page(pages kv, as_is layer, as_is from, as_is to));
    }

    fn states(&self, layers: &[(usize, usize)]) -> Result<States> {
        let of = |side| -> Vec<_> {
            let layers = layers.iter().enumerate();
            let count = |l, count| if self.of_layer(l) == side { count } else { 0 };
            layers.map(|(l, &(states, size))| (count(l, states), size)).collect()
        };
        let (cpu, cuda) = (of(Side::Cpu), of(Side::Cuda));
        Ok(States { cpu: self.cpu().states(&cpu)?, cuda: self.cuda.states(&cuda)? })
    }

    fn embed(&self, table: &Mat, ids: &[u32], scale: f32, out: &mut Buf) {
        let side = if matches!(table, Mat::Cuda(_)) { Side::Cuda } else { Side::Cpu };
        on!(self, side, embed(weight table, as_is ids, as_is scale, write out));
    }

    fn rms_norm(&self, x: &Buf, gain: &Row, eps: f32, out: &mut Buf) {
        on!(self, gain.home, rms_norm(read x, weight gain, as_is eps, write out));
    }

    fn layer_norm(&self, x: &Buf, gain: &Row, bias: Option<&Row>, eps: f32, out: &mut Buf) {
        on!(self, gain.home, layer_norm(read x, weight gain, maybe bias, as_is eps, write out));
    }

    fn linear(&self, w: &Mat, bias: Option<&Row>, x: &Buf, out: &mut Buf) {
        on!(self, w.side(), linear(weight w, maybe bias, read x, write out));
    }

    fn linear_add(&self, w: &Mat, bias: Option<&Row>, x: &Buf, out: &mut Buf) {
        on!(self, w.side(), linear_add(weight w, maybe bias, read x, change out));
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
        let side = w.side();
        on!(self, side, gated(weight w, maybe bias, as_is act, as_is width, read x, write out));
    }

    fn activated(&self, w: &Mat, bias: Option<&Row>, act: Activation, x: &Buf, out: &mut Buf) {
        on!(self, w.side(), activated(weight w, maybe bias, as_is act, read x, write out));
    }

    fn linear_heads(&self, w: &Mat, heads: usize, x: &Buf, out: &mut Buf) {
        on!(self, w.side(), linear_heads(weight w, as_is heads, read x, write out));
    }

    fn latent_qk(
        &self,
        w: &Mat,
        (norm, eps): (&Row, f32),
        how: &Latent,
        q: &Buf,
        kv: &Buf,
        out: &mut Buf,
    ) {
        match w.side() {
            Side::Cpu => {
                let (q, kv) = (&self.on_cpu(q), &self.on_cpu(kv));
                self.cpu().latent_qk(w.cpu(), (&norm.cpu, eps), how, q, kv, out.new_on_cpu());
            }
            Side::Cuda => {
                let (q, kv) = (&self.on_cuda(q), &self.on_cuda(kv));
                self.cuda.latent_qk(w.cuda(), (&norm.cuda, eps), how, q, kv, out.new_on_cuda());
            }
        }
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
        match experts[0].gate_up.side() {
            Side::Cpu => {
                let (c, s) = (correction.map(Row::cpu), scales.map(Row::cpu));
                let experts: Vec<_> = experts.iter().map(|e| e.map(Mat::cpu, Row::cpu)).collect();
                let x = &self.on_cpu(x);
                let logits = self.change_on_cpu(logits);
                self.cpu().moe(how, logits, c, s, &experts, act, width, x, out.new_on_cpu());
            }
            Side::Cuda => {
                let (c, s) = (correction.map(Row::cuda), scales.map(Row::cuda));
                let experts: Vec<_> = experts.iter().map(|e| e.map(Mat::cuda, Row::cuda)).collect();
                let x = &self.on_cuda(x);
                let logits = self.change_on_cuda(logits);
                self.cuda.moe(how, logits, c, s, &experts, act, width, x, out.new_on_cuda());
            }
        }
    }

    fn add_gated(&self, gate: &mut Buf, y: &Buf, out: &mut Buf) {
        on!(self, out.side(), add_gated(change gate, read y, change out));
    }

    fn gate_with(&self, x: &mut Buf, act: Activation, y: &Buf, from: usize) {
        on!(self, x.side(), gate_with(change x, as_is act, read y, as_is from));
    }

    fn cut_and_gate(&self, x: &Buf, times: f32, act: Activation, width: usize, out: &mut Buf) {
        let side = x.side();
        on!(self, side, cut_and_gate(read x, as_is times, as_is act, as_is width, write out));
    }

    fn altup_predict(&self, coefficients: &Buf, streams: &mut [Buf]) {
        self.altup(coefficients, None, streams);
    }

    fn altup_correct(&self, coefficients: &Buf, seen: &Buf, streams: &mut [Buf]) {
        self.altup(coefficients, Some(seen), streams);
    }

    fn multiply(&self, x: &Buf, gain: &Row, out: &mut Buf) {
        on!(self, gain.home, multiply(read x, weight gain, write out));
    }

    fn copy(&self, x: &Buf, out: &mut Buf) {
        on!(self, x.side(), copy(read x, write out));
    }

    fn match_power(&self, x: &mut Buf, to: &Buf, least: f32) {
        on!(self, x.side(), match_power(change x, read to, as_is least));
    }

    fn add(&self, x: &mut Buf, y: &Buf) {
        on!(self, x.side(), add(change x, read y));
    }

    fn add_scaled(&self, x: &mut Buf, scale: f32, y: &Buf) {
        on!(self, x.side(), add_scaled(change x, as_is scale, read y));
    }

    fn rope_table(
        &self,
        positions: &[u32],
        long: &[bool],
        inv_freq: [&[f32]; 2],
        scale: f32,
    ) -> Buf {
        Buf {
            cpu: RefCell::new(self.cpu().rope_table(positions, long, inv_freq, scale)),
            cuda: RefCell::new(self.cuda.rope_table(positions, long, inv_freq, scale)),
            on_cpu: Cell::new(true),
            on_cuda: Cell::new(true),
        }
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
        fn of<'a, R>(n: QkNorm<'a, Row>, row: impl Fn(&'a Row) -> &'a R) -> QkNorm<'a, R> {
            let QkNorm { q, k, v, centred, full, after_rope, eps } = n;
            QkNorm { q: row(q), k: row(k), v: v.map(row), centred, full, after_rope, eps }
        }
        match self.of_layer(layer) {
            Side::Cpu => {
                let (norms, table) =
                    (norms.map(|n| of(n, Row::cpu)), table.map(|table| self.on_cpu(table)));
                let qkv = self.change_on_cpu(qkv);
                let table = table.as_deref();
                self.cpu().rotate_and_store(qkv, how, norms, table, &mut kv.cpu, layer, spans);
            }
            Side::Cuda => {
                let (norms, table) =
                    (norms.map(|n| of(n, Row::cuda)), table.map(|table| self.on_cuda(table)));
                let qkv = self.change_on_cuda(qkv);
                let table = table.as_deref();
                self.cuda.rotate_and_store(qkv, how, norms, table, &mut kv.cuda, layer, spans);
            }
        }
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
        match self.of_layer(layer) {
            Side::Cpu => {
                let (qkv, sinks) = (&self.on_cpu(qkv), sinks.map(Row::cpu));
                self.cpu().attend(qkv, how, sinks, &kv.cpu, layer, spans, out.new_on_cpu());
            }
            Side::Cuda => {
                let (qkv, sinks) = (&self.on_cuda(qkv), sinks.map(Row::cuda));
                self.cuda.attend(qkv, how, sinks, &kv.cuda, layer, spans, out.new_on_cuda());
            }
        }
    }

    fn gate_heads(&self, qkv: &Buf, how: &Attention, out: &mut Buf) {
        on!(self, out.side(), gate_heads(read qkv, as_is how, change out));
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
        on!(
            self,
            self.of_layer(layer),
            conv(change x, as_is how, weight taps, maybe bias, pages states, as_is layer, as_is spans, write out)
        );
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
        match self.of_layer(layer) {
            Side::Cpu => {
                let (x, rates) = (&self.on_cpu(x), &self.on_cpu(rates));
                let (conv, rows) = (self.change_on_cpu(conv), rows.map(Row::cpu));
                let (states, out) = (&mut states.cpu, out.new_on_cpu());
                self.cpu().recur(x, rates, conv, how, &rows, eps, states, layer, spans, out);
            }
            Side::Cuda => {
                let (x, rates) = (&self.on_cuda(x), &self.on_cuda(rates));
                let (conv, rows) = (self.change_on_cuda(conv), rows.map(Row::cuda));
                let (states, out) = (&mut states.cuda, out.new_on_cuda());
                self.cuda.recur(x, rates, conv, how, &rows, eps, states, layer, spans, out);
            }
        }
    }

    fn select(&self, x: &Buf, rows: &[usize], out: &mut Buf) {
        on!(self, x.side(), select(read x, as_is rows, write out));
    }

    fn scale(&self, x: &mut Buf, scale: f32) {
        on!(self, x.side(), scale(change x, as_is scale));
    }

    fn softcap(&self, x: &mut Buf, cap: f32) {
        on!(self, x.side(), softcap(change x, as_is cap));
    }

    fn draw(&self, logits: &Buf, how: &[Draw<'_>]) -> Vec<Option<u32>> {
        match logits.side() {
            Side::Cpu => self.cpu().draw(&logits.cpu.borrow(), how),
            Side::Cuda => self.cuda.draw(&logits.cuda.borrow(), how),
        }
    }

    fn read(&self, x: &Buf) -> Vec<f32> {
        match x.side() {
            Side::Cpu => x.cpu.borrow().values().to_vec(),
            Side::Cuda => self.cuda.read(&x.cuda.borrow()),
        }
    }
}
