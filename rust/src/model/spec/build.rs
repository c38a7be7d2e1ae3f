//! From a family and a `config.json` to a [`Spec`]: every number read, checked, and refused if the model is not
//! what the family says. Knows no tensor.

use super::config::{Facts, Object, bad, shown};
use super::family::{Family, Format};
use super::gemma;
use super::quantized::Quantized;
use super::ropes::Ropes;
use super::{Act, Attention, Ffn, Gate, Latent, Layer, Mixer, Norms, Place, QkNorm, Spec, Values};
use crate::{Error, Result};
use serde_json::Value;
use std::path::Path;

// No released model comes near these; they keep every product of two far below 2^64.
pub(super) const MAX_LAYERS: usize = 10_000;
pub(super) const MAX_WIDTH: usize = 1 << 20;
pub(super) const MAX_HEADS: usize = 1 << 14;
pub(super) const MAX_HEAD_DIM: usize = 1 << 14;
pub(super) const MAX_FFN: usize = 1 << 22;
pub(super) const MAX_VOCAB: usize = 1 << 24;
pub(super) const MAX_POSITIONS: usize = 1 << 30;

impl Spec {
    /// Reads `config`, the parsed `config.json`. `family` is the TOML text of a family to use instead of the one
    /// that ships for this architecture.
    pub fn new(config: &Value, family: Option<&str>) -> Result<Spec> {
        Spec::read(config, family, Format::Config)
    }

    /// Reads `facts`, what the GGUF file `path` says ([`super::gguf::facts`]).
    pub fn of_gguf(path: &Path, facts: &Value, family: Option<&str>) -> Result<Spec> {
        Spec::read(facts, family, Format::Gguf).map_err(|error| match error {
            Error::Format { file, what } if file == Path::new("config.json") => {
                Error::format(path, format!("metadata: {what}"))
            }
            Error::Unsupported(what) => {
                let what = what.strip_prefix("config.json: ").unwrap_or(&what);
                Error::Unsupported(format!("{}: metadata: {what}", path.display()))
            }
            other => other,
        })
    }

    fn read(config: &Value, family: Option<&str>, format: Format) -> Result<Spec> {
        let Some(top) = config.as_object() else {
            return Err(Error::format("config.json", "found no object, expected one"));
        };
        let top = Object { map: top, path: String::new() };
        let Some(architecture) = top.get("architectures").and_then(|v| v[0].as_str()) else {
            let found = top.get("architectures").map_or("nothing".to_owned(), shown);
            return Err(top.bad("architectures", found, "a list with the model's class name"));
        };
        let family = match family {
            None => Family::of(architecture, top.map, format)?,
            Some(text) => {
                let family = Family::parse(text, "given", format)?;
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
        let quantized = quantized(&family, architecture, &top, &text)?;
        refuse(&family, architecture, &text)?;
        if format == Format::Gguf {
            only_known(&family, architecture, &top)?;
        }
        let facts = Facts { top, text };
        let mut spec = Spec::build(family, architecture, &facts)?;
        spec.quantized = quantized;
        if format == Format::Gguf {
            let behind = facts.top.number_in("nextn_predict_layers", 0.0, 64.0)?.unwrap_or(0.0);
            let layers = spec.layers.len();
            spec.ignore.extend((layers..layers + behind as usize).map(|l| format!("blk.{l}.*")));
        }
        Ok(spec)
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
        let full_dim = family.gemma.as_ref().map(|g| g.full_head_dim(facts)).transpose()?.flatten();
        let dims = [full_dim.unwrap_or(head_dim), head_dim];
        let file_context = facts.need_count(&family.context_length, MAX_POSITIONS)?;
        let windows = windows(&family, facts)?;
        let positions = facts.count(&family.positions, MAX_POSITIONS)?;
        let rotates = match facts.read_text(&family.rotates)? {
            Some("rope") => positions.is_none(),
            Some("nope") | None => false,
            Some(other) => {
                let what = format!("config.json: positions of kind {other:?} are not supported");
                return Err(Error::Unsupported(format!("{what}, only \"rope\" and \"nope\"")));
            }
        };
        let ropes = match rotates {
            false => Ropes::none(windows.len()),
            true => Ropes::read(&family, facts, dims, file_context, &windows)?,
        };
        let scale_of = facts.number(&family.attn_scale_rsqrt_of, 1e-9, 1e9)?;
        let softcap =
            |fact| -> Result<Option<f32>> { Ok(facts.number(fact, 1e-6, 1e9)?.map(|x| x as f32)) };
        let parallel = facts.flag(&family.parallel)?;
        let norms = if parallel { family.norms_parallel.as_ref() } else { None };
        let norms = norms.unwrap_or(&family.norms);
        let has = |place| norms.contains(&place);
        let norm_bias = facts.flag(&family.norm_bias)?;
        let unknown = if norm_bias && !family.norm.centred() {
            Some("found biases on rms norms, expected none")
        } else if parallel && norms.iter().any(|p| [Place::AttnAfter, Place::FfnAfter].contains(p))
        {
            Some("found a norm of outputs in parallel layers, expected none")
        } else if parallel && norms.is_empty() {
            Some("found parallel layers without a norm, expected one or two")
        } else {
            None
        };
        if let Some(what) = unknown {
            return Err(Error::format(format!("family of {architecture}"), what));
        }
        let qkv_bias = facts.flag(&family.qkv_bias)?;
        if qkv_bias && family.attn_gate != Gate::None || parallel && family.recurrent.is_some() {
            return Err(Error::format(
                format!("family of {architecture}"),
                "found a bias on gated attention, or a state in a parallel layer, expected neither",
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
            query_growth: match family.query_growth.key.is_empty() {
                true => None,
                false => Some((
                    facts.need_number(&family.query_growth, 0.0, 1e3)? as f32,
                    facts.need_count(&family.query_growth_every, MAX_POSITIONS)?,
                )),
            },
            values: Values::Projected,
            kv_of: None,
            gate: if facts.flag(&family.use_attn_gate)? { family.attn_gate } else { Gate::None },
            sinks: facts.flag(&family.sinks)?,
            rope_interleaved: facts.flag(&family.rope_interleaved)?,
        };
        let latent = Latent::read(&family, facts, (hidden, heads, head_dim))?;
        if parallel && latent.is_some() {
            let what = "found latent attention in parallel layers, expected ordinary attention";
            return Err(Error::format(format!("family of {architecture}"), what));
        }
        let ffns = ffns(&family, facts, hidden, windows.len())?;
        let states = match &family.recurrent {
            Some(recurrent) => recurrent.at(facts, &family, windows.len())?,
            None => vec![false; windows.len()],
        };
        let recurrent = family.recurrent.as_ref().filter(|_| states.contains(&true));
        let recurrent = recurrent.map(|r| r.read(facts, &family, hidden)).transpose()?;
        let kinds = windows.into_iter().zip(ropes.of).zip(states).zip(ffns);
        let layers = kinds.map(|(((window, rope), state), ffn)| {
            let mixer = match (recurrent, latent) {
                (Some(recurrent), _) if state => Mixer::Recurrent(recurrent),
                (_, Some(latent)) => Mixer::Latent(Latent { rope, ..latent }),
                _ => Mixer::Attention(Attention { window, rope, ..attention }),
            };
            Layer { mixer, ffn }
        });
        let mut layers: Vec<Layer> = layers.collect();
        let gemma = family.gemma.as_ref().map(|g| g.read(facts, &mut layers)).transpose()?;
        let embed_scale = scale(&family.embed_scale)?;
        let depth = facts.number(&family.residual_depth, 1e-6, 1e6)?;
        let depth = depth.map_or(1.0, |depth| depth / (layers.len() as f64).sqrt());
        let logit_width = facts.count(&family.logit_width, MAX_WIDTH)?.unwrap_or(hidden);
        let logit_width = logit_width as f64 / hidden as f64;
        let spec = Spec {
            architecture: architecture.to_owned(),
            family: family.name.clone(),
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
            qk_norm_after_rope: family.qk_norm_after_rope,
            qk_norm: if facts.flag(&family.use_qk_norm)? { family.qk_norm } else { QkNorm::None },
            act: match facts.need_text(&family.act)? {
                "silu" | "swish" => Act::Silu,
                "gelu" | "gelu_python" => Act::Gelu,
                "gelu_pytorch_tanh" | "gelu_new" | "gelu_fast" | "gelu_accurate" => Act::GeluTanh,
                "relu2" => Act::Relu2,
                "clamped_swiglu" if family.gated => Act::ClampedSwiglu,
                "xielu" if !family.gated => Act::XIelu,
                other => {
                    return Err(Error::Unsupported(format!(
                        "config.json: activation {other:?} is not supported, only silu, gelu, gelu_pytorch_tanh, \
                         relu2, and xielu where there is no gate"
                    )));
                }
            },
            xielu: xielu(&family, facts, layers.len())?,
            transposed: family.transposed,
            qkv_by_head: family.qkv_by_head,
            qkv_bias,
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
            gemma,
            layers,
            ropes: ropes.all,
            context_length: match positions {
                Some(positions) => file_context.min(positions),
                None => file_context.max(ropes.reach.unwrap_or(0).min(MAX_POSITIONS)),
            },
            quantized: None,
            model: family.model,
            names: family.names,
            ignore: family.ignore,
        };
        spec.check_names()?;
        Ok(spec)
    }
}

/// What the file says about quantized weights, but for methods of the family's own, which must say no more than that.
fn quantized(
    family: &Family,
    architecture: &str,
    top: &Object<'_>,
    text: &Object<'_>,
) -> Result<Option<Quantized>> {
    let mut found: Option<(String, &Value)> = None;
    let mut quantized = None;
    for object in [top, text] {
        for key in ["quantization_config", "compression_config"] {
            let Some(value) = object.get(key) else { continue };
            match &found {
                Some((_, other)) if *other == value => continue,
                Some((label, _)) => {
                    return Err(object.bad(
                        key,
                        "another description".to_owned(),
                        &format!("what {label} says"),
                    ));
                }
                None => found = Some((object.label(key), value)),
            }
            let method = value["quant_method"].as_str().unwrap_or("unknown");
            if family.quantized.iter().any(|known| known == method) {
                only_experts(object, key)?;
            } else if let Some(said) = object.object(key)? {
                quantized = Some(Quantized::read(&said)?);
            }
            if quantized.is_some() && family.transposed {
                return Err(Error::Unsupported(format!(
                    "config.json: {}: quantized weights of {architecture} are not supported; take the model's \
                     unquantized checkpoint",
                    object.label(key)
                )));
            }
        }
    }
    Ok(quantized)
}

/// Refuses a model that asks for more than the family honours.
fn refuse(family: &Family, architecture: &str, text: &Object<'_>) -> Result<()> {
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

/// Checks that a GGUF file says nothing that the family does not know: there, every key is about the arithmetic.
fn only_known(family: &Family, architecture: &str, top: &Object<'_>) -> Result<()> {
    let tensor =
        |key: &str| key.starts_with("blk.") || key.ends_with(".weight") || key.ends_with(".bias");
    let own = |key: &str| key == "architectures" || tensor(key);
    let known = |key: &str| family.honoured.contains(key) || family.neutral.contains_key(key);
    match top.keys().find(|key| !own(key) && !known(key)) {
        None => Ok(()),
        Some(key) => Err(Error::Unsupported(format!(
            "config.json: {}: {} is not known for {architecture} here",
            top.label(key),
            top.get(key).map_or("nothing".to_owned(), shown)
        ))),
    }
}

/// The width of a feed-forward network, if it is given: as it is, or two thirds of it, times a factor, rounded up.
fn ffn_width(family: &Family, facts: &Facts<'_>, hidden: usize) -> Result<Option<usize>> {
    let width = facts.count(&family.ffn, MAX_FFN)?;
    let width = match facts.count(&family.ffn_per_hidden, 64)? {
        Some(times) => width.or(Some(times * hidden)),
        None => width,
    };
    let (Some(width), true) = (width, facts.flag(&family.ffn_two_thirds)?) else {
        return Ok(width);
    };
    let width = 2 * width / 3;
    let Some(factor) = facts.number(&family.ffn_factor, 1e-3, 1e3)? else {
        return Ok(Some(width));
    };
    let multiple = facts.need_count(&family.ffn_multiple, MAX_FFN)?;
    let width = ((factor * width as f64) as usize).next_multiple_of(multiple);
    match width {
        1..=MAX_FFN => Ok(Some(width)),
        _ => Err(bad("the adjusted width", &width.to_string(), &format!("1 to {MAX_FFN}"))),
    }
}

/// The numbers of xIELU of each layer, where the file lists them.
fn xielu(family: &Family, facts: &Facts<'_>, layers: usize) -> Result<Option<Vec<[f32; 4]>>> {
    let Some(list) = facts.list(&family.xielu)? else { return Ok(None) };
    let number = |v: &Value| v.as_f64().map(|x| x as f32).filter(|x| x.is_finite());
    let four = |v: &Value| {
        <[f32; 4]>::try_from(v.as_array()?.iter().map(number).collect::<Option<Vec<_>>>()?).ok()
    };
    let all = list.iter().map(four).collect::<Option<Vec<_>>>();
    let all = all.filter(|all| all.len() == layers);
    all.map(Some).ok_or_else(|| {
        bad("xielu", &format!("{} entries", list.len()), "four numbers for each layer")
    })
}

/// Checks that a description of MXFP4 weights says no more than that experts are so.
fn only_experts(object: &Object<'_>, key: &str) -> Result<()> {
    let Some(said) = object.object(key)? else { return Ok(()) };
    let kept = said.get("modules_to_not_convert").and_then(Value::as_array);
    let modules: Vec<&str> = kept.into_iter().flatten().filter_map(Value::as_str).collect();
    let mut strange =
        said.keys().filter(|k| !["quant_method", "modules_to_not_convert"].contains(k));
    if let Some(strange) = strange.next() {
        return Err(Error::Unsupported(format!(
            "config.json: {}: not known for MXFP4 weights",
            said.label(strange)
        )));
    }
    if let Some(module) = modules.into_iter().find(|module| module.contains("experts")) {
        return Err(Error::Unsupported(format!(
            "config.json: {}: {module:?} is expected to be MXFP4",
            said.label("modules_to_not_convert")
        )));
    }
    Ok(())
}

/// The feed-forward network of each layer.
fn ffns(family: &Family, facts: &Facts<'_>, hidden: usize, layers: usize) -> Result<Vec<Ffn>> {
    let widths = gemma::widths(facts, &family.ffn, layers)?;
    let width = match &widths {
        Some(widths) => widths.first().copied(),
        None => ffn_width(family, facts, hidden)?,
    };
    let (moe, has) = match &family.moe {
        None => (None, vec![false; layers]),
        Some(moe) if !moe.enabled(facts)? => (None, vec![false; layers]),
        Some(moe) => {
            let own = |o: &Object<'_>| {
                let said =
                    o.get("quantization_config").and_then(|said| said["quant_method"].as_str());
                said.is_some_and(|method| family.quantized.iter().any(|known| known == method))
            };
            let mxfp4 = own(&facts.top) || own(&facts.text);
            let (moe, has) = moe.read(facts, hidden, width, layers, mxfp4)?;
            (Some(moe), has)
        }
    };
    let beside = family.moe.as_ref().map(|moe| facts.flag(&moe.beside_dense)).transpose()?;
    let ffn = |(l, has): (usize, bool)| {
        let width = || match &widths {
            Some(widths) => Ok(widths[l]),
            None => width.map_or_else(|| facts.need_count(&family.ffn, MAX_FFN), Ok),
        };
        Ok(match (moe, has) {
            (Some(moe), true) if beside == Some(true) => Ffn::Beside(width()?, moe),
            (Some(moe), true) => Ffn::Moe(moe),
            _ if family.gated => Ffn::Dense(width()?),
            _ => Ffn::Plain(width()?),
        })
    };
    has.into_iter().enumerate().map(ffn).collect()
}

/// The window of each layer.
fn windows(family: &Family, facts: &Facts<'_>) -> Result<Vec<Option<usize>>> {
    let count = facts.need_count(&family.layers, MAX_LAYERS)?;
    let window = facts.count(&family.window, MAX_POSITIONS)?;
    let window = if facts.flag(&family.use_window)? { window } else { None };
    let types = facts.list(&family.layer_types)?;
    // Not read where layer_types decides: EXAONE 4 says the interval in letters.
    let full_every = match types {
        None => facts.count(&family.full_every, MAX_LAYERS)?,
        Some(_) => None,
    };
    let full_at = facts.number(&family.full_at, 0.0, 1e9)?;
    let full_first = facts.number(&family.full_first, 0.0, 1e9)?;
    if let Some(types) = types
        && types.len() != count
    {
        return Err(bad("layer_types", &format!("{} entries", types.len()), &format!("{count}")));
    }
    let full_last = facts.flag(&family.full_last)?;
    let state = |name: &str| family.recurrent.as_ref().is_some_and(|r| r.is_type(name));
    (0..count)
        .map(|l| {
            let slides = match types.map(|t| &t[l]) {
                Some(Value::String(t)) if t == "full_attention" || t == "attention" => false,
                Some(Value::String(t)) if state(t) => false,
                Some(Value::String(t)) if t == "sliding_attention" => {
                    if window.is_none() {
                        let label = format!("layer_types[{l}]");
                        return Err(bad(
                            &label,
                            "\"sliding_attention\" without a window",
                            "a window",
                        ));
                    }
                    true
                }
                Some(other) => {
                    return Err(Error::Unsupported(format!(
                        "config.json: layer_types[{l}]: {} is not supported, only full_attention, \
                         sliding_attention and what the family says",
                        shown(other)
                    )));
                }
                None => {
                    full_every.is_none_or(|n| (l % n) as f64 != full_at.unwrap_or(n as f64 - 1.0))
                        && full_first.is_none_or(|n| l as f64 >= n)
                }
            };
            Ok(window.filter(|_| slides && !(full_last && l + 1 == count)))
        })
        .collect()
}
