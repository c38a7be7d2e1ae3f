//! What a model is and what it will take, from its headers: no matrix is read.

use super::spec::{self, Ffn, Mixer, Spec, Stored};
use super::{KvGroup, LoadOptions, forward, weights};
use crate::Result;
use std::path::Path;

/// What a model is and what it will take.
#[derive(Clone, Debug, PartialEq)]
pub struct Description {
    /// Name in `config.json`'s `architectures`.
    pub architecture: String,
    /// The file of `models/families` that describes it, or "given".
    pub family: String,
    /// Numbers that were trained.
    pub parameters: u64,
    /// Those that one token is multiplied by.
    pub active_parameters: u64,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Positions it was made for.
    pub context_length: usize,
    /// Kinds of layers and how many there are of each, in the order of their first.
    pub layers: Vec<(String, usize)>,
    /// How the files' matrices are quantized, if `config.json` says that they are.
    pub quantization: Option<String>,
    /// Bytes in the files by type, of all tensors.
    pub stored: Vec<(&'static str, u64)>,
    /// Bytes in memory by form, of all matrices.
    pub packed: Vec<(&'static str, u64)>,
    /// Its page tables.
    pub kv_groups: Vec<KvGroup>,
    /// Bytes of the largest packed matrix.
    pub largest: u64,
    /// Bytes of what else a running model needs, nearly: activations, logits, the tokenizer.
    pub working: u64,
}

/// Positions computed at once, which windows need room for.
pub const CHUNK: usize = 512;
/// Bytes that a tokenizer takes for each entry of its vocabulary: 730 stay, the rest is needed while it is read.
const ENTRY: u64 = 900;

/// Describes the model in `folder`, or the GGUF file that it is, as it would be loaded with `options`.
pub fn describe(folder: &Path, options: &LoadOptions) -> Result<Description> {
    let (spec, checkpoint, path) = super::open(folder, options)?;
    let sizes = weights::sizes(&path, &checkpoint, &spec, options.quantization)?;
    let mut stored = Vec::new();
    for tensor in checkpoint.names().filter_map(|name| checkpoint.get(name)) {
        add(&mut stored, tensor.dtype.name(), tensor.bytes.len() as u64);
    }
    let mut layers = Vec::new();
    for layer in &spec.layers {
        let mixer = match &layer.mixer {
            Mixer::Attention(a) => {
                let window = a.window.map_or(String::new(), |w| format!(" over {w} positions"));
                let (h, kv, d) = (a.heads, a.kv_heads, a.head_dim);
                format!("attention{window} ({h} heads of {d}, {kv} for keys and values)")
            }
            Mixer::Latent(a) => {
                format!("latent attention ({} heads, {} numbers kept)", a.heads, a.key_dim())
            }
            Mixer::Recurrent(r) => format!("recurrence (a state of {} numbers)", r.shape.state()),
        };
        let experts = |moe: &spec::Moe| {
            format!("{} of {} experts of {}", moe.routing.top_k, moe.experts, moe.width)
        };
        let ffn = match &layer.ffn {
            Ffn::Moe(moe) => experts(moe),
            Ffn::Beside(width, moe) => format!("{width} wide and {}", experts(moe)),
            Ffn::Dense(width) | Ffn::Plain(width) | Ffn::Sparse(width, _) => {
                format!("{width} wide")
            }
        };
        add(&mut layers, format!("{mixer}, {ffn}"), 1);
    }
    let (groups, _) = forward::kv_groups(&spec, options.kv_dtype);
    let (parameters, active_parameters) = spec.parameters();
    Ok(Description {
        architecture: spec.architecture.clone(),
        family: spec.family.clone(),
        parameters,
        active_parameters,
        hidden: spec.hidden,
        vocab: spec.vocab,
        context_length: spec.context_length,
        layers,
        quantization: quantization(&spec),
        stored,
        packed: sizes.forms,
        kv_groups: groups,
        largest: sizes.largest,
        working: working(&spec, sizes.widest),
    })
}

/// The method, and what it makes of matrices.
fn quantization(spec: &Spec) -> Option<String> {
    let moes = || spec.layers.iter().filter_map(|layer| layer.ffn.moe());
    let mxfp4 = moes().any(|moe| moe.stored == Stored::Mxfp4).then(|| "mxfp4: experts".to_owned());
    spec.quantized.as_ref().map(spec::Quantized::name).or(mxfp4)
}

/// Bytes of activations of one chunk, of logits and of the tokenizer, nearly and rather too much: `widest` are the
/// most outputs and inputs of a matrix.
fn working(spec: &Spec, widest: (usize, usize)) -> u64 {
    activations(spec, widest).saturating_add(ENTRY * spec.vocab as u64)
}

/// The same without the tokenizer.
pub(super) fn activations(spec: &Spec, (outputs, inputs): (usize, usize)) -> u64 {
    let mixture = |moe: &spec::Moe| moe.routing.top_k * (2 * spec.hidden + moe.width);
    let mixture = spec.layers.iter().map(|layer| match &layer.ffn {
        Ffn::Moe(moe) | Ffn::Beside(_, moe) => mixture(moe),
        _ => 0,
    });
    // The residual stream, its norm and two outputs as wide; the widest output and input; quantized inputs.
    let numbers =
        4 * spec.hidden + outputs + inputs + inputs.div_ceil(4) + mixture.max().unwrap_or(0);
    let chunk = CHUNK.min(spec.context_length);
    // A row of logits is computed, copied and sampled from.
    let floats =
        (chunk as u64).saturating_mul(numbers as u64).saturating_add(4 * spec.vocab as u64);
    floats.saturating_mul(size_of::<f32>() as u64)
}

/// Adds to the count of a name.
fn add<N: PartialEq, T: std::ops::AddAssign>(counts: &mut Vec<(N, T)>, name: N, count: T) {
    match counts.iter_mut().find(|(known, _)| *known == name) {
        Some((_, sum)) => *sum += count,
        None => counts.push((name, count)),
    }
}
