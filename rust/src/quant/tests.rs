//! Bounds that every block must keep, whatever the weights.

use super::*;
use proptest::prelude::*;

fn weights() -> impl Strategy<Value = Vec<f32>> {
    let value = prop_oneof![
        4 => -1.0f32..1.0,
        1 => -1e30f32..1e30,
        1 => Just(0.0f32),
        1 => -1e-30f32..1e-30,
    ];
    prop::collection::vec(value, 0..=BLOCK)
}

proptest! {
    #[test]
    fn q4_stays_in_its_ranges_and_near(x in weights()) {
        let b = BlockQ4::quantize(&x);
        prop_assert!(b.q.iter().all(|&q| q < 16));
        prop_assert!(b.sc.iter().all(|&s| (1..=16).contains(&s)));
        prop_assert!(b.mn.iter().all(|&m| m != -128));
        for k in 0..BLOCK {
            let (sc, mn) = (i32::from(b.sc[k / GROUP]), i32::from(b.mn[k / GROUP]));
            prop_assert!((sc * i32::from(b.q[k]) - mn).abs() <= 127);
        }
        let y = b.dequantize();
        for (g, x) in x.chunks(GROUP).enumerate() {
            let (lo, hi) = x.iter().fold((0f32, 0f32), |(l, h), &v| (l.min(v), h.max(v)));
            // The group's range plus zero (padding) in 15 steps of at least one grid step, clipped
            // by at most one step at each end.
            let step = ((hi - lo) / 15.0 + 2.0 * b.d).max(amax(&x[..0]));
            for (k, &v) in x.iter().enumerate() {
                let e = (y[g * GROUP + k] - v).abs();
                prop_assert!(e <= 16.0 * step + TINY, "{v} became {}", y[g * GROUP + k]);
            }
        }
    }

    #[test]
    fn q8_is_within_half_a_step(x in weights()) {
        let b = BlockQ8::quantize(&x);
        let y = b.dequantize();
        for (k, &v) in x.iter().enumerate() {
            prop_assert!((y[k] - v).abs() <= b.d * 0.5001 + TINY);
        }
    }
}

/// A fixed pseudo-random sequence, uniform in -1..1.
fn noise(n: usize, mut seed: u32) -> Vec<f32> {
    (0..n)
        .map(|_| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// Error power over signal power.
fn relative_noise(x: &[f32], y: impl Iterator<Item = f32>) -> f64 {
    let (mut signal, mut error) = (0.0, 0.0);
    for (x, y) in x.iter().zip(y) {
        signal += f64::from(x * x);
        error += f64::from((x - y) * (x - y));
    }
    error / signal
}

#[test]
fn q4_has_a_fifth_less_noise_than_q4_0() {
    // Box and Muller's normal numbers.
    let normal = |c: &[f32]| {
        (-2.0 * (0.5 + 0.5 * c[0]).max(1e-9).ln()).sqrt() * (std::f32::consts::PI * c[1]).cos()
    };
    let (u, v) = (noise(256 * BLOCK, 7), noise(256 * BLOCK, 1234));
    let x: Vec<f32> = u.iter().zip(&v).map(|(&u, &v)| normal(&[u, v])).collect();
    let ours = x.chunks(BLOCK).flat_map(|x| BlockQ4::quantize(x).dequantize());
    let ours = relative_noise(&x, ours);
    // ggml's Q4_0, also 4.5 bits: one scale for 32 weights, the largest magnitude becomes -8.
    let q4_0 = x.chunks(32).flat_map(|x| {
        let largest = x.iter().fold(0.0f32, |m, &v| if v.abs() > m.abs() { v } else { m });
        let d = largest / -8.0;
        x.iter().map(move |v| d * ((v / d + 8.5).floor().clamp(0.0, 15.0) - 8.0))
    });
    let q4_0 = relative_noise(&x, q4_0);
    assert!(ours < 0.8 * q4_0 && ours < 0.006, "{ours} against {q4_0}");
    println!("noise: {:.3} % against {:.3} %", 100.0 * ours, 100.0 * q4_0);
}

#[test]
fn zeros_stay_zeros() {
    assert_eq!(BlockQ4::quantize(&[0.0; BLOCK]), BlockQ4::ZERO);
    assert_eq!(BlockQ8::quantize(&[TINY / 2.0; 3]), BlockQ8::ZERO);
    assert_eq!(BlockQ4::ZERO.dequantize(), [0.0; BLOCK]);
}

/// Inputs whose first half moves together, and the sums over them.
fn inputs(k: usize, seed: u32) -> (Vec<Vec<f32>>, Vec<f32>) {
    let all: Vec<Vec<f32>> = (0..64)
        .map(|t| {
            let (own, common) = (noise(k, seed + 2 * t), noise(1, seed + 2 * t + 1)[0]);
            let mix = |(i, x): (usize, f32)| if i < k / 2 { 0.2 * x + 2.0 * common } else { x };
            own.into_iter().enumerate().map(mix).collect()
        })
        .collect();
    let mut sums = vec![0.0; k.div_ceil(BLOCK) * BLOCK * BLOCK];
    for x in &all {
        for (b, x) in x.chunks(BLOCK).enumerate() {
            for (i, xi) in x.iter().enumerate() {
                for (j, xj) in x.iter().enumerate() {
                    sums[(b * BLOCK + i) * BLOCK + j] += xi * xj;
                }
            }
        }
    }
    (all, sums)
}

/// Mean square of the error of the products with `inputs`.
fn product_error(w: &[f32], quantized: &[f32], inputs: &[Vec<f32>]) -> f64 {
    let error = |x: &Vec<f32>| -> f64 {
        let each = w.iter().zip(quantized).zip(x);
        each.map(|((w, q), x)| f64::from(w - q) * f64::from(*x)).sum()
    };
    inputs.iter().map(|x| error(x).powi(2)).sum::<f64>() / inputs.len() as f64
}

#[test]
fn feedback_lessens_the_error_of_products() {
    let (inputs, sums) = inputs(BLOCK, 7);
    let feedback = Feedback::new(&sums, BLOCK);
    let (mut q4, mut q8) = ([0.0, 0.0], [0.0, 0.0]);
    for seed in 0..16 {
        let w = noise(BLOCK, 1000 + seed);
        let error = |quantized: [f32; BLOCK]| product_error(&w, &quantized, &inputs);
        q4[0] += error(BlockQ4::quantize(&w).dequantize());
        q4[1] += error(feedback.q4(0, &w).dequantize());
        q8[0] += error(BlockQ8::quantize(&w).dequantize());
        q8[1] += error(feedback.q8(0, &w).dequantize());
    }
    println!("mean square error of products: int4 {q4:?}, int8 {q8:?}");
    assert!(q4[1] < 0.2 * q4[0] && q8[1] < 0.2 * q8[0]);
}

#[test]
fn feedback_without_inputs_is_rounding() {
    let feedback = Feedback::new(&vec![0.0; 2 * BLOCK * BLOCK], 300);
    let w = noise(300, 3);
    assert_eq!(feedback.q8(1, &w[BLOCK..]), BlockQ8::quantize(&w[BLOCK..]));
    let (mut own, mut plain) = (0.0, 0.0);
    for (x, y, z) in feedback
        .q4(0, &w[..BLOCK])
        .dequantize()
        .iter()
        .zip(&w)
        .zip(BlockQ4::quantize(&w[..BLOCK]).dequantize())
        .map(|((x, y), z)| (x, y, z))
    {
        own += (x - y).powi(2);
        plain += (z - y).powi(2);
    }
    assert!(own <= 1.02 * plain, "{own} {plain}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))] // each makes a matrix of 256 by 256

    #[test]
    fn zeros_stay_zero_in_every_form(x in weights(), seed in 0u32..100) {
        let (_, sums) = inputs(BLOCK, seed);
        let feedback = Feedback::new(&sums, BLOCK);
        let x = if x.is_empty() { vec![1.0] } else { x };
        let rows = [
            BlockQ4::quantize(&x).dequantize(),
            BlockQ8::quantize(&x).dequantize(),
            feedback.q4(0, &x).dequantize(),
            feedback.q8(0, &x).dequantize(),
        ];
        for row in rows {
            prop_assert!(x.iter().zip(row).all(|(&x, y)| x != 0.0 || y == 0.0));
        }
        let b = feedback.q4(0, &x);
        prop_assert!(b.d.is_finite());
        for g in 0..GROUPS {
            let (sc, mn) = (i32::from(b.sc[g]), i32::from(b.mn[g]));
            prop_assert!((1..=16).contains(&sc) && (-127..=127).contains(&mn) && 15 * sc - mn <= 127);
        }
        prop_assert!(b.q.iter().all(|&q| q < 16));
        prop_assert!(feedback.q8(0, &x).q.iter().all(|&q| q != -128));
    }
}

#[test]
fn signs_with_zero_are_exact() {
    let x: Vec<f32> = (0..BLOCK).map(|i| [0.25f32, 0.0, -0.25][i * 7 % 3]).collect();
    assert_eq!(BlockQ4::quantize(&x).dequantize()[..], x[..]);
}
