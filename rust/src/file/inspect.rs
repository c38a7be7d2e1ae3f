//! What a checkpoint says about itself, as JSON: files, metadata, tensors. Reads no tensor data.

use super::gguf::{Kind, Value};
use super::{Checkpoint, Mapped, gguf_at};
use crate::Result;
use serde::Deserialize;
use serde_json::{Value as Json, json};
use std::collections::BTreeMap;
use std::path::Path;

/// The most values of a list that are shown.
const SHOWN: usize = 16;

/// The files, metadata and tensors of a file or a folder. Every range in it has been checked.
pub fn inspect(path: &Path) -> Result<Json> {
    let path = gguf_at(path)?.unwrap_or(path.to_path_buf());
    let checkpoint = Checkpoint::open(&path)?;
    let files: Vec<Json> = checkpoint.files.iter().map(file).collect();
    let metadata: Vec<Json> = match checkpoint.metadata() {
        Some(metadata) => {
            let items = metadata.iter();
            items.map(|(item, value)| entry(&item.key, item.kind.name(), value)).collect()
        }
        None => checkpoint.files.iter().flat_map(safetensors_metadata).collect(),
    };
    let tensors = checkpoint.tensors.iter().map(|(file, entry)| {
        json!({
            "name": entry.name, "dtype": entry.dtype.name(), "shape": entry.shape, "bytes": entry.range.len(),
            "file": file, "start": entry.range.start,
        })
    });
    let tensors: Vec<Json> = tensors.collect();
    Ok(json!({"files": files, "metadata": metadata, "tensors": tensors}))
}

fn file(file: &Mapped) -> Json {
    let (format, version) = match &file.gguf {
        Some(header) => ("gguf", Some(header.version)),
        None => ("safetensors", None),
    };
    json!({"name": file.name, "format": format, "version": version, "bytes": file.map.len()})
}

fn entry(key: &str, kind: &str, value: Value<'_>) -> Json {
    match value {
        Value::List(list) => json!({
            "key": key, "type": format!("list of {}", list.kind.name()), "length": list.len,
            "value": list.iter().take(SHOWN).map(plain).collect::<Vec<_>>(),
        }),
        value => json!({"key": key, "type": kind, "value": plain(value)}),
    }
}

fn plain(value: Value<'_>) -> Json {
    match value {
        Value::Unsigned(x) => json!(x),
        Value::Signed(x) => json!(x),
        // JSON has no other numbers.
        Value::Float(x) if !x.is_finite() => json!(x.to_string()),
        Value::Float(x) => json!(x),
        Value::Bool(x) => json!(x),
        Value::Text(x) => json!(x),
        Value::List(_) => Json::Null, // there are no lists of lists
    }
}

/// `__metadata__` of a safetensors header: texts.
fn safetensors_metadata(file: &Mapped) -> Vec<Json> {
    #[derive(Deserialize)]
    struct Header {
        #[serde(default)]
        __metadata__: BTreeMap<String, Json>,
    }
    let header = || {
        let (length, rest) = file.map.split_first_chunk::<8>()?;
        let header = rest.get(..usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
        serde_json::from_slice::<Header>(header).ok()
    };
    let texts = header().map_or(BTreeMap::new(), |header| header.__metadata__).into_iter();
    let kind = Kind::Text.name();
    texts.map(|(key, value)| json!({"key": key, "type": kind, "value": value})).collect()
}
