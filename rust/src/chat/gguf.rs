//! The chat template and the special tokens in a GGUF file's metadata.

use super::ChatTemplate;
use crate::file::gguf::{Metadata, Value};
use crate::file::{Checkpoint, gguf_at};
use crate::{Error, Result};
use serde_json::{Map, Value as Json};
use std::path::Path;

/// Template variables, and the keys of their ids.
const TOKENS: &[(&str, &str)] = &[
    ("bos_token", "tokenizer.ggml.bos_token_id"),
    ("eos_token", "tokenizer.ggml.eos_token_id"),
    ("unk_token", "tokenizer.ggml.unknown_token_id"),
    ("sep_token", "tokenizer.ggml.seperator_token_id"), // so spelled
    ("pad_token", "tokenizer.ggml.padding_token_id"),
    ("mask_token", "tokenizer.ggml.mask_token_id"),
];

/// The template of the GGUF model at `path`, if there is one.
pub(super) fn template(path: &Path) -> Result<Option<ChatTemplate>> {
    with_metadata(path, |metadata| {
        let text = |key| metadata.read(key, "a text", Value::as_text);
        let Some(source) = text("tokenizer.chat_template")? else { return Ok(Ok(None)) };
        let special_tokens = special_tokens(metadata)?;
        let tool_use = text("tokenizer.chat_template.tool_use")?;
        Ok((|| {
            let mut template = ChatTemplate::new(source, special_tokens)?;
            if let Some(source) = tool_use {
                template.add("tool_use", source)?;
            }
            Ok(Some(template))
        })())
    })?
    .unwrap_or(Ok(None))
}

/// The special tokens of the GGUF model at `path`.
pub(super) fn tokens(path: &Path) -> Result<Map<String, Json>> {
    Ok(with_metadata(path, special_tokens)?.unwrap_or_default())
}

fn with_metadata<T>(
    path: &Path,
    read: impl Fn(Metadata<'_>) -> std::result::Result<T, String>,
) -> Result<Option<T>> {
    let Some(path) = gguf_at(path)? else { return Ok(None) };
    let checkpoint = Checkpoint::open(&path)?;
    let Some(metadata) = checkpoint.metadata() else { return Ok(None) };
    read(metadata).map(Some).map_err(|what| Error::format(path, what))
}

fn special_tokens(metadata: Metadata<'_>) -> std::result::Result<Map<String, Json>, String> {
    let texts = metadata.read("tokenizer.ggml.tokens", "a list", Value::as_list)?;
    let mut tokens = Map::new();
    for (name, key) in TOKENS {
        let id =
            metadata.read(key, "an id", Value::as_u64)?.and_then(|id| usize::try_from(id).ok());
        let text = id.zip(texts).and_then(|(id, texts)| texts.iter().nth(id)?.as_text());
        if let Some(text) = text {
            tokens.insert((*name).to_owned(), text.into());
        }
    }
    Ok(tokens)
}
