//! Layers that keep a state instead of keys and values: the `[recurrent]` table of a family, applied to one
//! `config.json`. Never touches a tensor.

use super::build::{MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS};
use super::config::{Facts, bad, shown};
use super::family::{Fact, Family};
use super::names::{Weight, existing};
use crate::backend::{self, Core, Heads};
use crate::{Error, Result};
use serde::Deserialize;

/// A mixer with a state.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Recurrent {
    /// Its shape.
    pub shape: backend::Recurrent,
    /// The convolution has a bias.
    pub conv_bias: bool,
    /// The projections before and after have biases.
    pub bias: bool,
    /// A checkpoint has `-exp(A_log)`, not `A_log`.
    pub decay: bool,
}

/// Names of [`Core`]s.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Kind {
    Gated,
    DeltaNet,
    Mamba2,
}

/// Which layers have a state, and its shape. `models/README.md` explains every field.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RecurrentFacts {
    kind: Kind,
    layer_types: Vec<String>,
    #[serde(default)]
    attention_at: Fact,
    width: Fact,
    #[serde(default)]
    conv_bias: Fact,
    #[serde(default)]
    bias: Fact,
    #[serde(default)]
    heads: Fact,
    #[serde(default)]
    groups: Fact,
    #[serde(default)]
    key_dim: Fact,
    #[serde(default)]
    value_dim: Fact,
    #[serde(default)]
    tiled: Fact,
    #[serde(default)]
    decay: Fact,
}

impl RecurrentFacts {
    /// Whether `layer_types` may call a layer with a state so.
    pub(super) fn is_type(&self, name: &str) -> bool {
        self.layer_types.iter().any(|known| known == name)
    }

    /// Which layers have a state: by their types, or all but some, or all but each n-th.
    pub(super) fn at(
        &self,
        facts: &Facts<'_>,
        family: &Family,
        layers: usize,
    ) -> Result<Vec<bool>> {
        if let Some(types) = facts.list(&family.layer_types)? {
            return Ok(types.iter().map(|t| t.as_str().is_some_and(|t| self.is_type(t))).collect());
        }
        let Some(attention) = facts.list(&self.attention_at)? else {
            let every = facts.count(&family.full_every, MAX_LAYERS)?;
            return Ok((1..=layers).map(|l| every.is_some_and(|n| l % n != 0)).collect());
        };
        let mut all = vec![true; layers];
        for index in attention {
            let l = index.as_u64().and_then(|l| usize::try_from(l).ok()).filter(|&l| l < layers);
            let Some(l) = l else {
                let expected = format!("indices below {layers}");
                return Err(bad("the layers with attention", &shown(index), &expected));
            };
            all[l] = false;
        }
        Ok(all)
    }

    /// The mixer of those layers.
    pub(super) fn read(
        &self,
        facts: &Facts<'_>,
        family: &Family,
        hidden: usize,
    ) -> Result<Recurrent> {
        let act = facts.need_text(&family.act)?;
        if self.kind != Kind::Gated && !["silu", "swish"].contains(&act) {
            return Err(Error::Unsupported(format!(
                "config.json: activation {act:?} is not supported in layers with a state, only silu"
            )));
        }
        let core = match self.kind {
            Kind::Gated => Core::Gated(hidden),
            Kind::DeltaNet => Core::DeltaNet(self.heads(facts)?),
            Kind::Mamba2 => Core::Mamba2(self.heads(facts)?),
        };
        let width = facts.need_count(&self.width, backend::Recurrent::MAX_WIDTH)?;
        if width == 1 {
            return Err(bad("the width of the convolution", "1", "at least 2"));
        }
        let shape = backend::Recurrent { width, core };
        Ok(Recurrent {
            shape,
            conv_bias: facts.flag(&self.conv_bias)?,
            bias: facts.flag(&self.bias)?,
            decay: facts.flag(&self.decay)?,
        })
    }

    fn heads(&self, facts: &Facts<'_>) -> Result<Heads> {
        let h = Heads {
            heads: facts.need_count(&self.heads, MAX_HEADS)?,
            groups: facts.need_count(&self.groups, MAX_HEADS)?,
            tiled: facts.flag(&self.tiled)?,
            key_dim: facts.need_count(&self.key_dim, MAX_HEAD_DIM)?,
            value_dim: facts.need_count(&self.value_dim, MAX_HEAD_DIM)?,
        };
        if !h.heads.is_multiple_of(h.groups) {
            let found = format!("{} heads in {} groups", h.heads, h.groups);
            return Err(bad("recurrent layers", &found, "a divisor of the heads"));
        }
        if !h.key_dim.is_multiple_of(4) || !h.value_dim.is_multiple_of(16) {
            return Err(Error::Unsupported(format!(
                "config.json: recurrent layers with heads of {} x {} are not supported, only multiples of 4 x 16",
                h.key_dim, h.value_dim
            )));
        }
        Ok(h)
    }
}

impl Recurrent {
    /// Its weights.
    pub(super) fn weights(&self, hidden: usize) -> Vec<Weight> {
        let (shape, bias) = (&self.shape, self.bias);
        let (_, channels) = shape.channels();
        let mut all = match shape.core {
            Core::DeltaNet(h) => existing([
                (true, "mix_q", vec![h.keys(), hidden]),
                (true, "mix_k", vec![h.keys(), hidden]),
                (true, "mix_v", vec![h.values(), hidden]),
                (true, "mix_z", vec![h.values(), hidden]),
                (true, "mix_b", vec![h.heads, hidden]),
                (true, "mix_a", vec![h.heads, hidden]),
            ]),
            Core::Gated(_) | Core::Mamba2(_) => existing([
                (true, "mix_in", vec![shape.projection() + shape.rates(), hidden]),
                (bias, "mix_in_bias", vec![shape.projection() + shape.rates()]),
            ]),
        };
        all.extend(existing([
            (true, "conv", vec![channels, 1, shape.width]),
            (self.conv_bias, "conv_bias", vec![channels]),
            (true, "mix_out", vec![hidden, shape.output()]),
            (bias, "mix_out_bias", vec![hidden]),
        ]));
        if let Core::DeltaNet(h) | Core::Mamba2(h) = shape.core {
            let mamba = matches!(shape.core, Core::Mamba2(_));
            all.extend(existing([
                (true, "a_log", vec![h.heads]),
                (true, "dt", vec![h.heads]),
                (mamba, "skip", vec![h.heads]),
                (true, "mix_norm", vec![if mamba { h.values() } else { h.value_dim }]),
            ]));
        }
        all
    }
}
