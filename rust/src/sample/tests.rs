//! Sampling against a reference that sorts everything.

use super::*;
use proptest::prelude::*;

/// Weight of each token after all filters, by id: sorts and sums naively.
fn reference(s: &Sampling, logits: &[f32]) -> Vec<u64> {
    let clean = |x: f32| if x.is_nan() { f32::NEG_INFINITY } else { x };
    let max = logits.iter().map(|x| clean(*x)).fold(f32::NEG_INFINITY, f32::max);
    let scale = Scale::new(max, s.temperature);
    let max = max.min(f32::MAX);
    let x: Vec<f64> = logits
        .iter()
        .map(|l| {
            (f64::from(clean(*l)) - f64::from(max)).min(0.0) * (1.0 / f64::from(s.temperature))
        })
        .collect();
    let w: Vec<u64> = logits.iter().map(|l| scale.weight(*l)).collect();
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| clean(logits[*b]).partial_cmp(&clean(logits[*a])).unwrap().then(a.cmp(b)));
    if s.top_k > 0 {
        order.truncate(s.top_k);
    }
    let cut = |order: &mut Vec<usize>, p: f32| {
        let total: u64 = order.iter().map(|i| w[*i]).sum();
        let need = (f64::from(p) * total as f64).ceil() as u64;
        let mut sum = 0;
        let keep = order.iter().position(|i| {
            sum += w[*i];
            sum >= need
        });
        order.truncate(keep.unwrap() + 1);
    };
    if s.top_p < 1.0 {
        cut(&mut order, s.top_p);
    }
    order.retain(|i| w[*i] as f64 >= f64::from(s.min_p) * ONE as f64);
    if s.typical_p < 1.0 {
        order.sort();
        let total: u64 = order.iter().map(|i| w[*i]).sum();
        order.retain(|i| w[*i] > 0);
        let mean = order.iter().map(|i| w[*i] as f64 * x[*i]).sum::<f64>() / total as f64;
        order.sort_by(|a, b| {
            let (da, db) = ((mean - x[*a]).abs(), (mean - x[*b]).abs());
            da.partial_cmp(&db)
                .unwrap()
                .then(clean(logits[*b]).partial_cmp(&clean(logits[*a])).unwrap())
                .then(a.cmp(b))
        });
        cut(&mut order, s.typical_p);
    }
    let mut all = vec![0; logits.len()];
    order.into_iter().for_each(|i| all[i] = w[i]);
    all
}

fn weights(s: &Sampling, logits: &[f32], scratch: &mut Scratch) -> Vec<u64> {
    if keep(s, logits, Scale::new(largest(logits), s.temperature), scratch) {
        let mut all = vec![0; logits.len()];
        assert!(scratch.kept.windows(2).all(|two| id(two[0].key) < id(two[1].key)));
        scratch.kept.iter().for_each(|t| all[id(t.key)] = t.weight);
        all
    } else {
        scratch.weights.clone()
    }
}

fn logit() -> impl Strategy<Value = f32> {
    prop_oneof![
        8 => -12.0..12.0f32,
        4 => (-5..5i8).prop_map(f32::from), // ties
        1 => prop::sample::select(vec![f32::NAN, f32::NEG_INFINITY, -0.0, 0.0, 1e30, -1e30, f32::MAX]),
    ]
}

fn all_logits() -> impl Strategy<Value = Vec<f32>> {
    prop_oneof![
        prop::collection::vec(logit(), 1..40),
        prop::collection::vec(logit(), 400..900),
        (1..600usize).prop_map(|n| vec![1.5; n]),
    ]
}

fn sampling() -> impl Strategy<Value = Sampling> {
    let off = |value: f32, on: std::ops::Range<f32>| prop_oneof![Just(value), on];
    let top_k = prop_oneof![Just(0), 1..8usize, 1..1000usize];
    let temperature = prop_oneof![Just(1.0), 0.05..4.0f32, Just(1e-30f32)];
    (temperature, top_k, off(1.0, 1e-6..1.0), off(0.0, 0.0..1.0), off(1.0, 1e-6..1.0)).prop_map(
        |(temperature, top_k, top_p, min_p, typical_p)| Sampling {
            temperature,
            top_k,
            top_p,
            min_p,
            typical_p,
            ..Sampling::default()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn filters_keep_what_the_reference_keeps(s in sampling(), logits in all_logits(), coin in 0.0..1.0f64) {
        let mut scratch = Scratch::default();
        if largest(&logits) == f32::NEG_INFINITY {
            prop_assert!(draw(&s, &logits, coin, &mut scratch).is_err());
            return Ok(());
        }
        let expected = reference(&s, &logits);
        prop_assert_eq!(&weights(&s, &logits, &mut scratch), &expected);
        // the draw is the inverse of the distribution function, by ascending id
        let total: u64 = expected.iter().sum();
        let mut left = ((coin * total as f64) as u64).min(total - 1);
        let drawn = expected.iter().position(|w| {
            let here = left < *w;
            left = left.saturating_sub(*w);
            here
        });
        // buffers with the leftovers of another call change nothing
        prop_assert_eq!(Some(draw(&s, &logits, coin, &mut scratch)? as usize), drawn);
    }

    #[test]
    fn weights_are_probabilities(logits in prop::collection::vec(-12.0..12.0f32, 1..50), t in 0.1..3.0f32) {
        let s = Sampling { temperature: t, ..Sampling::default() };
        let found = weights(&s, &logits, &mut Scratch::default());
        let total: u64 = found.iter().sum();
        let naive: Vec<f64> = logits.iter().map(|l| libm::exp(f64::from(*l) / f64::from(t))).collect();
        let sum: f64 = naive.iter().sum();
        for (w, p) in found.iter().zip(&naive) {
            prop_assert!((*w as f64 / total as f64 - p / sum).abs() < 1e-9);
        }
    }

    #[test]
    fn logprobs_agree_with_a_naive_softmax(logits in all_logits(), at in 0..900usize, n in 0..50usize) {
        let id = at % logits.len();
        let clean = |x: f32| if x.is_nan() { f32::NEG_INFINITY } else { x };
        let (own, top) = logprobs(&logits, id as u32, n);
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|a, b| clean(logits[*b]).partial_cmp(&clean(logits[*a])).unwrap().then(a.cmp(b)));
        let max = f64::from(clean(logits[order[0]]));
        let sum: f64 = logits.iter().map(|l| libm::exp(f64::from(clean(*l)) - max)).sum();
        let expected = |i: usize| f64::from(clean(logits[i])) - max - libm::log(sum);
        prop_assert_eq!(top.len(), n.min(logits.len()));
        for (i, found) in top.iter().chain([&own]).enumerate() {
            let rank = order.iter().position(|x| *x == found.id as usize).unwrap();
            prop_assert_eq!(found.rank as usize, rank + 1);
            prop_assert!(i == top.len() || rank == i);
            let expected = expected(found.id as usize) as f32;
            let close = (found.logprob - expected).abs() <= 1e-6 * (1.0 + expected.abs());
            prop_assert!(close || found.logprob == expected || !max.is_finite(), "{found:?} {expected}");
        }
    }

    #[test]
    fn penalties_agree_with_a_naive_count(
        mut logits in prop::collection::vec(-9.0..9.0f32, 1..30),
        prompt in prop::collection::vec(0..40u32, 0..60),
        answer in prop::collection::vec(0..40u32, 0..60),
        banned in prop::collection::vec(0..40u32, 0..3),
        (r, p, f, bias) in (0.5..2.0f32, -2.0..2.0f32, -2.0..2.0f32, -5.0..5.0f32),
    ) {
        let s = Sampling { repetition_penalty: r, presence_penalty: p, frequency_penalty: f,
            logit_bias: vec![(0, bias)], ..Sampling::default() };
        let mut scratch = Scratch::default();
        adjust(&s, &mut [0.0; 35], &answer, &prompt, &[], &mut scratch);
        let expected: Vec<f32> = logits.iter().enumerate().map(|(i, &l)| {
            let i = i as u32;
            let mut l = if i == 0 { l + bias } else { l };
            let count = answer.iter().filter(|x| **x == i).count();
            if count > 0 || prompt.contains(&i) {
                l = if l > 0.0 { l / r } else { l * r };
            }
            if count > 0 {
                l -= f * count as f32 + p;
            }
            if banned.contains(&i) { f32::NEG_INFINITY } else { l }
        }).collect();
        adjust(&s, &mut logits, &prompt, &answer, &banned, &mut scratch);
        prop_assert_eq!(logits, expected);
    }
}

fn at(s: &Sampling, logits: &[f32], coin: f64) -> u32 {
    draw(s, logits, coin, &mut Scratch::default()).unwrap()
}

#[test]
fn greedy_takes_the_first_of_the_largest() {
    let greedy = Sampling { temperature: 0.0, top_k: 1, ..Sampling::default() };
    assert_eq!(at(&greedy, &[f32::NAN, 1.0, 3.0, 3.0, f32::NEG_INFINITY], 0.9), 2);
    assert_eq!(at(&greedy, &[-0.0, 0.0], 0.9), 0);
    assert_eq!(at(&greedy, &[1.0, f32::INFINITY, f32::MAX], 0.9), 1);
    assert_eq!(at(&greedy, &[f32::NEG_INFINITY, -1e30], 0.9), 1);
}

#[test]
fn no_allowed_token_is_an_error() {
    for temperature in [0.0, 1.0] {
        for top_k in [0, 2] {
            let s = Sampling { temperature, top_k, ..Sampling::default() };
            for logits in [&[f32::NEG_INFINITY; 4][..], &[f32::NAN; 4], &[]] {
                let e = draw(&s, logits, 0.5, &mut Scratch::default()).unwrap_err();
                assert!(e.to_string().contains("all are -inf or NaN"), "{e}");
            }
        }
    }
}

#[test]
fn edges() {
    let s = |top_k, top_p, min_p, typical_p| Sampling {
        top_k,
        top_p,
        min_p,
        typical_p,
        ..Sampling::default()
    };
    let flat = [0.5; 10];
    // k beyond the vocabulary, and a k that cuts through a tie
    assert_eq!(reference(&s(99, 1.0, 0.0, 1.0), &flat), [ONE; 10]);
    assert_eq!([0.0, 0.4, 0.999].map(|c| at(&s(99, 1.0, 0.0, 1.0), &flat, c)), [0, 4, 9]);
    assert_eq!([0.0, 0.4, 0.999].map(|c| at(&s(2, 1.0, 0.0, 1.0), &flat, c)), [0, 0, 1]);
    // the smallest p keeps the likeliest
    let peak = [0.0, 0.1, 2.0, 0.2];
    assert_eq!([0.0, 0.999].map(|c| at(&s(0, f32::MIN_POSITIVE, 0.0, 1.0), &peak, c)), [2, 2]);
    assert_eq!([0.0, 0.999].map(|c| at(&s(0, 1.0, 1.0, 1.0), &peak, c)), [2, 2]);
    assert_eq!([0.0, 0.999].map(|c| at(&s(3, 0.01, 0.0, 1.0), &peak, c)), [2, 2]);
    // p that is met exactly
    assert_eq!([0.0, 0.999].map(|c| at(&s(0, 0.5, 0.0, 1.0), &flat, c)), [0, 4]);
    // typical: with one likely and many unlikely tokens, the likely one is not typical
    let mut many = vec![0.0; 1000];
    many[7] = 4.6;
    assert_ne!(at(&s(0, 1.0, 0.0, 0.2), &many, 0.0), 7);
    // coins outside [0, 1) do not panic
    for coin in [-1.0, 1.0, f64::NAN, f64::INFINITY] {
        assert!(at(&s(0, 1.0, 0.0, 1.0), &flat, coin) < 10);
    }
    // infinity takes all
    assert_eq!(at(&s(0, 1.0, 0.0, 1.0), &[f32::MAX, f32::INFINITY, 0.0], 0.2), 0);
    assert_eq!(at(&s(0, 1.0, 0.0, 1.0), &[1e30, f32::INFINITY, 0.0], 0.2), 1);
}

#[test]
fn a_grid_of_coins_gives_each_token_its_share() {
    let s = Sampling { top_p: 0.9, ..Sampling::default() };
    let logits: Vec<f32> = (0..20).map(|i| (i % 7) as f32 * 0.7).collect();
    let expected = reference(&s, &logits);
    let total: u64 = expected.iter().sum();
    let mut counts = [0u32; 20];
    let n = 10_000;
    for i in 0..n {
        counts[at(&s, &logits, (f64::from(i) + 0.5) / f64::from(n)) as usize] += 1;
    }
    for (count, weight) in counts.iter().zip(&expected) {
        let share = *weight as f64 / total as f64 * f64::from(n);
        assert!((f64::from(*count) - share).abs() <= 1.0, "{counts:?}");
    }
}

#[test]
fn exp_is_exp() {
    assert_eq!(exp(0.0), 1.0);
    let weights = [0.0, -27.1, f32::NEG_INFINITY, f32::NAN].map(|x| Scale::new(0.0, 1.0).weight(x));
    assert_eq!(weights, [ONE, 0, 0, 0]);
    for i in 0..60_000 {
        let x = f64::from(-i) * 1e-3;
        assert!((exp(x) / libm::exp(x) - 1.0).abs() < 1e-9, "{x}");
    }
}

#[test]
fn coins_are_those_of_the_definition() {
    // from a program in another language, which gives SplitMix64's published first output
    assert_eq!((coin(0, 0), coin(u64::MAX, 7)), (0.6524484863740322, 0.7238582745899125));
    let all: Vec<f64> = (0..64).flat_map(|s| (0..64).map(move |p| coin(s, p))).collect();
    assert!(all.iter().all(|c| (0.0..1.0).contains(c)));
    let mut sorted = all.clone();
    sorted.sort_by(f64::total_cmp);
    assert!(sorted.windows(2).all(|two| two[0] < two[1]));
    for (i, c) in sorted.iter().enumerate() {
        assert!((c - i as f64 / 4096.0).abs() < 0.03); // Kolmogorov's distance at p = 0.001 is 0.0305
    }
}

#[test]
fn ranges() {
    let check = |change: fn(&mut Sampling)| {
        let mut s = Sampling::default();
        change(&mut s);
        s.check(10).map_err(|e| e.to_string())
    };
    assert_eq!(check(|_| ()), Ok(()));
    assert_eq!(check(|s| s.logit_bias = vec![(9, -3.0)]), Ok(()));
    assert_eq!(check(|s| (s.temperature, s.min_p, s.frequency_penalty) = (0.0, 1.0, -2.0)), Ok(()));
    type Change = fn(&mut Sampling);
    let bad: [(Change, &str); 13] = [
        (|s| s.temperature = -0.1, "temperature: found -0.1, expected a finite number, 0 or more"),
        (|s| s.temperature = f32::INFINITY, "temperature: found inf"),
        (|s| s.temperature = f32::NAN, "temperature: found NaN"),
        (|s| s.top_p = 0.0, "top_p: found 0"),
        (|s| s.top_p = 1.1, "top_p: found 1.1"),
        (|s| s.min_p = -0.1, "min_p"),
        (|s| s.typical_p = 0.0, "typical_p"),
        (|s| s.repetition_penalty = 0.0, "repetition_penalty"),
        (|s| s.presence_penalty = 2.1, "presence_penalty"),
        (|s| s.frequency_penalty = f32::NAN, "frequency_penalty"),
        (|s| s.logit_bias = vec![(10, 1.0)], "logit_bias: found 10, expected ids below 10"),
        (|s| s.logit_bias = vec![(1, f32::NAN)], "logit_bias: found NaN"),
        (|s| s.logit_bias = vec![(1, f32::INFINITY)], "logit_bias: found inf"),
    ];
    for (change, expected) in bad {
        let found = check(change).unwrap_err();
        assert!(found.starts_with(expected), "{found}");
    }
}
