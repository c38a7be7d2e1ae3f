//! What a decoder-only model is, as data: a family (`models/families/*.toml`) applied to one `config.json`.
//! Nothing else in the crate reads either file. Never touches a tensor.

mod config;
mod family;
mod rope;
#[cfg(test)]
mod tests;

use crate::{Error, Result};
use config::{Facts, Object, bad, shown};
use family::Family;
use serde::Deserialize;
use serde_json::Value;
use std::collections::{BTreeMap, HashSet};

// No released model comes near these; they keep every product of two far below 2^64.
const MAX_LAYERS: usize = 10_000;
const MAX_WIDTH: usize = 1 << 20;
const MAX_HEADS: usize = 1 << 14;
const MAX_HEAD_DIM: usize = 1 << 14;
const MAX_FFN: usize = 1 << 22;
const MAX_VOCAB: usize = 1 << 24;
const MAX_POSITIONS: usize = 1 << 30;

/// Root mean square norm: `x / sqrt(mean(x^2) + eps) * w` (Zhang and Sennrich 2019).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Norm {
    /// With `w` as stored.
    Rms,
    /// With `1 + w` (Gemma): the loader adds the 1 in f32, so that the forward pass sees `w`. All norms of the
    /// model, q and k norm included.
    RmsPlusOne,
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
}

/// Activation of the feed-forward network: `down(act(gate(x)) * up(x))`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// `x / (1 + exp(-x))`.
    Silu,
    /// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`.
    GeluTanh,
}

/// What differs from layer to layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Position i sees j with `i - window < j <= i`: `window` keys, itself included. `None`: all `j <= i`.
    pub window: Option<usize>,
    /// Index into `Spec::ropes`.
    pub rope: usize,
}

/// Rotary embedding in half-split layout: with `a = position * inv_freq[i]`, `c = scale * cos(a)`,
/// `s = scale * sin(a)`, the pair `(x[i], x[i + d/2])` becomes `(c x[i] - s x[i+d/2], c x[i+d/2] + s x[i])`.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// One frequency for each pair, `[head_dim / 2]`, scaling rules applied.
    pub inv_freq: Vec<f32>,
    /// Multiplies cos and sin (YaRN's attention factor; else 1).
    pub scale: f32,
}

/// A weight that the model has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weight {
    /// Its short name here: `embed`, `q`, `q_bias`, ...
    pub what: &'static str,
    /// Its shape: `[out, in]` for a matrix, `[n]` for a norm or a bias.
    pub shape: Vec<usize>,
}

/// A model with every number known. Invariants: no dimension is 0, `heads` is a multiple of `kv_heads`,
/// `head_dim` is even, `layers` is not empty, the bytes of each weight in f32 fit in `isize`.
///
/// ```text
/// x = embed[id] * embed_scale
/// each layer: a = norm?(x); q, k, v = a Wq + bq?, a Wk + bk?, a Wv + bv?; qk_norm?; rope
///             s = softcap?(attn_scale * q k); o = softmax(s over the window) v
///             x = x + norm?(o Wo + bo?);  x = x + norm?(down(act(gate(a)) * up(a))), a = norm?(x)
/// logits = softcap?(norm(x) head)          softcap(y) = cap * tanh(y / cap)
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// Name in `config.json`'s `architectures`.
    pub architecture: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; query head h reads head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Width of a head; `heads * head_dim` need not be `hidden`.
    pub head_dim: usize,
    /// Width of the feed-forward network.
    pub ffn: usize,
    /// Rows of the embedding; may exceed the tokenizer's.
    pub vocab: usize,
    /// Added to the mean square in every norm.
    pub eps: f32,
    /// Kind of all norms.
    pub norm: Norm,
    /// Which norms a layer has.
    pub norms: Norms,
    /// Norm of queries and keys.
    pub qk_norm: QkNorm,
    /// Activation of the feed-forward network.
    pub act: Act,
    /// Biases on q, k, v.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub o_bias: bool,
    /// Biases on gate, up, down.
    pub mlp_bias: bool,
    /// Multiplies q k: `1 / sqrt(head_dim)`, or `1 / sqrt(query_pre_attn_scalar)` (Gemma).
    pub attn_scale: f32,
    /// Soft cap of the scaled scores, before the mask.
    pub attn_softcap: Option<f32>,
    /// Soft cap of the logits.
    pub logit_softcap: Option<f32>,
    /// Multiplies the embedding: `sqrt(hidden)` in f32 (Gemma), else 1.
    pub embed_scale: f32,
    /// The head is the embedding.
    pub tied: bool,
    /// The layers, first to last.
    pub layers: Vec<Layer>,
    /// The rotary embeddings that layers refer to.
    pub ropes: Vec<Rope>,
    /// Positions the model is meant for: `max_position_embeddings`, or what YaRN extends it to.
    pub context_length: usize,
    model: Vec<String>,
    names: BTreeMap<String, family::Names>,
    ignore: Vec<String>,
}

impl Spec {
    /// Reads `config`, the parsed `config.json`. `family` is the TOML text of a family to use instead of the one
    /// that ships for this architecture.
    pub fn new(config: &Value, family: Option<&str>) -> Result<Spec> {
        let Some(top) = config.as_object() else {
            return Err(Error::format("config.json", "found no object, expected one"));
        };
        let top = Object { map: top, path: String::new() };
        let Some(architecture) = top.get("architectures").and_then(|v| v[0].as_str()) else {
            let found = top.get("architectures").map_or("nothing".to_owned(), shown);
            return Err(top.bad("architectures", found, "a list with the model's class name"));
        };
        let family = match family {
            None => Family::of(architecture)?,
            Some(text) => {
                let family = Family::parse(text, "given")?;
                if !family.architectures.iter().any(|a| a == architecture) {
                    let names = family.architectures.join(", ");
                    let what =
                        format!("the model is {architecture:?}, the family given is for {names}");
                    return Err(Error::Unsupported(what));
                }
                family
            }
        };
        let text = match &family.section {
            None => top.clone(),
            Some(key) => top
                .object(key)?
                .ok_or_else(|| bad(key, "nothing", "an object that describes the text model"))?,
        };
        refuse(&family, architecture, &top, &text)?;
        Spec::build(family, architecture, &Facts { top, text })
    }

    fn build(family: Family, architecture: &str, facts: &Facts<'_>) -> Result<Spec> {
        let hidden = facts.need_count(&family.hidden, MAX_WIDTH)?;
        let heads = facts.need_count(&family.heads, MAX_HEADS)?;
        let kv_heads = facts.count(&family.kv_heads, MAX_HEADS)?.unwrap_or(heads);
        if heads % kv_heads != 0 {
            let found = format!("{heads} heads and {kv_heads} key/value heads");
            return Err(bad("num_key_value_heads", &found, "a divisor of the heads"));
        }
        let head_dim = match facts.count(&family.head_dim, MAX_HEAD_DIM)? {
            Some(head_dim) => head_dim,
            None if hidden % heads == 0 => hidden / heads,
            None => {
                let found = format!("{heads} with hidden size {hidden} and no head_dim");
                return Err(bad("num_attention_heads", &found, "a divisor of the hidden size"));
            }
        };
        if head_dim % 2 != 0 {
            return Err(bad("head_dim", &head_dim.to_string(), "an even number"));
        }
        let file_context = facts.need_count(&family.context_length, MAX_POSITIONS)?;
        let (ropes, local, reach) = ropes(&family, facts, head_dim, file_context)?;
        let scale_of = facts.number(&family.attn_scale_rsqrt_of, 1e-9, 1e9)?;
        let softcap =
            |fact| -> Result<Option<f32>> { Ok(facts.number(fact, 1e-6, 1e9)?.map(|x| x as f32)) };
        let has = |place| family.norms.contains(&place);
        let spec = Spec {
            architecture: architecture.to_owned(),
            hidden,
            heads,
            kv_heads,
            head_dim,
            ffn: facts.need_count(&family.ffn, MAX_FFN)?,
            vocab: facts.need_count(&family.vocab, MAX_VOCAB)?,
            eps: facts.need_number(&family.eps, 1e-12, 1.0)? as f32,
            norm: family.norm,
            norms: Norms {
                attn: has(Place::Attn),
                attn_after: has(Place::AttnAfter),
                ffn: has(Place::Ffn),
                ffn_after: has(Place::FfnAfter),
            },
            qk_norm: family.qk_norm,
            act: match facts.need_text(&family.act)? {
                "silu" | "swish" => Act::Silu,
                "gelu_pytorch_tanh" | "gelu_new" => Act::GeluTanh,
                other => {
                    return Err(Error::Unsupported(format!(
                        "config.json: activation {other:?} is not supported, only silu and gelu_pytorch_tanh"
                    )));
                }
            },
            qkv_bias: facts.flag(&family.qkv_bias)?,
            o_bias: facts.flag(&family.o_bias)?,
            mlp_bias: facts.flag(&family.mlp_bias)?,
            attn_scale: (1.0 / scale_of.unwrap_or(head_dim as f64).sqrt()) as f32,
            attn_softcap: softcap(&family.attn_softcap)?,
            logit_softcap: softcap(&family.logit_softcap)?,
            embed_scale: if family.embed_times_sqrt_hidden { (hidden as f32).sqrt() } else { 1.0 },
            tied: facts.flag(&family.tied)?,
            layers: layers(&family, facts, local)?,
            ropes,
            context_length: file_context.max(reach.unwrap_or(0).min(MAX_POSITIONS)),
            model: family.model,
            names: family.names,
            ignore: family.ignore,
        };
        spec.check_names()?;
        Ok(spec)
    }

    /// Every weight has a name and a size that can be addressed, and every name a weight.
    fn check_names(&self) -> Result<()> {
        let table = self.layer_table();
        let known = |stem: &str| {
            ["embed", "norm", "head"].contains(&stem)
                || table.iter().any(|(_, what, _)| *what == stem)
        };
        let bad_name = |stem: &str, found: &str, expected: &str| {
            let what = format!("names.{stem}: found {found}, expected {expected}");
            Error::format(format!("family of {}", self.architecture), what)
        };
        if let Some(stem) = self.names.keys().find(|stem| !known(stem)) {
            return Err(bad_name(stem, "this name", "the name of a weight (models/README.md)"));
        }
        for Weight { what, shape } in self.model_weights().into_iter().chain(self.layer_weights()) {
            let stem = what.strip_suffix("_bias").unwrap_or(what);
            if self.names.get(stem).is_none_or(|names| names.0.is_empty()) {
                return Err(bad_name(stem, "nothing", "the name of this weight"));
            }
            let bytes = shape.iter().try_fold(4usize, |n, d| n.checked_mul(*d));
            if bytes.is_none_or(|n| n > isize::MAX as usize) {
                let found = format!("a weight {what} of shape {shape:?}");
                return Err(bad("the dimensions", &found, "weights that can be addressed"));
            }
        }
        Ok(())
    }

    /// The weights outside the layers.
    pub fn model_weights(&self) -> Vec<Weight> {
        let mut all = vec![
            Weight { what: "embed", shape: vec![self.vocab, self.hidden] },
            Weight { what: "norm", shape: vec![self.hidden] },
        ];
        if !self.tied {
            all.push(Weight { what: "head", shape: vec![self.vocab, self.hidden] });
        }
        all
    }

    /// The weights of each layer.
    pub fn layer_weights(&self) -> Vec<Weight> {
        let table = self.layer_table().into_iter().filter(|(exists, ..)| *exists);
        table.map(|(_, what, shape)| Weight { what, shape }).collect()
    }

    /// Every weight that a layer can have, and whether it has it.
    fn layer_table(&self) -> [(bool, &'static str, Vec<usize>); 20] {
        let (hidden, ffn) = (self.hidden, self.ffn);
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let head_norm = self.qk_norm == QkNorm::Head;
        [
            (self.norms.attn, "attn_norm", vec![hidden]),
            (true, "q", vec![q, hidden]),
            (true, "k", vec![kv, hidden]),
            (true, "v", vec![kv, hidden]),
            (true, "o", vec![hidden, q]),
            (self.qkv_bias, "q_bias", vec![q]),
            (self.qkv_bias, "k_bias", vec![kv]),
            (self.qkv_bias, "v_bias", vec![kv]),
            (self.o_bias, "o_bias", vec![hidden]),
            (head_norm, "q_norm", vec![self.head_dim]),
            (head_norm, "k_norm", vec![self.head_dim]),
            (self.norms.attn_after, "attn_after_norm", vec![hidden]),
            (self.norms.ffn, "ffn_norm", vec![hidden]),
            (true, "gate", vec![ffn, hidden]),
            (true, "up", vec![ffn, hidden]),
            (true, "down", vec![hidden, ffn]),
            (self.mlp_bias, "gate_bias", vec![ffn]),
            (self.mlp_bias, "up_bias", vec![ffn]),
            (self.mlp_bias, "down_bias", vec![hidden]),
            (self.norms.ffn_after, "ffn_after_norm", vec![hidden]),
        ]
    }

    /// The names that this family's weights have in one checkpoint; `has` tells whether a tensor is there.
    pub fn names(&self, has: impl Fn(&str) -> bool) -> Names {
        let first = |what: &str, model: &str| {
            let mut names = self.names[what].0.iter().map(|n| n.replace("{model}", model));
            names.find(|n| has(&format!("{}.weight", n.replace("{l}", "0")))) // layer 0 decides
        };
        let model = self.model.iter().find(|m| first("embed", m).is_some());
        let model = model.or(self.model.first()).cloned().unwrap_or_default();
        let stems = self.names.iter().map(|(what, names)| {
            let fallback = || names.0.first().map(|n| n.replace("{model}", &model));
            (what.clone(), first(what, &model).or_else(fallback).unwrap_or_default())
        });
        Names { stems: stems.collect() }
    }

    /// Those of a checkpoint's tensors that are neither a weight of this model nor known to be ignorable: their
    /// presence means that the model is not what the family says.
    pub fn unused<'a>(
        &self,
        names: &Names,
        tensors: impl IntoIterator<Item = &'a str>,
    ) -> Vec<&'a str> {
        let mut known: HashSet<String> = HashSet::new();
        known.extend(names.stems.get("head").map(|h| format!("{h}.weight"))); // also where tied
        known.extend(self.model_weights().iter().map(|w| names.model(w.what)));
        for weight in self.layer_weights() {
            known.extend((0..self.layers.len()).map(|l| names.layer(l, weight.what)));
        }
        let ignored = |name: &str| self.ignore.iter().any(|pattern| matches(pattern, name));
        tensors.into_iter().filter(|name| !known.contains(*name) && !ignored(name)).collect()
    }
}

/// Short name of a weight -> its name in one checkpoint.
#[derive(Clone, Debug)]
pub struct Names {
    stems: BTreeMap<String, String>,
}

impl Names {
    /// The name of a weight outside the layers. Panics if `what` is none of `Spec::model_weights`.
    pub fn model(&self, what: &str) -> String {
        match what.strip_suffix("_bias") {
            Some(what) => format!("{}.bias", self.stems[what]),
            None => format!("{}.weight", self.stems[what]),
        }
    }

    /// The name of a weight of layer `l`. Panics if `what` is none of `Spec::layer_weights`.
    pub fn layer(&self, l: usize, what: &str) -> String {
        self.model(what).replace("{l}", &l.to_string())
    }
}

/// Refuses a model that asks for more than the family honours.
fn refuse(family: &Family, architecture: &str, top: &Object<'_>, text: &Object<'_>) -> Result<()> {
    for object in [top, text] {
        for key in ["quantization_config", "compression_config"] {
            if let Some(value) = object.get(key) {
                let method = value["quant_method"].as_str().unwrap_or("unknown");
                return Err(Error::Unsupported(format!(
                    "config.json: {}: checkpoints quantized with {method:?} are not supported; take the model's \
                     unquantized checkpoint",
                    object.label(key)
                )));
            }
        }
    }
    if let Some(kind) = text.text("model_type")?
        && !family.model_types.is_empty()
        && !family.model_types.iter().any(|t| t == kind)
    {
        return Err(Error::Unsupported(format!(
            "config.json: {}: found {kind:?}, but architecture {architecture} is known with {:?} only",
            text.label("model_type"),
            family.model_types
        )));
    }
    for (key, neutral) in &family.neutral {
        let same = |v: &Value| v == neutral || (v.is_number() && v.as_f64() == neutral.as_f64());
        if let Some(value) = text.get(key)
            && !family.honoured.contains(key)
            && !same(value)
        {
            return Err(Error::Unsupported(format!(
                "config.json: {}: {} changes the model in a way that {architecture} does not have here",
                text.label(key),
                shown(value)
            )));
        }
    }
    Ok(())
}

fn layers(family: &Family, facts: &Facts<'_>, local: usize) -> Result<Vec<Layer>> {
    let count = facts.need_count(&family.layers, MAX_LAYERS)?;
    let window = facts.count(&family.window, MAX_POSITIONS)?;
    let window = if facts.flag(&family.use_window)? { window } else { None };
    let full_every = facts.count(&family.full_every, MAX_LAYERS)?;
    let full_first = facts.number(&family.full_first, 0.0, 1e9)?;
    let types = facts.list(&family.layer_types)?;
    if let Some(types) = types
        && types.len() != count
    {
        return Err(bad("layer_types", &format!("{} entries", types.len()), &format!("{count}")));
    }
    (0..count)
        .map(|l| {
            let slides = match types.map(|t| &t[l]) {
                Some(Value::String(t)) if t == "full_attention" => false,
                Some(Value::String(t)) if t == "sliding_attention" => {
                    if window.is_none() {
                        let label = format!("layer_types[{l}]");
                        return Err(bad(&label, "\"sliding_attention\" without a window", "a window"));
                    }
                    true
                }
                Some(other) => {
                    return Err(Error::Unsupported(format!(
                        "config.json: layer_types[{l}]: {} is not supported, only full_attention and \
                         sliding_attention",
                        shown(other)
                    )));
                }
                None => {
                    full_every.is_none_or(|n| (l + 1) % n != 0)
                        && full_first.is_none_or(|n| l as f64 >= n)
                }
            };
            Ok(match (slides, window) {
                (true, Some(_)) => Layer { window, rope: local },
                _ => Layer { window: None, rope: 0 },
            })
        })
        .collect()
}

/// The rotary embedding of full layers, that of sliding layers if it differs, the index of the latter, and the
/// context that scaling reaches.
fn ropes(
    family: &Family,
    facts: &Facts<'_>,
    head_dim: usize,
    max_position: usize,
) -> Result<(Vec<Rope>, usize, Option<usize>)> {
    const RANGE: (f64, f64) = (1.0, 1e18);
    // The base is outside (old spelling), inside (new) or both; two that disagree are an error.
    let base = |params: Option<&Object<'_>>, fact: &family::Fact| -> Result<rope::Base> {
        let outside = facts.need_number(fact, RANGE.0, RANGE.1);
        let inside = match params {
            Some(params) => params.number_in("rope_theta", RANGE.0, RANGE.1)?,
            None => None,
        };
        if let (Some(inside), Some(outside)) = (inside, facts.given(fact))
            && outside.as_f64() != Some(inside)
        {
            return Err(bad("rope_theta", &format!("{inside} and {outside}"), "one value"));
        }
        let theta = match inside {
            Some(theta) => theta,
            None => outside?,
        };
        Ok(rope::Base { head_dim, theta, max_position })
    };
    let (mut full, mut local, mut reach) = (Vec::new(), Vec::new(), None);
    let own_local = !family.rope_theta_local.key.is_empty();
    for params in facts.objects(&family.rope_scaling)? {
        let per_type = params.map.values().any(Value::is_object);
        if per_type && let Some(key) = params.keys().find(|k| !k.ends_with("_attention")) {
            return Err(params.bad(key, "a key beside layer types".to_owned(), "layer types only"));
        }
        let full_params =
            if per_type { params.object("full_attention")? } else { Some(params.clone()) };
        if let Some(p) = full_params {
            let (rope, to) = base(Some(&p), &family.rope_theta)?.scaled(&p)?;
            reach = reach.max(to);
            full.push(rope);
        }
        if per_type && let Some(p) = params.object("sliding_attention")? {
            let fact = if own_local { &family.rope_theta_local } else { &family.rope_theta };
            local.push(base(Some(&p), fact)?.scaled(&p)?.0);
        }
    }
    if full.is_empty() {
        full.push(base(None, &family.rope_theta)?.unscaled());
    }
    if local.is_empty() && own_local {
        local.push(base(None, &family.rope_theta_local)?.unscaled());
    }
    for all in [&mut full, &mut local] {
        if all.windows(2).any(|two| two[0] != two[1]) {
            return Err(bad(
                "rope_parameters",
                "another embedding than rope_scaling says",
                "the same",
            ));
        }
        all.truncate(1);
    }
    if local == full {
        local.clear();
    }
    full.append(&mut local);
    let last = full.len() - 1;
    Ok((full, last, reach))
}

/// Whether `name` fits `pattern`, in which each `*` stands for any text.
fn matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| name.strip_prefix(first)) else {
        return false;
    };
    let mut last = None;
    for part in parts {
        if let Some(part) = last.replace(part) {
            let Some(at) = rest.find(part) else { return false };
            rest = &rest[at + part.len()..];
        }
    }
    match last {
        None => rest.is_empty(),
        Some(last) => rest.ends_with(last),
    }
}
