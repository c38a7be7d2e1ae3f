//! The back end gives the same bits with any number of threads, and the formula's result.

use super::*;

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
                (a.values().to_vec(), b.values().to_vec())
            };
            let (a, b) = run(1);
            for threads in 2..4 {
                assert!(run(threads) == (a.clone(), b.clone()));
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
                    let silu = g / (1.0 + (-g).exp()) * u;
                    assert!((b[t * n + r] - silu).abs() < allowed * 3.0);
                }
            }
        }
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
