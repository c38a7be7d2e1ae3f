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
fn norms_of_queries_and_keys_are_over_a_head_or_over_all() {
    let cpu = Cpu::new(1, None).unwrap();
    let how = Attention {
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        scale: 1.0,
        clip: None,
        softcap: None,
        window: None,
        rope_interleaved: false,
    };
    let x = noise(8 * 16, 3);
    let gain = noise(4 * 16, 4);
    let (q, k) = (gain.clone(), gain[..32].to_vec());
    let (one, each) = (gain[..16].to_vec(), gain.clone());
    let run = |how: &Attention, q: &Vec<f32>, k: &Vec<f32>, full, centred| {
        let mut qkv = Buf::new(x.clone(), 8 * 16);
        let norms = QkNorm { q, k, centred, full, eps: 1e-5 };
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
