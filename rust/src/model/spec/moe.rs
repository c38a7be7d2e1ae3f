//! Mixture of experts: the `[moe]` table of a family, and what it makes of a `config.json`. Knows no tensor.

use super::build::MAX_FFN;
use super::config::{Facts, bad, shown};
use super::family::Fact;
use crate::backend::{Groups, Routing, Score};
use crate::{Error, Result};
use serde::Deserialize;

const MAX_EXPERTS: usize = 1 << 16;

/// A feed-forward network of experts: `sum of p_e expert_e(x)` over those that a router chooses for a position, plus
/// shared experts that every position uses. Each is `down(act(gate(x)) * up(x))`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Moe {
    /// Experts to choose from.
    pub experts: usize,
    /// Width of an expert.
    pub width: usize,
    /// How they are chosen. Logits are `router x`.
    pub routing: Routing,
    /// The router has a bias.
    pub router_bias: bool,
    /// A correction is added to the scores for the choice, and only for it.
    pub correction: bool,
    /// Biases on gate, up, down of the experts that are chosen.
    pub expert_bias: bool,
    /// How a checkpoint stores the experts.
    pub stored: Stored,
    /// The shared experts.
    pub shared: Option<Shared>,
}

/// Experts that every position uses, side by side as one network.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shared {
    /// Width of all together.
    pub width: usize,
    /// Their output is multiplied by `sigmoid(gate x)` (Qwen2-MoE).
    pub gate: bool,
}

/// How a checkpoint stores the matrices of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// `[out, in]`, or `[experts, out, in]`.
    Rows,
    /// `[experts, in, out]`; gate and up in one tensor alternate, as their biases do (GPT-OSS).
    Columns,
    /// `[experts, out, in]` in MXFP4; gate and up in one tensor alternate, as their biases do (GPT-OSS as released).
    /// Two tensors: `_blocks`, 32 codes in 16 bytes, the first in the low nibble; `_scales`, an exponent for each 32.
    Mxfp4,
}

/// The table `[moe]` of a family. `models/README.md` explains every field.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MoeFacts {
    #[serde(default = "always")]
    enabled: Fact,
    #[serde(default)]
    pub(super) beside_dense: Fact,
    experts: Fact,
    top_k: Fact,
    #[serde(default)]
    expert_ffn: Fact,
    #[serde(default)]
    expert_bias: Fact,
    #[serde(default)]
    stored: Fact,
    score: Fact,
    #[serde(default)]
    renormalise: Fact,
    #[serde(default)]
    sum_eps: Fact,
    #[serde(default)]
    scale: Fact,
    #[serde(default)]
    groups: Fact,
    #[serde(default)]
    top_groups: Fact,
    #[serde(default)]
    group_score: Fact,
    #[serde(default)]
    router_bias: Fact,
    #[serde(default)]
    correction: Fact,
    #[serde(default)]
    shared_experts: Fact,
    #[serde(default)]
    shared_ffn: Fact,
    #[serde(default)]
    shared_gate: Fact,
    #[serde(default)]
    dense_first: Fact,
    #[serde(default)]
    dense_layers: Fact,
    #[serde(default)]
    every: Fact,
}

fn always() -> Fact {
    Fact { key: Vec::new(), default: Some(true.into()) }
}

impl MoeFacts {
    /// Whether the model has experts at all.
    pub(super) fn enabled(&self, facts: &Facts<'_>) -> Result<bool> {
        facts.flag(&self.enabled)
    }

    /// The experts, and for each of `layers` whether it has them.
    pub(super) fn read(
        &self,
        facts: &Facts<'_>,
        hidden: usize,
        dense_ffn: Option<usize>,
        layers: usize,
        mxfp4: bool,
    ) -> Result<(Moe, Vec<bool>)> {
        let experts = facts.need_count(&self.experts, MAX_EXPERTS)?;
        let top_k = facts.need_count(&self.top_k, experts)?;
        let width = match facts.count(&self.expert_ffn, MAX_FFN)?.or(dense_ffn) {
            Some(width) => width,
            None => facts.need_count(&self.expert_ffn, MAX_FFN)?,
        };
        let score = match facts.need_text(&self.score)? {
            "softmax" => Score::Softmax,
            "sigmoid" => Score::Sigmoid,
            other => {
                return Err(Error::Unsupported(format!(
                    "config.json: router score {other:?} is not supported, only softmax and sigmoid"
                )));
            }
        };
        let stored = match facts.read_text(&self.stored)? {
            _ if mxfp4 => Stored::Mxfp4,
            None | Some("rows") => Stored::Rows,
            Some("columns") => Stored::Columns,
            Some(other) => return Err(bad("moe.stored", other, "rows or columns")),
        };
        if mxfp4 && !(hidden.is_multiple_of(32) && width.is_multiple_of(32)) {
            let found = format!("experts of {hidden} inputs and width {width}");
            return Err(bad("quantization_config", &found, "multiples of 32 for MXFP4"));
        }
        let renormalise = facts.flag(&self.renormalise)?;
        let eps = facts.number(&self.sum_eps, 0.0, 1.0)?.unwrap_or(0.0) as f32;
        let shared = facts.number(&self.shared_experts, 0.0, MAX_EXPERTS as f64)?.unwrap_or(0.0);
        let shared_ffn = facts.count(&self.shared_ffn, MAX_FFN)?.unwrap_or(width);
        let shared =
            Shared { width: shared as usize * shared_ffn, gate: facts.flag(&self.shared_gate)? };
        if shared.width > MAX_FFN {
            let found = format!("shared experts of width {}", shared.width);
            return Err(bad("the shared experts", &found, &format!("at most {MAX_FFN}")));
        }
        let moe = Moe {
            experts,
            width,
            routing: Routing {
                top_k,
                score,
                groups: self.groups(facts, experts, top_k)?,
                renormalise: renormalise.then_some(eps),
                scale: facts.number(&self.scale, 1e-6, 1e6)?.unwrap_or(1.0) as f32,
            },
            router_bias: facts.flag(&self.router_bias)?,
            correction: facts.flag(&self.correction)?,
            expert_bias: facts.flag(&self.expert_bias)?,
            stored,
            shared: (shared.width > 0).then_some(shared),
        };
        Ok((moe, self.layers(facts, layers)?))
    }

    /// The groups, if their number makes a difference.
    fn groups(&self, facts: &Facts<'_>, experts: usize, top_k: usize) -> Result<Option<Groups>> {
        let Some(count) = facts.count(&self.groups, experts)? else { return Ok(None) };
        let by_two = match facts.read_text(&self.group_score)? {
            // DeepSeek's `topk_method`: "greedy" has no groups.
            Some("greedy") => return Ok(None),
            Some("max" | "group_limited_greedy") => false,
            Some("two" | "noaux_tc") => true,
            other => {
                let found = other.map_or("nothing".to_owned(), |x| format!("{x:?}"));
                return Err(Error::Unsupported(format!(
                    "config.json: a group score of {found} is not supported, only \"greedy\", \
                     \"group_limited_greedy\" (max) and \"noaux_tc\" (two)"
                )));
            }
        };
        if count == 1 {
            return Ok(None);
        }
        let chosen = facts.need_count(&self.top_groups, count)?;
        if !experts.is_multiple_of(count) || experts / count * chosen < top_k {
            let found =
                format!("{count} groups, {chosen} chosen, for {top_k} of {experts} experts");
            return Err(bad(
                "the groups of experts",
                &found,
                "groups of one size, with enough experts",
            ));
        }
        Ok(Some(Groups { count, top_k: chosen, by_two }))
    }

    /// Which layers have experts.
    fn layers(&self, facts: &Facts<'_>, layers: usize) -> Result<Vec<bool>> {
        let first = facts.number(&self.dense_first, 0.0, 1e9)?.unwrap_or(0.0);
        let every = facts.count(&self.every, layers)?.unwrap_or(1);
        let mut moe: Vec<bool> =
            (0..layers).map(|l| l as f64 >= first && (l + 1).is_multiple_of(every)).collect();
        for layer in facts.list(&self.dense_layers)?.into_iter().flatten() {
            let place = layer.as_u64().and_then(|l| moe.get_mut(usize::try_from(l).ok()?));
            let Some(place) = place else {
                return Err(bad("the dense layers", &shown(layer), "the number of a layer"));
            };
            *place = false;
        }
        Ok(moe)
    }
}
