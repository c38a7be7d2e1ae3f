//! The weights that a model has, and what they are called in a checkpoint. Never reads a tensor.

use super::config::bad;
use super::{Act, Attention, Ffn, Gate, Mixer, Moe, QkNorm, Slice, Spec, Values};
use crate::{Error, Result};
use std::collections::{BTreeMap, HashSet};

/// Short names of all weights that a family can have; biases append `_bias`, and need a name of their own only where it
/// is not the weight's with `.bias`.
pub(super) const WEIGHTS: &[&str] = &[
    "embed",
    "norm",
    "positions",
    "head",
    "attn_norm",
    "q",
    "k",
    "v",
    "q_a",
    "q_a_norm",
    "q_b",
    "kv_a",
    "kv_a_norm",
    "kv_b",
    "k_b",
    "v_b",
    "o",
    "q_norm",
    "k_norm",
    "sinks",
    "attn_gate",
    "attn_after_norm",
    "ffn_norm",
    "gate",
    "up",
    "xielu_alpha_p",
    "xielu_alpha_n",
    "xielu_beta",
    "xielu_eps",
    "down",
    "ffn_after_norm",
    "router",
    "router_correction",
    "expert_gate",
    "expert_up",
    "expert_down",
    "expert_gate_bias",
    "expert_up_bias",
    "expert_down_bias",
    "shared_gate",
    "shared_up",
    "shared_down",
    "shared_router",
    "mix_in",
    "mix_q",
    "mix_k",
    "mix_v",
    "mix_z",
    "mix_b",
    "mix_a",
    "conv",
    "a_log",
    "dt",
    "skip",
    "mix_norm",
    "mix_out",
    "router_norm",
    "router_scale",
    "dense_after_norm",
    "experts_norm",
    "experts_after_norm",
    "layer_scale",
    "input_embed",
    "input_proj",
    "input_proj_norm",
    "input_gate",
    "input_out",
    "input_norm",
    "altup_in",
    "altup_out",
    "altup_router",
    "altup_router_norm",
    "altup_predict",
    "altup_correct",
    "altup_scale",
    "laurel_left",
    "laurel_right",
    "laurel_norm",
];

/// A weight that the model has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weight {
    /// Its short name here: `embed`, `q`, `q_bias`, ...
    pub what: &'static str,
    /// Its shape: `[out, in]` for a matrix, `[n]` for a norm or a bias, `[channels, 1, width]` for a convolution, none for
    /// a single number; those of experts with the number of experts before it.
    pub shape: Vec<usize>,
}

impl Spec {
    /// Every weight has a name and a size that can be addressed, and every name a weight.
    pub(super) fn check_names(&self) -> Result<()> {
        let bad_name = |stem: &str, found: &str, expected: &str| {
            let what = format!("names.{stem}: found {found}, expected {expected}");
            Error::format(format!("family of {}", self.architecture), what)
        };
        if let Some(stem) = self.names.keys().find(|stem| !WEIGHTS.contains(&stem.as_str())) {
            return Err(bad_name(stem, "this name", "the name of a weight (models/README.md)"));
        }
        if self.qkv_by_head && ["k", "v"].iter().any(|&w| self.names.get(w) != self.names.get("q"))
        {
            return Err(bad_name("q", "other names than k and v have", "one tensor"));
        }
        let layers = (0..self.layers.len()).flat_map(|l| self.layer_weights(l));
        for Weight { what, shape } in self.model_weights().into_iter().chain(layers) {
            let stem = match what.strip_suffix("_bias") {
                Some(stem) if !self.names.contains_key(what) => stem,
                _ => what,
            };
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

    /// Numbers that were trained: all, and those that one token is multiplied by. Of the experts that is the part that
    /// is chosen, and of the embedding one row, unless it is the head, too.
    pub fn parameters(&self) -> (u64, u64) {
        let (mut all, mut active) = (0u64, 0u64);
        let mut add = |weight: &Weight, used: u64, of: u64| {
            let n = weight.shape.iter().fold(1u64, |n, &d| n.saturating_mul(d as u64));
            all = all.saturating_add(n);
            active = active.saturating_add(n / of * used);
        };
        for weight in self.model_weights() {
            match weight.what {
                "embed" | "positions" if !(self.tied && weight.what == "embed") => {
                    add(&weight, 1, weight.shape[0] as u64);
                }
                _ => add(&weight, 1, 1),
            }
        }
        for (l, layer) in self.layers.iter().enumerate() {
            for weight in self.layer_weights(l) {
                match &layer.ffn {
                    Ffn::Moe(moe) | Ffn::Beside(_, moe) if weight.what.starts_with("expert_") => {
                        add(&weight, moe.routing.top_k as u64, moe.experts as u64);
                    }
                    _ => add(&weight, 1, 1),
                }
            }
        }
        (all, active)
    }

    /// The weights outside the layers.
    pub fn model_weights(&self) -> Vec<Weight> {
        let all = [
            (true, "embed", vec![self.vocab, self.hidden]),
            (self.positions.is_some(), "positions", vec![self.positions.unwrap_or(0), self.hidden]),
            (true, "norm", vec![self.hidden]),
            (self.norm_bias, "norm_bias", vec![self.hidden]),
            (!self.tied, "head", vec![self.vocab, self.hidden]),
            (self.head_bias, "head_bias", vec![self.vocab]),
        ];
        let gemma = self.gemma.iter().flat_map(|g| g.model_weights(self.hidden, self.layers.len()));
        existing(all).into_iter().chain(gemma).collect()
    }

    /// The weights of layer `l`.
    pub fn layer_weights(&self, l: usize) -> Vec<Weight> {
        let (hidden, layer, bias) = (self.hidden, &self.layers[l], self.norm_bias);
        let mut all = existing([
            (self.norms.attn, "attn_norm", vec![hidden]),
            (self.norms.attn && bias, "attn_norm_bias", vec![hidden]),
            (self.norms.attn_after, "attn_after_norm", vec![hidden]),
            (self.norms.attn_after && bias, "attn_after_norm_bias", vec![hidden]),
            (self.norms.ffn, "ffn_norm", vec![hidden]),
            (self.norms.ffn && bias, "ffn_norm_bias", vec![hidden]),
            (self.norms.ffn_after, "ffn_after_norm", vec![hidden]),
            (self.norms.ffn_after && bias, "ffn_after_norm_bias", vec![hidden]),
        ]);
        all.extend(match &layer.mixer {
            Mixer::Attention(a) => {
                let (q, kv, d) = (a.q_width(), a.kv_width(), a.head_dim);
                let normed = self.qk_norm != QkNorm::None;
                let norm = |heads| match self.qk_norm {
                    QkNorm::None | QkNorm::Head => vec![d],
                    QkNorm::EachHead => vec![heads, d],
                    QkNorm::Full => vec![heads * d],
                };
                let own = a.kv_of.is_none();
                existing([
                    (true, "q", vec![q, hidden]),
                    (own, "k", vec![kv, hidden]),
                    (own && a.values != Values::NormedKeys, "v", vec![kv, hidden]),
                    (true, "o", vec![hidden, q]),
                    (self.qkv_bias, "q_bias", vec![q]),
                    (self.qkv_bias, "k_bias", vec![kv]),
                    (self.qkv_bias, "v_bias", vec![kv]),
                    (self.o_bias, "o_bias", vec![hidden]),
                    (normed, "q_norm", norm(a.heads)),
                    (normed && own, "k_norm", norm(a.kv_heads)),
                    (a.sinks, "sinks", vec![a.heads]),
                    (a.gate != Gate::None, "attn_gate", vec![a.gate_width(), hidden]),
                ])
            }
            Mixer::Latent(latent) => latent.weights(hidden),
            Mixer::Recurrent(recurrent) => recurrent.weights(hidden),
        });
        all.extend(match &layer.ffn {
            &Ffn::Dense(ffn) | &Ffn::Sparse(ffn, _) | &Ffn::Beside(ffn, _) => existing([
                (true, "gate", vec![ffn, hidden]),
                (true, "up", vec![ffn, hidden]),
                (true, "down", vec![hidden, ffn]),
                (self.mlp_bias, "gate_bias", vec![ffn]),
                (self.mlp_bias, "up_bias", vec![ffn]),
                (self.mlp_bias, "down_bias", vec![hidden]),
            ]),
            Ffn::Moe(_) => Vec::new(),
            &Ffn::Plain(ffn) => {
                let xielu = self.act == Act::XIelu && self.xielu.is_none();
                existing([
                    (true, "up", vec![ffn, hidden]),
                    (true, "down", vec![hidden, ffn]),
                    (self.mlp_bias, "up_bias", vec![ffn]),
                    (self.mlp_bias, "down_bias", vec![hidden]),
                    (xielu, "xielu_alpha_p", vec![1]),
                    (xielu, "xielu_alpha_n", vec![1]),
                    (xielu, "xielu_beta", vec![]),
                    (xielu, "xielu_eps", vec![]),
                ])
            }
        });
        if let Some(moe) = layer.ffn.moe() {
            let Moe { experts, width, .. } = *moe;
            let shared = moe.shared.map_or(0, |shared| shared.width);
            let beside = matches!(layer.ffn, Ffn::Beside(..));
            all.extend(existing([
                (true, "router", vec![experts, hidden]),
                (moe.router_bias, "router_bias", vec![experts]),
                (moe.correction, "router_correction", vec![experts]),
                (beside, "router_norm", vec![hidden]),
                (beside, "router_scale", vec![experts]),
                (true, "expert_gate", vec![experts, width, hidden]),
                (true, "expert_up", vec![experts, width, hidden]),
                (true, "expert_down", vec![experts, hidden, width]),
                (moe.expert_bias, "expert_gate_bias", vec![experts, width]),
                (moe.expert_bias, "expert_up_bias", vec![experts, width]),
                (moe.expert_bias, "expert_down_bias", vec![experts, hidden]),
                (shared > 0, "shared_gate", vec![shared, hidden]),
                (shared > 0, "shared_up", vec![shared, hidden]),
                (shared > 0, "shared_down", vec![hidden, shared]),
                (moe.shared.is_some_and(|s| s.gate), "shared_router", vec![1, hidden]),
                (beside, "dense_after_norm", vec![hidden]),
                (beside, "experts_norm", vec![hidden]),
                (beside, "experts_after_norm", vec![hidden]),
            ]));
        }
        if let Some(gemma) = &self.gemma {
            all.extend(gemma.layer_weights(hidden, l));
        }
        all
    }

    /// The names that this family's weights have in one checkpoint; `has` tells whether a tensor is there.
    pub fn names(&self, has: impl Fn(&str) -> bool) -> Names {
        let first = |what: &str, model: &str| {
            let mut names = self.names[what].0.iter().map(|n| n.replace("{model}", model));
            // Layer 0 and expert (or head) 0 decide.
            names.find(|n| has(&whole(&n.replace("{l}", "0").replace("{e}", "0"), ".weight")))
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
        for l in 0..self.layers.len() {
            for weight in self.layer_weights(l) {
                let places = self.places(names, l, weight.what);
                known.extend(places.iter().flat_map(Slice::tensors).map(|(name, _)| name));
            }
            if let Mixer::Attention(Attention { kv_of: Some(_), .. }) = self.layers[l].mixer {
                // Releases have them also where nothing reads them.
                let all = ["k", "v", "k_norm"].into_iter();
                let all = all.filter(|&what| self.names.contains_key(what));
                known.extend(all.map(|what| names.layer(l, what)));
            }
        }
        let ignored = |name: &str| self.ignores(name);
        let other = |name: &&str| !known.contains(*name) && !ignored(name);
        let unused = tensors.into_iter().filter(other);
        let Some(quantized) = &self.quantized else { return unused.collect() };
        let head = names.stems.get("head").filter(|_| self.tied);
        let part = |name: &str| {
            let mut ends = name.match_indices('.');
            quantized.of_cache(name)
                || ends.any(|(at, _)| {
                    let (module, end) = name.split_at(at);
                    quantized.belongs(end)
                        && known.contains(&format!("{module}.weight"))
                        && head.is_none_or(|head| head != module)
                })
        };
        unused.filter(|name| !part(name)).collect()
    }
}

impl Spec {
    fn ignores(&self, name: &str) -> bool {
        self.ignore.iter().any(|pattern| matches(pattern, name))
    }

    /// Those of a checkpoint's tensors that are no weights, and known not to be.
    pub fn ignored<'a>(
        &self,
        tensors: impl Iterator<Item = &'a str>,
    ) -> impl Iterator<Item = &'a str> {
        tensors.filter(|name| self.ignores(name))
    }
}

/// The weights of a table whose first column says that they exist.
pub(super) fn existing<const N: usize>(
    table: [(bool, &'static str, Vec<usize>); N],
) -> Vec<Weight> {
    let weights = table.into_iter().filter(|(exists, ..)| *exists);
    weights.map(|(_, what, shape)| Weight { what, shape }).collect()
}

/// Short name of a weight -> its name in one checkpoint.
#[derive(Clone, Debug)]
pub struct Names {
    stems: BTreeMap<String, String>,
}

impl Names {
    /// These, without `.weight` or `.bias`.
    pub(super) fn new(stems: BTreeMap<String, String>) -> Names {
        Names { stems }
    }

    /// Whether there is a name for a weight.
    pub fn has(&self, what: &str) -> bool {
        let stem = what.strip_suffix("_bias").unwrap_or(what);
        self.stems.contains_key(what) || self.stems.contains_key(stem)
    }

    /// The name of a weight outside the layers. Panics if `what` is none of `Spec::model_weights`.
    pub fn model(&self, what: &str) -> String {
        match (self.stems.get(what), what.strip_suffix("_bias")) {
            (None, Some(what)) => whole(&self.stems[what], ".bias"),
            _ => whole(&self.stems[what], ".weight"),
        }
    }

    /// The name of a weight of layer `l`. Panics if `what` is none of `Spec::layer_weights`.
    pub fn layer(&self, l: usize, what: &str) -> String {
        self.model(what).replace("{l}", &l.to_string())
    }
}

/// A tensor's name: the stem and what is appended to it, or the stem alone if it ends in `!`.
fn whole(stem: &str, suffix: &str) -> String {
    stem.strip_suffix('!').map_or_else(|| format!("{stem}{suffix}"), str::to_owned)
}

/// Whether `name` fits `pattern`, in which each `*` stands for any text.
pub(in crate::model) fn matches(pattern: &str, name: &str) -> bool {
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
