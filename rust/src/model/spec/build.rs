//! From a family and a `config.json` to a [`Spec`]: every number read, checked, and refused if the model is not
//! what the family says. Knows no tensor.

use super::config::{Facts, Object, bad, shown};
use super::family::{self, Family};
use super::{Act, Attention, Ffn, Layer, Mixer, Norms, Place, QkNorm, Rope, Spec, rope};
use crate::{Error, Result};
use serde_json::Value;

// No released model comes near these; they keep every product of two far below 2^64.
const MAX_LAYERS: usize = 10_000;
const MAX_WIDTH: usize = 1 << 20;
const MAX_HEADS: usize = 1 << 14;
const MAX_HEAD_DIM: usize = 1 << 14;
const MAX_FFN: usize = 1 << 22;
const MAX_VOCAB: usize = 1 << 24;
const MAX_POSITIONS: usize = 1 << 30;

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
        let positions = facts.count(&family.positions, MAX_POSITIONS)?;
        let (ropes, local, reach) = match positions {
            Some(_) => (Vec::new(), 0, None),
            None => ropes(&family, facts, head_dim, file_context)?,
        };
        let scale_of = facts.number(&family.attn_scale_rsqrt_of, 1e-9, 1e9)?;
        let softcap =
            |fact| -> Result<Option<f32>> { Ok(facts.number(fact, 1e-6, 1e9)?.map(|x| x as f32)) };
        let parallel = facts.flag(&family.parallel)?;
        let norms = if parallel { family.norms_parallel.as_ref() } else { None };
        let norms = norms.unwrap_or(&family.norms);
        let has = |place| norms.contains(&place);
        let norm_bias = facts.flag(&family.norm_bias)?;
        if norm_bias && !family.norm.centred()
            || parallel && (has(Place::AttnAfter) || has(Place::FfnAfter))
        {
            return Err(Error::format(
                format!("family of {architecture}"),
                "found a bias on an rms norm, or a norm of outputs in a parallel layer, expected neither",
            ));
        }
        let scale =
            |fact| -> Result<f32> { Ok(facts.number(fact, 1e-6, 1e6)?.unwrap_or(1.0) as f32) };
        let attention = Attention {
            heads,
            kv_heads,
            head_dim,
            scale: match facts.number(&family.attn_scale, 1e-6, 1e6)? {
                Some(scale) => scale as f32,
                None => (1.0 / scale_of.unwrap_or(head_dim as f64).sqrt()) as f32,
            },
            clip: softcap(&family.attn_clip)?,
            softcap: softcap(&family.attn_softcap)?,
            window: None,
            rope: None,
        };
        let width =
            match (facts.count(&family.ffn, MAX_FFN)?, facts.count(&family.ffn_per_hidden, 64)?) {
                (None, Some(times)) => times * hidden,
                _ => facts.need_count(&family.ffn, MAX_FFN)?,
            };
        let ffn = if family.gated { Ffn::Dense(width) } else { Ffn::Plain(width) };
        let layers = windows(&family, facts)?.into_iter().map(|window| {
            let rope = positions.is_none().then_some(if window.is_some() { local } else { 0 });
            let mixer = Mixer::Attention(Attention { window, rope, ..attention });
            Layer { mixer, ffn: ffn.clone() }
        });
        let layers: Vec<Layer> = layers.collect();
        let embed_scale = scale(&family.embed_scale)?;
        let depth = facts.number(&family.residual_depth, 1e-6, 1e6)?;
        let depth = depth.map_or(1.0, |depth| depth / (layers.len() as f64).sqrt());
        let logit_width = facts.count(&family.logit_width, MAX_WIDTH)?.unwrap_or(hidden);
        let logit_width = logit_width as f64 / hidden as f64;
        let spec = Spec {
            architecture: architecture.to_owned(),
            hidden,
            vocab: facts.need_count(&family.vocab, MAX_VOCAB)?,
            eps: facts.need_number(&family.eps, 1e-12, 1.0)? as f32,
            norm: family.norm,
            norms: Norms {
                attn: has(Place::Attn),
                attn_after: has(Place::AttnAfter),
                ffn: has(Place::Ffn),
                ffn_after: has(Place::FfnAfter),
            },
            norm_bias,
            parallel,
            residual_scale: scale(&family.residual_scale)? * depth as f32,
            qk_norm: if facts.flag(&family.use_qk_norm)? { family.qk_norm } else { QkNorm::None },
            act: match facts.need_text(&family.act)? {
                "silu" | "swish" => Act::Silu,
                "gelu" | "gelu_python" => Act::Gelu,
                "gelu_pytorch_tanh" | "gelu_new" | "gelu_fast" | "gelu_accurate" => Act::GeluTanh,
                "relu2" => Act::Relu2,
                "xielu" if !family.gated => Act::XIelu,
                other => {
                    return Err(Error::Unsupported(format!(
                        "config.json: activation {other:?} is not supported, only silu, gelu, gelu_pytorch_tanh, \
                         relu2, and xielu where there is no gate"
                    )));
                }
            },
            qkv_bias: facts.flag(&family.qkv_bias)?,
            o_bias: facts.flag(&family.o_bias)?,
            mlp_bias: facts.flag(&family.mlp_bias)?,
            logit_scale: scale(&family.logit_scale)? / scale(&family.logit_divisor)?
                * logit_width as f32,
            logit_softcap: softcap(&family.logit_softcap)?,
            embed_scale: match family.embed_times_sqrt_hidden {
                true => (hidden as f32).sqrt() * embed_scale,
                false => embed_scale,
            },
            positions,
            tied: facts.flag(&family.tied)?,
            head_bias: facts.flag(&family.head_bias)?,
            layers,
            ropes,
            context_length: match positions {
                Some(positions) => file_context.min(positions),
                None => file_context.max(reach.unwrap_or(0).min(MAX_POSITIONS)),
            },
            model: family.model,
            names: family.names,
            ignore: family.ignore,
        };
        spec.check_names()?;
        Ok(spec)
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
            && neutral != "*"
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

/// The window of each layer.
fn windows(family: &Family, facts: &Facts<'_>) -> Result<Vec<Option<usize>>> {
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
            Ok(window.filter(|_| slides))
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
