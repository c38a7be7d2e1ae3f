//! A tokenizer from the metadata of a GGUF file: byte-level BPE with a named pre-tokenizer, and SentencePiece's BPE,
//! as the tokenizer.json of the same model would be. Never guesses: what is not known is an error.

use super::pre;
use crate::file::gguf::{List, Metadata, Value};
use serde_json::json;
use std::cmp::Ordering;
use std::collections::HashSet;
use tokenizers::models::bpe::{BPE, BpeBuilder, Merges, Vocab};
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
    Tokenizer,
};

/// Of what kind a token is: the numbers of `tokenizer.ggml.token_type`.
const NORMAL: u64 = 1;
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

/// Tokens that end an answer whatever the file names as EOS: what generation_config.json lists beside it is not
/// in a GGUF file. llama.cpp goes by the same names.
const ENDS: &[&str] = &[
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<turn|>",
    "<|tool_response>",
    "<end_of_utterance>",
    "<eos>",
    "<EOT>",
    "▁<EOT>",
    "[EOT]",
    "[EOS]",
    "[e~[",
];

/// Gemma's, which converters take for words of the user.
const START_OF_TURN: &str = "<start_of_turn>";

/// A tokenizer and what the file says of its special tokens.
pub(super) struct Built {
    pub(super) inner: Tokenizer,
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) ends: Vec<u32>,
}

/// The tokens of a file and their kinds.
struct Tokens<'a> {
    metadata: Metadata<'a>,
    texts: Vec<String>,
    kinds: Vec<u64>,
}

/// The tokenizer that `metadata` describes, or what is wrong with it.
pub(super) fn build(metadata: Metadata<'_>) -> Result<Built, String> {
    let tokens = Tokens::new(metadata)?;
    let model = text(metadata, "tokenizer.ggml.model")?.unwrap_or("nothing");
    let (mut inner, bos_by_default) = match model {
        "gpt2" => tokens.byte_level()?,
        "llama" => (tokens.sentencepiece(tokens.merges_by_score()?)?, true),
        "gemma4" => (tokens.sentencepiece(tokens.merges()?)?, true),
        _ => {
            return Err(format!(
                "key `tokenizer.ggml.model`: found {model:?}, expected \"gpt2\", \"llama\" or \"gemma4\""
            ));
        }
    };
    // SentencePiece has had these numbers since before they were written into files.
    let default = |id| (model == "llama").then_some(id);
    let bos = tokens.id("bos")?.or(default(1));
    let eos = tokens.id("eos")?.or(default(2));
    let add_bos = flag(metadata, "tokenizer.ggml.add_bos_token")?.unwrap_or(bos_by_default);
    let add_eos = flag(metadata, "tokenizer.ggml.add_eos_token")?.unwrap_or(false);
    inner.with_post_processor(tokens.around(add_bos.then_some(bos), add_eos.then_some(eos))?);
    let mut ends: Vec<u32> = eos.into_iter().collect();
    ends.extend(tokens.id("eot")?);
    ends.extend(tokens.id("eom")?);
    ends.extend(ENDS.iter().filter_map(|end| inner.token_to_id(end)));
    // gpt-oss ends a message with <|end|> and goes on with the next; what ends its answer is one of the others.
    if let (Some(end), Some(_), Some(_)) = (
        inner.token_to_id("<|end|>"),
        inner.token_to_id("<|return|>"),
        inner.token_to_id("<|call|>"),
    ) {
        ends.retain(|id| *id != end || eos == Some(end));
    }
    let mut seen = HashSet::new();
    ends.retain(|id| seen.insert(*id));
    let start = inner.token_to_id(START_OF_TURN);
    let special: HashSet<u32> = ends.iter().copied().chain(bos).chain(start).collect();
    tokens.add_to(&mut inner, &special)?;
    Ok(Built { inner, bos, eos, ends })
}

fn text<'a>(metadata: Metadata<'a>, key: &str) -> Result<Option<&'a str>, String> {
    metadata.read(key, "a text", Value::as_text)
}

fn flag(metadata: Metadata<'_>, key: &str) -> Result<Option<bool>, String> {
    metadata.read(key, "true or false", Value::as_bool)
}

fn made<T>(what: &str, result: tokenizers::Result<T>) -> Result<T, String> {
    result.map_err(|e| format!("{what}: {e}"))
}

impl<'a> Tokens<'a> {
    fn new(metadata: Metadata<'a>) -> Result<Tokens<'a>, String> {
        let mut tokens = Tokens { metadata, texts: Vec::new(), kinds: Vec::new() };
        let (key, list) = tokens.list("tokenizer.ggml.tokens")?;
        for (i, token) in list.iter().enumerate() {
            let text = token.as_text().ok_or_else(|| format!("key `{key}`: expected texts"))?;
            // As llama.cpp: an id without a text still is an id.
            let text = if text.is_empty() { format!("[EMPTY_{i}]") } else { text.to_owned() };
            tokens.texts.push(text);
        }
        tokens.kinds = vec![NORMAL; tokens.texts.len()];
        if metadata.get("tokenizer.ggml.token_type").is_some() {
            tokens.kinds = tokens.each("tokenizer.ggml.token_type", Value::as_u64)?;
        }
        Ok(tokens)
    }

    fn list(&self, key: &'static str) -> Result<(&'static str, List<'a>), String> {
        let list = self.metadata.read(key, "a list", Value::as_list)?;
        Ok((key, list.ok_or_else(|| format!("key `{key}`: found nothing, expected a list"))?))
    }

    /// A list with a value for each token.
    fn each<T>(
        &self,
        key: &'static str,
        read: impl Fn(Value<'a>) -> Option<T>,
    ) -> Result<Vec<T>, String> {
        let (key, list) = self.list(key)?;
        let n = self.texts.len();
        if list.len != n {
            return Err(format!(
                "key `{key}`: found {} values, expected {n}, one for each token",
                list.len
            ));
        }
        let values = list.iter().map(read).collect::<Option<_>>();
        values.ok_or_else(|| format!("key `{key}`: found {list:?}, expected numbers"))
    }

    /// The id that `tokenizer.ggml.NAME_token_id` gives.
    fn id(&self, name: &str) -> Result<Option<u32>, String> {
        let n = self.texts.len();
        let known = |v: Value<'_>| v.as_u64().filter(|id| *id < n as u64).map(|id| id as u32);
        let key = format!("tokenizer.ggml.{name}_token_id");
        self.metadata.read(&key, &format!("an id below {n}"), known)
    }

    fn vocab(&self) -> Result<Vocab, String> {
        let mut vocab = Vocab::default();
        for (id, text) in self.texts.iter().enumerate() {
            if let Some(other) = vocab.insert(text.clone(), id as u32) {
                return Err(format!(
                    "key `tokenizer.ggml.tokens`: {text:?} is there twice, as {other} and {id}"
                ));
            }
        }
        Ok(vocab)
    }

    /// The merges that the file lists, each a pair of tokens.
    fn merges(&self) -> Result<Merges, String> {
        let (key, list) = self.list("tokenizer.ggml.merges")?;
        let known: HashSet<&str> = self.texts.iter().map(String::as_str).collect();
        let merge = |(i, merge): (usize, Value<'a>)| {
            let merge = merge.as_text().unwrap_or_default();
            // The first token may itself begin with a space.
            let first = merge.chars().next().map_or(0, char::len_utf8);
            let at = merge[first..].find(' ').map(|at| first + at);
            let pair = at.map(|at| (&merge[..at], &merge[at + 1..]));
            let pair = pair.filter(|(a, b)| known.contains(format!("{a}{b}").as_str()));
            let (a, b) = pair.ok_or_else(|| {
                format!(
                    "key `{key}`: merge {i}: found {merge:?}, expected two tokens that make a third"
                )
            })?;
            Ok((a.to_owned(), b.to_owned()))
        };
        list.iter().enumerate().map(merge).collect()
    }

    /// The merges that SentencePiece's scores mean: the pair whose union scores best comes first. Of two ways to the
    /// same token the one with the longer first half is tried first, as transformers has it.
    fn merges_by_score(&self) -> Result<Merges, String> {
        let scores = self.each("tokenizer.ggml.scores", Value::as_f64)?;
        // Control tokens are never made of text.
        let normal = || (0..self.texts.len()).filter(|id| self.kinds[*id] == NORMAL);
        let vocab: std::collections::HashMap<&str, usize> =
            normal().map(|id| (self.texts[id].as_str(), id)).collect();
        // Each token is looked up in as many cuts as it has bytes. That is little for any vocabulary that is one.
        let (bytes, work) = normal().fold((0usize, 0usize), |(bytes, work), id| {
            let n = self.texts[id].len();
            (bytes + n, work.saturating_add(n.saturating_mul(n)))
        });
        if work > 256 * bytes + (1 << 20) {
            return Err(format!(
                "key `tokenizer.ggml.tokens`: found {bytes} bytes in very long tokens, expected pieces of words"
            ));
        }
        let mut merges: Vec<(f64, usize, usize, usize, usize)> = Vec::new();
        for id in normal() {
            let text = self.texts[id].as_str();
            let first = merges.len();
            for (at, _) in text.char_indices().skip(1) {
                let (left, right) = text.split_at(at);
                if let (Some(&a), Some(&b)) = (vocab.get(left), vocab.get(right)) {
                    let (left, right) = (left.chars().count(), right.chars().count());
                    merges.push((scores[id], left, right, a, b));
                }
            }
            merges[first..].sort_by_key(|merge| (merge.3, merge.4));
        }
        merges.sort_by(|x, y| {
            let by_score = y.0.partial_cmp(&x.0).unwrap_or(Ordering::Equal);
            by_score.then(y.1.cmp(&x.1)).then(y.2.cmp(&x.2))
        });
        let pair =
            |(.., a, b): (_, _, _, usize, usize)| (self.texts[a].clone(), self.texts[b].clone());
        Ok(merges.into_iter().map(pair).collect())
    }

    /// Byte-level BPE, and whether BOS is added by default.
    fn byte_level(&self) -> Result<(Tokenizer, bool), String> {
        let name = text(self.metadata, "tokenizer.ggml.pre")?.ok_or(
            "key `tokenizer.ggml.pre`: found nothing, expected the name of the pre-tokenizer; the file was made by \
             an old converter, take a newer one of this model",
        )?;
        let pre = pre::ALL.iter().find(|pre| pre.names.contains(&name)).ok_or_else(|| {
            format!("key `tokenizer.ggml.pre`: found {name:?}, which is not a pre-tokenizer that is known here")
        })?;
        let mut inner = self.bpe(self.merges()?, |bpe| bpe.ignore_merges(pre.ignore_merges))?;
        if pre.nfc {
            made(
                "normalizer",
                inner.with_normalizer(part::<NormalizerWrapper>(json!({"type": "NFC"}))?),
            )?;
        }
        let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        let mut steps: Vec<_> = (pre.splits.iter())
            .map(|regex| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false}))
            .collect();
        steps.push(byte_level.clone());
        inner.with_pre_tokenizer(part::<PreTokenizerWrapper>(
            json!({"type": "Sequence", "pretokenizers": steps}),
        )?);
        inner.with_decoder(part::<DecoderWrapper>(byte_level)?);
        Ok((inner, pre.bos))
    }

    /// SentencePiece's BPE: spaces are `▁`, and what the vocabulary lacks is spelled in bytes.
    fn sentencepiece(&self, merges: Merges) -> Result<Tokenizer, String> {
        let unknown = self.id("unknown")?.map(|id| id as usize);
        let unknown = unknown.or_else(|| self.kinds.iter().position(|kind| *kind == UNKNOWN));
        let unknown = unknown.and_then(|id| self.texts.get(id));
        let mut inner = self.bpe(merges, |bpe| {
            let bpe = bpe.byte_fallback(true).fuse_unk(true);
            if let Some(unknown) = unknown { bpe.unk_token(unknown.clone()) } else { bpe }
        })?;
        let prefix = match text(self.metadata, "tokenizer.ggml.model")? {
            Some("llama") => {
                flag(self.metadata, "tokenizer.ggml.add_space_prefix")?.unwrap_or(true)
            }
            _ => false,
        };
        let mut normalizers =
            vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if prefix {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let normalizer = json!({"type": "Sequence", "normalizers": normalizers});
        made("normalizer", inner.with_normalizer(part::<NormalizerWrapper>(normalizer)?))?;
        inner.with_decoder(part::<DecoderWrapper>(
            json!({"type": "Sequence", "decoders": decoders}),
        )?);
        Ok(inner)
    }

    fn bpe(
        &self,
        merges: Merges,
        how: impl Fn(BpeBuilder) -> BpeBuilder,
    ) -> Result<Tokenizer, String> {
        let bpe = how(BPE::builder().vocab_and_merges(self.vocab()?, merges));
        Ok(Tokenizer::new(made("vocabulary", bpe.build())?))
    }

    /// What is put around a text: `Some(None)` is a token that is wanted but has no id.
    fn around(
        &self,
        bos: Option<Option<u32>>,
        eos: Option<Option<u32>>,
    ) -> Result<Option<PostProcessorWrapper>, String> {
        let sequence = |id| json!({"Sequence": {"id": id, "type_id": 0}});
        let (mut one, mut known) = (vec![sequence("A")], serde_json::Map::new());
        for (token, name) in [(bos, "bos"), (eos, "eos")] {
            let Some(token) = token else { continue };
            let id = token.ok_or_else(|| {
                format!("key `tokenizer.ggml.add_{name}_token`: found true, but there is no `tokenizer.ggml.{name}_token_id`")
            })?;
            let text = self.texts.get(id as usize).ok_or_else(|| {
                format!("key `tokenizer.ggml.{name}_token_id`: found {id} by default, expected an id below {}", self.texts.len())
            })?;
            let token = json!({"SpecialToken": {"id": text, "type_id": 0}});
            one.insert(if name == "bos" { 0 } else { one.len() }, token);
            known.insert(text.clone(), json!({"id": text, "ids": [id], "tokens": [text]}));
        }
        if known.is_empty() {
            return Ok(None);
        }
        let two = [sequence("A"), sequence("B")];
        let json = json!({"type": "TemplateProcessing", "single": one, "pair": two, "special_tokens": known});
        part(json)
    }

    /// Makes control and user-defined tokens known as such; `special` are control tokens whatever their kind.
    fn add_to(&self, inner: &mut Tokenizer, special: &HashSet<u32>) -> Result<(), String> {
        // Phi-3's swallow the space behind them, which GGUF has no place for.
        let phi3 = text(self.metadata, "general.architecture")? == Some("phi3")
            && text(self.metadata, "tokenizer.ggml.model")? == Some("llama");
        let (mut controls, mut others) = (Vec::new(), Vec::new());
        for (id, (text, kind)) in self.texts.iter().zip(&self.kinds).enumerate() {
            let control = *kind == CONTROL || special.contains(&(id as u32));
            if !control && ![USER_DEFINED, UNKNOWN].contains(kind) {
                continue;
            }
            let strip = phi3 && !["<unk>", "<s>", "<|endoftext|>"].contains(&text.as_str());
            let control = control || *kind == UNKNOWN;
            let token = AddedToken::from(text.clone(), control).normalized(false).rstrip(strip);
            if control { controls.push(token) } else { others.push(token) }
        }
        made("special tokens", inner.add_special_tokens(controls))?;
        made("user-defined tokens", inner.add_tokens(others))?;
        Ok(())
    }
}

/// One part of a tokenizer.json.
fn part<T: serde::de::DeserializeOwned>(json: serde_json::Value) -> Result<Option<T>, String> {
    serde_json::from_value(json).map(Some).map_err(|e| format!("tokenizer: {e}"))
}
