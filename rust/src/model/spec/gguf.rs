//! What a GGUF file says about its model, as the object in which a family's `[gguf]` facts are looked up. Knows the
//! format's conventions, no family but for two numbers that no file has.
//!
//! Keys are those of the metadata without the architecture in front: `block_count`, `attention.head_count`. Beside
//! them:
//!
//! | key | is |
//! |---|---|
//! | the name of a tensor outside the layers; of one in any layer, without its number: `blk.attn_q.bias` | true |
//! | `tied` | there is no `output.weight` |
//! | `vocab_size` | where it is not given: the rows of the embedding |
//! | `layer_types` | what `attention.sliding_window_pattern` says for each layer, and `recurrent` where a layer has no keys |
//! | `block_count` | without the layers behind the last, for drafting |
//! | `attention.head_count_kv_full` | the number on layers that do not slide, where it is another one |
//! | `keys_without_values` | a layer has keys and no values |
//! | `laurel_rank`, `per_layer_vocab` | the rows of those tensors |
//! | `ssm.value_length` | `ssm.inner_size`, of one head |
//! | `position_embedding_type` | of Granite: `rope` or `nope` |
//! | `xielu` | for each layer its `alpha_p`, `alpha_n`, `beta` and `eps` |
//! | `attention.key_length_nope` | the part of a key of latent attention that does not rotate |
//! | `rope_scaling` | the keys below `rope.scaling`, or the tensors that scale each frequency, as in config.json |

use crate::file::gguf::{Metadata, Value as Item, shown};
use crate::file::{Checkpoint, Dtype};
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::f64::consts::FRAC_1_SQRT_2;
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
    let embedding = checkpoint.get("token_embd.weight").and_then(|t| t.shape.first());
    if let (Some(n), false) = (embedding, facts.contains_key("vocab_size")) {
        facts.insert("vocab_size".to_owned(), json!(n));
    }
    rope(path, architecture, checkpoint, &mut facts)?;
    drafting(&mut facts);
    types(&mut facts).map_err(wrong)?;
    latent(&mut facts);
    gemma(checkpoint, &mut facts);
    xielu(metadata, &mut facts);
    states(architecture, &mut facts);
    let score = match facts.get("expert_gating_func").and_then(Value::as_u64) {
        Some(1) => Some("softmax"),
        Some(2) => Some("sigmoid"),
        _ => None, // none, or a number that no family takes
    };
    facts.extend(score.map(|score| ("expert_gating_func".to_owned(), json!(score))));
    // A window of 0 is none.
    if facts.get("attention.sliding_window").and_then(Value::as_u64) == Some(0) {
        facts.remove("attention.sliding_window");
    }
    // Keys and values of one width are said twice.
    for end in ["", "_swa"] {
        let value = format!("attention.value_length{end}");
        if facts.get(&value) == facts.get(&format!("attention.key_length{end}")) {
            facts.remove(&value);
        }
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
    // Several models share a name there.
    let name = match architecture {
        "llama" if experts => "llama with experts",
        "deepseek2" if score == Some("sigmoid") => "deepseek2 with sigmoid",
        name => name,
    };
    facts.insert("architectures".to_owned(), json!([name]));
    facts.insert("tied".to_owned(), json!(checkpoint.get("output.weight").is_none()));
    for name in checkpoint.names() {
        let inside = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
        let name = inside.map_or_else(|| name.to_owned(), |(_, rest)| format!("blk.{rest}"));
        facts.insert(name, json!(true));
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
        let sparsity = key == "activation_sparsity_scale";
        let plain = |value: Item<'_>| match value {
            // In standard deviations; the families want the part of the gates that is cut.
            Item::Float(x) if sparsity => Some(json!(0.5 * libm::erfc(-x * FRAC_1_SQRT_2))),
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
                    Some(first)
                        if !sparsity && first.is_number() && values.iter().all(|v| v == first) =>
                    {
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

/// Which layers slide, and which have a state instead of keys.
fn types(facts: &mut Map<String, Value>) -> std::result::Result<(), String> {
    const KEYS: &str = "attention.head_count_kv";
    let mut types: Option<Vec<&str>> = None;
    for (key, is) in [
        ("attention.sliding_window_pattern", "sliding_attention"),
        ("attention.recurrent_layers", "recurrent"),
    ] {
        if let Some(Value::Array(pattern)) = facts.get(key) {
            let name = |it: &Value| Some(if it.as_bool()? { is } else { "full_attention" });
            types = pattern.iter().map(name).collect();
            if types.is_none() {
                let expected = "true or false for each layer";
                return Err(format!("key `{key}`: found a list, expected {expected}"));
            }
            facts.remove(key);
        }
    }
    if let (Some(types), Some(Value::Array(heads))) = (&types, facts.get(KEYS))
        && types.len() == heads.len()
    {
        let of = |kind: &str| -> Vec<&Value> {
            let all = types.iter().zip(heads).filter(|(t, _)| **t == kind);
            all.map(|(_, n)| n).collect()
        };
        let (sliding, full) = (of("sliding_attention"), of("full_attention"));
        let same = |all: &[&Value]| all.windows(2).all(|two| two[0] == two[1]);
        if let ([first, ..], [other, ..], true) =
            (&sliding[..], &full[..], same(&sliding) && same(&full))
        {
            let (first, other) = ((*first).clone(), (*other).clone());
            facts.insert(KEYS.to_owned(), first);
            facts.insert(format!("{KEYS}_full"), other);
        }
    }
    if let (None, Some(Value::Array(heads))) = (&types, facts.get(KEYS)) {
        let mut some = heads.iter().filter(|n| n.as_u64() != Some(0));
        let first = some.next().cloned();
        if let (Some(first), true) = (first.clone(), some.all(|n| Some(n) == first.as_ref())) {
            let name = |n: &Value| if *n == first { "full_attention" } else { "recurrent" };
            types = Some(heads.iter().map(name).collect());
            facts.insert(KEYS.to_owned(), first);
        }
    }
    let types = types.map(|types| json!(types));
    facts.extend(types.map(|types| ("layer_types".to_owned(), types)));
    Ok(())
}

/// Widths of latent attention: those of a head before it is absorbed, as config.json says them.
fn latent(facts: &mut Map<String, Value>) {
    if !facts.contains_key("attention.kv_lora_rank") {
        return;
    }
    for of in ["key", "value"] {
        let length = format!("attention.{of}_length");
        let inner = facts.remove(&format!("{length}_mla"));
        facts.extend(inner.map(|inner| (length, inner)));
    }
    let number = |key: &str| facts.get(key).and_then(Value::as_u64);
    if let (Some(key), Some(turned)) =
        (number("attention.key_length"), number("rope.dimension_count"))
    {
        facts.insert("attention.key_length_nope".to_owned(), json!(key.saturating_sub(turned)));
    }
    facts.remove("attention.key_length");
}

/// The numbers of xIELU, whose keys have no architecture in front: four for each layer.
fn xielu(metadata: Metadata<'_>, facts: &mut Map<String, Value>) {
    let lists = ["alpha_p", "alpha_n", "beta", "eps"].map(|name| {
        let list = metadata.get(&format!("xielu.{name}"))?.as_list()?;
        let number = |x: Item<'_>| if let Item::Float(x) = x { Some(x) } else { None };
        if list.len > MAX_LIST { None } else { list.iter().map(number).collect::<Option<Vec<_>>>() }
    });
    if let [Some(p), Some(n), Some(beta), Some(eps)] = lists
        && [n.len(), beta.len(), eps.len()] == [p.len(); 3]
    {
        let layers = (0..p.len()).map(|l| json!([p[l], n[l], beta[l], eps[l]])).collect();
        facts.insert("xielu".to_owned(), Value::Array(layers));
    }
}

/// What Gemma 3n and 4 say by their tensors.
fn gemma(checkpoint: &Checkpoint, facts: &mut Map<String, Value>) {
    let values = |key: &str| key.strip_suffix("attn_k.weight").map(|l| format!("{l}attn_v.weight"));
    if checkpoint.names().filter_map(values).any(|values| checkpoint.get(&values).is_none()) {
        facts.insert("keys_without_values".to_owned(), json!(true));
    }
    for (key, tensor) in [
        ("laurel_rank", "blk.0.laurel_l.weight"),
        ("per_layer_vocab", "per_layer_token_embd.weight"),
    ] {
        let tensor = checkpoint.get(tensor);
        facts.extend(tensor.map(|tensor| (key.to_owned(), json!(tensor.shape.first()))));
    }
    // Where there are two kinds of heads, all of both rotate.
    let heads = ["", "_swa"].map(|end| {
        let rotates = format!("rope.dimension_count{end}");
        (facts.get(&rotates) == facts.get(&format!("attention.key_length{end}"))).then_some(rotates)
    });
    if let ([Some(full), Some(sliding)], true) =
        (heads, facts.contains_key("attention.key_length_swa"))
    {
        facts.remove(&full);
        facts.remove(&sliding);
    }
}

/// Takes the layers for drafting off, which stand behind the others.
fn drafting(facts: &mut Map<String, Value>) {
    let number = |key: &str| facts.get(key).and_then(Value::as_u64);
    let (Some(all), Some(n @ 1..)) = (number("block_count"), number("nextn_predict_layers")) else {
        return;
    };
    let left = all.saturating_sub(n);
    for list in facts.values_mut().filter_map(Value::as_array_mut) {
        if list.len() as u64 == all {
            list.truncate(left as usize);
        }
    }
    facts.insert("block_count".to_owned(), json!(left));
}

/// What layers with a state and the others around them say.
fn states(architecture: &str, facts: &mut Map<String, Value>) {
    let number = |key: &str| facts.get(key).and_then(Value::as_u64);
    if let (Some(all), Some(heads @ 1..)) = (number("ssm.inner_size"), number("ssm.time_step_rank"))
        && all % heads == 0
    {
        facts.remove("ssm.inner_size");
        facts.insert("ssm.value_length".to_owned(), json!(all / heads));
    }
    // Granite's files say so whether layers rotate.
    if architecture.starts_with("granite") {
        let rotates = facts.remove("rope.scaling.finetuned") != Some(json!(false));
        let kind = if rotates { "rope" } else { "nope" };
        facts.insert("position_embedding_type".to_owned(), json!(kind));
    }
}

/// The scaling of rotary frequencies in the words of config.json.
fn rope(
    path: &Path,
    architecture: &str,
    checkpoint: &Checkpoint,
    facts: &mut Map<String, Value>,
) -> Result<()> {
    let numbers = |name: &str| numbers(path, checkpoint, name);
    let freqs = numbers("rope_freqs.weight")?;
    let long = numbers("rope_factors_long.weight")?;
    let short = numbers("rope_factors_short.weight")?;
    let given = facts.remove("rope.scaling.type");
    let factor = facts.remove("rope.scaling.factor").or_else(|| facts.remove("rope.scale_linear"));
    let factor = factor.filter(|f| f.as_f64() != Some(0.0)); // 0 is none
    // Phi-3's files have the numbers of a rule and not its name.
    let unnamed = if long.is_some() { "longrope" } else { "linear" };
    let kind = given.as_ref().map_or(Some(unnamed), Value::as_str);
    let keys: &[(&str, &str)] = match kind {
        Some("none" | "linear") => &[],
        Some("longrope") => &[
            ("rope.scaling.original_context_length", "original_max_position_embeddings"),
            ("rope.scaling.attn_factor", "attention_factor"),
        ],
        Some("yarn") => &[
            ("rope.scaling.original_context_length", "original_max_position_embeddings"),
            ("rope.scaling.yarn_attn_factor", "attention_factor"),
            ("rope.scaling.yarn_beta_fast", "beta_fast"),
            ("rope.scaling.yarn_beta_slow", "beta_slow"),
            ("rope.scaling.yarn_log_multiplier", "mscale_all_dim"),
        ],
        _ => {
            let found = given.as_ref().map_or("nothing".to_owned(), Value::to_string);
            let expected = "none, linear, yarn or longrope";
            let what = format!("key `rope.scaling.type`: found {found}, expected {expected}");
            return Err(Error::format(path, what));
        }
    };
    let plain = kind == Some("none") || (kind == Some("linear") && factor.is_none());
    let mut rule = Map::new();
    rule.insert("rope_type".to_owned(), json!(kind));
    rule.extend(factor.map(|factor| ("factor".to_owned(), factor)));
    for (key, name) in keys {
        rule.extend(facts.remove(*key).map(|value| ((*name).to_owned(), value)));
    }
    // DeepSeek's is a tenth of it, and stands for both numbers.
    let all = rule.get("mscale_all_dim").and_then(Value::as_f64);
    if let (Some(all), true) = (all, architecture == "deepseek2") {
        rule.insert("mscale_all_dim".to_owned(), json!(all * 10.0));
        rule.insert("mscale".to_owned(), json!(all * 10.0));
    } else if all.is_some() {
        rule.insert("mscale".to_owned(), json!(1.0));
    }
    // No file has it; the released model's config.json does.
    if architecture == "gpt-oss" && kind == Some("yarn") {
        rule.insert("truncate".to_owned(), json!(false));
    }
    match (freqs, long, short) {
        (None, None, None) => {}
        (Some(freqs), None, None) if plain => {
            rule = Map::new();
            rule.insert("rope_type".to_owned(), json!("divisors"));
            rule.insert("divisors".to_owned(), json!(freqs));
        }
        (None, Some(long), Some(short)) if kind == Some("longrope") => {
            rule.insert("long_factor".to_owned(), json!(long));
            rule.insert("short_factor".to_owned(), json!(short));
            rule.entry("attention_factor").or_insert(json!(1.0));
        }
        _ => {
            let what =
                "tensors of rotary frequencies beside another rule that scales them".to_owned();
            return Err(Error::Unsupported(format!("{}: {what}", path.display())));
        }
    }
    if !plain || rule.contains_key("divisors") {
        // Gemma 4's tensor is for its full layers.
        if architecture == "gemma4" {
            let sliding = json!({"rope_type": "default"});
            let full = std::mem::take(&mut rule);
            rule.insert("sliding_attention".to_owned(), sliding);
            rule.insert("full_attention".to_owned(), Value::Object(full));
        }
        facts.insert("rope_scaling".to_owned(), Value::Object(rule));
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
