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

/// Box and Muller's normal numbers.
fn normal(n: usize) -> Vec<f32> {
    let normal = |(u, v): (f32, &f32)| {
        (-2.0 * (0.5 + 0.5 * u).max(1e-9).ln()).sqrt() * (std::f32::consts::PI * v).cos()
    };
    noise(n, 7).into_iter().zip(&noise(n, 1234)).map(normal).collect()
}

#[test]
fn q4_has_a_fifth_less_noise_than_q4_0() {
    let x = normal(256 * BLOCK);
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

#[test]
fn more_bits_have_less_noise() {
    // The steps that `--bits` counts with (`model/quantize/mixed.rs`).
    let x = normal(256 * BLOCK);
    let noise =
        |each: &dyn Fn(&[f32]) -> [f32; BLOCK]| relative_noise(&x, x.chunks(BLOCK).flat_map(each));
    let int4 = noise(&|x| BlockQ4::quantize(x).dequantize());
    for (how, range) in [(Grouped::INT5, 0.28..0.36), (Grouped::INT6, 0.05..0.09)] {
        let found = noise(&|x| BlockGrouped::quantize(how, x).dequantize(how)) / int4;
        assert!(range.contains(&found), "{how:?}: {found}");
    }
    assert!(noise(&|x| BlockQ8::quantize(x).dequantize()) < 0.01 * int4);
}

/// The factor of sums over inputs that have much in common.
fn factor(k: usize, seed: u32) -> Vec<f32> {
    let mut m = noise(k * k, seed);
    for i in 0..k {
        m[i * k + i] += 4.0;
    }
    m
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))] // each makes a matrix of 256 by 256

    #[test]
    fn zeros_stay_zero_in_every_form(x in weights(), seed in 0u32..100) {
        let feedback = Feedback::new(&factor(BLOCK, seed), BLOCK);
        let x = if x.is_empty() { vec![1.0] } else { x };
        let v: Vec<f32> = x.iter().zip(noise(BLOCK, seed)).map(|(x, e)| x * (1.0 + 0.1 * e)).collect();
        let mut rows = vec![
            BlockQ4::quantize(&x).dequantize(),
            BlockQ8::quantize(&x).dequantize(),
            feedback.q4(0, &x, &v).dequantize(),
            feedback.q8(0, &x, &v).dequantize(),
        ];
        for how in [Grouped::INT5, Grouped::INT6] {
            for block in [BlockGrouped::quantize(how, &x), feedback.grouped(how, 0, &x, &v)] {
                // An f16 times 127 times the largest code holds this much.
                let fits = amax(&x) <= 65504.0 * 127.0 * 16.0;
                prop_assert!(block.not_finite(how).is_none() || !fits);
                prop_assert!(block.q.iter().all(|&q| q < 16 << how.high()));
                if fits {
                    rows.push(block.dequantize(how));
                }
            }
        }
        for row in rows {
            prop_assert!(x.iter().zip(row).all(|(&x, y)| x != 0.0 || y == 0.0));
        }
        let b = feedback.q4(0, &x, &v);
        prop_assert!(b.d.is_finite());
        for g in 0..GROUPS {
            let (sc, mn) = (i32::from(b.sc[g]), i32::from(b.mn[g]));
            prop_assert!((1..=16).contains(&sc) && (-127..=127).contains(&mn) && 15 * sc - mn <= 127);
        }
        prop_assert!(b.q.iter().all(|&q| q < 16));
        prop_assert!(feedback.q8(0, &x, &v).q.iter().all(|&q| q != -128));
    }

    #[test]
    fn int5_and_int6_are_near(x in weights()) {
        let x: Vec<f32> = x.into_iter().map(|x| x.clamp(-1e6, 1e6)).collect();
        for how in [Grouped::INT5, Grouped::INT6] {
            let block = BlockGrouped::quantize(how, &x);
            let (y, d) = (block.dequantize(how), half::f16::from_bits(block.d).to_f32());
            for (u, x) in x.chunks(how.unit()).enumerate() {
                // A step that holds the largest weight, rounded to the grid of scales, clipped by one at most.
                let step = amax(x) / -f32::from(how.signed()) + d;
                let square: f32 = x.iter().zip(&y[u * how.unit()..]).map(|(x, y)| (x - y).powi(2)).sum();
                let most = x.len() as f32 * (step + TINY).powi(2);
                prop_assert!(square <= 1.01 * most, "{square} {most}");
            }
        }
    }
}

#[test]
fn corners_of_int5_and_int6() {
    for how in [Grouped::INT5, Grouped::INT6] {
        assert_eq!(BlockGrouped::quantize(how, &[0.0; BLOCK]).dequantize(how), [0.0; BLOCK]);
        assert_eq!(BlockGrouped::quantize(how, &[]).dequantize(how), [0.0; BLOCK]);
        // Larger than an f16 can scale: said, not clipped.
        assert!(BlockGrouped::quantize(how, &[1e30; 3]).not_finite(how).is_some());
        // Smaller than the smallest f16 times one.
        let small = BlockGrouped::quantize(how, &[1e-9, -1e-6, 3e-6]).dequantize(how);
        assert!(
            small[0].abs() < 1e-7
                && (small[1] + 1e-6).abs() < 1e-7
                && (small[2] - 3e-6).abs() < 2e-7
        );
    }
}

#[test]
fn signs_with_zero_are_exact() {
    let x: Vec<f32> = (0..BLOCK).map(|i| [0.25f32, 0.0, -0.25][i * 7 % 3]).collect();
    assert_eq!(BlockQ4::quantize(&x).dequantize()[..], x[..]);
}
