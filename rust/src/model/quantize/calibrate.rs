//! Runs a model over a text and sums up what its matrices are multiplied by.

use super::super::weights::Reader;
use super::super::{Forward, LoadOptions, Model, Quantization, Sequence, Wanted, forward};
use crate::backend::cpu::{Cpu, Inputs, topology};
use crate::file::Checkpoint;
use crate::model::spec::Spec;
use crate::{Error, Result};
use std::path::Path;
use std::sync::atomic::AtomicBool;

/// Tokens whose logits are computed at once.
const ROWS: usize = 64;

/// Sums over the inputs of each matrix, in the order of plans.
#[derive(Default)]
pub(super) struct Seen {
    ids: Vec<usize>,
    inputs: Inputs,
}

impl Seen {
    pub(super) fn take(&mut self, plan: usize) -> Option<Vec<f32>> {
        self.inputs.take(*self.ids.get(plan)?)
    }
}

/// Sums over what the matrices of the unquantized model meet on `contexts`.
pub(super) fn run(
    path: &Path,
    checkpoint: &Checkpoint,
    spec: &Spec,
    mut load: LoadOptions,
    contexts: &[Vec<u32>],
    stop: &AtomicBool,
    progress: &(dyn Fn(&'static str, u64, u64) + Sync),
) -> Result<Seen> {
    let threads = load.threads.unwrap_or_else(|| topology::auto().count);
    let mut backend = Cpu::new(threads, load.isa.as_deref())?;
    let reader = Reader::new(path, checkpoint, spec);
    let plans = reader.plans(Quantization::None)?;
    let mats = reader.matrices(&plans, &backend, &mut load)?;
    let ids: Vec<usize> = mats.iter().map(|mat| mat.id()).collect();
    let weights = reader.join(&backend, mats)?;
    let (groups, group_of) = forward::kv_groups(spec, load.kv_dtype);
    backend.watch_inputs();
    let spec = spec.clone();
    let mut model = Model { spec, backend, weights, kv_dtype: load.kv_dtype, group_of, groups };
    let longest = contexts.iter().map(Vec::len).max().unwrap_or(0);
    if longest > model.context_length() {
        let most = format!("at most {} tokens", model.context_length());
        return Err(Error::parameter("context", longest, most));
    }
    let mut sequence = Sequence::new(&model, longest)?;
    for (i, tokens) in contexts.iter().enumerate() {
        progress("calibrating", i as u64, contexts.len() as u64);
        sequence.restart(tokens.len());
        for tokens in tokens.chunks(ROWS) {
            // All logits: the head's inputs count, too.
            sequence.read(tokens, Wanted::All, stop)?;
        }
    }
    drop(sequence);
    Ok(Seen { ids, inputs: model.backend.take_inputs() })
}
