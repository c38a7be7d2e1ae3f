//! The back end gives the same bits with any number of threads, and the formula's result.

const TOKENS: usize = 512;
use super::*;
use crate::quant::Grouped;

pub(super) fn noise(n: usize, mut seed: u32) -> Vec<f32> {
    (0..n)
        .map(|_| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

fn bytes(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|x| x.to_le_bytes()).collect()
}

pub(super) fn mat(
    cpu: &Cpu,
    form: Form,
    parts: &[(&[f32], usize)],
    k: usize,
    interleaved: bool,
) -> Mat {
    let stored: Vec<Vec<u8>> = parts.iter().map(|(x, _)| bytes(x)).collect();
    let parts = parts.iter().zip(&stored);
    let parts = parts.map(|(&(_, n), bytes)| Part::floats(Form::F32, n, k, bytes)).collect();
    cpu.pack(form, &Parts { parts, k, interleaved }).unwrap().unwrap()
}

#[test]
fn products_do_not_depend_on_threads_and_match_plain_loops() {
    let (n, k) = (72, 100);
    let (gate, up, bias) = (noise(n * k, 1), noise(n * k, 2), noise(192, 3));
    for form in [Form::Q4, Form::Q8, Form::F32] {
        for m in [1, 3, 33, TOKENS + 2] {
            let x = Buf::new(noise(m * k, 4), k);
            let run = |threads| {
                let cpu = Cpu::new(threads, None).unwrap();
                let below = mat(&cpu, form, &[(&gate, n), (&up, n)], k, false);
                let beside = mat(&cpu, form, &[(&gate, n), (&up, n)], k, true);
                let (mut a, mut b) = (cpu.buf(), cpu.buf());
                cpu.linear(&below, Some(&bias), &x, &mut a);
                cpu.linear_add(&below, None, &x, &mut a);
                cpu.gated(&beside, None, Activation::Silu, n, &x, &mut b);
                let mut c = cpu.buf();
                cpu.activated(&below, Some(&bias), Activation::Relu2, &x, &mut c);
                (a.values().to_vec(), b.values().to_vec(), c.values().to_vec())
            };
            let (a, b, c) = run(1);
            for threads in 2..4 {
                assert!(run(threads) == (a.clone(), b.clone(), c.clone()));
            }
            // Quantized weights and activations are off by percents, floats by rounding.
            let allowed = if form == Form::F32 { 1e-4 } else { 2.0 };
            for t in 0..m {
                let dot = |w: &[f32], r: usize| -> f32 {
                    w[r * k..][..k].iter().zip(x.row(t)).map(|(w, x)| w * x).sum()
                };
                for r in (0..n).step_by(if m < 40 { 1 } else { 29 }) {
                    let (g, u) = (dot(&gate, r), dot(&up, r));
                    assert!((a[t * 2 * n + r] - 2.0 * g - bias[r]).abs() < allowed);
                    assert!((a[t * 2 * n + n + r] - 2.0 * u - bias[n + r]).abs() < allowed);
                    let relu = (g + bias[r]).max(0.0);
                    assert!((c[t * 2 * n + r].sqrt() - relu).abs() < allowed);
                    let silu = g / (1.0 + (-g).exp()) * u;
                    assert!((b[t * n + r] - silu).abs() < allowed * 3.0);
                }
            }
        }
    }
}

#[test]
fn mxfp4_is_kept_as_it_is() {
    let (n, k) = (40, 96);
    let codes: Vec<u8> = (0..2 * n * k / 2).map(|i| (i * 37 % 256) as u8).collect();
    let scales: Vec<u8> = (0..2 * n * k / 32).map(|i| (100 + i % 60) as u8).collect();
    // Two matrices whose rows alternate, as gate and up do.
    let part = |first: usize| Part {
        stored: Form::MXFP4,
        blocks: None,
        encoded: None,
        n,
        bytes: &codes[first * k / 2..],
        row: 2 * k,
        column: 1,
        scales: &scales[first * k / 32..],
    };
    let cpu = Cpu::new(2, None).unwrap();
    let parts = |interleaved| Parts { parts: vec![part(0), part(1)], k, interleaved };
    for form in [Form::MXFP4, Form::GroupedFloat(Grouped::MXFP4)] {
        let mat = cpu.pack(form, &parts(false)).unwrap().unwrap();
        let beside = cpu.pack(form, &parts(true)).unwrap().unwrap();
        let (mut row, mut same) = (vec![0.0; k], vec![0.0; k]);
        for r in 0..2 * n {
            let (p, i) = (r / n, r % n);
            mat.unpack_row(r, &mut row);
            beside.unpack_row(i / 16 * 32 + p * 16 + i % 16, &mut same);
            assert!(row == same);
            for (c, &w) in row.iter().enumerate() {
                let at = (2 * i + p) * k + c;
                let code = usize::from(codes[at / 2] >> (4 * (at % 2)) & 15);
                let value = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][code % 8];
                let value = if code < 8 { value } else { -value };
                assert_eq!(w, value * 2f32.powi(i32::from(scales[at / 32]) - 127));
            }
        }
        let mut scales = scales.clone();
        scales[(2 * 35 + 1) * 3 + 2] = 255;
        let part = Part { scales: &scales[3..], ..part(1) };
        let parts = Parts { parts: vec![part], k, interleaved: false };
        assert_eq!(cpu.pack(form, &parts).unwrap().err(), Some((0, 35, 64)));
    }
}

#[test]
fn a_number_that_is_not_finite_is_found() {
    let cpu = Cpu::new(2, None).unwrap();
    for (form, bad) in [(Form::Q4, f32::NAN), (Form::Q8, f32::INFINITY), (Form::F32, f32::NAN)] {
        let mut w = noise(40 * 300, 9);
        w[35 * 300 + 277] = bad;
        let w = bytes(&w);
        let part = |bytes| Part::floats(Form::F32, 40, 300, bytes);
        let good = bytes(&noise(40 * 300, 8));
        let parts = Parts { parts: vec![part(&good), part(&w)], k: 300, interleaved: false };
        assert_eq!(cpu.pack(form, &parts).unwrap().err(), Some((1, 35, 277)));
    }
}

#[test]
fn a_matrix_of_each_head_is_a_product_of_each_head() {
    const HEADS: usize = 3;
    let (n, k) = (16, 320);
    let w = noise(HEADS * n * k, 1);
    // The same matrix, its heads stored as [k, n].
    let mut turned = Vec::new();
    for w in w.chunks(n * k) {
        turned.extend((0..k * n).map(|i| w[i % n * k + i / n]));
    }
    for form in [Form::Q4, Form::Q8, Form::F32] {
        for m in [1, 3, TOKENS + 2] {
            let x = noise(m * HEADS * k, 2);
            let run = |threads| {
                let cpu = Cpu::new(threads, None).unwrap();
                let heads = |w: &[f32], transposed| {
                    let bytes: Vec<Vec<u8>> = w.chunks(n * k).map(bytes).collect();
                    let (row, column) = if transposed { (1, n) } else { (k, 1) };
                    let part = |bytes| Part { row, column, ..Part::floats(Form::F32, n, k, bytes) };
                    let parts = bytes.iter().map(|b| part(b)).collect();
                    cpu.pack(form, &Parts { parts, k, interleaved: false }).unwrap().unwrap()
                };
                let (w, turned) = (heads(&w, false), heads(&turned, true));
                assert!(w.bytes() == turned.bytes());
                let mut out = cpu.buf();
                cpu.linear_heads(&w, HEADS, &Buf::new(x.clone(), HEADS * k), &mut out);
                out.values().to_vec()
            };
            let all = run(1);
            assert!(run(2) == all && run(3) == all);
            let cpu = Cpu::new(1, None).unwrap();
            for h in 0..HEADS {
                let w = mat(&cpu, form, &[(&w[h * n * k..][..n * k], n)], k, false);
                let x = x.chunks(k).skip(h).step_by(HEADS).flatten().copied().collect();
                let mut out = cpu.buf();
                cpu.linear(&w, None, &Buf::new(x, k), &mut out);
                for (t, out) in out.values().chunks(n).enumerate() {
                    assert!(out == &all[(t * HEADS + h) * n..][..n], "{form:?} head {h} row {t}");
                }
            }
        }
    }
}

#[test]
fn streams_and_gates_match_plain_loops() {
    const ROWS: usize = 9;
    const N: usize = 3;
    let width = 40;
    let run = |threads| {
        let cpu = Cpu::new(threads, None).unwrap();
        let old: Vec<_> = (0..N).map(|i| Buf::new(noise(ROWS * width, i as u32), width)).collect();
        let (predict, correct) = (noise(ROWS * N * N, 7), noise(ROWS * N, 8));
        let seen = Buf::new(noise(ROWS * width, 9), width);
        let mut predicted = old.clone();
        cpu.altup_predict(&Buf::new(predict.clone(), N * N), &mut predicted);
        let mut corrected = predicted.clone();
        cpu.altup_correct(&Buf::new(correct.clone(), N), &seen, &mut corrected);
        let mut matched = seen.clone();
        cpu.match_power(&mut matched, &old[0], 1e-5);
        let mut gated = Buf::new(noise(ROWS * 8, 10), 8);
        let before = gated.clone();
        cpu.gate_with(&mut gated, Activation::Silu, &seen, 16);
        let both = Buf::new(noise(ROWS * 96, 11), 96);
        let mut cut = cpu.buf();
        cpu.cut_and_gate(&both, 0.5, Activation::Silu, width, &mut cut);
        let silu = |x: f32| x / (1.0 + (-x).exp());
        let close = |a: f32, b: f32| assert!((a - b).abs() < 1e-5, "{a} {b}");
        for r in 0..ROWS {
            let power = |x: &Buf| x.row(r).iter().map(|x| x * x).sum::<f32>() / width as f32;
            close(power(&matched), power(&old[0]));
            let part = |from: usize| -> Vec<f32> {
                (0..width).map(|c| both.row(r)[c / 16 * 32 + from + c % 16]).collect()
            };
            let (gate, up) = (part(0), part(16));
            let mean = gate.iter().sum::<f32>() / width as f32;
            let variance = gate.iter().map(|g| (g - mean).powi(2)).sum::<f32>() / width as f32;
            for c in 0..width {
                for i in 0..N {
                    let sum = (0..N).map(|j| predict[r * N * N + i * N + j] * old[j].row(r)[c]);
                    close(predicted[i].row(r)[c], old[i].row(r)[c] + sum.sum::<f32>());
                    let new =
                        (seen.row(r)[c] - predicted[0].row(r)[c]) * (1.0 + correct[r * N + i]);
                    close(corrected[i].row(r)[c], predicted[i].row(r)[c] + new);
                }
                let large = (gate[c] - mean - 0.5 * variance.sqrt()).max(0.0);
                close(cut.row(r)[c], silu(large) * up[c]);
            }
            for c in 0..8 {
                close(gated.row(r)[c], silu(before.row(r)[c]) * seen.row(r)[16 + c]);
            }
        }
        [predicted, corrected, vec![matched, gated, cut]].concat()
    };
    let one: Vec<Vec<f32>> = run(1).iter().map(|x| x.values().to_vec()).collect();
    assert!(run(2).iter().zip(&one).all(|(a, b)| a.values() == b));
}

#[test]
fn norms_of_queries_and_keys_are_over_a_head_or_over_all() {
    let cpu = Cpu::new(1, None).unwrap();
    let how = Attention {
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        latent: None,
        scale: 1.0,
        clip: None,
        softcap: None,
        window: None,
        query_growth: None,
        queries_only: false,
        rope_interleaved: false,
    };
    let x = noise(8 * 16, 3);
    let gain = noise(4 * 16, 4);
    let (q, k) = (gain.clone(), gain[..32].to_vec());
    let (one, each) = (gain[..16].to_vec(), gain.clone());
    let run = |how: &Attention, q: &Vec<f32>, k: &Vec<f32>, full, centred| {
        let mut qkv = Buf::new(x.clone(), 8 * 16);
        let norms = QkNorm { q, k, v: None, centred, full, after_rope: false, eps: 1e-5 };
        cpu.rotate(&mut qkv, how, Some(&norms), None);
        qkv.values().to_vec()
    };
    let expected = |x: &[f32], gain: &[f32], centred: bool| -> Vec<f32> {
        let n = x.len() as f64;
        let mean = if centred { x.iter().map(|&x| f64::from(x)).sum::<f64>() / n } else { 0.0 };
        let square = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
        let norm = |(x, g): (&f32, &f32)| {
            ((f64::from(*x) - mean) / (square + 1e-5).sqrt() * f64::from(*g)) as f32
        };
        x.iter().zip(gain).map(norm).collect()
    };
    let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
    for centred in [false, true] {
        let found = run(&how, &q, &k, true, centred);
        assert!(close(&found[..64], &expected(&x[..64], &q, centred)));
        assert!(close(&found[64..96], &expected(&x[64..96], &k, centred)));
        assert_eq!(found[96..], x[96..]);
        let (shared, own) =
            (run(&how, &one, &one, false, centred), run(&how, &each, &k, false, centred));
        for h in 0..6 {
            let (at, x) = (h * 16, &x[h * 16..][..16]);
            assert!(close(&shared[at..at + 16], &expected(x, &one, centred)));
            let gain = &gain[h % 4 * 16..][..16];
            assert!(close(&own[at..at + 16], &expected(x, gain, centred)));
        }
        let clipped = run(&Attention { clip: Some(0.25), ..how }, &one, &one, false, centred);
        let all = clipped.iter().zip(&shared);
        assert!(all.into_iter().all(|(c, s)| *c == s.clamp(-0.25, 0.25)));
    }
}

#[test]
fn rotation_comes_before_a_norm_that_is_after_it_and_turns_the_first_dimensions() {
    let cpu = Cpu::new(1, None).unwrap();
    let (d, x, gain) = (8, noise(8 * 3, 3), noise(8, 4));
    let table = cpu.rope_table(&[7], &[false], [&[0.5, 0.1], &[]], 1.5);
    for rope_interleaved in [false, true] {
        let how = Attention {
            heads: 1,
            kv_heads: 1,
            head_dim: d,
            latent: None,
            scale: 1.0,
            clip: None,
            softcap: None,
            window: None,
            query_growth: None,
            queries_only: false,
            rope_interleaved,
        };
        let run = |norm: Option<bool>| {
            let mut qkv = Buf::new(x.clone(), 3 * d);
            let (q, k) = (&gain, &gain);
            let norms = norm.map(|after_rope| QkNorm {
                q,
                k,
                v: None,
                centred: false,
                full: false,
                after_rope,
                eps: 1e-5,
            });
            cpu.rotate(&mut qkv, &how, norms.as_ref(), Some(&table));
            qkv.values().to_vec()
        };
        let turned = |x: &[f32]| {
            let mut y = x.to_vec();
            for (i, f) in [0.5f32, 0.1].into_iter().enumerate() {
                let (a, b) = if rope_interleaved { (2 * i, 2 * i + 1) } else { (i, i + 2) };
                let (sin, cos) = (7.0 * f).sin_cos();
                (y[a], y[b]) = (1.5 * (x[a] * cos - x[b] * sin), 1.5 * (x[b] * cos + x[a] * sin));
            }
            y
        };
        let normed = |x: &[f32]| -> Vec<f32> {
            let square = x.iter().map(|x| x * x).sum::<f32>() / d as f32;
            x.iter().zip(&gain).map(|(x, g)| x / (square + 1e-5).sqrt() * g).collect()
        };
        let close = |a: &[f32], b: Vec<f32>| a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-5);
        for head in [0..d, d..2 * d] {
            let x = &x[head.clone()];
            assert!(close(&run(None)[head.clone()], turned(x)));
            assert!(close(&run(Some(false))[head.clone()], turned(&normed(x))));
            assert!(close(&run(Some(true))[head.clone()], normed(&turned(x))));
        }
        assert_eq!(run(Some(true))[2 * d..], x[2 * d..], "values stay");
    }
}

#[test]
fn queries_grow_with_their_position() {
    let cpu = Cpu::new(1, None).unwrap();
    let (d, n, every) = (16, 40, 9);
    let mut how = Attention {
        heads: 2,
        kv_heads: 1,
        head_dim: d,
        latent: None,
        scale: 0.5,
        clip: None,
        softcap: None,
        window: None,
        query_growth: Some((0.3, every)),
        queries_only: false,
        rope_interleaved: false,
    };
    let qkv = Buf::new(noise(n * 4 * d, 5), 4 * d);
    let mut kv =
        Kv::new(KvDtype::F32, &[KvLayer { pages: 1, heads: 1, head_dim: d, values: true }])
            .unwrap();
    let spans = [Span { first_row: 0, len: n, start: 0, table: &[0] }];
    cpu.store(&qkv, &how, &mut kv, 0, &spans);
    let mut grown = Buf::default();
    cpu.attention(&qkv, &how, None, &kv, 0, &spans, &mut grown);
    how.query_growth = None;
    let mut larger = qkv.clone();
    for (position, row) in larger.values_mut().chunks_exact_mut(4 * d).enumerate() {
        let times = 1.0 + 0.3 * (1.0 + (position / every) as f32).ln();
        row[..2 * d].iter_mut().for_each(|q| *q *= times);
    }
    let mut expected = Buf::default();
    cpu.attention(&larger, &how, None, &kv, 0, &spans, &mut expected);
    let off = grown.values().iter().zip(expected.values()).map(|(a, b)| (a - b).abs());
    assert!(off.fold(0.0, f32::max) < 1e-5);
    let mut plain = Buf::default();
    cpu.attention(&qkv, &how, None, &kv, 0, &spans, &mut plain);
    assert_eq!(plain.values()[..every * 2 * d], grown.values()[..every * 2 * d]);
    assert_ne!(plain.row(every), grown.row(every));
}

#[test]
fn each_row_gets_the_token_that_its_rules_give_it() {
    use crate::sample::{self, Edit, Sampling};
    let (vocab, rows) = (700, 7);
    let mut logits: Vec<f32> = noise(vocab * rows, 5).iter().map(|x| 4.0 * x).collect();
    logits[3 * vocab + 9] = f32::NAN;
    logits[4 * vocab..5 * vocab].fill(f32::NEG_INFINITY);
    let rules = [(0.0, 1.0), (1.0, 1.0), (0.7, 0.9)].map(|(temperature, typical_p)| Sampling {
        temperature,
        typical_p,
        top_p: 0.95,
        ..Sampling::default()
    });
    let favour = |id, add| Edit { id, add, penalty: 1.0, subtract: 0.0 };
    let how: Vec<_> = (0..rows)
        .map(|r| Draw {
            edits: if r < 5 { Vec::new() } else { vec![favour(r as u32, 90.0)] },
            sampling: &rules[r % 3],
            coin: sample::coin(r as u64, 0),
        })
        .collect();
    let mut scratch = Scratch::default();
    let mut want: Vec<_> = (0..rows)
        .map(|r| {
            let row = &logits[r * vocab..][..vocab];
            sample::draw(how[r].sampling, row, how[r].coin, &mut scratch).ok()
        })
        .collect();
    want[3] = None;
    (want[5], want[6]) = (Some(5), Some(6));
    assert_eq!(want[4], None);
    let logits = Buf::new(logits, vocab);
    for threads in [1, 2, 3, 9] {
        let cpu = Cpu::new(threads, None).unwrap();
        assert_eq!(cpu.draw(&logits, &how), want, "{threads}");
    }
}
