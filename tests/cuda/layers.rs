//! Layers of several launches on the emulated device: mixtures of experts, products with a matrix for each head, states.
//! The CPU's bits.

use super::ops::{Both, Pair};
use ferrule::backend::{
    Activation, Backend, Core, Expert, Form, Groups, HeadRows, Heads, Latent, Place, Recurrent,
    Routing, Score, Span,
};

fn routing(top_k: usize) -> Routing {
    let score = Score::Softmax;
    Routing { top_k, score, groups: None, renormalise: None, scale: 1.0 }
}

#[test]
#[ignore = "on the emulated driver: see main.rs"]
fn mixtures() {
    let mut b = Both::new();
    let groups = |by_two| Some(Groups { count: 4, top_k: 2, by_two });
    let sigmoid = Routing { score: Score::Sigmoid, renormalise: Some(1e-20), ..routing(4) };
    let cases = [
        (7, routing(1), &[Form::Q4][..]),
        (7, Routing { renormalise: Some(0.0), scale: 1.5, ..routing(3) }, &[Form::Q8]),
        (12, Routing { groups: groups(true), ..sigmoid }, &[Form::Bf16]),
        (12, Routing { groups: groups(false), ..sigmoid }, &[Form::Q8, Form::Q4]),
        (40, Routing { top_k: 32, ..sigmoid }, &[Form::F32, Form::Q4, Form::F16]),
    ];
    for (number, (experts, how, forms)) in cases.into_iter().enumerate() {
        let (hidden, width, odd) = (288 + 13 * (number % 2), 40, number % 2 == 1);
        let (correction, scales) = (b.vector(experts), b.vector(experts));
        let mut parts = |e: usize| {
            let form = forms[e % forms.len()];
            let (up, down) =
                (b.matrix(form, width, hidden, true), b.matrix(form, hidden, width, false));
            let bias = odd.then(|| (b.vector(2 * 48), b.vector(hidden)));
            (up, down, bias)
        };
        let all: Vec<_> = (0..experts).map(&mut parts).collect();
        for rows in [1, 5, 70] {
            let x = b.rows(rows, hidden);
            let mut logits = b.rows(rows, experts);
            let mut out = b.empty();
            macro_rules! on {
                ($i:tt, $backend:ident) => {
                    let expert = |e: usize| Expert {
                        gate_up: &all[e].0.$i,
                        gate_up_bias: all[e].2.as_ref().map(|bias| &bias.0.$i),
                        down: &all[e].1.$i,
                        down_bias: all[e].2.as_ref().map(|bias| &bias.1.$i),
                    };
                    let experts: Vec<_> = (0..experts).map(expert).collect();
                    let (c, s) = (odd.then_some(&correction.$i), odd.then_some(&scales.$i));
                    let act = Activation::Silu;
                    let (logits, out) = (&mut logits.$i, &mut out.$i);
                    b.$backend.moe(&how, logits, c, s, &experts, act, width, &x.$i, out);
                };
            }
            on!(0, cpu);
            on!(1, cuda);
            b.same(&format!("scores {number} x {rows}"), &logits);
            b.same(&format!("mixture {number} x {rows}"), &out);
        }
    }
}

#[test]
#[ignore = "on the emulated driver: see main.rs"]
fn heads() {
    let mut b = Both::new();
    for form in [Form::Q4, Form::Q8, Form::Bf16, Form::F32] {
        for (heads, n, k, part) in [(3, 16, 34, 40), (2, 48, 288, 288), (5, 32, 64, 65)] {
            let w = b.matrix(form, heads * n, k, false);
            let gain = b.vector(n);
            for rows in [1, 6, 70] {
                let (x, mut out) = (b.rows(rows, heads * part), b.empty());
                b.cpu.linear_heads(&w.0, heads, &x.0, &mut out.0);
                b.cuda.linear_heads(&w.1, heads, &x.1, &mut out.1);
                b.same(&format!("{form:?} {heads} x [{n}, {k}] x {rows}"), &out);
                let how = Latent { heads, nope: k, rope: part - k, rank: n };
                let kv = b.rows(rows, n + part - k);
                b.cpu.latent_qk(&w.0, (&gain.0, 1e-6), &how, &x.0, &kv.0, &mut out.0);
                b.cuda.latent_qk(&w.1, (&gain.1, 1e-6), &how, &x.1, &kv.1, &mut out.1);
                b.same(&format!("{form:?} latent, {heads} x [{n}, {k}] x {rows}"), &out);
            }
        }
    }
}

/// Two sequences of one layer: prompts, then a part of the other, tokens of both. State 0 of each is read by the first.
#[test]
#[ignore = "on the emulated driver: see main.rs"]
fn states() {
    let shape = Heads { heads: 4, groups: 2, tiled: false, key_dim: 20, value_dim: 48 };
    let cores = [
        Core::Gated(300),
        Core::DeltaNet(shape),
        Core::DeltaNet(Heads { tiled: true, key_dim: 256, value_dim: 16, ..shape }),
        Core::Mamba2(shape),
        Core::Mamba2(Heads { groups: 1, ..shape }),
    ];
    for (number, core) in cores.into_iter().enumerate() {
        let mut b = Both::new();
        let how = Recurrent { width: 2 + 2 * number, core };
        let (channels, bias) = (how.channels().1, number % 2 == 1);
        let (taps, conv_bias) = (b.vector(how.width * channels), b.vector(channels));
        let (h, delta) = match core {
            Core::Gated(_) => (None, false),
            Core::DeltaNet(h) => (Some(h), true),
            Core::Mamba2(h) => (Some(h), false),
        };
        let heads = h.map_or(1, |h| h.heads);
        let (dt_bias, skip) = (b.vector(heads), b.vector(heads));
        // Negative, as in all models: a state that grows soon overflows.
        let decay: Vec<f32> = b.floats(heads).iter().map(|x| -x.abs()).collect();
        let decay = (b.cpu.row(Place::End, &decay), b.cuda.row(Place::End, &decay));
        let norm = b.vector(h.map_or(1, |h| if delta { h.value_dim } else { h.values() }));
        let layers = [(6, how.state())];
        let mut states = (b.cpu.states(&layers).unwrap(), b.cuda.states(&layers).unwrap());
        let steps: [&[(usize, usize, [u32; 2])]; 3] = [
            &[(0, 9, [5, 0]), (0, 1, [5, 1])],
            &[(1, 30, [1, 2]), (9, 1, [0, 3])],
            &[(10, 1, [3, 0]), (31, 1, [2, 1])],
        ];
        for (s, step) in steps.iter().enumerate() {
            let rows: usize = step.iter().map(|(_, len, _)| len).sum();
            let mut first_row = 0;
            let mut spans = Vec::new();
            for (start, len, table) in *step {
                spans.push(Span { first_row, len: *len, start: *start, table });
                first_row += len;
            }
            let mut x = b.rows(rows, how.projection());
            let rates = b.rows(rows, how.rates().max(1));
            let (mut conv, mut out): (Pair, Pair) = (b.empty(), b.empty());
            macro_rules! on {
                ($i:tt, $backend:ident) => {
                    let (taps, bias) = (&taps.$i, bias.then_some(&conv_bias.$i));
                    let (x, states, conv) = (&mut x.$i, &mut states.$i, &mut conv.$i);
                    b.$backend.conv(x, &how, taps, bias, states, 0, &spans, conv);
                    if h.is_some() {
                        let skip = (!delta && bias.is_some()).then_some(&skip.$i);
                        let (decay, dt_bias, norm) = (&decay.$i, &dt_bias.$i, &norm.$i);
                        let rows = HeadRows { decay, dt_bias, skip, norm };
                        let (rates, out) = (&rates.$i, &mut out.$i);
                        b.$backend.recur(x, rates, conv, &how, &rows, 1e-5, states, 0, &spans, out);
                    }
                };
            }
            on!(0, cpu);
            on!(1, cuda);
            b.same(&format!("convolution {number}, step {s}"), &conv);
            if h.is_some() {
                b.same(&format!("recurrence {number}, step {s}"), &out);
            }
        }
    }
}
