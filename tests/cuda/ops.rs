//! Single operations on the emulated device, with shapes that fit nothing: the CPU's bits.

use ferrule::backend::cpu::{self, Cpu};
use ferrule::backend::cuda::{self, Cuda};
use ferrule::backend::{
    Activation, Attention, Backend, Form, KvDtype, KvLayer, PAGE, Part, Parts, Place, QkNorm, Span,
};

/// Both back ends, and numbers.
pub(super) struct Both {
    pub(super) cpu: Cpu,
    pub(super) cuda: Cuda,
    state: u32,
}

/// The same activations on both.
pub(super) type Pair = (cpu::Buf, cuda::Buf);

impl Both {
    pub(super) fn new() -> Both {
        let cpu = || Cpu::new(1, None).unwrap();
        Both { cpu: cpu(), cuda: Cuda::new(None, cpu()).unwrap(), state: 7 }
    }
    pub(super) fn floats(&mut self, n: usize) -> Vec<f32> {
        let mut next = || {
            self.state = self.state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (self.state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| 3.0 * next() * next()).collect()
    }
    pub(super) fn rows(&mut self, rows: usize, width: usize) -> Pair {
        let values = self.floats(rows * width);
        (cpu::Buf::new(values.clone(), width), self.cuda.upload(&values, width))
    }
    pub(super) fn empty(&self) -> Pair {
        (self.cpu.buf(), self.cuda.buf())
    }
    pub(super) fn vector(&mut self, n: usize) -> (Vec<f32>, cuda::Row) {
        let values = self.floats(n);
        (self.cpu.row(Place::End, &values), self.cuda.row(Place::End, &values))
    }
    pub(super) fn matrix(
        &mut self,
        form: Form,
        n: usize,
        k: usize,
        interleaved: bool,
    ) -> (cpu::Mat, cuda::Mat) {
        let halves = if interleaved { 2 } else { 1 };
        let bytes: Vec<Vec<u8>> = (0..halves)
            .map(|_| {
                let values = self.floats(n * k);
                let f16 = |x: f32| half::f16::from_f32(x).to_le_bytes();
                match form {
                    Form::F16 => values.into_iter().flat_map(f16).collect(),
                    Form::Bf16 => values
                        .into_iter()
                        .flat_map(|x| half::bf16::from_f32(x).to_le_bytes())
                        .collect(),
                    _ => values.into_iter().flat_map(f32::to_le_bytes).collect(),
                }
            })
            .collect();
        let stored = if form.is_quantized() { Form::F32 } else { form };
        let parts = bytes.iter().map(|bytes| Part::floats(stored, n, k, bytes)).collect();
        let parts = Parts { parts, k, interleaved };
        let pack = || self.cpu.pack(form, &parts).unwrap().unwrap();
        (pack(), self.cuda.place(Place::End, pack()).unwrap())
    }
    #[track_caller]
    pub(super) fn same(&self, what: &str, pair: &Pair) {
        let (cpu, cuda) = (self.cpu.read(&pair.0), self.cuda.read(&pair.1));
        self.cuda.finish().unwrap();
        assert_eq!(cpu.len(), cuda.len(), "{what}");
        for (i, (a, b)) in cpu.iter().zip(&cuda).enumerate() {
            let same = a.is_finite() && a.to_bits() == b.to_bits();
            assert!(same, "{what} [{i}]: {a} on the CPU, {b} on CUDA");
        }
    }
}

/// `op` on both back ends; arguments in brackets are pairs, those in parentheses are the same for both.
macro_rules! both {
    ($both:ident, $op:ident($($arg:tt),*)) => {{
        $both.cpu.$op($(half!(0, $arg)),*);
        $both.cuda.$op($(half!(1, $arg)),*);
    }};
}
macro_rules! half {
    ($i:tt, [&mut $x:expr]) => {
        &mut $x.$i
    };
    ($i:tt, [&$x:expr]) => {
        &$x.$i
    };
    ($i:tt, ($x:expr)) => {
        $x
    };
}

const ACTIVATIONS: [Activation; 8] = [
    Activation::Silu,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Relu2,
    Activation::XIelu { alpha_p: 0.9, alpha_n: 1.3, beta: 0.5, eps: -1e-6 },
    Activation::Sigmoid,
    Activation::None,
    Activation::ClampedSwiglu,
];

#[test]
#[ignore = "on the emulated driver: see main.rs"]
fn every_operation() {
    let mut b = Both::new();
    for form in [Form::Q4, Form::Q8, Form::Bf16, Form::F16, Form::F32] {
        for (n, k) in [(40, 300), (33, 520), (130, 4360), (16, 33)] {
            let w = b.matrix(form, n, k, false);
            let bias = b.vector(n);
            for rows in [1, 3, 8, 9, 37, 70] {
                if k > 4000 && !form.is_quantized() && rows > 3 {
                    continue; // slow, and no other code
                }
                let what = format!("{form:?} [{n}, {k}] x {rows}");
                let x = b.rows(rows, k);
                let mut out = b.empty();
                b.cpu.linear(&w.0, Some(&bias.0), &x.0, &mut out.0);
                b.cuda.linear(&w.1, Some(&bias.1), &x.1, &mut out.1);
                b.same(&what, &out);
                b.cpu.linear_add(&w.0, None, &x.0, &mut out.0);
                b.cuda.linear_add(&w.1, None, &x.1, &mut out.1);
                b.same(&what, &out);
            }
        }
        for (i, act) in ACTIVATIONS.into_iter().enumerate() {
            // Widths that are not whole tiles; token counts of every kernel.
            let (width, k, rows) = (37 + 16 * (i % 2), 288, [1, 4, 11][i % 3]);
            let (w, plain) = (b.matrix(form, width, k, true), b.matrix(form, width, k, false));
            let (bias, x) = (b.vector(2 * width.next_multiple_of(16)), b.rows(rows, k));
            let mut out = b.empty();
            b.cpu.gated(&w.0, Some(&bias.0), act, width, &x.0, &mut out.0);
            b.cuda.gated(&w.1, Some(&bias.1), act, width, &x.1, &mut out.1);
            b.same(&format!("{form:?} gated {act:?}"), &out);
            b.cpu.activated(&plain.0, None, act, &x.0, &mut out.0);
            b.cuda.activated(&plain.1, None, act, &x.1, &mut out.1);
            b.same(&format!("{form:?} activated {act:?}"), &out);
        }
        let table = b.matrix(form, 50, 300, false);
        let mut out = b.empty();
        b.cpu.embed(&table.0, &[49, 0, 17], 1.5, &mut out.0);
        b.cuda.embed(&table.1, &[49, 0, 17], 1.5, &mut out.1);
        b.same(&format!("{form:?} embed"), &out);
    }
    // More than goes to the device at once.
    let w = b.matrix(Form::Q8, 4200, 4360, false);
    let (x, mut out) = (b.rows(1, 4360), b.empty());
    b.cpu.linear(&w.0, None, &x.0, &mut out.0);
    b.cuda.linear(&w.1, None, &x.1, &mut out.1);
    b.same("a matrix of 18 MB", &out);
    for (rows, width) in [(1, 300), (5, 96), (2, 1100)] {
        let (x, gain, bias, w) = (
            b.rows(rows, width),
            b.vector(width),
            b.vector(width),
            b.matrix(Form::Q8, 20, width, false),
        );
        let (mut out, mut y) = (b.empty(), b.empty());
        b.cpu.rms_norm(&x.0, &gain.0, 1e-5, &mut out.0);
        b.cuda.rms_norm(&x.1, &gain.1, 1e-5, &mut out.1);
        b.same("rms_norm", &out);
        // From what the norm has quantized.
        b.cpu.linear(&w.0, None, &out.0, &mut y.0);
        b.cuda.linear(&w.1, None, &out.1, &mut y.1);
        b.same("linear after rms_norm", &y);
        both!(b, add([&mut out], [&x]));
        b.cpu.linear(&w.0, None, &out.0, &mut y.0);
        b.cuda.linear(&w.1, None, &out.1, &mut y.1);
        b.same("linear of what has changed", &y);
        b.cpu.layer_norm(&x.0, &gain.0, Some(&bias.0), 1e-5, &mut out.0);
        b.cuda.layer_norm(&x.1, &gain.1, Some(&bias.1), 1e-5, &mut out.1);
        b.same("layer_norm", &out);
        let piece = b.vector(width / 4);
        b.cpu.rms_norm(&x.0, &piece.0, 1e-6, &mut out.0);
        b.cuda.rms_norm(&x.1, &piece.1, 1e-6, &mut out.1);
        b.same("rms_norm of pieces", &out);
        both!(b, add_scaled([&mut out], (0.3), [&x]));
        both!(b, scale([&mut out], (1.7)));
        both!(b, softcap([&mut out], (2.5)));
        b.same("add_scaled, scale, softcap", &out);
        both!(b, multiply([&x], [&gain], [&mut out]));
        b.same("multiply", &out);
        both!(b, match_power([&mut out], [&x], (1e-5)));
        b.same("match_power", &out);
        let mut copy = b.empty();
        both!(b, copy([&out], [&mut copy]));
        both!(b, select([&copy], (&[rows - 1, 0]), [&mut y]));
        b.same("copy, select", &y);
        let mut gate = b.rows(rows, 1);
        both!(b, add_gated([&mut gate], [&x], [&mut out]));
        b.same("add_gated", &out);
        let wide = b.rows(rows, width + 13);
        both!(b, gate_with([&mut out], (Activation::GeluTanh), [&wide], (13)));
        b.same("gate_with", &out);
        let interleaved = b.rows(rows, 2 * 64);
        both!(b, cut_and_gate([&interleaved], (0.7), (Activation::Silu), (51), [&mut out]));
        b.same("cut_and_gate", &out);
        let (three, nine, one) = (b.rows(rows, 3), b.rows(rows, 9), b.rows(rows, width));
        let (mut on_cpu, mut on_cuda): (Vec<_>, Vec<_>) =
            (0..3).map(|_| b.rows(rows, width)).unzip();
        b.cpu.altup_predict(&nine.0, &mut on_cpu);
        b.cuda.altup_predict(&nine.1, &mut on_cuda);
        b.cpu.altup_correct(&three.0, &one.0, &mut on_cpu);
        b.cuda.altup_correct(&three.1, &one.1, &mut on_cuda);
        for pair in on_cpu.into_iter().zip(on_cuda) {
            b.same("altup", &pair);
        }
    }
}

/// Spans of one step; keys and values before them are those of earlier steps.
struct Case {
    heads: usize,
    kv_heads: usize,
    d: usize,
    dtype: KvDtype,
    window: Option<usize>,
    softcap: Option<f32>,
    sinks: bool,
    norms: bool,
    gate: bool,
    clip: Option<f32>,
    growth: Option<(f32, usize)>,
    interleaved: bool,
    latent: Option<usize>,
}

const CASE: Case = Case {
    heads: 4,
    kv_heads: 2,
    d: 64,
    dtype: KvDtype::F16,
    window: None,
    softcap: None,
    sinks: false,
    norms: false,
    gate: false,
    clip: None,
    growth: None,
    interleaved: false,
    latent: None,
};

#[test]
#[ignore = "on the emulated driver: see main.rs"]
fn attention() {
    let cases = [
        CASE,
        Case { dtype: KvDtype::F32, norms: true, ..CASE },
        Case { dtype: KvDtype::Int8, window: Some(70), sinks: true, ..CASE },
        Case { heads: 16, kv_heads: 2, d: 16, softcap: Some(5.0), ..CASE },
        Case { heads: 20, kv_heads: 1, d: 24, dtype: KvDtype::Int8, gate: true, ..CASE },
        Case {
            heads: 3,
            kv_heads: 3,
            d: 80,
            window: Some(600),
            norms: true,
            interleaved: true,
            ..CASE
        },
        Case { heads: 2, kv_heads: 1, d: 256, clip: Some(1.0), growth: Some((0.1, 100)), ..CASE },
        Case { heads: 4, kv_heads: 1, d: 20, dtype: KvDtype::F32, sinks: true, ..CASE },
        Case { heads: 4, kv_heads: 1, d: 20, dtype: KvDtype::Int8, sinks: true, ..CASE },
        Case { heads: 5, kv_heads: 1, d: 44, latent: Some(30), ..CASE },
        Case { heads: 2, kv_heads: 1, d: 576, dtype: KvDtype::Int8, latent: Some(512), ..CASE },
        Case { heads: 3, kv_heads: 1, d: 72, dtype: KvDtype::F32, latent: Some(64), ..CASE },
    ];
    for (number, case) in cases.iter().enumerate() {
        check(number, case);
    }
}

fn check(number: usize, c: &Case) {
    let mut b = Both::new();
    let how = Attention {
        heads: c.heads,
        kv_heads: c.kv_heads,
        head_dim: c.d,
        latent: c.latent,
        scale: 0.3,
        clip: c.clip,
        softcap: c.softcap,
        window: c.window,
        query_growth: c.growth,
        queries_only: false,
        rope_interleaved: c.interleaved,
    };
    let pages = 24;
    let layer = KvLayer { pages, heads: c.kv_heads, head_dim: c.d, values: c.latent.is_none() };
    let mut kv = (b.cpu.kv(c.dtype, &[layer]).unwrap(), b.cuda.kv(c.dtype, &[layer]).unwrap());
    let (q_gain, k_gain, sinks) =
        (b.vector(c.d), b.vector(c.heads.min(c.kv_heads) * c.d), b.vector(c.heads));
    let k_gain = if number % 2 == 1 { k_gain } else { b.vector(c.d) };
    let tables: [Vec<u32>; 2] = [(0..20).rev().collect(), (20..24).collect()];
    // A long prompt in parts and a short one, then generated tokens of both: of the long one chunks of keys. Of parts of
    // more than `ATTENDED` positions there are only keys and values: their attention would take most of the time, and has
    // no other code.
    const ATTENDED: usize = 130;
    let steps: [&[(usize, usize, usize)]; 7] = [
        &[(0, 0, 40)],
        &[(0, 40, 390)],
        &[(0, 430, 100), (1, 0, 20)],
        &[(0, 530, 1), (1, 20, 1)],
        &[(0, 531, 480)],
        &[(0, 1011, 20)],
        &[(1, 21, 1), (0, 1031, 1)],
    ];
    for (s, step) in steps.iter().enumerate() {
        let rows: usize = step.iter().map(|(_, _, len)| len).sum();
        let mut first_row = 0;
        let spans: Vec<_> = step
            .iter()
            .map(|&(sequence, start, len)| {
                let span = Span { first_row, len, start, table: &tables[sequence] };
                assert!(start + len <= PAGE * span.table.len());
                first_row += len;
                span
            })
            .collect();
        let positions: Vec<u32> =
            spans.iter().flat_map(|s| (s.start..s.start + s.len).map(|p| p as u32)).collect();
        let frequencies: Vec<f32> = (0..c.d / 4).map(|i| 0.5f32.powi(i as i32)).collect();
        let long = vec![false; rows];
        let turned = (
            b.cpu.rope_table(&positions, &long, [&frequencies; 2], 1.0),
            b.cuda.rope_table(&positions, &long, [&frequencies; 2], 1.0),
        );
        let gates = if c.gate { c.heads } else { 0 };
        let mut qkv = b.rows(rows, how.qkv_width() + gates);
        let mut out = b.empty();
        macro_rules! on {
            ($i:tt, $backend:ident) => {
                let norms = c.norms.then(|| QkNorm {
                    q: &q_gain.$i,
                    k: &k_gain.$i,
                    v: None,
                    centred: number % 3 == 1,
                    full: false,
                    after_rope: number % 5 == 0,
                    eps: 1e-5,
                });
                b.$backend.rotate_and_store(
                    &mut qkv.$i,
                    &how,
                    norms,
                    Some(&turned.$i),
                    &mut kv.$i,
                    0,
                    &spans,
                );
                let sinks = c.sinks.then_some(&sinks.$i);
                if rows <= ATTENDED {
                    b.$backend.attend(&qkv.$i, &how, sinks, &kv.$i, 0, &spans, &mut out.$i);
                    if c.gate {
                        b.$backend.gate_heads(&qkv.$i, &how, &mut out.$i);
                    }
                }
            };
        }
        on!(0, cpu);
        on!(1, cuda);
        if rows > ATTENDED {
            b.cuda.finish().unwrap();
            continue;
        }
        b.same(&format!("attention {number}, step {s}"), &out);
    }
}
