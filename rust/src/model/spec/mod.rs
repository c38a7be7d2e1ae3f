//! What a decoder-only model is, as data: a family (`models/families/*.toml`) applied to one `config.json`.
//! Nothing else in the crate reads either file. Never touches a tensor.

mod build;
mod config;
mod cuda;
mod family;
mod gemma;
pub mod gguf;
mod latent;
mod moe;
mod names;
mod place;
mod quantized;
mod recurrent;
mod rope;
mod ropes;
#[cfg(test)]
mod tests;
mod to_gguf;

pub use gemma::{Gemma, Inputs, Streams};
pub use latent::Latent;
pub use moe::{Moe, Shared, Stored};
pub(super) use names::matches;
pub use names::{Names, Weight};
pub use place::Slice;
pub use quantized::{Quantized, Scheme, Spread};
pub use recurrent::Recurrent;
use serde::Deserialize;
use std::collections::BTreeMap;
pub use to_gguf::Said;

/// Kind of norm. `Rms`: `x / sqrt(mean(x^2) + eps) * w` (Zhang and Sennrich 2019). `Layer`:
/// `(x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * w + bias?` (Ba et al. 2016).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Norm {
    /// With `w` as stored.
    Rms,
    /// With `1 + w` (Gemma): the loader adds the 1 in f32, so that the forward pass sees `w`. All norms of the
    /// model, q and k norm included.
    RmsPlusOne,
    /// With `w` as stored.
    Layer,
    /// With `1 + w` (Nemotron's LayerNorm1P).
    LayerPlusOne,
}

impl Norm {
    /// The stored weight is added to 1.
    pub fn plus_one(self) -> bool {
        matches!(self, Norm::RmsPlusOne | Norm::LayerPlusOne)
    }
    /// The mean is subtracted.
    pub fn centred(self) -> bool {
        matches!(self, Norm::Layer | Norm::LayerPlusOne)
    }
}

/// Where a layer has a norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// On the input of attention: weight `attn_norm`.
    Attn,
    /// On the output of attention, before it is added to the residual: `attn_after_norm`.
    AttnAfter,
    /// On the input of the feed-forward network: `ffn_norm`.
    Ffn,
    /// On the output of the feed-forward network, before it is added to the residual: `ffn_after_norm`.
    FfnAfter,
}

/// Which of the four norms of a layer exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // see Place
pub struct Norms {
    pub attn: bool,
    pub attn_after: bool,
    pub ffn: bool,
    pub ffn_after: bool,
}

/// Norm of queries and keys before rotary embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QkNorm {
    /// None.
    None,
    /// Over `head_dim`, one weight `[head_dim]` for all heads: `q_norm`, `k_norm`.
    Head,
    /// Over `head_dim`, each head with its own weight: `[heads, head_dim]` (Cohere, StableLM 2 12B).
    EachHead,
    /// Over all heads together, one weight `[heads * head_dim]` (OLMo 2).
    Full,
}

/// Activation of the feed-forward network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// `x / (1 + exp(-x))`.
    Silu,
    /// `x / 2 * (1 + erf(x / sqrt(2)))`.
    Gelu,
    /// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`.
    GeluTanh,
    /// `max(x, 0)^2` (So et al. 2021).
    Relu2,
    /// xIELU (Huang and Schlag 2024), with numbers of each layer: `beta x + softplus(alpha_p) x^2` where `x > 0`,
    /// else `beta x + (beta + softplus(alpha_n)) (exp(min(x, eps)) - 1 - x)`.
    XIelu,
    /// `g * sigmoid(1.702 g)` with `g = min(x, 7)`; `up` becomes `clamp(up, -7, 7) + 1` (GPT-OSS).
    ClampedSwiglu,
}

/// One layer: positions are mixed, then each is transformed.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// What mixes positions.
    pub mixer: Mixer,
    /// What transforms each position.
    pub ffn: Ffn,
}

/// What mixes positions in a layer.
#[derive(Clone, Debug, PartialEq)]
pub enum Mixer {
    /// Softmax attention over cached keys and values.
    Attention(Attention),
    /// The same over what keys and values are made from.
    Latent(Latent),
    /// A convolution and what follows it, over a state.
    Recurrent(Recurrent),
}

/// What transforms each position in a layer.
#[derive(Clone, Debug, PartialEq)]
pub enum Ffn {
    /// `down(act(gate(x)) * up(x))` of this width.
    Dense(usize),
    /// Experts, of which each position uses some.
    Moe(Moe),
    /// `down(act(up(x)))` of this width.
    Plain(usize),
    /// `down(act(max(0, g - mean(g) - t * deviation(g))) * up(x))`, `g = gate(x)`, of this width and with this `t`
    /// (Gemma 3n).
    Sparse(usize, f32),
    /// A dense network of this width beside experts (Gemma 4), with norms `n` of their own around each; the layer's
    /// norm is on the input of the network and on the sum of both: `n(dense(norm(x))) + n(experts(n(x)))`. The
    /// router's input is `x / rms(x) * router_norm / sqrt(hidden)`, and an expert's weight is multiplied by its
    /// number in `expert_scale`.
    Beside(usize, Moe),
}

impl Ffn {
    /// The experts, if there are any.
    pub fn moe(&self) -> Option<&Moe> {
        match self {
            Ffn::Moe(moe) | Ffn::Beside(_, moe) => Some(moe),
            _ => None,
        }
    }
}

/// What the values of a layer are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Values {
    /// A projection.
    Projected,
    /// A projection, each head divided by its root mean square (Gemma 3n).
    Normed,
    /// The same of the projection that keys are made from, before their norm (Gemma 4).
    NormedKeys,
}

/// Shape of attention in one layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; query head h reads head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Width of a head; `heads * head_dim` need not be the hidden size.
    pub head_dim: usize,
    /// Multiplies q k: `1 / sqrt(head_dim)`, `1 / sqrt(query_pre_attn_scalar)` (Gemma), or as given (Granite).
    pub scale: f32,
    /// Queries, keys and values are clamped to plus or minus this, after q and k norm, before rotation (OLMo).
    pub clip: Option<f32>,
    /// Soft cap of the scaled scores, before the mask.
    pub softcap: Option<f32>,
    /// Position i sees j with `i - window < j <= i`: `window` keys, itself included. `None`: all `j <= i`.
    pub window: Option<usize>,
    /// Index into `Spec::ropes`; `None`: queries and keys carry no position.
    pub rope: Option<usize>,
    /// Queries of position p are multiplied by `1 + growth * ln(1 + floor(p / every))` after rotation (Ministral 3,
    /// as Llama 4): `(growth, every)`.
    pub query_growth: Option<(f32, usize)>,
    /// What the values are.
    pub values: Values,
    /// The layer whose keys and values are read; the layer then makes none. `None`: its own.
    pub kv_of: Option<usize>,
    /// What the heads' outputs are multiplied by.
    pub gate: Gate,
    /// One more score in each head's softmax, without a value: weight `sinks`, `[heads]` (gpt-oss).
    pub sinks: bool,
    /// Rotary pairs are neighbours: `2i` and `2i + 1` (GPT-J), not half a rotation apart (GPT-NeoX).
    pub rope_interleaved: bool,
}

impl Attention {
    /// Width of all queries.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }
    /// Width of the gate.
    pub fn gate_width(&self) -> usize {
        match self.gate {
            Gate::None => 0,
            Gate::Head => self.heads,
            Gate::Element => self.q_width(),
        }
    }
    /// Width of all keys, and of all values.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// Rotary embedding (Su et al. 2021) of the first `r = 2 inv_freq.len()` dimensions of a head: with
/// `a = position * inv_freq[i]`, `c = scale * cos(a)`, `s = scale * sin(a)`, pair i, `(x, y)`, becomes
/// `(c x - s y, c y + s x)`. Pair i is dimensions `i` and `i + r/2`, or `2i` and `2i + 1` if interleaved.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// One frequency for each pair, scaling rules applied; at most `head_dim / 2`, the rest of a head stays.
    pub inv_freq: Vec<f32>,
    /// Multiplies cos and sin (YaRN's and LongRoPE's attention factor; else 1).
    pub scale: f32,
    /// Other frequencies for long sequences.
    pub long: Option<Long>,
}

/// LongRoPE (Ding et al. 2024) as Phi-3 has it: a model with two sets of frequencies, one for sequences within the
/// context it was first trained for, one for longer ones. transformers chooses one set for all rows of a forward
/// pass, by its largest position, and leaves older keys in the cache as they are; what a token gets then depends on
/// how a prompt is cut. Here the choice depends on the request alone: position `p` of a request with a prompt of `n`
/// tokens has the long set if `max(p + 1, n) > after`. That is what transformers does when it reads a prompt at once
/// and then generates from its cache.
#[derive(Clone, Debug, PartialEq)]
pub struct Long {
    /// One frequency for each pair.
    pub inv_freq: Vec<f32>,
    /// `original_max_position_embeddings`.
    pub after: usize,
}

/// What the output of attention is multiplied by: the sigmoid of a projection of its input, weight `attn_gate`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gate {
    /// Nothing.
    None,
    /// One number for each head: `[heads, hidden]` (LFM3).
    Head,
    /// One for each of its numbers: `[heads * head_dim, hidden]` (Qwen3-Next).
    Element,
}

/// The layers that have rotary embedding at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeOn {
    /// All.
    #[default]
    All,
    /// Those with a window (Command R7B).
    Sliding,
    /// Those with a window, or all if the file names no window (EXAONE 4).
    SlidingIfAny,
}

/// A model with every number known. Invariants: no dimension is 0, in each layer `heads` is a multiple of `kv_heads`
/// and `head_dim` is even, `layers` is not empty, the bytes of each weight in f32 fit in `isize`.
///
/// ```text
/// x = embed[id] * embed_scale + positions?[position]
/// each layer: a = norm?(x); q, k, v = a Wq + bq?, a Wk + bk?, a Wv + bv?; qk_norm?; clip?; rope?
///             s = softcap?(attn_scale * q k); o = sigmoid(a Wg)? * softmax(s over the window) v
///             x = x + m norm?(o Wo + bo?);  x = x + m norm?(down(act(gate(b)) * up(b))), b = norm?(x)
///             in parallel: b = norm(x) of the layer's input, or a if there is no such norm; m = residual_scale
/// logits = softcap?((norm(x) head + bias?) * logit_scale)          softcap(y) = cap * tanh(y / cap)
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// Name in `config.json`'s `architectures`, or a GGUF file's `general.architecture`.
    pub architecture: String,
    /// The family that it is: a file of `models/families`, or "given".
    pub family: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the embedding; may exceed the tokenizer's.
    pub vocab: usize,
    /// Added to the mean square in every norm.
    pub eps: f32,
    /// Kind of all norms.
    pub norm: Norm,
    /// Biases in the norms of layers and the last norm.
    pub norm_bias: bool,
    /// Which norms a layer has.
    pub norms: Norms,
    /// Attention and feed-forward network both read the layer's input (GPT-NeoX, Phi-2, Cohere).
    pub parallel: bool,
    /// Multiplies what a layer adds to the residual stream, twice (Granite, MiniCPM).
    pub residual_scale: f32,
    /// Norm of queries and keys.
    pub qk_norm: QkNorm,
    /// The norm of queries and keys comes after the rotation (Hunyuan), not before it.
    pub qk_norm_after_rope: bool,
    /// Activation of the feed-forward network.
    pub act: Act,
    /// The matrices of layers are stored as `[in, out]` (GPT-2).
    pub transposed: bool,
    /// Queries, keys and values are one tensor `[kv_heads, heads / kv_heads + 2, head_dim]`: of each key/value head
    /// its queries, its key, its value (GPT-NeoX).
    pub qkv_by_head: bool,
    /// xIELU's `alpha_p`, `alpha_n`, `beta` and `eps` in each layer, where a checkpoint has them elsewhere than in tensors.
    pub xielu: Option<Vec<[f32; 4]>>,
    /// Biases on q, k, v.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub o_bias: bool,
    /// Biases on gate (where there is one), up, down.
    pub mlp_bias: bool,
    /// Multiplies the logits (Cohere; Granite and MiniCPM divide).
    pub logit_scale: f32,
    /// Soft cap of the logits.
    pub logit_softcap: Option<f32>,
    /// Multiplies the embedding: `sqrt(hidden)` in f32 (Gemma), or as given (Granite, MiniCPM), else 1.
    pub embed_scale: f32,
    /// Learned vectors of this many positions are added to the embedding (GPT-2); no position is rotated then.
    pub positions: Option<usize>,
    /// The head is the embedding.
    pub tied: bool,
    /// A bias on the logits (Phi-2).
    pub head_bias: bool,
    /// What only Gemma 3n and 4 have.
    pub gemma: Option<Gemma>,
    /// The layers, first to last.
    pub layers: Vec<Layer>,
    /// The rotary embeddings that layers refer to.
    pub ropes: Vec<Rope>,
    /// Positions the model is meant for: `max_position_embeddings`, or what YaRN extends it to.
    pub context_length: usize,
    /// How quantized matrices are stored, where a `quantization_config` says so. MXFP4 is in [`Moe::stored`].
    pub quantized: Option<Quantized>,
    model: Vec<String>,
    names: BTreeMap<String, family::Names>,
    ignore: Vec<String>,
}

impl Spec {
    /// Where sequences begin to be long: [`Long::after`].
    pub fn long_after(&self) -> Option<usize> {
        self.ropes.iter().find_map(|rope| rope.long.as_ref()).map(|long| long.after)
    }
}
