//! Rotary position embedding: frequencies from `rope_theta` and the scaling rules of `config.json`.
//! Follows transformers' modeling_rope_utils.py in f32, operation by operation. Never rotates anything.

use super::Rope;
use super::config::Object;
use crate::{Error, Result};
use std::f64::consts::PI;

/// What the rules need besides their own keys.
pub(super) struct Base {
    pub(super) head_dim: usize,
    pub(super) theta: f64,
    pub(super) max_position: usize,
}

impl Base {
    /// `1 / theta^(2i / d)`, rounded to f32 after each operation.
    fn plain(&self) -> Vec<f32> {
        self.powers().iter().map(|p| 1.0 / p).collect()
    }

    fn powers(&self) -> Vec<f32> {
        let theta = f64::from(self.theta as f32);
        let d = self.head_dim as f32;
        (0..self.head_dim / 2)
            .map(|i| libm::pow(theta, f64::from((2 * i) as f32 / d)) as f32)
            .collect()
    }

    /// Without scaling.
    pub(super) fn unscaled(&self) -> Rope {
        Rope { inv_freq: self.plain(), scale: 1.0 }
    }

    /// With the rules of `params`, one object of `rope_scaling` or `rope_parameters`. The second value is the
    /// context that the rule is meant to reach, where it says so.
    pub(super) fn scaled(&self, params: &Object<'_>) -> Result<(Rope, Option<usize>)> {
        let kind = match (params.text("rope_type")?, params.text("type")?) {
            (Some(a), Some(b)) if a != b => {
                return Err(params.bad(
                    "rope_type",
                    format!("{a:?} but `type` is {b:?}"),
                    "one type",
                ));
            }
            (Some(kind), _) | (None, Some(kind)) => kind,
            (None, None) => "default",
        };
        let own: &[&str] = match kind {
            "default" => &[],
            "linear" => &["factor"],
            "llama3" => &[
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            ],
            "yarn" => &[
                "factor",
                "original_max_position_embeddings",
                "attention_factor",
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
                "truncate",
            ],
            _ => {
                return Err(Error::Unsupported(format!(
                    "config.json: {}: {kind:?} is not supported, only default, linear, llama3, yarn",
                    params.label("rope_type")
                )));
            }
        };
        for key in params.keys() {
            let known = ["rope_type", "type", "rope_theta"].contains(&key)
                || own.contains(&key)
                || key == "partial_rotary_factor" && params.number(key)? == Some(1.0);
            if !known {
                return Err(Error::Unsupported(format!(
                    "config.json: {} is not supported with rope type {kind:?}",
                    params.label(key)
                )));
            }
        }
        let positive = |key: &str| params.number_in(key, f64::MIN_POSITIVE, 1e9);
        let need = |key: &str| positive(key)?.ok_or_else(|| params.missing(key));
        let (mut scale, mut reach) = (1.0, None);
        let inv_freq: Vec<f32> = match kind {
            "default" => self.plain(),
            "linear" => {
                let factor = need("factor")? as f32;
                self.plain().iter().map(|f| f / factor).collect()
            }
            "llama3" => {
                let (factor, low) = (need("factor")? as f32, need("low_freq_factor")?);
                let high = need("high_freq_factor")?;
                let original = need("original_max_position_embeddings")?;
                if high <= low {
                    let found = format!("{high}, low_freq_factor {low}");
                    return Err(params.bad("high_freq_factor", found, "more than low_freq_factor"));
                }
                let bend = |f: f32| {
                    let wavelength = 2.0 * PI as f32 / f;
                    if wavelength < (original / high) as f32 {
                        f
                    } else if wavelength > (original / low) as f32 {
                        f / factor
                    } else {
                        let smooth =
                            (original as f32 / wavelength - low as f32) / (high - low) as f32;
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                };
                self.plain().into_iter().map(bend).collect()
            }
            _ => {
                let factor = need("factor")?;
                let original = positive("original_max_position_embeddings")?
                    .unwrap_or(self.max_position as f64);
                reach = Some((original * factor) as usize);
                scale = yarn_scale(params, factor)? as f32;
                self.yarn(params, factor, original)?
            }
        };
        if !scale.is_finite() || inv_freq.iter().any(|f| !f.is_finite()) {
            return Err(params.bad(
                "rope_type",
                format!("{kind:?} with numbers that overflow"),
                "finite frequencies",
            ));
        }
        Ok((Rope { inv_freq, scale }, reach))
    }

    /// YaRN (Peng et al. 2023): low frequencies are divided by `factor`, high ones kept, with a ramp between.
    fn yarn(&self, params: &Object<'_>, factor: f64, original: f64) -> Result<Vec<f32>> {
        let positive = |key: &str, default: f64| -> Result<f64> {
            // transformers takes 0 for "not given" here.
            Ok(params.number_in(key, 0.0, 1e9)?.filter(|x| *x > 0.0).unwrap_or(default))
        };
        let d = self.head_dim as f64;
        let dim = |turns: f64| {
            d * libm::log(original / (turns * 2.0 * PI)) / (2.0 * libm::log(self.theta))
        };
        let mut low = dim(positive("beta_fast", 32.0)?);
        let mut high = dim(positive("beta_slow", 1.0)?);
        if params.flag("truncate")?.unwrap_or(true) {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(d - 1.0));
        if low == high {
            high += 0.001; // no division by zero
        }
        let ramp = |i: usize| ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
        let bend = |(i, p): (usize, &f32)| {
            let keep = 1.0 - ramp(i);
            1.0 / (factor as f32 * p) * (1.0 - keep) + 1.0 / p * keep
        };
        Ok(self.powers().iter().enumerate().map(bend).collect())
    }
}

/// What YaRN multiplies the scores of latent attention by, beside its factor on cos and sin: `m(mscale_all_dim)^2`.
pub(super) fn latent_scale(params: &Object<'_>) -> Result<f64> {
    let yarn = [params.text("rope_type")?, params.text("type")?].contains(&Some("yarn"));
    let (factor, all) = (params.number("factor")?, params.number("mscale_all_dim")?);
    Ok(match (factor, all) {
        (Some(factor), Some(all)) if yarn && factor > 1.0 => {
            let m = 0.1 * all * libm::log(factor) + 1.0;
            m * m
        }
        _ => 1.0,
    })
}

/// YaRN's factor on cos and sin: `attention_factor`, else `m(mscale) / m(mscale_all_dim)` if both are given and
/// not 0, else `m(1)`, with `m(x) = 0.1 x ln(factor) + 1`, or 1 if `factor <= 1`.
fn yarn_scale(params: &Object<'_>, factor: f64) -> Result<f64> {
    let m = |x: f64| if factor <= 1.0 { 1.0 } else { 0.1 * x * libm::log(factor) + 1.0 };
    let given = |key: &str| params.number_in(key, 0.0, 1e9);
    if let Some(x) = given("attention_factor")? {
        return Ok(x);
    }
    let (mscale, all) = (given("mscale")?, given("mscale_all_dim")?);
    Ok(match (mscale, all) {
        (Some(a), Some(b)) if a != 0.0 && b != 0.0 => m(a) / m(b),
        _ => m(1.0),
    })
}
