//! From the keywords of `Engine` to a model on its engine: which machine, how much memory, in which order. Never computes.

use super::driver::{self, Inbox};
use super::{Info, KV_DTYPES, device};
use crate::backend::Backend;
use crate::backend::cpu;
#[cfg(feature = "cuda")]
use crate::backend::cuda::{Cuda, Split};
use crate::chat::{ChatTemplate, special_tokens};
use crate::engine::{self, EngineConfig};
use crate::model::{self, Forward, GpuLayers, LoadOptions, Model, Wish};
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};
use std::path::Path;
use std::sync::{Arc, mpsc};

/// Keywords of `Engine`.
#[derive(Clone)]
pub(super) struct Options {
    pub(super) device: device::Wanted,
    pub(super) load: LoadOptions,
    pub(super) engine: EngineConfig,
    pub(super) kv_bytes: Option<u64>,
    pub(super) context_length: Option<usize>,
    pub(super) gpu_layers: GpuLayers,
    pub(super) chat_template: Option<String>,
    pub(super) eos: Vec<u32>,
}

/// Opens what `folder` has, reports to `sender`, and serves until the inbox is closed.
pub(super) fn load_and_drive(
    folder: &Path,
    options: Options,
    sender: &mpsc::Sender<Result<Loaded>>,
    inbox: &Inbox,
) {
    let again = options.clone();
    let served = match attempt(folder, options, false, sender, inbox) {
        // The device had less than it said, or the model took more than its headers say.
        Err(Error::OutOfMemory { .. })
            if again.gpu_layers == GpuLayers::Auto && again.device != device::Wanted::Cpu =>
        {
            attempt(folder, again, true, sender, inbox)
        }
        served => served,
    };
    if let Err(error) = served {
        drop(sender.send(Err(error)));
    }
}

fn attempt(
    folder: &Path,
    options: Options,
    again: bool,
    sender: &mpsc::Sender<Result<Loaded>>,
    inbox: &Inbox,
) -> Result<()> {
    let Options { load, context_length, kv_bytes, gpu_layers, .. } = &options;
    let (context_length, kv_bytes, gpu_layers) = (*context_length, *kv_bytes, *gpu_layers);
    let asked = device::Asked { folder, load, context_length, kv_bytes, gpu_layers, again };
    match options.device.target(&asked)? {
        device::Target::Cpu(because) => {
            let load = |load| model::load(folder, load);
            let available = Some(cpu::memory().available);
            serve(folder, options, load, device::cpu, available, because, sender, inbox)
        }
        #[cfg(feature = "cuda")]
        device::Target::Cuda(cuda, plan) => match plan.border {
            None => {
                let load = |load| model::load_onto(folder, *cuda, load);
                let machine = |cuda: &Cuda| device::cuda(cuda, &plan, again);
                serve(folder, options, load, machine, None, String::new(), sender, inbox)
            }
            Some(border) => {
                let load = |load| model::load_onto(folder, Split::new(*cuda, border), load);
                let machine = |split: &Split| device::cuda(split.cuda(), &plan, again);
                serve(folder, options, load, machine, None, String::new(), sender, inbox)
            }
        },
    }
}

fn serve<B: Backend>(
    folder: &Path,
    options: Options,
    load: impl FnOnce(LoadOptions) -> Result<Model<B>>,
    machine: impl FnOnce(&B) -> device::Machine,
    available: Option<u64>,
    because: String,
    sender: &mpsc::Sender<Result<Loaded>>,
    inbox: &Inbox,
) -> Result<()> {
    let (engine, loaded) = open(folder, options, load, machine, available, because)?;
    // Nobody may wait for it any more: then the inbox is closed, and nobody comes.
    let _ = sender.send(Ok(loaded));
    driver::drive(engine, inbox);
    Ok(())
}

fn open<B: Backend>(
    folder: &Path,
    options: Options,
    load_model: impl FnOnce(LoadOptions) -> Result<Model<B>>,
    machine: impl FnOnce(&B) -> device::Machine,
    available: Option<u64>,
    device_because: String,
) -> Result<(engine::Engine<Model<B>>, Loaded)> {
    let Options { load, mut engine, kv_bytes, context_length, chat_template, mut eos, .. } =
        options;
    let kv_dtype = load.kv_dtype;
    // Small files first: what they lack shows before the weights are read.
    let tokenizer = Arc::new(Tokenizer::open(folder)?);
    let template = match chat_template {
        Some(source) => Some(ChatTemplate::new(&source, special_tokens(folder)?)?),
        None => ChatTemplate::open(folder)?,
    };
    let cache = load.cache_dir.is_some();
    let wish = Wish { cache, context_length, kv_bytes, max_batch: engine.max_batch };
    // A device has memory of its own, and says itself when it is short.
    let budget =
        available.map(|available| model::describe(folder, &load)?.budget(&wish, available));
    let budget = budget.transpose()?;
    let model = Arc::new(load_model(load)?);
    let device::Machine { device, isa, threads, free, gpu_layers, mut notes } =
        machine(&model.backend);
    notes.extend(model.note.clone());
    notes.extend(budget.iter().flat_map(|budget| budget.notes.clone()));
    if eos.is_empty() {
        eos.extend(tokenizer.ends());
    }
    let spec = &model.spec;
    if let Some(id) = eos.iter().find(|&&id| id as usize >= spec.vocab) {
        return Err(Error::format(
            folder,
            format!(
                "eos_token_id (of generation_config.json, config.json or the tokenizer): found {id}, expected an id below {}",
                spec.vocab
            ),
        ));
    }
    engine.context_length = context_length.unwrap_or(spec.context_length);
    engine.kv_bytes = budget.as_ref().map_or(kv_bytes.unwrap_or(free), |budget| budget.kv_bytes);
    let driven = engine::Engine::new(model.clone(), tokenizer.clone(), eos, engine)?;
    let pages = driven.stats().pages.into_iter().zip(model.kv_groups());
    let info = Info {
        architecture: spec.architecture.clone(),
        parameters: spec.parameters().0,
        active_parameters: spec.parameters().1,
        quantization: model.form(),
        weight_bytes: model.weight_bytes(),
        layers: spec.layers.len(),
        vocab_size: spec.vocab,
        context_length: driven.context_length(),
        chat_template: template.is_some(),
        kv_cache_dtype: KV_DTYPES.iter().find(|(_, d)| *d == kv_dtype).map_or("", |(name, _)| name),
        kv_cache_bytes: pages.map(|(n, group)| (n.total * group.page_bytes) as u64).sum(),
        device,
        gpu_layers,
        device_because,
        isa,
        threads,
        notes,
    };
    Ok((driven, Loaded { tokenizer, template, info }))
}

/// What the loading thread hands back before it begins to serve.
pub(super) struct Loaded {
    pub(super) tokenizer: Arc<Tokenizer>,
    pub(super) template: Option<ChatTemplate>,
    pub(super) info: Info,
}
