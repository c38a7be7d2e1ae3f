//! Runs the unquantized model over a text: what its matrices are multiplied by, and what it costs to round one of them.

use super::super::weights::{Plan, Reader};
use super::super::{Forward, LoadOptions, Model, Quantization, Sequence, Wanted, forward};
use super::mixed;
use crate::backend::cpu::{Cpu, Inputs, Mat, topology};
use crate::model::divergence::{kl, log_sum_exp};
use crate::model::spec::Spec;
use crate::{Error, Result};
use std::sync::atomic::AtomicBool;

/// Most tokens whose logits are computed at once, and most bytes of these.
const ROWS: usize = 512;
const LOGITS: usize = 64 << 20;
/// Tokens on which it is measured what rounding a matrix costs.
const PROBE: usize = 2048;

/// The unquantized model, and a text for it.
pub(super) struct Observer<'a> {
    reader: &'a Reader<'a>,
    model: Model<Cpu>,
    mats: Vec<Mat>,
    contexts: &'a [Vec<u32>],
    stop: &'a AtomicBool,
    progress: &'a (dyn Fn(&'static str, u64, u64) + Sync),
    /// Sums over the inputs of some plans.
    seen: Vec<usize>,
    inputs: Inputs,
}

impl<'a> Observer<'a> {
    pub(super) fn new(
        reader: &'a Reader<'a>,
        spec: &Spec,
        load: &LoadOptions,
        contexts: &'a [Vec<u32>],
        stop: &'a AtomicBool,
        progress: &'a (dyn Fn(&'static str, u64, u64) + Sync),
    ) -> Result<Observer<'a>> {
        let threads = load.threads.unwrap_or_else(|| topology::auto().count);
        let backend = Cpu::new(threads, load.isa.as_deref())?;
        let plans = reader.plans(Quantization::None)?;
        let (mats, note) = reader.matrices(&plans, &backend, load)?;
        let weights = reader.join(&backend, mats.clone())?;
        let (groups, group_of) = forward::kv_groups(spec, load.kv_dtype);
        let spec = spec.clone();
        let kv_dtype = load.kv_dtype;
        let model = Model { spec, backend, weights, kv_dtype, group_of, groups, note };
        let longest = contexts.iter().map(Vec::len).max().unwrap_or(0);
        if longest > model.context_length() {
            let most = format!("at most {} tokens", model.context_length());
            return Err(Error::parameter("context", longest, most));
        }
        let (seen, inputs) = (Vec::new(), Inputs::default());
        Ok(Observer { reader, model, mats, contexts, stop, progress, seen, inputs })
    }

    /// Sums over what matrix `wanted[0]` meets on the text; `None` if nothing. They are there once. Those of the next
    /// ones `wanted` are made in the same run, as many as fit into half of the memory that is free.
    pub(super) fn sums(&mut self, wanted: &[usize], plans: &[Plan]) -> Result<Option<Vec<f32>>> {
        if !self.seen.contains(&wanted[0]) {
            let mut room = crate::backend::cpu::memory().available / 2;
            let fits = |&&i: &&usize| {
                let bytes = (plans[i].k * plans[i].k * size_of::<f32>()) as u64;
                let fits = bytes <= room;
                room = room.saturating_sub(bytes);
                i == wanted[0] || fits
            };
            self.model.weights = self.reader.join(&self.model.backend, self.mats.clone())?;
            let wanted = wanted.iter().filter(|&&i| mixed::rounds(plans[i].form));
            self.seen = wanted.take_while(fits).copied().collect();
            self.model.backend.watch_inputs(self.seen.iter().map(|&i| self.mats[i].id()));
            let report = |done| (self.progress)("calibrating", done, self.contexts.len() as u64);
            read(&self.model, self.contexts, self.stop, |done, _, _| {
                report(done as u64);
                Ok(())
            })?;
            self.inputs = self.model.backend.take_inputs();
        }
        self.seen.retain(|&i| i != wanted[0]);
        Ok(self.inputs.take(self.mats[wanted[0]].id()))
    }

    /// The divergence from the unquantized model, in nats a token, with the matrices of each group (plan, matrix) in their
    /// places.
    pub(super) fn costs(&mut self, groups: &[Vec<(usize, Mat)>]) -> Result<Vec<f64>> {
        let of = |p: &[f32], q: &[f32]| kl((p, log_sum_exp(p)), (q, log_sum_exp(q)));
        let mut costs = vec![0.0; groups.len()];
        let mut tokens = 0;
        let total = self.contexts.iter().map(Vec::len).sum::<usize>().min(PROBE);
        for context in self.contexts {
            let context = &context[..context.len().min(PROBE - tokens)];
            if context.is_empty() {
                break;
            }
            let contexts = &[context.to_vec()];
            let mut reference = Vec::new();
            self.model.weights = self.reader.join(&self.model.backend, self.mats.clone())?;
            read(&self.model, contexts, self.stop, |_, _, logits| {
                reference.extend_from_slice(logits);
                Ok(())
            })?;
            for (g, (group, cost)) in groups.iter().zip(&mut costs).enumerate() {
                let done = tokens * groups.len() + g * context.len();
                (self.progress)("measuring", done as u64, (total * groups.len()) as u64);
                let mut mats = self.mats.clone();
                for (i, mat) in group {
                    mats[*i] = mat.clone();
                }
                self.model.weights = self.reader.join(&self.model.backend, mats)?;
                let vocab = self.model.vocab();
                read(&self.model, contexts, self.stop, |_, at, logits| {
                    let rows = reference[at * vocab..].chunks_exact(vocab);
                    *cost +=
                        rows.zip(logits.chunks_exact(vocab)).map(|(p, q)| of(p, q)).sum::<f64>();
                    Ok(())
                })?;
            }
            tokens += context.len();
        }
        costs.iter_mut().for_each(|cost| *cost /= tokens.max(1) as f64);
        Ok(costs)
    }
}

/// Reads `contexts`; `each` gets the contexts done, and logits with the index of their first token.
fn read(
    model: &Model<Cpu>,
    contexts: &[Vec<u32>],
    stop: &AtomicBool,
    mut each: impl FnMut(usize, usize, &[f32]) -> Result<()>,
) -> Result<()> {
    let longest = contexts.iter().map(Vec::len).max().unwrap_or(0);
    let mut sequence = Sequence::new(model, longest)?;
    let rows = (LOGITS / (model.vocab() * size_of::<f32>())).clamp(16, ROWS);
    for (i, tokens) in contexts.iter().enumerate() {
        sequence.restart(tokens.len());
        for (n, tokens) in tokens.chunks(rows).enumerate() {
            // All logits: the head's inputs count, too.
            each(i, n * rows, &sequence.read(tokens, Wanted::All, stop)?)?;
        }
    }
    Ok(())
}
