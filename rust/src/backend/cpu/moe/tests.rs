//! The choice of experts against its definition, and the mixture against plain sums of its experts.

use super::super::{Activation, Backend, Form};
use super::*;
use crate::backend::cpu::tests::{mat, noise};
use crate::backend::{Groups, Score};
use proptest::prelude::*;

/// The definition, by sorting: experts by descending key, the first of equals first.
fn expected(how: &Routing, scores: &[f32], correction: &[f32]) -> Vec<(usize, f32)> {
    let keys: Vec<f32> = scores.iter().zip(correction).map(|(s, c)| s + c).collect();
    let sorted = |keys: &[f32]| {
        let mut order: Vec<usize> = (0..keys.len()).collect();
        order.sort_by(|&a, &b| keys[b].total_cmp(&keys[a]).then(a.cmp(&b)));
        order
    };
    let mut order = sorted(&keys);
    if let Some(groups) = how.groups {
        let size = keys.len() / groups.count;
        let score = |group: &[f32]| {
            let best = sorted(group);
            let second = best.get(1).map_or(f32::NEG_INFINITY, |&i| group[i]);
            if groups.by_two { group[best[0]] + second } else { group[best[0]] }
        };
        let scores: Vec<f32> = keys.chunks(size).map(score).collect();
        let open = &sorted(&scores)[..groups.top_k];
        order.retain(|e| open.contains(&(e / size)));
    }
    order.truncate(how.top_k);
    order.sort_unstable();
    let sum: f32 = order.iter().map(|&e| scores[e]).sum();
    let divisor = how.renormalise.map_or(1.0, |eps| sum + eps);
    order.into_iter().map(|e| (e, scores[e] / divisor * how.scale)).collect()
}

proptest! {
    #[test]
    fn the_choice_is_the_definition(
        count in 1usize..6, size in 1usize..9, open in 1usize..6, top_k in 1usize..12,
        grouped: bool, by_two: bool, corrected: bool, renormalise in prop::option::of(0f32..1e-3),
        // Few values, so that there are ties.
        values in prop::collection::vec(0u8..6, 2 * 48),
    ) {
        let (experts, open) = (count * size, open.min(count));
        let how = Routing {
            top_k: top_k.min(if grouped { open * size } else { experts }),
            score: Score::Sigmoid,
            groups: grouped.then_some(Groups { count, top_k: open, by_two }),
            renormalise,
            scale: 2.5,
        };
        let values: Vec<f32> = values.iter().map(|&v| f32::from(v) / 8.0 + 0.125).collect();
        let correction: Vec<f32> =
            values[48..][..experts].iter().map(|v| if corrected { v - 0.5 } else { 0.0 }).collect();
        let scores = &values[..experts];
        let mut chosen = vec![(0, 0.0); how.top_k];
        choose(&how, scores, corrected.then_some(&correction), &mut chosen);
        prop_assert_eq!(chosen, expected(&how, scores, &correction));
    }
}

#[test]
fn a_mixture_is_the_sum_of_its_experts_and_no_row_depends_on_the_others() {
    let (hidden, width, experts, top_k) = (100, 48, 7, 3);
    let how =
        Routing { top_k, score: Score::Softmax, groups: None, renormalise: Some(0.0), scale: 1.0 };
    let correction = noise(experts, 9);
    for form in [Form::Q4, Form::Q8, Form::F32] {
        for m in [1, 5, 40] {
            let x = noise(m * hidden, 5);
            let logits = noise(m * experts, 6);
            let run = |threads, rows: std::ops::Range<usize>| {
                let cpu = Cpu::new(threads, None).unwrap();
                let expert = |e: usize| {
                    let w = |seed, n: usize| noise(n, (10 * e + seed) as u32);
                    let (g, u) = (w(1, width * hidden), w(2, width * hidden));
                    Expert {
                        gate_up: mat(&cpu, form, &[(&g, width), (&u, width)], hidden, true),
                        gate_up_bias: Some(w(3, 2 * width)),
                        down: mat(&cpu, form, &[(&w(4, hidden * width), hidden)], width, false),
                        down_bias: Some(w(5, hidden)),
                    }
                };
                let weights: Vec<_> = (0..experts).map(expert).collect();
                let part = |x: &[f32], k| Buf::new(x[rows.start * k..rows.end * k].to_vec(), k);
                let (mut logits, x) = (part(&logits, experts), part(&x, hidden));
                let mut out = cpu.buf();
                let act = Activation::Silu;
                let c = Some(&correction);
                let all: Vec<_> = weights.iter().map(Expert::as_ref).collect();
                cpu.moe(&how, &mut logits, c, None, &all, act, width, &x, &mut out);
                // By hand: each expert on every row, then sums.
                let mut sum = vec![0.0; out.values().len()];
                let mut all = Vec::new();
                for w in &weights {
                    let (mut wide, mut y) = (cpu.buf(), cpu.buf());
                    cpu.gated(&w.gate_up, w.gate_up_bias.as_ref(), act, width, &x, &mut wide);
                    cpu.linear(&w.down, w.down_bias.as_ref(), &wide, &mut y);
                    all.push(y);
                }
                for t in 0..rows.len() {
                    let scores = logits.row(t);
                    for (e, p) in expected(&how, scores, &correction) {
                        for (sum, y) in sum[t * hidden..].iter_mut().zip(all[e].row(t)) {
                            *sum = p.mul_add(*y, *sum);
                        }
                    }
                }
                assert!(out.values() == sum, "{form:?}, {m} rows");
                sum
            };
            let whole = run(1, 0..m);
            assert!(run(3, 0..m) == whole);
            let alone = run(2, m - 1..m);
            assert!(alone == whole[(m - 1) * hidden..]);
        }
    }
}
