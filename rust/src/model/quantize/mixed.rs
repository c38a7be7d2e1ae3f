//! Which matrices get more than 4 bits: those where it lessens the divergence from the unquantized model most.

use super::calibrate::Observer;
use super::{Packer, Plan, Quantization};
use crate::backend::Form;
use crate::backend::cpu::{Bytes, Mat};
use crate::{Error, Result};

/// The forms to choose from, and what they cost over int4: squared errors of normally distributed weights, rounded
/// with feedback (of the matrices of tales-4m: 0.33 to 0.35, 0.070 to 0.071).
const LADDER: [(Form, f64); 4] =
    [(Form::Q4, 1.0), (Form::INT5, 0.34), (Form::INT6, 0.07), (Form::Q8, 0.008)];
/// Most groups of matrices whose cost is measured by itself.
const MOST: usize = 1024;

/// Whether weights are rounded to get this form.
pub(super) fn rounds(form: Form) -> bool {
    LADDER.iter().any(|(known, _)| *known == form)
}

/// An error if these bits cannot be had.
pub(super) fn check(
    bits: f64,
    format: Quantization,
    blind: bool,
    plans: &[Plan],
    parameters: u64,
) -> Result<()> {
    if format != Quantization::Int4 {
        return Err(Error::parameter("bits", bits, "format \"int4\" beside it, or none"));
    }
    if blind {
        return Err(Error::parameter("bits", bits, "a calibration text beside it"));
    }
    let least = 8.0 * plans.iter().map(|plan| plan.bytes() as f64).sum::<f64>() / parameters as f64;
    if !(least..=32.0).contains(&bits) {
        let expected = format!("{least:.3} (int4, but for what rules say) to 32");
        return Err(Error::parameter("bits", bits, expected));
    }
    Ok(())
}

impl Packer<'_> {
    /// Gives the `free` plans other forms, up to `bits` a parameter in all; what is packed already.
    pub(super) fn mix(
        &self,
        plans: &mut [Plan],
        free: &[usize],
        bits: f64,
        parameters: u64,
        observer: &mut Option<Observer<'_>>,
    ) -> Result<Vec<Option<Bytes>>> {
        let free: Vec<usize> =
            free.iter().copied().filter(|&i| plans[i].form == Form::Q4).collect();
        let mut ready = vec![None; plans.len()];
        for n in 0..free.len() {
            (self.progress)("quantizing", n as u64, free.len() as u64);
            ready[free[n]] = Some(self.pack(&free[n..], plans, observer)?);
        }
        let Some(observer) = observer else { return Ok(ready) };
        let mut groups = Vec::new();
        for group in free.chunks(free.len().div_ceil(MOST).max(1)) {
            let mut mats = Vec::new();
            for &i in group {
                let (plan, bytes) = (&plans[i], ready[i].clone().ok_or(Error::Closed)?);
                mats.push((i, Mat::new(plan.form, plan.n, plan.k, bytes)?));
            }
            groups.push(mats);
        }
        let costs = observer.costs(&groups)?;
        let groups: Vec<Vec<usize>> =
            groups.iter().map(|group| group.iter().map(|(i, _)| *i).collect()).collect();
        let bytes = |group: &[usize], form: Form| -> u64 {
            group.iter().map(|&i| form.bytes(plans[i].n, plans[i].k) as u64).sum()
        };
        let sizes: Vec<_> =
            groups.iter().map(|group| LADDER.map(|(form, _)| bytes(group, form))).collect();
        let all: u64 = plans.iter().map(|plan| plan.bytes() as u64).sum();
        let room = ((bits / 8.0 * parameters as f64) as u64).saturating_sub(all);
        for (group, step) in groups.iter().zip(choose(&sizes, &costs, room)) {
            for &i in group.iter().filter(|_| step > 0) {
                plans[i].form = LADDER[step].0;
                ready[i] = None;
            }
        }
        Ok(ready)
    }
}

/// The step of [`LADDER`] of each group, given its bytes on each: always the step up that lessens the cost most for its
/// bytes, of those that fit into `room`.
fn choose(sizes: &[[u64; LADDER.len()]], costs: &[f64], mut room: u64) -> Vec<usize> {
    let mut steps = vec![0; sizes.len()];
    loop {
        let mut best: Option<(f64, usize, u64)> = None;
        for (g, &step) in steps.iter().enumerate() {
            let Some((_, next)) = LADDER.get(step + 1) else { continue };
            let more = sizes[g][step + 1].saturating_sub(sizes[g][step]);
            let gain = costs[g] * (LADDER[step].1 - next) / more.max(1) as f64;
            if more <= room && best.is_none_or(|(most, ..)| gain > most) {
                best = Some((gain, g, more));
            }
        }
        let Some((_, g, more)) = best else { return steps };
        steps[g] += 1;
        room -= more;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_go_where_they_save_most_for_their_bytes() {
        let size = |n: u64| [4 * n, 5 * n, 6 * n, 8 * n];
        let sizes = [size(100), size(1000), size(10)];
        let costs = [1.0, 1.0, 0.0];
        // A byte of the first saves ten times what one of the second does; the third saves nothing, but bits are for use.
        assert_eq!(choose(&sizes, &costs, 0), [0, 0, 0]);
        assert_eq!(choose(&sizes, &costs, 99), [0, 0, 3]);
        assert_eq!(choose(&sizes, &costs, 100), [1, 0, 0]);
        assert_eq!(choose(&sizes, &costs, 200), [2, 0, 0]);
        assert_eq!(choose(&sizes, &costs, 1200), [2, 1, 0]);
        assert_eq!(choose(&sizes, &costs, u64::MAX), [3, 3, 3]);
    }
}
