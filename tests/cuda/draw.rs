//! Tokens drawn on the emulated device: those of `sample`.

use ferrule::backend::cpu::Cpu;
use ferrule::backend::cuda::Cuda;
use ferrule::backend::{Backend, Draw};
use ferrule::sample::{Sampling, Scratch, coin, draw};

#[test]
#[ignore = "on the emulated driver: see main.rs"]
fn tokens() {
    let cuda = Cuda::new(None, Cpu::new(1, None).unwrap()).unwrap();
    assert!(cuda.draws());
    let mut state = 5u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let mut different = std::collections::BTreeSet::new();
    for vocab in [1, 7, 300, 5000, 9000] {
        for round in 0..3 {
            let spread = [30.0, 4.0, 0.5][round];
            let mut logits: Vec<f32> = (0..4 * vocab).map(|_| spread * next()).collect();
            if vocab > 7 {
                // Ties at the top, on both sides of zero; nothing but one; much that is never drawn.
                let row = &mut logits[vocab..2 * vocab];
                row.iter_mut().for_each(|x| *x = x.min(0.0));
                (row[vocab / 2], row[vocab / 3], row[vocab - 1]) = (0.0, -0.0, 0.0);
                logits[2 * vocab..3 * vocab].fill(f32::NEG_INFINITY);
                logits[2 * vocab + vocab / 5] = -7.0;
                logits[3 * vocab..].iter_mut().step_by(2).for_each(|x| *x = f32::NEG_INFINITY);
            }
            for (temperature, min_p, top_k, top_p) in [
                (0.0, 0.0, 3, 0.5),
                (1.0, 0.0, 0, 1.0),
                (0.3, 0.0, 0, 1.0),
                (1.5, 0.05, 0, 1.0),
                (1e-6, 1.0, 0, 1.0),
                (1e6, 0.0, 0, 1.0),
                (1.0, 0.0, 1, 1.0),
                (1.3, 0.0, 20, 0.8),
                (1e6, 0.0, 200, 1.0),
                (1.0, 0.0, 0, 0.9),
                (3.0, 0.1, 50, 0.99),
                (1e6, 0.0, 0, 0.3),
                (0.7, 0.0, 0, 1e-30),
            ] {
                if vocab > 5000 && round > 0 && (top_k, top_p) != (0, 1.0) {
                    continue; // slow, and no other code
                }
                let sampling = Sampling { temperature, min_p, top_k, top_p, ..Sampling::default() };
                let least = sampling.least_weight().unwrap();
                let top_k = if top_k < vocab { top_k as u32 } else { 0 };
                let coins = [0.0, coin(round as u64, 1), coin(9, vocab as u64), 1.0 - f64::EPSILON];
                let how = coins.map(|coin| Draw { temperature, least, coin, top_k, top_p });
                let found = cuda.draw(&cuda.upload(&logits, vocab), &how);
                cuda.finish().unwrap();
                for (r, coin) in coins.into_iter().enumerate() {
                    let row = &logits[r * vocab..(r + 1) * vocab];
                    let want = draw(&sampling, row, coin, &mut Scratch::default()).unwrap();
                    assert_eq!(found[r], Some(want), "{vocab} {round} {sampling:?} {r}");
                    different.insert(want);
                }
            }
        }
    }
    assert!(different.len() > 50, "{}", different.len());
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut logits = vec![if bad < 0.0 { bad } else { 1.0 }; 2500];
        logits[2400] = bad;
        let plain = Draw { temperature: 0.0, least: 1, coin: 0.5, top_k: 0, top_p: 1.0 };
        let how = [
            plain,
            Draw { temperature: 1.0, ..plain },
            Draw { temperature: 1.0, top_k: 7, top_p: 0.5, ..plain },
        ];
        let found = cuda.draw(&cuda.upload(&[&logits[..]; 3].concat(), 2500), &how);
        assert_eq!(found, [None; 3], "{bad}");
    }
    // What changes logits is not drawn there, nor is typical sampling.
    let with = |change: fn(&mut Sampling)| {
        let mut sampling = Sampling::default();
        change(&mut sampling);
        sampling.least_weight()
    };
    assert_eq!(with(|_| {}), Some(1));
    assert_eq!(with(|s| (s.top_k, s.top_p) = (5, 0.5)), Some(1));
    assert_eq!(with(|s| (s.temperature, s.typical_p) = (0.0, 0.5)), Some(1));
    for change in [
        |s: &mut Sampling| s.typical_p = 0.9,
        |s: &mut Sampling| s.repetition_penalty = 1.1,
        |s: &mut Sampling| s.presence_penalty = 0.1,
        |s: &mut Sampling| s.frequency_penalty = 0.1,
        |s: &mut Sampling| (s.temperature, s.logit_bias) = (0.0, vec![(1, 1.0)]),
    ] {
        assert_eq!(with(change), None);
    }
}
