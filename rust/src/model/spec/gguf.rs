//! What a GGUF file says about its model, as the object in which a family's `[gguf]` facts are looked up. Knows the
//! format's conventions, no family but for two numbers that no file has.
//!
//! Keys are those of the metadata without the architecture in front: `block_count`, `attention.head_count`. Beside
//! them:
//!
//! | key | is |
//! |---|---|
//! | the name of a tensor of the first layer or outside the layers | true |
//! | `tied` | there is no `output.weight` |
//! | `vocab_size` | where it is not given: the number of tokens |
//! | `layer_types` | what `attention.sliding_window_pattern` says for each layer |
//! | `rope_scaling` | the keys below `rope.scaling`, or the tensors that scale each frequency, as in config.json |

use crate::file::gguf::{Metadata, Value as Item, shown};
use crate::file::{Checkpoint, Dtype};
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::path::Path;

/// The longest list of numbers that is one for each layer, or one for each frequency.
const MAX_LIST: usize = 1 << 16;

/// The facts of an open GGUF file; `path` is for errors.
pub fn facts(path: &Path, checkpoint: &Checkpoint) -> Result<Value> {
    let wrong = |what: String| Error::format(path, what);
    let metadata = checkpoint.metadata().ok_or_else(|| wrong("found no GGUF metadata".into()))?;
    let text = |key: &str| metadata.read(key, "a text", Item::as_text).map_err(wrong);
    let kind = text("general.type")?.unwrap_or("model");
    if kind != "model" {
        return Err(Error::Unsupported(format!(
            "{}: key `general.type`: found {kind:?}, expected \"model\"",
            path.display()
        )));
    }
    let Some(architecture) = text("general.architecture")? else {
        return Err(wrong("key `general.architecture`: found nothing, expected a name".into()));
    };
    let mut facts = keys(metadata, architecture).map_err(wrong)?;
    vocabulary(metadata, checkpoint, &mut facts);
    rope(path, checkpoint, &mut facts)?;
    types(&mut facts).map_err(wrong)?;
    // A window of 0 is none.
    if facts.get("attention.sliding_window").and_then(Value::as_u64) == Some(0) {
        facts.remove("attention.sliding_window");
    }
    // Keys and values of one width are said twice.
    if facts.get("attention.value_length") == facts.get("attention.key_length") {
        facts.remove("attention.value_length");
    }
    // The only two Gemmas whose scores are not scaled by the width of a head; llama.cpp tells them by their layers.
    if let ("gemma2", Some(46)) | ("gemma3", Some(62)) =
        (architecture, facts.get("block_count").and_then(Value::as_u64))
    {
        let number = |key: &str| facts.get(key).and_then(Value::as_f64);
        if let (Some(width), Some(heads)) =
            (number("embedding_length"), number("attention.head_count"))
        {
            facts.insert("query_pre_attn_scalar".to_owned(), json!(width / heads));
        }
    }
    let experts = facts.get("expert_count").and_then(Value::as_u64).unwrap_or(0) > 0;
    // Mixtral is a Llama with experts there.
    let name = if architecture == "llama" && experts { "llama with experts" } else { architecture };
    facts.insert("architectures".to_owned(), json!([name]));
    facts.insert("tied".to_owned(), json!(checkpoint.get("output.weight").is_none()));
    for name in checkpoint.names().filter(|n| n.starts_with("blk.0.") || !n.starts_with("blk.")) {
        facts.insert(name.to_owned(), json!(true));
    }
    Ok(Value::Object(facts))
}

/// The keys of the architecture.
fn keys(
    metadata: Metadata<'_>,
    architecture: &str,
) -> std::result::Result<Map<String, Value>, String> {
    let mut facts = Map::new();
    for (item, value) in metadata.iter() {
        let Some(key) = item.key.strip_prefix(architecture).and_then(|k| k.strip_prefix('.'))
        else {
            continue;
        };
        let plain = |value: Item<'_>| match value {
            Item::Unsigned(x) => Some(json!(x)),
            Item::Signed(x) => Some(json!(x)),
            Item::Float(x) => serde_json::Number::from_f64(x).map(Value::Number),
            Item::Bool(x) => Some(json!(x)),
            Item::Text(x) => Some(json!(x)),
            Item::List(_) => None,
        };
        let json = match value {
            Item::List(list) if list.len <= MAX_LIST => {
                let values: Option<Vec<Value>> = list.iter().map(plain).collect();
                values.map(|values| match values.first() {
                    // One for each layer, all the same.
                    Some(first) if first.is_number() && values.iter().all(|v| v == first) => {
                        first.clone()
                    }
                    _ => Value::Array(values),
                })
            }
            value => plain(value),
        };
        let json = json.ok_or_else(|| {
            let expected = format!("finite numbers, texts, or at most {MAX_LIST} of them");
            format!("key `{}`: found {}, expected {expected}", item.key, shown(value))
        })?;
        facts.insert(key.to_owned(), json);
    }
    Ok(facts)
}

fn vocabulary(metadata: Metadata<'_>, checkpoint: &Checkpoint, facts: &mut Map<String, Value>) {
    let tokens = metadata.get("tokenizer.ggml.tokens").and_then(Item::as_list).map(|l| l.len);
    let embedding = || checkpoint.get("token_embd.weight").map(|t| t.shape[0]);
    if let (Some(n), false) = (tokens.or_else(embedding), facts.contains_key("vocab_size")) {
        facts.insert("vocab_size".to_owned(), json!(n));
    }
}

/// Which layers slide.
fn types(facts: &mut Map<String, Value>) -> std::result::Result<(), String> {
    const KEY: &str = "attention.sliding_window_pattern";
    let Some(Value::Array(pattern)) = facts.get(KEY) else { return Ok(()) };
    let name = |slides: &Value| {
        Some(if slides.as_bool()? { "sliding_attention" } else { "full_attention" })
    };
    let types: Option<Vec<&str>> = pattern.iter().map(name).collect();
    let types = types.ok_or_else(|| {
        format!("key `{KEY}`: found a list, expected true or false for each layer")
    })?;
    let types = json!(types);
    facts.remove(KEY);
    facts.insert("layer_types".to_owned(), types);
    Ok(())
}

/// The scaling of rotary frequencies in the words of config.json.
fn rope(path: &Path, checkpoint: &Checkpoint, facts: &mut Map<String, Value>) -> Result<()> {
    let kind = facts.remove("rope.scaling.type");
    let factor = facts.remove("rope.scaling.factor").or_else(|| facts.remove("rope.scale_linear"));
    let kind = kind.as_ref().map_or(Some("linear"), Value::as_str);
    let scaled = factor.as_ref().and_then(Value::as_f64).is_some_and(|f| f != 0.0);
    let mut scaling = match kind {
        Some("linear") if scaled => json!({"rope_type": "linear"}),
        Some("yarn" | "longrope") => json!({"rope_type": kind}),
        Some("none" | "linear") => Value::Null,
        _ => {
            let found =
                facts.get("rope.scaling.type").map_or("nothing".to_owned(), Value::to_string);
            let what = format!(
                "key `rope.scaling.type`: found {found}, expected none, linear, yarn or longrope"
            );
            return Err(Error::format(path, what));
        }
    };
    if let (Some(scaling), true) = (scaling.as_object_mut(), scaled) {
        scaling.extend(factor.map(|factor| ("factor".to_owned(), factor)));
    }
    if let Some(scaling) = scaling.as_object_mut() {
        for (key, name) in [
            ("rope.scaling.original_context_length", "original_max_position_embeddings"),
            ("rope.scaling.attn_factor", "attention_factor"),
            ("rope.scaling.yarn_attn_factor", "attention_factor"),
            ("rope.scaling.yarn_beta_fast", "beta_fast"),
            ("rope.scaling.yarn_beta_slow", "beta_slow"),
        ] {
            // A linear rule has no other number.
            if let (Some(value), true) = (facts.get(key), kind != Some("linear")) {
                scaling.insert(name.to_owned(), value.clone());
                facts.remove(key);
            }
        }
    }
    let divisors = |name: &str| numbers(path, checkpoint, name);
    let freqs = divisors("rope_freqs.weight")?;
    let (long, short) =
        (divisors("rope_factors_long.weight")?, divisors("rope_factors_short.weight")?);
    match (&mut scaling, freqs, long, short) {
        (_, None, None, None) => {}
        (Value::Null, Some(freqs), None, None) => {
            scaling = json!({"rope_type": "divisors", "divisors": freqs});
        }
        (Value::Object(scaling), None, Some(long), Some(short)) => {
            scaling.insert("long_factor".to_owned(), json!(long));
            scaling.insert("short_factor".to_owned(), json!(short));
        }
        _ => {
            let what =
                "tensors of rotary frequencies beside another rule that scales them".to_owned();
            return Err(Error::Unsupported(format!("{}: {what}", path.display())));
        }
    }
    if !scaling.is_null() {
        facts.insert("rope_scaling".to_owned(), scaling);
    }
    Ok(())
}

/// The numbers of a small tensor, if it is there.
fn numbers(path: &Path, checkpoint: &Checkpoint, name: &str) -> Result<Option<Vec<f32>>> {
    let Some(tensor) = checkpoint.get(name) else { return Ok(None) };
    if tensor.dtype != Dtype::F32 || tensor.shape.len() != 1 || tensor.shape[0] > MAX_LIST {
        let what = format!(
            "tensor `{name}`: found {} {:?}, expected F32 and at most {MAX_LIST} of them",
            tensor.dtype.name(),
            tensor.shape
        );
        return Err(Error::format(path, what));
    }
    Ok(Some(tensor.bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()))
}
