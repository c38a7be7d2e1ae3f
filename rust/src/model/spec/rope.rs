//! Rotary position embedding: frequencies from `rope_theta` and the scaling rules of `config.json`.
//! Follows transformers' modeling_rope_utils.py in f32, operation by operation. Never rotates anything.

use super::config::{Object, shown};
use super::{Long, Rope};
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::collections::HashSet;
use std::f64::consts::PI;

/// What the rules need besides their own keys.
pub(super) struct Base<'a> {
    /// Dimensions of a head that rotate.
    pub(super) dim: usize,
    pub(super) theta: f64,
    pub(super) max_position: usize,
    /// The context before it was extended, where the file says so outside of the rules.
    pub(super) original: Option<usize>,
    /// Keys that facts read, those inside of the rules among them.
    pub(super) honoured: &'a HashSet<String>,
}

impl Base<'_> {
    /// `1 / theta^(2i / d)`, rounded to f32 after each operation.
    fn plain(&self) -> Vec<f32> {
        self.powers().iter().map(|p| 1.0 / p).collect()
    }

    fn powers(&self) -> Vec<f32> {
        let theta = f64::from(self.theta as f32);
        let d = self.dim as f32;
        (0..self.dim / 2).map(|i| libm::pow(theta, f64::from((2 * i) as f32 / d)) as f32).collect()
    }

    /// Without scaling.
    pub(super) fn unscaled(&self) -> Rope {
        Rope { inv_freq: self.plain(), scale: 1.0, long: None }
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
            "linear" | "proportional" => &["factor"],
            "divisors" => &["divisors"],
            "dynamic" => &["factor", "alpha", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"],
            "longrope" | "su" => &[
                "factor",
                "long_factor",
                "short_factor",
                "original_max_position_embeddings",
                "attention_factor",
            ],
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
                    "config.json: {}: {kind:?} is not supported, only default, linear, proportional, \
                     dynamic, llama3, yarn, longrope",
                    params.label("rope_type")
                )));
            }
        };
        for key in params.keys() {
            // Those of `mrope` concern images: the positions of text have one part.
            const COMMON: [&str; 6] = [
                "rope_type",
                "type",
                "rope_theta",
                "partial_rotary_factor",
                "mrope_section",
                "mrope_interleaved",
            ];
            let known = COMMON.contains(&key)
                || own.contains(&key)
                || self.honoured.iter().any(|fact| {
                    fact.split_once('/').is_some_and(|(object, k)| !object.is_empty() && k == key)
                });
            if !known {
                return Err(Error::Unsupported(format!(
                    "config.json: {} is not supported with rope type {kind:?}",
                    params.label(key)
                )));
            }
        }
        let positive = |key: &str| params.number_in(key, f64::MIN_POSITIVE, 1e9);
        let need = |key: &str| positive(key)?.ok_or_else(|| params.missing(key));
        let (mut scale, mut reach, mut long) = (1.0, None, None);
        let inv_freq: Vec<f32> = match kind {
            "default" => self.plain(),
            "linear" => {
                let factor = need("factor")? as f32;
                self.plain().iter().map(|f| f / factor).collect()
            }
            // Of a GGUF file: one number for each frequency.
            "divisors" => self.divided(params, "divisors")?,
            // Pairs of the whole head, of which those beyond a part have no frequency.
            "proportional" => {
                let factor = positive("factor")?.unwrap_or(1.0) as f32;
                let part = params.number_in("partial_rotary_factor", 0.0, 1.0)?.unwrap_or(1.0);
                let turning = (part * self.dim as f64 / 2.0) as usize;
                let turns = |(i, f)| if i < turning { f / factor } else { 0.0 };
                self.plain().into_iter().enumerate().map(turns).collect()
            }
            "dynamic" => {
                // With alpha (Hunyuan): a larger base from the start. Without: the base grows beyond the context.
                let factor = need("factor")?;
                let Some(alpha) = positive("alpha")? else { return Ok((self.unscaled(), None)) };
                if factor != 1.0 {
                    return Err(params.bad("factor", format!("{factor} beside alpha"), "1"));
                }
                let d = self.dim as f64;
                let theta = self.theta * libm::pow(alpha, d / (d - 2.0));
                Base { theta, ..*self }.plain()
            }
            "longrope" | "su" => {
                let inside = params.number_in("original_max_position_embeddings", 1.0, 1e9)?;
                let original = match (inside, self.original) {
                    (Some(a), Some(b)) if a != b as f64 => {
                        let expected = format!("{b}, as outside");
                        let key = "original_max_position_embeddings";
                        return Err(params.bad(key, a.to_string(), &expected));
                    }
                    (Some(a), _) => a as usize,
                    (None, Some(b)) => b,
                    (None, None) => self.max_position,
                };
                let ratio = self.max_position as f64 / original as f64;
                let factor = positive("factor")?.unwrap_or(ratio);
                scale = match positive("attention_factor")? {
                    Some(given) => given as f32,
                    None if factor <= 1.0 => 1.0,
                    None => {
                        let (a, b) = (libm::log(factor), libm::log(original as f64));
                        libm::sqrt(1.0 + a / b) as f32
                    }
                };
                let short = self.divided(params, "short_factor")?;
                let other = self.divided(params, "long_factor")?;
                if other != short {
                    long = Some(Long { inv_freq: other, after: original });
                }
                short
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
        let all = inv_freq.iter().chain(long.iter().flat_map(|l| &l.inv_freq));
        if !scale.is_finite() || all.into_iter().any(|f| !f.is_finite()) {
            return Err(params.bad(
                "rope_type",
                format!("{kind:?} with numbers that overflow"),
                "finite frequencies",
            ));
        }
        Ok((Rope { inv_freq, scale, long }, reach))
    }

    /// Each frequency divided by a factor of its own, from a list.
    fn divided(&self, params: &Object<'_>, key: &str) -> Result<Vec<f32>> {
        let powers = self.powers();
        let bad = |found| params.bad(key, found, &format!("{} positive numbers", powers.len()));
        let list = params.get(key).ok_or_else(|| bad("nothing".to_owned()))?;
        let factors = list.as_array().filter(|list| list.len() == powers.len());
        let factors = factors.ok_or_else(|| bad(shown(list)))?.iter().zip(&powers);
        let divided = factors.map(|(factor, power)| {
            let factor = factor.as_f64().filter(|x| *x > 0.0 && *x < 1e31); // Gemma 4 has 1e30
            factor.map(|factor| 1.0 / (factor as f32 * power)).ok_or_else(|| bad(shown(list)))
        });
        divided.collect()
    }

    /// YaRN (Peng et al. 2023): low frequencies are divided by `factor`, high ones kept, with a ramp between.
    fn yarn(&self, params: &Object<'_>, factor: f64, original: f64) -> Result<Vec<f32>> {
        let positive = |key: &str, default: f64| -> Result<f64> {
            // transformers takes 0 for "not given" here.
            Ok(params.number_in(key, 0.0, 1e9)?.filter(|x| *x > 0.0).unwrap_or(default))
        };
        let d = self.dim as f64;
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

/// The base that a rule with alpha (Hunyuan) makes of one.
pub(super) fn scaled_theta(theta: f64, dim: usize, rule: Option<&Map<String, Value>>) -> f64 {
    let alpha =
        rule.filter(|rule| rule.get("type").or(rule.get("rope_type")) == Some(&"dynamic".into()));
    let d = dim as f64;
    match alpha.and_then(|rule| rule.get("alpha")?.as_f64()) {
        Some(alpha) => theta * libm::pow(alpha, d / (d - 2.0)),
        None => theta,
    }
}

/// What divides each plain frequency to give `inv_freq`: exactly, where a number near the quotient does.
pub(super) fn divisors(theta: f64, inv_freq: &[f32]) -> Vec<f32> {
    let honoured = HashSet::new();
    let base = Base {
        dim: 2 * inv_freq.len(),
        theta,
        max_position: 1,
        original: None,
        honoured: &honoured,
    };
    let divisor = |(power, inv): (f32, &f32)| {
        if *inv == 0.0 {
            return 1e30; // as Gemma 4 has for what does not turn
        }
        let near = (1.0 / (f64::from(power) * f64::from(*inv))) as f32;
        let all = (-8i32..=8).map(|ulps| f32::from_bits(near.to_bits().wrapping_add_signed(ulps)));
        all.into_iter().find(|factor| 1.0 / (factor * power) == *inv).unwrap_or(near)
    };
    base.powers().into_iter().zip(inv_freq).map(divisor).collect()
}

/// What YaRN multiplies the scores of latent attention by, beside its factor on cos and sin: `m(mscale_all_dim)^2`.
pub(super) fn latent_scale(params: &Object<'_>) -> Result<f64> {
    let yarn = [params.text("rope_type")?, params.text("type")?].contains(&Some("yarn"));
    let given = |key: &str| params.number_in(key, 0.0, 1e9);
    let (factor, all) = (given("factor")?, given("mscale_all_dim")?);
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
