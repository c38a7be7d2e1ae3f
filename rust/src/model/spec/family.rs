//! Architecture families: the TOML files under `models/families`, each a difference from its base.
//! Knows no number of any model and no tensor; `Spec` applies a family to one `config.json`.

use super::gemma::GemmaFacts;
use super::moe::MoeFacts;
use super::recurrent::RecurrentFacts;
use super::{Gate, Norm, Place, QkNorm, RopeOn};
use crate::{Error, Result};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashSet};

macro_rules! families {
    ($($name:literal),* $(,)?) => {
        /// Name and text of every family that ships with the crate.
        pub(super) const FAMILIES: &[(&str, &str)] = &[
            $(($name, include_str!(concat!("../../../../models/families/", $name, ".toml")))),*
        ];
    };
}
families![
    "llama",
    "mistral",
    "mistral3",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "gpt_oss",
    "glm4_moe",
    "gemma2",
    "gemma3",
    "gemma3_mm",
    "granite",
    "granite_moe",
    "olmo2",
    "olmoe",
    "starcoder2",
    "arcee",
    "apertus",
    "nemotron",
    "phi",
    "gpt2",
    "gpt_neox",
    "stablelm",
    "cohere",
    "cohere2",
    "granitemoehybrid",
    "phi3",
    "glm4",
    "ernie45",
    "seed_oss",
    "smollm3",
    "exaone4",
    "hunyuan_dense",
    "olmo3",
    "ministral3",
    "ministral3_mm",
    "granite_swa",
    "minicpm3",
    "deepseek_v2",
    "deepseek_v3",
    "gemma4",
    "gemma4_mm",
    "gemma3n",
    "gemma3n_mm",
    "lfm2",
    "lfm2_moe",
    "lfm3",
    "qwen3_5_text",
    "qwen3_5",
    "qwen3_next",
];

/// One string or a list of them.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl From<OneOrMany> for Vec<String> {
    fn from(x: OneOrMany) -> Vec<String> {
        match x {
            OneOrMany::One(x) => vec![x],
            OneOrMany::Many(x) => x,
        }
    }
}

/// Alternatives for a name, in the order in which they are tried.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(from = "OneOrMany")]
pub(super) struct Names(pub(super) Vec<String>);

impl From<OneOrMany> for Names {
    fn from(x: OneOrMany) -> Names {
        Names(x.into())
    }
}

/// Where a number comes from: keys of `config.json`, then a default. No key: the default is fixed.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(try_from = "Value")]
pub(super) struct Fact {
    pub(super) key: Vec<String>,
    pub(super) default: Option<Value>,
}

impl TryFrom<Value> for Fact {
    type Error = String;

    fn try_from(value: Value) -> std::result::Result<Fact, String> {
        let Value::Object(mut table) = value else {
            return Ok(Fact { key: Vec::new(), default: Some(value) });
        };
        let key = match table.remove("key") {
            None => Vec::new(),
            Some(x) => serde_json::from_value::<OneOrMany>(x)
                .map_err(|_| "`key` is neither a string nor a list of strings".to_owned())?
                .into(),
        };
        let default = table.remove("default");
        match table.keys().next() {
            None => Ok(Fact { key, default }),
            Some(x) => Err(format!("a fact has `key` and `default`, found `{x}`")),
        }
    }
}

/// Whose facts a family is read for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// `config.json`.
    Config,
    /// GGUF metadata: the family's table `[gguf]` is a difference from the rest of it.
    Gguf,
}

/// One architecture family, its base merged in. `models/README.md` explains every field.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Family {
    pub(super) architectures: Vec<String>,
    #[serde(default)]
    pub(super) model_types: Vec<String>,
    pub(super) section: Option<String>,
    pub(super) norm: Norm,
    #[serde(default)]
    pub(super) norm_bias: Fact,
    pub(super) norms: Vec<Place>,
    pub(super) norms_parallel: Option<Vec<Place>>,
    #[serde(default)]
    pub(super) parallel: Fact,
    pub(super) qk_norm: QkNorm,
    pub(super) use_qk_norm: Fact,
    #[serde(default)]
    pub(super) qk_norm_after_rope: bool,
    pub(super) gated: bool,
    #[serde(default)]
    pub(super) transposed: bool,
    #[serde(default)]
    pub(super) qkv_by_head: bool,
    pub(super) embed_times_sqrt_hidden: bool,
    pub(super) hidden: Fact,
    pub(super) layers: Fact,
    pub(super) heads: Fact,
    pub(super) kv_heads: Fact,
    pub(super) head_dim: Fact,
    pub(super) ffn: Fact,
    #[serde(default)]
    pub(super) ffn_per_hidden: Fact,
    #[serde(default)]
    pub(super) ffn_two_thirds: Fact,
    #[serde(default)]
    pub(super) ffn_factor: Fact,
    #[serde(default)]
    pub(super) ffn_multiple: Fact,
    pub(super) vocab: Fact,
    pub(super) eps: Fact,
    pub(super) act: Fact,
    pub(super) context_length: Fact,
    pub(super) tied: Fact,
    pub(super) qkv_bias: Fact,
    pub(super) o_bias: Fact,
    pub(super) mlp_bias: Fact,
    #[serde(default)]
    pub(super) head_bias: Fact,
    #[serde(default)]
    pub(super) positions: Fact,
    #[serde(default)]
    pub(super) embed_scale: Fact,
    #[serde(default)]
    pub(super) residual_scale: Fact,
    #[serde(default)]
    pub(super) residual_depth: Fact,
    #[serde(default)]
    pub(super) logit_scale: Fact,
    #[serde(default)]
    pub(super) logit_divisor: Fact,
    #[serde(default)]
    pub(super) logit_width: Fact,
    #[serde(default)]
    pub(super) attn_scale: Fact,
    #[serde(default)]
    pub(super) attn_clip: Fact,
    #[serde(default)]
    pub(super) attn_scale_rsqrt_of: Fact,
    #[serde(default)]
    pub(super) latent_rank: Fact,
    #[serde(default)]
    pub(super) latent_q_rank: Fact,
    #[serde(default)]
    pub(super) latent_nope: Fact,
    #[serde(default)]
    pub(super) latent_value: Fact,
    #[serde(default)]
    pub(super) latent_eps: Fact,
    #[serde(default)]
    pub(super) latent_split: Fact,
    #[serde(default)]
    pub(super) xielu: Fact,
    #[serde(default)]
    pub(super) attn_softcap: Fact,
    pub(super) attn_gate: Gate,
    pub(super) use_attn_gate: Fact,
    #[serde(default)]
    pub(super) sinks: Fact,
    #[serde(default)]
    pub(super) logit_softcap: Fact,
    #[serde(default)]
    pub(super) window: Fact,
    pub(super) use_window: Fact,
    pub(super) layer_types: Fact,
    #[serde(default)]
    pub(super) full_every: Fact,
    #[serde(default)]
    pub(super) full_at: Fact,
    #[serde(default)]
    pub(super) full_first: Fact,
    #[serde(default)]
    pub(super) full_last: Fact,
    #[serde(default)]
    pub(super) rope_on: RopeOn,
    #[serde(default)]
    pub(super) rope_layers: Fact,
    #[serde(default)]
    pub(super) nope_every: Fact,
    #[serde(default)]
    pub(super) rotary_dim: Fact,
    #[serde(default)]
    pub(super) rotary_factor: Fact,
    #[serde(default)]
    pub(super) rope_interleaved: Fact,
    pub(super) rope_theta: Fact,
    #[serde(default)]
    pub(super) rope_theta_local: Fact,
    #[serde(default)]
    pub(super) rope_theta_layers: Fact,
    #[serde(default)]
    pub(super) original_context: Fact,
    #[serde(default)]
    pub(super) query_growth: Fact,
    #[serde(default)]
    pub(super) query_growth_every: Fact,
    pub(super) rope_scaling: Fact,
    pub(super) rotates: Fact,
    pub(super) recurrent: Option<RecurrentFacts>,
    pub(super) moe: Option<MoeFacts>,
    pub(super) gemma: Option<GemmaFacts>,
    #[serde(default)]
    pub(super) quantized: Vec<String>,
    pub(super) model: Vec<String>,
    pub(super) ignore: Vec<String>,
    pub(super) names: BTreeMap<String, Names>,
    pub(super) neutral: BTreeMap<String, Value>,
    /// What the family is called.
    #[serde(skip)]
    pub(super) name: String,
    /// Keys of config.json that some fact reads.
    #[serde(skip)]
    pub(super) honoured: HashSet<String>,
}

impl Family {
    /// The family of `architecture`, and of the text model's type where several share a wrapper; or an error that
    /// names it and the nearest known ones.
    pub(super) fn of(
        architecture: &str,
        config: &Map<String, Value>,
        format: Format,
    ) -> Result<Family> {
        let mut other = None;
        let mut near = Vec::new();
        for (name, text) in FAMILIES {
            let family = Family::parse(text, name, format)?;
            for known in &family.architectures {
                if known == architecture {
                    if family.fits(config) {
                        return Ok(family);
                    }
                    other.get_or_insert_with(|| family.clone()); // to say which types it has
                }
                near.push((distance(known, architecture), known.clone()));
            }
        }
        if let Some(family) = other {
            return Ok(family);
        }
        near.sort();
        let near: Vec<_> = near.into_iter().take(3).map(|(_, name)| name).collect();
        Err(Error::Unsupported(format!(
            "config.json: architecture {architecture:?} is not known; the nearest known are {}; a family of \
             your own can be given as TOML (family=, models/README.md)",
            near.join(", ")
        )))
    }

    /// Name and text of a family: one that ships, or the one that was given.
    pub(super) fn text<'a>(name: &str, given: Option<&'a str>) -> Option<(&'static str, &'a str)> {
        match given {
            Some(text) => Some(("given", text)),
            None => FAMILIES.iter().find(|(known, _)| *known == name).copied(),
        }
    }

    /// The table of a family, its bases merged in.
    pub(super) fn table(text: &str, source: &str) -> Result<Map<String, Value>> {
        merged(text, source, 0)
    }

    /// How GGUF files have the models of a family: what the family itself says, or else the nearest of its bases that
    /// GGUF has a name for. With its table `[gguf]`, bases merged in.
    pub(super) fn for_gguf(
        text: &str,
        source: &str,
    ) -> Result<Option<(Family, Map<String, Value>)>> {
        let (mut text, mut source) = (text.to_owned(), source.to_owned());
        for _ in 0..8 {
            let family = Family::parse(&text, &source, Format::Gguf);
            let mut table = merged(&text, &source, 0)?;
            let gguf = table.remove("gguf");
            if let (Ok(family), Some(Value::Object(gguf))) = (family, gguf)
                && !family.architectures.is_empty()
            {
                return Ok(Some((family, gguf)));
            }
            let own: Map<String, Value> = toml::from_str(&text)
                .map_err(|e| Error::format(format!("family {source}"), e.to_string()))?;
            let base = own.get("base").and_then(Value::as_str);
            let Some((name, base)) = FAMILIES.iter().find(|(name, _)| Some(*name) == base) else {
                break;
            };
            (text, source) = ((*base).to_owned(), (*name).to_owned());
        }
        Ok(None)
    }

    /// Whether the text model has a type of this family, or none is said.
    fn fits(&self, config: &Map<String, Value>) -> bool {
        let section = self.section.as_ref().and_then(|key| config.get(key)?.as_object());
        let kind = section.unwrap_or(config).get("model_type").and_then(Value::as_str);
        let types = &self.model_types;
        kind.is_none_or(|kind| types.is_empty() || types.iter().any(|t| t == kind))
    }

    /// Parses a family, merging its base in; `source` names the text in errors. Only one that ships and is not known
    /// to GGUF has no architectures.
    pub(super) fn parse(text: &str, source: &str, format: Format) -> Result<Family> {
        let bad = |what: String| Error::format(format!("family {source}"), what);
        let mut table = merged(text, source, 0)?;
        let gguf = table.remove("gguf");
        if format == Format::Gguf {
            table.insert("architectures".to_owned(), Value::Array(Vec::new()));
            table.remove("model_types");
            table.remove("section");
            match gguf {
                Some(Value::Object(gguf)) => overlay(&mut table, gguf),
                None => {}
                Some(other) => return Err(bad(format!("gguf: found {other}, expected a table"))),
            }
        }
        let tables =
            ["moe", "recurrent", "gemma"].iter().filter_map(|name| table.get(*name)?.as_object());
        let facts = table.values().chain(tables.flat_map(|table| table.values()));
        let facts = facts.filter_map(|v| Fact::try_from(v.clone()).ok());
        let honoured = facts.flat_map(|fact| fact.key).collect();
        let mut family: Family =
            serde_json::from_value(Value::Object(table)).map_err(|e| bad(e.to_string()))?;
        family.name = source.to_owned();
        family.honoured = honoured;
        if family.architectures.is_empty() && (format == Format::Config || source == "given") {
            return Err(bad("architectures: found an empty list, expected names".to_owned()));
        }
        Ok(family)
    }
}

/// The table of `text` over those of its bases.
fn merged(text: &str, source: &str, depth: usize) -> Result<Map<String, Value>> {
    let bad = |what: String| Error::format(format!("family {source}"), what);
    let mut table: Map<String, Value> = toml::from_str(text).map_err(|e| bad(e.to_string()))?;
    let Some(base) = table.remove("base") else { return Ok(table) };
    let found = base.as_str().and_then(|name| FAMILIES.iter().find(|(n, _)| *n == name));
    let (Some((name, text)), true) = (found, depth < 8) else {
        return Err(bad(format!("base: found {base}, expected the name of a family that ships")));
    };
    let mut result = merged(text, name, depth + 1)?;
    // What a family is called is never inherited, or two families would claim one architecture.
    result.remove("architectures");
    result.remove("model_types");
    result.get_mut("gguf").and_then(Value::as_object_mut).map(|gguf| gguf.remove("architectures"));
    overlay(&mut result, table);
    Ok(result)
}

/// Lays the difference over the base: tables merge, all else replaces. A fact that names its keys replaces
/// the whole fact, so that a lone `default` keeps the keys and a lone `key` drops the default.
fn overlay(base: &mut Map<String, Value>, difference: Map<String, Value>) {
    for (name, value) in difference {
        match (base.get_mut(&name), value) {
            (Some(Value::Object(old)), Value::Object(new)) if !new.contains_key("key") => {
                overlay(old, new);
            }
            (_, value) => {
                base.insert(name, value);
            }
        }
    }
}

/// Levenshtein distance, by bytes.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut corner = i;
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let next = (corner + usize::from(x != y)).min(row[j] + 1).min(row[j + 1] + 1);
            corner = std::mem::replace(&mut row[j + 1], next);
        }
    }
    row[b.len()]
}
