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
