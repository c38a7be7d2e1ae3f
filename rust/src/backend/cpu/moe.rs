//! Mixture of experts: each position chooses its experts, positions are gathered by expert, and each expert's weights
//! are read once for all of them. A position's result does not depend on the others: its products are its own, and
//! they are added up by ascending expert.

use super::memory::Disjoint;
use super::product::{Into, Job};
use super::{Buf, Cpu, Expert, Mat, Routing};

/// Room for one operation.
#[derive(Default)]
pub(super) struct Scratch {
    /// `[positions, top_k]`: expert and weight, experts ascending.
    chosen: Vec<(usize, f32)>,
    /// The place of each choice among the gathered rows.
    places: Vec<usize>,
    /// The position of each gathered row: those of the first expert, those of the second, ...
    rows: Vec<usize>,
    /// For each expert, the end of its rows.
    ends: Vec<usize>,
    /// The gathered inputs of experts, between their layers, and their outputs.
    input: Buf,
    hidden: Buf,
    output: Buf,
}

impl Cpu {
    /// [`Backend::moe`](super::Backend::moe).
    pub(super) fn mixture(
        &self,
        how: &Routing,
        logits: &mut Buf,
        correction: Option<&Vec<f32>>,
        scales: Option<&Vec<f32>>,
        experts: &[Expert<&Mat, &Vec<f32>>],
        gate: Into,
        x: &Buf,
        out: &mut Buf,
    ) {
        assert!(logits.rows == x.rows && logits.width == experts.len());
        assert!(correction.is_none_or(|c| c.len() == experts.len()));
        let mut scratch = self.moe.lock().unwrap_or_else(|e| e.into_inner());
        let Scratch { chosen, places, rows, ends, input, hidden, output } = &mut *scratch;
        let k = how.top_k;
        chosen.resize(x.rows * k, (0, 0.0));
        let (choices, scores) = (Disjoint::new(chosen), Disjoint::new(logits.values_mut()));
        self.each(x.rows, 4, |t| {
            // SAFETY: each position is claimed by one thread.
            let (chosen, scores) = unsafe {
                (
                    choices.part(t * k..(t + 1) * k),
                    scores.part(t * experts.len()..(t + 1) * experts.len()),
                )
            };
            self.kernels.score(how.score, scores);
            choose(how, scores, correction.map(Vec::as_slice), chosen);
            for (e, p) in chosen {
                *p *= scales.map_or(1.0, |scales| scales[*e]);
            }
        });
        // Gathered rows in the order of experts, those of one expert in the order of positions.
        ends.clear();
        ends.resize(experts.len(), 0);
        chosen.iter().for_each(|&(e, _)| ends[e] += 1);
        let mut end = 0;
        for e in &mut *ends {
            end += *e;
            *e = end - *e; // its start; each row below moves it on
        }
        places.resize(chosen.len(), 0);
        rows.resize(chosen.len(), 0);
        for (i, &(e, _)) in chosen.iter().enumerate() {
            (places[i], rows[ends[e]]) = (ends[e], i / k);
            ends[e] += 1;
        }
        input.shape(rows.len(), x.width);
        let values = Disjoint::new(input.values_mut());
        self.each(rows.len(), 4, |r| {
            // SAFETY: each row is claimed by one thread.
            unsafe { values.part(r * x.width..(r + 1) * x.width) }.copy_from_slice(x.row(rows[r]));
        });
        let Into::Gate(_, width) = gate else { unreachable!("experts are gated") };
        type Layer<'a> = (&'a Mat, Option<&'a Vec<f32>>);
        let jobs = |w: for<'a> fn(&Expert<&'a Mat, &'a Vec<f32>>) -> Layer<'a>| {
            let mut jobs = Vec::new();
            let mut start = 0;
            for (expert, &end) in experts.iter().zip(&*ends) {
                let (w, bias) = w(expert);
                let tokens = self.tokens(w);
                for from in (start..end).step_by(tokens) {
                    jobs.push(Job {
                        w,
                        block: 0,
                        n: w.n,
                        bias,
                        rows: from..end.min(from + tokens),
                    });
                }
                start = end;
            }
            jobs
        };
        hidden.shape(rows.len(), width);
        self.products(&jobs(|e| (e.gate_up, e.gate_up_bias)), input, gate, hidden);
        output.shape(rows.len(), x.width);
        self.products(&jobs(|e| (e.down, e.down_bias)), hidden, Into::Store, output);
        out.shape(x.rows, x.width);
        let values = Disjoint::new(out.values_mut());
        self.each(x.rows, 4, |t| {
            // SAFETY: each position is claimed by one thread.
            let out = unsafe { values.part(t * x.width..(t + 1) * x.width) };
            out.fill(0.0);
            for i in t * k..(t + 1) * k {
                self.kernels.add_scaled(out, chosen[i].1, output.row(places[i]));
            }
        });
    }
}

/// The experts of one position and their weights, experts ascending; see [`Routing`].
fn choose(how: &Routing, scores: &[f32], correction: Option<&[f32]>, chosen: &mut [(usize, f32)]) {
    let mut keys = scores.to_vec();
    for (key, c) in keys.iter_mut().zip(correction.unwrap_or_default()) {
        *key += c;
    }
    let mut taken = vec![false; keys.len()];
    if let Some(groups) = how.groups {
        let size = keys.len() / groups.count;
        let score = |keys: &[f32]| {
            let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
            for &key in keys {
                second = second.max(first.min(key));
                first = first.max(key);
            }
            if groups.by_two { first + second } else { first }
        };
        let scores: Vec<f32> = keys.chunks(size).map(score).collect();
        let mut open = vec![false; groups.count];
        for _ in 0..groups.top_k {
            let g = largest(&scores, &open);
            open[g] = true;
        }
        for (taken, open) in taken.chunks_mut(size).zip(open) {
            taken.fill(!open);
        }
    }
    for (e, _) in &mut *chosen {
        *e = largest(&keys, &taken);
        taken[*e] = true;
    }
    chosen.sort_unstable_by_key(|&(e, _)| e);
    let sum: f32 = chosen.iter().map(|&(e, _)| scores[e]).sum();
    for (e, p) in chosen {
        *p = scores[*e];
        if let Some(more) = how.renormalise {
            *p /= sum + more;
        }
        *p *= how.scale;
    }
}

/// The largest of those not taken, the first of equals.
fn largest(keys: &[f32], taken: &[bool]) -> usize {
    let mut best = None;
    for (i, &key) in keys.iter().enumerate() {
        if !taken[i] && best.is_none_or(|b: usize| key > keys[b]) {
            best = Some(i);
        }
    }
    best.unwrap_or(0)
}

#[cfg(test)]
mod tests;
