//! Tokens drawn on the emulated device: those of `sample`.

use ferrule::backend::cpu::Cpu;
use ferrule::backend::cuda::Cuda;
use ferrule::backend::{Backend, Draw, Edit};
use ferrule::sample::{Sampling, Scratch, adjust, coin, draw, edits};

#[test]
#[ignore = "on the emulated driver: see main.rs"]
fn tokens() {
    let cuda = Cuda::new(None, Cpu::new(1, None).unwrap()).unwrap();
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
                let coins = [0.0, coin(round as u64, 1), coin(9, vocab as u64), 1.0 - f64::EPSILON];
                let how = coins.map(|coin| Draw { edits: Vec::new(), sampling: &sampling, coin });
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
        let rules =
            [(0.0, 0, 1.0), (1.0, 0, 1.0), (1.0, 7, 0.5)].map(|(temperature, top_k, top_p)| {
                Sampling { temperature, top_k, top_p, ..Sampling::default() }
            });
        let how = rules.each_ref().map(|s| Draw { edits: Vec::new(), sampling: s, coin: 0.5 });
        let found = cuda.draw(&cuda.upload(&[&logits[..]; 3].concat(), 2500), &how);
        assert_eq!(found, [None; 3], "{bad}");
    }
    edited(&cuda);
    // Typical sampling is not drawn there, and leaves the logits.
    let rules = [(1.0, 1.0), (0.0, 0.5), (1.0, 0.9)].map(|(temperature, typical_p)| Sampling {
        temperature,
        typical_p,
        ..Sampling::default()
    });
    let edit = Edit { id: 1, add: 1.0, penalty: 1.0, subtract: 0.0 };
    let how = rules.each_ref().map(|s| Draw { edits: vec![edit], sampling: s, coin: 0.0 });
    let logits = [[5.0f32, 4.5, 4.0]; 3].concat();
    let buf = cuda.upload(&logits, 3);
    assert_eq!(cuda.draw(&buf, &how), [Some(0), Some(1), None]);
    assert_eq!(cuda.read(&buf), logits);
    cuda.finish().unwrap();
}

/// Bias, penalties and bans, of other ids in each row; where a row allows nothing, all are as they were.
fn edited(cuda: &Cuda) {
    let vocab = 3000;
    let logits: Vec<f32> =
        (0..5 * vocab).map(|i| ((i * 7919) % 4001) as f32 / 400.0 - 5.0).collect();
    let ids = |from: usize, count: usize| -> Vec<u32> {
        (from..from + count).map(|i| (i * i % 3100) as u32).collect()
    };
    let plain = Sampling { temperature: 0.7, ..Sampling::default() };
    let rules = [
        Sampling { repetition_penalty: 1.7, ..plain.clone() },
        Sampling {
            presence_penalty: 1.5,
            frequency_penalty: 0.7,
            temperature: 0.0,
            ..plain.clone()
        },
        plain.clone(),
        Sampling { logit_bias: vec![(5, 9.5), (2999, 9.0), (5, 0.25)], ..plain.clone() },
        Sampling {
            repetition_penalty: 0.6,
            frequency_penalty: -1.1,
            top_k: 40,
            top_p: 0.8,
            ..plain
        },
    ];
    let (mut scratch, mut seen) = (Scratch::default(), std::collections::BTreeSet::new());
    for round in 0..6 {
        let mut how = Vec::new();
        let mut want = Vec::new();
        for (r, s) in rules.iter().enumerate() {
            let (prompt, answer) = (ids(10 * r, 400 * round), ids(31 * r + round, 300 * round));
            let banned = if r == 3 { &[5, 7][..] } else { &[] };
            let coin = coin(round as u64, r as u64);
            let mut row = logits[r * vocab..(r + 1) * vocab].to_vec();
            how.push(Draw {
                edits: edits(s, vocab, &prompt, &answer, banned, &mut scratch),
                sampling: s,
                coin,
            });
            adjust(s, &mut row, &prompt, &answer, banned, &mut scratch);
            want.push(Some(draw(s, &row, coin, &mut scratch).unwrap()));
        }
        assert!(how[2].edits.is_empty() && how[3].edits.len() == 3);
        let buf = cuda.upload(&logits, vocab);
        assert_eq!(cuda.draw(&buf, &how), want, "{round}");
        seen.extend(want.clone());
        // All banned in one row.
        how[1].edits =
            edits(&rules[1], vocab, &[], &[], &Vec::from_iter(0..vocab as u32), &mut scratch);
        let buf = cuda.upload(&logits, vocab);
        want[1] = None;
        assert_eq!(cuda.draw(&buf, &how), want);
        assert_eq!(cuda.read(&buf), logits, "{round}");
        cuda.finish().unwrap();
    }
    assert!(seen.len() > 15, "{seen:?}");
}
