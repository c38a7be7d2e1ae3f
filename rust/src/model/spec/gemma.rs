//! What only Gemma 3n and 4 have: the `[gemma]` table of a family, applied to one `config.json`. Never touches a
//! tensor.

use super::build::{MAX_FFN, MAX_HEAD_DIM, MAX_HEADS, MAX_VOCAB, MAX_WIDTH};
use super::config::{Facts, bad, shown};
use super::family::Fact;
use super::names::{Weight, existing};
use super::{Attention, Ffn, Layer, Mixer, Values};
use crate::Result;
use serde::Deserialize;

/// What a model has beside what other families have (transformers' modeling_gemma3n.py, modeling_gemma4.py).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gemma {
    /// Every layer has an input of its own from each token.
    pub inputs: Option<Inputs>,
    /// The output of each layer is multiplied by a trained number.
    pub layer_scale: bool,
    /// The residual stream is several.
    pub streams: Option<Streams>,
}

/// Inputs of the layers: with P = `width`, piece l of `p` is layer l's, and after its feed-forward network:
///
/// ```text
/// p = (sqrt(P) input_embed[id] + norm of each piece((input_proj x) / sqrt(hidden))) / sqrt(2)    x: the embedding
/// x = x + norm(input_out (act(input_gate x) * p[l]))
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Inputs {
    /// Numbers of one layer's input.
    pub width: usize,
    /// Rows of their embedding; ids beyond have that of id 0.
    pub vocab: usize,
}

/// AltUp (Baykal et al. 2023) and LAuReL (Menghani et al. 2024): n residual streams, of which the first goes through
/// the layers and the others follow.
///
/// ```text
/// start:  x_i = P_i x_0 * rms(x_0) / rms(P_i x_0)                    end: the mean of x_0 and the same with U_i x_i
/// layer:  m = tanh(router norm(x_0) / hidden);  p_i = x_i + sum over j of (predict m)[n i + j] x_j
///         y = layer of p_0, with (p_0 + norm(attention) + a + norm(right (left a))) / sqrt(2), a = norm(p_0), for
///             p_0 + norm(attention)
///         m = tanh(router norm(y) / hidden);  x_i = p_i + (1 + (correct m)[i]) (y - p_0)
///         x_i = x_i + norm(input_out (act(input_gate (x_0 * scale)) * p[l])), i > 0
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Streams {
    /// n.
    pub count: usize,
    /// Rows of `left`.
    pub laurel_rank: usize,
    /// The released code clamps the numbers of `correct` to this; those of releases are within, others are refused.
    pub clip: f32,
}

/// The table `[gemma]` of a family. `models/README.md` explains every field.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct GemmaFacts {
    #[serde(default)]
    full_head_dim: Fact,
    #[serde(default)]
    full_kv_heads: Fact,
    #[serde(default)]
    full_values_are_keys: Fact,
    kv_shared: Fact,
    #[serde(default)]
    shared_double: Fact,
    #[serde(default)]
    layer_scale: Fact,
    input_width: Fact,
    #[serde(default)]
    input_vocab: Fact,
    #[serde(default)]
    streams: Fact,
    #[serde(default)]
    laurel_rank: Fact,
    #[serde(default)]
    coefficient_clip: Fact,
    #[serde(default)]
    sparsity: Fact,
}

impl GemmaFacts {
    /// Width of a head on full layers, if it is another one.
    pub(super) fn full_head_dim(&self, facts: &Facts<'_>) -> Result<Option<usize>> {
        match facts.count(&self.full_head_dim, MAX_HEAD_DIM)? {
            Some(d) if d % 2 != 0 => Err(bad("global_head_dim", &d.to_string(), "an even number")),
            d => Ok(d),
        }
    }

    /// What the model has, and what differs in its layers, which are as in other families so far.
    pub(super) fn read(&self, facts: &Facts<'_>, layers: &mut [Layer]) -> Result<Gemma> {
        let full_head_dim = self.full_head_dim(facts)?;
        let of_keys = facts.flag(&self.full_values_are_keys)?;
        let full_kv_heads =
            if of_keys { facts.count(&self.full_kv_heads, MAX_HEADS)? } else { None };
        for layer in &mut *layers {
            let Mixer::Attention(a) = &mut layer.mixer else { continue };
            a.values = Values::Normed;
            if a.window.is_none() {
                a.head_dim = full_head_dim.unwrap_or(a.head_dim);
                a.kv_heads = full_kv_heads.unwrap_or(a.kv_heads);
                if of_keys {
                    a.values = Values::NormedKeys;
                }
            }
            if a.heads % a.kv_heads != 0 {
                let found = format!("{} heads and {} key/value heads", a.heads, a.kv_heads);
                let key = "num_global_key_value_heads";
                return Err(bad(key, &found, "a divisor of the heads"));
            }
        }
        self.share(facts, layers)?;
        self.cut(facts, layers)?;
        let inputs = match facts.number(&self.input_width, 0.0, MAX_WIDTH as f64)? {
            None | Some(0.0) => None,
            Some(_) => Some(Inputs {
                width: facts.need_count(&self.input_width, MAX_WIDTH)?,
                vocab: facts.need_count(&self.input_vocab, MAX_VOCAB)?,
            }),
        };
        let streams = match facts.count(&self.streams, 64)? {
            None => None,
            Some(count) => Some(Streams {
                count,
                laurel_rank: facts.need_count(&self.laurel_rank, MAX_WIDTH)?,
                clip: facts
                    .number(&self.coefficient_clip, 0.0, 1e9)?
                    .map_or(f32::MAX, |c| c as f32),
            }),
        };
        // Streams are written for models that have inputs; the projections of stream l + 1 are found with layer l.
        let n = layers.len();
        if let Some(Streams { count, .. }) = streams
            && (inputs.is_none() || count < 2 || count > n)
        {
            let found =
                format!("{count} streams, {n} layers, inputs of layers: {}", inputs.is_some());
            return Err(bad("altup_num_inputs", &found, "2 to the number of layers, and inputs"));
        }
        Ok(Gemma { inputs, layer_scale: facts.flag(&self.layer_scale)?, streams })
    }

    /// The last layers read keys and values of the last layer of their kind before them.
    fn share(&self, facts: &Facts<'_>, layers: &mut [Layer]) -> Result<()> {
        let n = layers.len();
        let shared = facts.number(&self.kv_shared, 0.0, n as f64)?.unwrap_or(0.0) as usize;
        let double = facts.flag(&self.shared_double)?;
        let first = n - shared;
        let window = |layers: &[Layer], l: usize| match &layers[l].mixer {
            Mixer::Attention(Attention { window, .. }) => Some(*window),
            _ => None,
        };
        for l in first..n {
            let kind = window(layers, l);
            let Some(of) = (0..first).rev().find(|&other| window(layers, other) == kind) else {
                let found =
                    format!("{shared} of {n} layers, the first without one of its kind before");
                return Err(bad("num_kv_shared_layers", &found, "fewer"));
            };
            if let Mixer::Attention(a) = &mut layers[l].mixer {
                a.kv_of = Some(of);
            }
            match &mut layers[l].ffn {
                Ffn::Dense(width) | Ffn::Beside(width, _) if double => *width *= 2,
                _ => {}
            }
        }
        Ok(())
    }

    /// The layers in which only the largest gates count.
    fn cut(&self, facts: &Facts<'_>, layers: &mut [Layer]) -> Result<()> {
        if self.sparsity.key.is_empty() {
            return Ok(());
        }
        let Some(sparsity) = facts.list(&self.sparsity)? else {
            return Err(bad("activation_sparsity_pattern", "nothing", "a list of numbers"));
        };
        if sparsity.len() != layers.len() {
            let found = format!("{} entries", sparsity.len());
            let expected = format!("{}", layers.len());
            return Err(bad("activation_sparsity_pattern", &found, &expected));
        }
        for (layer, part) in layers.iter_mut().zip(sparsity) {
            let Some(p) = part.as_f64().filter(|p| (0.0..0.9999).contains(p)) else {
                let expected = "numbers from 0 up to 0.9999";
                return Err(bad("activation_sparsity_pattern", &shown(part), expected));
            };
            if let (Ffn::Dense(width), true) = (&layer.ffn, p > 0.0) {
                layer.ffn = Ffn::Sparse(*width, quantile(f64::from(p as f32)) as f32);
            }
        }
        Ok(())
    }
}

/// The number below which a part `p` of normally distributed numbers lies.
fn quantile(p: f64) -> f64 {
    if p < 0.5 {
        return -quantile(1.0 - p);
    }
    // Newton's method; the distribution is concave here, so it comes from below and never goes beyond.
    let mut x = 0.0;
    for _ in 0..100 {
        let below = 0.5 * libm::erfc(-x / std::f64::consts::SQRT_2);
        let density = libm::exp(-0.5 * x * x) / libm::sqrt(2.0 * std::f64::consts::PI);
        x += (p - below) / density;
    }
    x
}

impl Gemma {
    /// The weights outside the layers.
    pub(super) fn model_weights(&self, hidden: usize, layers: usize) -> Vec<Weight> {
        let Some(Inputs { width, vocab }) = self.inputs else { return Vec::new() };
        existing([
            (true, "input_embed", vec![vocab, layers * width]),
            (true, "input_proj", vec![layers * width, hidden]),
            (true, "input_proj_norm", vec![width]),
        ])
    }

    /// The weights of layer `l`, and the projections of stream `l + 1`.
    pub(super) fn layer_weights(&self, hidden: usize, l: usize) -> Vec<Weight> {
        let input = self.inputs.is_some();
        let width = self.inputs.map_or(0, |inputs| inputs.width);
        let altup = self.streams.is_some();
        let (n, rank) = self.streams.map_or((0, 0), |s| (s.count, s.laurel_rank));
        existing([
            (self.layer_scale, "layer_scale", vec![1]),
            (input, "input_gate", vec![width, hidden]),
            (input, "input_out", vec![hidden, width]),
            (input, "input_norm", vec![hidden]),
            (altup, "altup_router", vec![n, hidden]),
            (altup, "altup_router_norm", vec![hidden]),
            (altup, "altup_predict", vec![n * n, n]),
            (altup, "altup_correct", vec![n, n]),
            (altup, "altup_scale", vec![hidden]),
            (altup, "laurel_left", vec![rank, hidden]),
            (altup, "laurel_right", vec![hidden, rank]),
            (altup, "laurel_norm", vec![hidden]),
            (l + 1 < n, "altup_in", vec![hidden, hidden]),
            (l + 1 < n, "altup_out", vec![hidden, hidden]),
        ])
    }
}

/// Width of the feed-forward network of each layer, where the file lists them.
pub(super) fn widths(facts: &Facts<'_>, fact: &Fact, layers: usize) -> Result<Option<Vec<usize>>> {
    let Some(list) = facts.given(fact).and_then(serde_json::Value::as_array) else {
        return Ok(None);
    };
    if list.len() != layers {
        let found = format!("{} entries", list.len());
        return Err(bad("intermediate_size", &found, &layers.to_string()));
    }
    let width = |v: &serde_json::Value| {
        let width = v.as_u64().and_then(|n| usize::try_from(n).ok());
        let width = width.filter(|n| (1..=MAX_FFN).contains(n));
        width.ok_or_else(|| bad("intermediate_size", &shown(v), "positive integers"))
    };
    list.iter().map(width).collect::<Result<Vec<_>>>().map(Some)
}

#[cfg(test)]
mod tests {
    use super::quantile;

    #[test]
    fn quantiles_of_the_normal_distribution() {
        for (p, x) in
            [(0.5, 0.0), (0.95, 1.644_853_627), (0.999, 3.090_232_306), (0.025, -1.959_963_985)]
        {
            assert!((quantile(p) - x).abs() < 1e-9, "{p}");
        }
        assert!((quantile(0.9999) - 3.719_016_485).abs() < 1e-9);
    }
}
