//! A tokenizer.json as the metadata of a GGUF file: the reverse of [`super::gguf`]. What is made is read again and gives
//! the same ids for every token's text and for texts that tell tokenizers apart, or it is an error.

use super::{MAX_CONFIG, MAX_TOKENIZER, Tokenizer, other_tokenizer, pre};
use crate::file::gguf::{Metadata, parse};
use crate::file::gguf_writer::{Datum, header};
use crate::file::{gguf_at, read, read_json};
use crate::{Error, Result};
use serde_json::Value;
use std::collections::HashMap;
use std::path::Path;

/// Kinds of tokens: the numbers of `tokenizer.ggml.token_type`.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// Texts by which tokenizers differ: contractions, digits, spaces, line ends, scripts, marks, emoji.
const TEXTS: &[&str] = &[
    "",
    " ",
    "  x",
    " Hello world",
    "Hello, world! It's 2024, isn't it? I'LL SAY WE'VE",
    "1 12 123 1234 12345678 3.14 ½ ١٢٣",
    "a\n\nb\r\n\tc  d   \n  e\n",
    "Größe naïve Ǆungla ﬁne e\u{301}te\u{301} İstanbul",
    "日本語のテキスト と 漢字カナ 中文字符。한국어 문장입니다",
    "Привет, мир! שלום עולם مرحبا بالعالم नमस्ते दुनिया ไทย",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 🇩🇪 ✓",
    "fn main() { println!(\"{:>8}\", x_y[0] += 1); } // ---- ====",
    "<s>[INST] x [/INST]</s><|im_start|>user\nhi<|im_end|><start_of_turn>model",
    "\u{0}\u{7f}\u{a0}\u{200b}\u{feff}",
    "▁ ▁▁x Ġ Ċ",
];

/// The keys of the tokenizer in `folder`, for a model of this architecture with so many tokens. A folder without one:
/// that there is none.
pub fn to_gguf(folder: &Path, architecture: &str, vocab: usize) -> Result<Vec<(String, Datum)>> {
    let path = folder.join("tokenizer.json");
    let wrong = |what: String| Error::Tokenizer(format!("{}: {what}", path.display()));
    let Some(bytes) = read(&path, MAX_TOKENIZER)? else {
        if gguf_at(folder)?.is_none() && other_tokenizer(folder).is_none() {
            return Ok(vec![("tokenizer.ggml.model".to_owned(), text("no_vocab"))]);
        }
        return Err(match Tokenizer::open(folder) {
            Err(error) => error,
            Ok(_) => wrong("found a GGUF file beside the model, expected tokenizer.json".into()),
        });
    };
    let own = Tokenizer::open(folder)?;
    let json: Value = serde_json::from_slice(&bytes).map_err(|e| wrong(e.to_string()))?;
    let made = Made { json: &json, own: &own, vocab };
    let mut items = made.items(architecture).map_err(wrong)?;
    items.extend(made.specials(folder)?);

    let mut all = vec![("general.architecture".to_owned(), text(architecture))];
    all.extend(items.iter().cloned());
    let bytes = header(&all, &[]);
    let header = parse(&bytes).map_err(wrong)?;
    let other = Tokenizer::from_gguf(Metadata::new(&header, &bytes))?;
    same(&own, &other, vocab).map_err(wrong)?;
    Ok(items)
}

fn text(x: &str) -> Datum {
    Datum::Text(x.to_owned())
}

struct Made<'a> {
    json: &'a Value,
    own: &'a Tokenizer,
    vocab: usize,
}

impl Made<'_> {
    fn items(&self, architecture: &str) -> std::result::Result<Vec<(String, Datum)>, String> {
        let model = &self.json["model"];
        let kind = model["type"].as_str().unwrap_or("BPE");
        if kind != "BPE" || !model["merges"].is_array() {
            return Err(format!("GGUF output knows BPE only, found a tokenizer of type {kind:?}"));
        }
        let merges = self.merges()?;
        let byte_level = self.json["pre_tokenizer"].to_string().contains("\"ByteLevel\"");
        let (texts, kinds) = self.tokens(byte_level)?;
        let mut items = Vec::new();
        let mut add = |key: &str, value| items.push((format!("tokenizer.ggml.{key}"), value));
        let joined = || Datum::Texts(merges.iter().map(|(a, b)| format!("{a} {b}")).collect());
        if byte_level {
            add("model", text("gpt2"));
            add("pre", text(self.pre()?));
            add("merges", joined());
        } else if architecture == "gemma4" {
            add("model", text("gemma4"));
            add("merges", joined());
        } else {
            // As SentencePiece has it: the earlier a merge, the higher the score of what it makes.
            let mut ranks: HashMap<String, usize> = HashMap::new();
            for (rank, (a, b)) in merges.iter().enumerate() {
                ranks.entry(format!("{a}{b}")).or_insert(rank);
            }
            let score = |(id, (text, kind)): (usize, (&String, &i32))| match ranks.get(text) {
                _ if *kind != NORMAL => 0.0,
                Some(rank) => -(*rank as f32),
                None => -((merges.len() + id) as f32),
            };
            add("model", text("llama"));
            add("pre", text("default"));
            add("scores", Datum::F32s(texts.iter().zip(&kinds).enumerate().map(score).collect()));
            let first = ["Prepend", "Metaspace"].iter().any(|step| {
                let step = format!("\"type\":\"{step}\"");
                let never = "\"prepend_scheme\":\"never\"";
                ["normalizer", "pre_tokenizer"].iter().any(|part| {
                    let part = self.json[*part].to_string();
                    part.contains(&step) && !part.contains(never)
                })
            });
            add("add_space_prefix", Datum::Bool(first));
        }
        add("tokens", Datum::Texts(texts));
        add("token_type", Datum::I32s(kinds));
        Ok(items)
    }

    fn merges(&self) -> std::result::Result<Vec<(String, String)>, String> {
        let pair = |merge: &Value| {
            let (a, b) = match merge {
                Value::String(both) => both.split_once(' ')?,
                both => (both[0].as_str()?, both[1].as_str()?),
            };
            let plain = !a.is_empty() && !b.is_empty() && !a.contains(' ') && !b.contains(' ');
            plain.then(|| (a.to_owned(), b.to_owned()))
        };
        let merges = self.json["model"]["merges"].as_array().into_iter().flatten();
        let merges: Option<Vec<_>> = merges.map(pair).collect();
        merges
            .ok_or_else(|| "merges: found one that GGUF cannot say: with a space in it".to_owned())
    }

    /// Text and kind of each id.
    fn tokens(&self, byte_level: bool) -> std::result::Result<(Vec<String>, Vec<i32>), String> {
        let (mut texts, mut kinds) = (Vec::new(), Vec::new());
        let unknown = self.json["model"]["unk_token"].as_str();
        for id in 0..self.vocab {
            let id = u32::try_from(id).map_err(|e| e.to_string())?;
            let text = self.own.token(id);
            kinds.push(match &text {
                None => UNUSED,
                Some(text) if !byte_level && Some(&text[..]) == unknown => UNKNOWN,
                Some(_) if self.own.is_special(id) => CONTROL,
                Some(_) if self.own.is_added(id) => USER_DEFINED,
                Some(text) if !byte_level && is_byte(text) => BYTE,
                Some(_) => NORMAL,
            });
            texts.push(text.unwrap_or_else(|| format!("[PAD{id}]")));
        }
        let known = texts.len() - kinds.iter().filter(|kind| **kind == UNUSED).count();
        if known < self.own.vocab_size() {
            let found = self.own.vocab_size();
            return Err(format!(
                "found {found} tokens, expected at most the model's {}",
                self.vocab
            ));
        }
        Ok((texts, kinds))
    }

    /// The name of the way in which text is cut.
    fn pre(&self) -> std::result::Result<&'static str, String> {
        let found = &self.json["pre_tokenizer"];
        let one = [found.clone()];
        let steps = found["pretokenizers"].as_array().map_or(&one[..], |steps| &steps[..]);
        let mut splits: Vec<&str> = Vec::new();
        for step in steps {
            let known = match step["type"].as_str() {
                Some("Split") if step["behavior"] == "Isolated" && step["invert"] != true => {
                    let pattern = &step["pattern"];
                    pattern["Regex"].as_str().or_else(|| pattern["String"].as_str())
                }
                Some("Digits") if step["individual_digits"] == true => Some(pre::DIGIT),
                Some("ByteLevel") if step["add_prefix_space"] == true => None,
                Some("ByteLevel") if step["use_regex"] != false => Some(pre::GPT2),
                Some("ByteLevel") => continue,
                _ => None,
            };
            let unknown = || format!("pre_tokenizer: GGUF has no name for {step}");
            splits.push(known.ok_or_else(unknown)?);
        }
        let normalizer = &self.json["normalizer"];
        let nfc = normalizer.to_string().contains("\"NFC\"");
        let ignore = self.json["model"]["ignore_merges"] == true;
        let same = |pre: &&pre::Pre| pre.splits == splits && pre.nfc == nfc;
        let mut all = pre::ALL.iter().filter(same);
        // Where no token is one that merges do not make, taking pieces whole changes nothing: the comparison tells.
        let pre = all.clone().find(|pre| pre.ignore_merges == ignore).or(all.next());
        pre.and_then(|pre| pre.names.first().copied()).ok_or_else(|| {
            format!(
                "GGUF has no name for this way to cut text: {splits:?}{}{}",
                if nfc { ", NFC" } else { "" },
                if ignore { ", ignore_merges" } else { "" }
            )
        })
    }

    /// Ids of special tokens, and what is put around a text.
    fn specials(&self, folder: &Path) -> Result<Vec<(String, Datum)>> {
        let mut items = Vec::new();
        let mut add = |key: &str, value| items.push((format!("tokenizer.ggml.{key}"), value));
        let (plain, whole) =
            (self.own.encode("a", false, false)?, self.own.encode("a", true, false)?);
        let at = whole.windows(plain.len().max(1)).position(|ids| ids == plain).unwrap_or(0);
        let (before, behind) = (&whole[..at], whole.get(at + plain.len()..).unwrap_or_default());
        let config = read_json(&folder.join("tokenizer_config.json"), MAX_CONFIG)?;
        let map = read_json(&folder.join("special_tokens_map.json"), MAX_CONFIG)?;
        let generation = read_json(&folder.join("generation_config.json"), MAX_CONFIG)?;
        let named = |name: &str| {
            let found = [&config, &map].into_iter().flatten().find_map(|file| file.get(name))?;
            self.own.id(found.as_str().or_else(|| found.get("content")?.as_str())?)
        };
        let model = read_json(&folder.join("config.json"), MAX_CONFIG)?;
        let text = model.as_ref().and_then(|m| m.get("text_config"));
        let says = [generation.as_ref(), model.as_ref(), text];
        let mut ends = says.into_iter().flatten().filter_map(|file| file.get("eos_token_id"));
        let ends = ends.find(|ends| !ends.is_null()).cloned();
        let ends: Vec<u32> = match ends {
            Some(Value::Array(all)) => {
                all.iter().filter_map(|id| Some(id.as_u64()? as u32)).collect()
            }
            Some(one) => one.as_u64().map(|id| id as u32).into_iter().collect(),
            None => Vec::new(),
        };
        let bos = before.first().copied().or(self.own.bos().map(|(id, _)| id));
        let eos = behind.first().copied().or(self.own.eos().map(|(id, _)| id));
        let eos = eos.or(ends.first().copied());
        for (key, id) in [
            ("bos", bos),
            ("eos", eos),
            ("unknown", named("unk_token")),
            ("padding", named("pad_token")),
            ("seperator", named("sep_token")), // so spelled
            ("mask", named("mask_token")),
        ] {
            if let Some(id) = id {
                add(&format!("{key}_token_id"), Datum::U32(id));
            }
        }
        // Others that end an answer.
        let others = ends.iter().filter(|id| Some(**id) != eos && (**id as usize) < self.vocab);
        for (key, id) in ["eot", "eom"].iter().zip(others) {
            add(&format!("{key}_token_id"), Datum::U32(*id));
        }
        add("add_bos_token", Datum::Bool(!before.is_empty()));
        add("add_eos_token", Datum::Bool(!behind.is_empty()));
        Ok(items)
    }
}

/// Whether a token stands for a byte: `<0x0A>`.
fn is_byte(text: &str) -> bool {
    let hex = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    hex.is_some_and(|hex| hex.len() == 2 && u8::from_str_radix(hex, 16).is_ok())
}

/// Whether two tokenizers give the same ids and texts.
fn same(own: &Tokenizer, other: &Tokenizer, vocab: usize) -> std::result::Result<(), String> {
    let failed = |e: Error| e.to_string();
    let check = |text: &str, add: bool, parse: bool| {
        let [a, b] = [own, other].map(|t| t.encode(text, add, parse).map_err(failed));
        match (a?, b?) {
            (a, b) if a == b => Ok(()),
            (a, b) => Err(format!(
                "GGUF has no words for all of this tokenizer: for the text {text:?} it gives {a:?}, a GGUF file's would \
                 give {b:?}"
            )),
        }
    };
    for text in TEXTS {
        for (add, parse) in [(true, true), (false, true), (false, false)] {
            check(text, add, parse)?;
        }
    }
    for id in 0..vocab as u32 {
        if own.token(id).is_none() {
            continue;
        }
        let [a, b] = [own, other].map(|t| t.decode(&[id, id], false).map_err(failed));
        let (a, b) = (a?, b?);
        if a != b {
            return Err(format!("token {id} twice: found {a:?}, a GGUF file's would give {b:?}"));
        }
        check(&a, false, true)?;
    }
    Ok(())
}
