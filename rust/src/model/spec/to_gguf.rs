//! What a GGUF file says about a model that comes from a config.json: the reverse of [`super::gguf`], from the same
//! families. What is written is read again and compared, so that a model that GGUF has no words for is an error. Never
//! touches a tensor.

use super::config::{Facts, Object};
use super::family::{Fact, Family, Format};
use super::rope::{divisors, scaled_theta};
use super::{Attention, Ffn, Latent, Mixer, Names, Norm, Spec, Stored};
use crate::file::gguf_writer::Datum;
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// What is written.
pub struct Said {
    /// `general.architecture`.
    pub architecture: String,
    /// The keys of the architecture.
    pub items: Vec<(String, Datum)>,
    /// Tensors that are no weights: factors of rotary frequencies.
    pub vectors: Vec<(String, Vec<f32>)>,
    /// The model as such a file has it.
    pub spec: Spec,
    /// What its weights are called.
    pub names: Names,
}

/// Facts that are written as floats whatever a config.json has.
const FLOATS: &[&str] = &[
    "eps",
    "rope_theta",
    "rope_theta_local",
    "embed_scale",
    "residual_scale",
    "logit_scale",
    "logit_divisor",
    "attn_scale",
    "attn_scale_rsqrt_of",
    "attn_clip",
    "attn_softcap",
    "logit_softcap",
    "scale",
    "query_growth",
];
/// What is no number of a config.json, and found otherwise here.
const WHOLE: &[&str] = &["architectures", "tied", "layer_types", "rope_scaling", "xielu"];
/// Said by tensors, or by other keys (see `items`).
const DERIVED: &[&str] = &[
    "attention.key_length_nope",
    "attention.head_count_kv_full",
    "keys_without_values",
    "per_layer_vocab",
    "query_pre_attn_scalar",
    "position_embedding_type",
    "ssm.value_length",
];

/// A model and where its facts come from.
struct Source<'a> {
    spec: &'a Spec,
    /// Its family's table, bases merged in.
    table: Map<String, Value>,
    family: Family,
    facts: Facts<'a>,
    /// The family that says how GGUF has it, and its table `[gguf]`.
    to: Family,
    gguf: Map<String, Value>,
}

impl Spec {
    /// What a GGUF file of this model says; `names` are those of its checkpoint, `family` is as for [`Spec::new`].
    /// `by_layer`: layers that slide, or have a state, are listed one by one. `xielu` are the numbers of xIELU in each
    /// layer, where they are tensors.
    pub fn to_gguf(
        &self,
        names: &Names,
        config: &Value,
        family: Option<&str>,
        by_layer: bool,
        xielu: Option<&[[f32; 4]]>,
    ) -> Result<Said> {
        let none = || Error::Unsupported(format!("{}: GGUF has no name for it", self.architecture));
        let top = config.as_object().ok_or_else(none)?;
        let (name, text) = Family::text(&self.family, family).ok_or_else(none)?;
        let (to, gguf) = Family::for_gguf(text, name)?.ok_or_else(none)?;
        let family = Family::parse(text, name, Format::Config)?;
        let top = Object { map: top, path: String::new() };
        let text_part = match &family.section {
            Some(key) => top.object(key)?.ok_or_else(none)?,
            None => top.clone(),
        };
        let facts = Facts { top, text: text_part };
        let table = Family::table(text, name)?;
        let source = Source { spec: self, table, family, facts, to, gguf };
        let said = source.said(names, by_layer, xielu)?;
        Ok(said)
    }

    /// An error if `written`, read from a GGUF file, is not this model; where the two may differ, the tensors do.
    pub fn is_said(&self, written: &Spec) -> Result<()> {
        let [a, b] = [(self, written), (written, self)].map(|(spec, other)| plain(spec, other));
        if a == b {
            return Ok(());
        }
        let [a, b] = [a, b].map(|spec| format!("{spec:#?}"));
        let differ = a.lines().zip(b.lines()).find(|(a, b)| a != b);
        let (a, b) = differ.map_or(("more layers", "fewer"), |(a, b)| (a.trim(), b.trim()));
        Err(Error::Unsupported(format!(
            "{}: GGUF has no words for all of it: the model has `{a}`, a file of architecture {:?} would have `{b}`",
            self.architecture, written.architecture
        )))
    }
}

/// A model without what writing changes, and with the frequencies of `other` where they are nearly the same.
fn plain(spec: &Spec, other: &Spec) -> Spec {
    let mut spec = spec.clone();
    (spec.architecture, spec.family) = (String::new(), String::new());
    spec.norm = match spec.norm {
        Norm::RmsPlusOne => Norm::Rms,
        Norm::LayerPlusOne => Norm::Layer,
        norm => norm,
    };
    (spec.transposed, spec.qkv_by_head) = (false, false);
    (spec.quantized, spec.xielu) = (None, None);
    (spec.model, spec.ignore) = (Vec::new(), Vec::new());
    spec.names = BTreeMap::new();
    for (layer, other) in spec.layers.iter_mut().zip(&other.layers) {
        match (&mut layer.mixer, &other.mixer) {
            (Mixer::Attention(a), Mixer::Attention(b)) => {
                // Rows of queries and keys take another order; a model without rotation has none.
                a.rope_interleaved = (a.rope_interleaved || b.rope_interleaved) && a.rope.is_some();
            }
            (Mixer::Latent(a), _) => a.split = false,
            (Mixer::Recurrent(r), _) => r.decay = true,
            _ => {}
        }
        if let Ffn::Moe(moe) | Ffn::Beside(_, moe) = &mut layer.ffn {
            moe.stored = Stored::Rows;
        }
    }
    let near = |a: &[f32], b: &[f32]| {
        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-6 * a.abs() + 1e-25;
        a.len() == b.len() && a.iter().zip(b).all(near)
    };
    for (rope, other) in spec.ropes.iter_mut().zip(&other.ropes) {
        let same_long = match (&rope.long, &other.long) {
            (Some(a), Some(b)) => a.after == b.after && near(&a.inv_freq, &b.inv_freq),
            (a, b) => a == b,
        };
        let scale = (rope.scale - other.scale).abs() <= 1e-6 * rope.scale;
        if near(&rope.inv_freq, &other.inv_freq) && same_long && scale {
            // The one of two that both come to.
            rope.inv_freq =
                rope.inv_freq.iter().zip(&other.inv_freq).map(|(a, b)| a.min(*b)).collect();
            rope.scale = rope.scale.min(other.scale);
            if let (Some(a), Some(b)) = (&mut rope.long, &other.long) {
                a.inv_freq = a.inv_freq.iter().zip(&b.inv_freq).map(|(a, b)| a.min(*b)).collect();
            }
        }
    }
    spec
}

impl Source<'_> {
    fn said(&self, names: &Names, by_layer: bool, xielu: Option<&[[f32; 4]]>) -> Result<Said> {
        let spec = self.spec;
        let mut facts = Map::new();
        let tables = ["moe", "recurrent", "gemma"].into_iter().filter(|name| match *name {
            "moe" => spec.layers.iter().any(|l| l.ffn.moe().is_some()),
            "recurrent" => spec.layers.iter().any(|l| matches!(l.mixer, Mixer::Recurrent(_))),
            _ => spec.gemma.is_some(),
        });
        self.table_facts(&self.table, &self.gguf, &mut facts)?;
        for name in tables {
            let table = |of: &Map<String, Value>| of.get(name).and_then(Value::as_object).cloned();
            if let (Some(from), Some(to)) = (table(&self.table), table(&self.gguf)) {
                self.table_facts(&from, &to, &mut facts)?;
            }
        }
        let architecture = self.to.architectures.first().cloned().unwrap_or_default();
        let vectors = self.rope(&architecture, &mut facts)?;
        if by_layer {
            facts.remove("attention.sliding_window_pattern");
            let kind = |layer: &super::Layer| match &layer.mixer {
                Mixer::Recurrent(_) => "recurrent",
                Mixer::Attention(Attention { window: Some(_), .. }) => "sliding_attention",
                _ => "full_attention",
            };
            let kinds: Vec<&str> = spec.layers.iter().map(kind).collect();
            facts.insert("layer_types".to_owned(), json!(kinds));
        }
        if let Some(xielu) = xielu {
            facts.insert("xielu".to_owned(), json!(xielu));
        }
        let own = self.names(names);
        let layers = (0..spec.layers.len()).flat_map(|l| spec.layer_weights(l));
        for weight in spec.model_weights().into_iter().chain(layers) {
            if own.has(weight.what) {
                let name = own.model(weight.what).replace("blk.{l}.", "blk.");
                facts.insert(name, json!(true));
            }
        }
        facts.insert("architectures".to_owned(), json!([architecture]));
        facts.insert("tied".to_owned(), json!(spec.tied));
        let file = Path::new("the GGUF file to be written");
        let written = Spec::of_gguf(file, &Value::Object(facts.clone()), None)?;
        // Several models share a name there.
        let architecture = architecture.split(" with ").next().unwrap_or_default().to_owned();
        let items = self.items(&architecture, &facts)?;
        Ok(Said { architecture, items, vectors, spec: written, names: own })
    }

    /// The facts of a table of the family, by the keys that a table of `[gguf]` has for them.
    fn table_facts(
        &self,
        from: &Map<String, Value>,
        to: &Map<String, Value>,
        facts: &mut Map<String, Value>,
    ) -> Result<()> {
        for (name, value) in to {
            let Ok(Fact { key, .. }) = Fact::try_from(value.clone()) else { continue };
            let key = match (&key[..], &name[..]) {
                ([], _) | (_, "architectures" | "names" | "neutral") => continue,
                // The second is that of norms with a mean.
                ([_, second, ..], "eps") if self.spec.norm.centred() => second,
                ([first, ..], _) => first,
            };
            let tensor = key.starts_with("blk.") || key.ends_with(".weight") || key.contains('/');
            if tensor || WHOLE.contains(&&key[..]) {
                continue;
            }
            let said = match from.get(name).map(|fact| Fact::try_from(fact.clone())) {
                Some(Ok(fact)) => self.facts.value(&fact)?.1.cloned(),
                _ => None,
            };
            let value = match self.known(name) {
                Some(value) => Some(value),
                None => said,
            };
            let Some(value) = value.filter(|value| !value.is_null()) else { continue };
            let value = match value.as_f64() {
                Some(x) if FLOATS.contains(&&name[..]) => json!(x),
                _ => value,
            };
            facts.entry(key.clone()).or_insert(value);
        }
        Ok(())
    }

    /// What the model's numbers say, where that is more than config.json does.
    fn known(&self, name: &str) -> Option<Value> {
        let spec = self.spec;
        let attention = spec.layers.iter().find_map(|layer| match &layer.mixer {
            Mixer::Attention(a) => Some(a),
            _ => None,
        });
        let latent: Option<&Latent> = spec.layers.iter().find_map(|layer| match &layer.mixer {
            Mixer::Latent(a) => Some(a),
            _ => None,
        });
        Some(match name {
            "hidden" => json!(spec.hidden),
            "layers" => json!(spec.layers.len()),
            "vocab" => json!(spec.vocab),
            "kv_heads" if spec.gemma.is_none() => {
                json!(attention.map(|a| a.kv_heads).or(latent.map(|a| a.heads))?)
            }
            "head_dim" if spec.gemma.is_none() && latent.is_none() => json!(attention?.head_dim),
            "expert_ffn" => json!(spec.layers.iter().find_map(|l| l.ffn.moe())?.width),
            "latent_value" => json!(latent?.value),
            "latent_nope" => json!(latent?.nope),
            "rotary_dim" if spec.gemma.is_none() => json!(2 * spec.ropes.first()?.inv_freq.len()),
            "rope_theta" => json!(self.theta(false).ok()??),
            "rope_theta_local" => json!(self.theta(true).ok()??),
            "ffn" => {
                let width = |layer: &super::Layer| match layer.ffn {
                    Ffn::Dense(n) | Ffn::Plain(n) | Ffn::Sparse(n, _) | Ffn::Beside(n, _) => {
                        Some(n)
                    }
                    Ffn::Moe(_) => None,
                };
                let widths: Vec<usize> = spec.layers.iter().filter_map(width).collect();
                let (first, all) = (*widths.first()?, widths.len() == spec.layers.len());
                match widths.iter().all(|n| *n == first) {
                    true => json!(first),
                    false if all => json!(widths),
                    false => return None,
                }
            }
            _ => return None,
        })
    }

    /// The rules of rotary embedding of full layers, or of sliding ones.
    fn rules(&self, sliding: bool) -> Result<Option<Map<String, Value>>> {
        let all = self.facts.objects(&self.family.rope_scaling)?;
        let Some(params) = all.first() else { return Ok(None) };
        if !params.map.values().any(Value::is_object) {
            return Ok(Some(params.map.clone()));
        }
        let key = if sliding { "sliding_attention" } else { "full_attention" };
        Ok(params.object(key)?.map(|inner| inner.map.clone()))
    }

    /// The base of rotary embedding.
    fn theta(&self, local: bool) -> Result<Option<f64>> {
        let rules = self.rules(local)?;
        let inside = rules.as_ref().and_then(|rules| rules.get("rope_theta")?.as_f64());
        let fact = match local {
            true => &self.family.rope_theta_local,
            false => &self.family.rope_theta,
        };
        let theta = match inside.filter(|_| !local || !fact.key.is_empty()) {
            Some(theta) => Some(theta),
            None => self.facts.value(fact)?.1.and_then(Value::as_f64),
        };
        let dim = self.spec.ropes.first().map_or(0, |rope| 2 * rope.inv_freq.len());
        Ok(theta.map(|theta| scaled_theta(theta, dim, rules.as_ref().filter(|_| !local))))
    }

    /// The rule that scales rotary frequencies: as it is, where GGUF has words for it, else as factors of them.
    fn rope(
        &self,
        architecture: &str,
        facts: &mut Map<String, Value>,
    ) -> Result<Vec<(String, Vec<f32>)>> {
        let (Some(rope), Some(rules)) = (self.spec.ropes.first(), self.rules(false)?) else {
            return Ok(Vec::new());
        };
        let kind = ["rope_type", "type"].iter().find_map(|key| rules.get(*key)?.as_str());
        let mut rule = Map::new();
        let copy = |keys: &[&str], rule: &mut Map<String, Value>| {
            let some = keys.iter().filter_map(|key| Some((*key, rules.get(*key)?)));
            rule.extend(some.map(|(key, value)| (key.to_owned(), value.clone())));
        };
        const ORIGINAL: &str = "original_max_position_embeddings";
        let positions = self.facts.value(&self.family.context_length)?.1.cloned();
        let mut vectors = Vec::new();
        match kind.unwrap_or("default") {
            "default" | "dynamic" => return Ok(vectors),
            "linear" => copy(&["factor"], &mut rule),
            "yarn" => {
                let known = ["attention_factor", "beta_fast", "beta_slow", "mscale_all_dim"];
                copy(&["factor"], &mut rule);
                copy(&[ORIGINAL], &mut rule);
                copy(&known, &mut rule);
                if let (None, Some(positions)) = (rule.get(ORIGINAL), positions) {
                    rule.insert(ORIGINAL.to_owned(), positions);
                }
                copy(&["mscale", "truncate"], &mut rule);
            }
            "longrope" | "su" => {
                let outside = self.facts.value(&self.family.original_context)?.1.cloned();
                let original = rules.get(ORIGINAL).cloned().or(outside).or(positions);
                rule.extend(original.map(|n| (ORIGINAL.to_owned(), n)));
                rule.insert("attention_factor".to_owned(), json!(f64::from(rope.scale)));
                copy(&["long_factor", "short_factor"], &mut rule);
                for (end, key) in [("long", "long_factor"), ("short", "short_factor")] {
                    let numbers = rules.get(key).and_then(Value::as_array).into_iter().flatten();
                    let numbers = numbers.filter_map(Value::as_f64).map(|x| x as f32).collect();
                    vectors.push((format!("rope_factors_{end}.weight"), numbers));
                }
            }
            _ => {
                let theta = self.theta(false)?.unwrap_or(1.0);
                let numbers = divisors(theta, &rope.inv_freq);
                rule.insert("divisors".to_owned(), json!(numbers));
                vectors.push(("rope_freqs.weight".to_owned(), numbers));
            }
        }
        let kind = match kind {
            _ if rule.contains_key("divisors") => "divisors",
            Some("su") => "longrope",
            kind => kind.unwrap_or_default(),
        };
        rule.insert("rope_type".to_owned(), json!(kind));
        let rule = match architecture {
            "gemma4" => {
                json!({"sliding_attention": {"rope_type": "default"}, "full_attention": rule})
            }
            _ => Value::Object(rule),
        };
        facts.insert("rope_scaling".to_owned(), rule);
        Ok(vectors)
    }

    /// What each weight is called there. Those that are one tensor in the checkpoint are one there, too, where that has a
    /// name for all of them.
    fn names(&self, names: &Names) -> Names {
        let own = self.gguf.get("names").and_then(Value::as_object);
        let known = || own.into_iter().flat_map(Map::keys);
        let to = |what: &str| self.to.names.get(what).map_or(&[][..], |names| &names.0[..]);
        let stem = |what: &String| {
            let shares = |other: &&String| {
                names.has(what) && names.has(other) && names.model(other) == names.model(what)
            };
            let of_all =
                |name: &&String| known().filter(shares).all(|other| to(other).contains(name));
            let name = to(what).iter().find(of_all).or(to(what).first())?;
            Some((what.clone(), name.replace("{model}", "")))
        };
        Names::new(known().filter_map(stem).collect())
    }

    /// The facts as keys of a file.
    fn items(
        &self,
        architecture: &str,
        facts: &Map<String, Value>,
    ) -> Result<Vec<(String, Datum)>> {
        let mut items: Vec<(String, Datum)> = Vec::new();
        let mut add = |key: &str, value: Datum| {
            items.push((format!("{architecture}.{key}"), value));
        };
        let number = |key: &str| facts.get(key).and_then(Value::as_u64);
        let types = facts.get("layer_types").and_then(Value::as_array);
        let is = |kind: &str| types.map(|t| t.iter().map(|t| t == kind).collect::<Vec<bool>>());
        let recurrent = is("recurrent").filter(|is| is.contains(&true));
        for (key, value) in facts {
            let tensor =
                key.starts_with("blk.") || key.ends_with(".weight") || key.ends_with(".bias");
            if tensor || WHOLE.contains(&&key[..]) || DERIVED.contains(&&key[..]) {
                continue;
            }
            let full = number("attention.head_count_kv_full");
            if key == "attention.head_count_kv"
                && let Some(n) = value.as_u64()
                && (recurrent.is_some() || full.is_some())
            {
                let slides = is("sliding_attention");
                let of = |l: usize| match (&recurrent, &slides, full) {
                    (Some(state), ..) if state[l] => 0,
                    (_, Some(slides), Some(full)) if !slides[l] => full as i32,
                    _ => n as i32,
                };
                add(key, Datum::I32s((0..self.spec.layers.len()).map(of).collect()));
                continue;
            }
            let value = match (&key[..], value.as_str()) {
                ("expert_gating_func", Some("softmax")) => &json!(1),
                ("expert_gating_func", Some("sigmoid")) => &json!(2),
                _ => value,
            };
            add(key, datum(value).ok_or_else(|| self.unsaid(key, value))?);
            if let Some(end) = key.strip_prefix("attention.key_length") {
                let length = || datum(value).ok_or(Error::Closed);
                add(&format!("attention.value_length{end}"), length()?);
                if facts.contains_key("attention.key_length_swa") {
                    add(&format!("rope.dimension_count{end}"), length()?); // all of both kinds turns
                }
            }
        }
        if let (Some(nope), Some(turned)) =
            (number("attention.key_length_nope"), number("rope.dimension_count"))
        {
            add("attention.key_length", Datum::U32((nope + turned) as u32));
        }
        if let (Some(n), Some(heads)) = (number("ssm.value_length"), number("ssm.time_step_rank")) {
            add("ssm.inner_size", Datum::U32((n * heads) as u32));
        }
        if architecture.starts_with("granite") {
            let turns =
                facts.get("position_embedding_type").and_then(Value::as_str) != Some("nope");
            add("rope.scaling.finetuned", Datum::Bool(turns));
        }
        if let Some(slides) = is("sliding_attention").filter(|is| is.contains(&true)) {
            add("attention.sliding_window_pattern", Datum::Bools(slides));
        }
        let rule = facts.get("rope_scaling").map(|rule| rule.get("full_attention").unwrap_or(rule));
        if let Some(rule) = rule {
            let kind = rule["rope_type"].as_str().unwrap_or_default();
            // Phi-3's files have no name for theirs.
            if matches!(kind, "linear" | "yarn") {
                add("rope.scaling.type", Datum::Text(kind.to_owned()));
            }
            let tenth = if architecture == "deepseek2" { 0.1 } else { 1.0 };
            for (name, key, times) in [
                ("factor", "rope.scaling.factor", 1.0),
                ("attention_factor", "rope.scaling.yarn_attn_factor", 1.0),
                ("attention_factor", "rope.scaling.attn_factor", 1.0),
                ("beta_fast", "rope.scaling.yarn_beta_fast", 1.0),
                ("beta_slow", "rope.scaling.yarn_beta_slow", 1.0),
                ("mscale_all_dim", "rope.scaling.yarn_log_multiplier", tenth),
            ] {
                let own = key.contains(".yarn_") == (kind == "yarn") || name == "factor";
                if let Some(x) = rule[name].as_f64().filter(|_| own) {
                    add(key, Datum::F32((x * times) as f32));
                }
            }
            if let Some(n) = rule["original_max_position_embeddings"].as_f64() {
                add("rope.scaling.original_context_length", Datum::U32(n as u32));
            }
        }
        if let Some(all) = facts.get("xielu").and_then(Value::as_array) {
            for (i, name) in ["alpha_p", "alpha_n", "beta", "eps"].iter().enumerate() {
                let numbers = all.iter().filter_map(|four| Some(four[i].as_f64()? as f32));
                items.push((format!("xielu.{name}"), Datum::F32s(numbers.collect())));
            }
        }
        Ok(items)
    }

    fn unsaid(&self, key: &str, value: &Value) -> Error {
        let architecture = &self.spec.architecture;
        Error::Unsupported(format!("{architecture}: GGUF has no words for {key} = {value}"))
    }
}

/// A value of the metadata.
fn datum(value: &Value) -> Option<Datum> {
    let u32 = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
    Some(match value {
        Value::Bool(x) => Datum::Bool(*x),
        Value::String(x) => Datum::Text(x.clone()),
        Value::Number(n) if n.is_f64() => Datum::F32(n.as_f64()? as f32),
        Value::Number(_) => Datum::U32(u32(value)?),
        Value::Array(list) if list.iter().all(Value::is_u64) => {
            Datum::I32s(list.iter().map(|v| Some(u32(v)? as i32)).collect::<Option<_>>()?)
        }
        Value::Array(list) => {
            Datum::F32s(list.iter().map(|v| Some(v.as_f64()? as f32)).collect::<Option<_>>()?)
        }
        _ => return None,
    })
}
