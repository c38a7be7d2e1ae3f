//! Text <-> token ids, exactly as Hugging Face `tokenizers` does; streaming decode. Never guesses: without
//! tokenizer.json or a GGUF file there is no tokenizer.

mod gguf;
mod pre;
mod to_gguf;

pub use to_gguf::to_gguf;

use crate::file::gguf::Metadata;
use crate::file::{Checkpoint, gguf_at, read, read_json};
use crate::{Error, Result};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use tokenizers::tokenizer::{
    AddedVocabulary, Decoder as _, Model as _, OffsetType, PreTokenizer as _,
};
use tokenizers::{DecoderWrapper, Tokenizer as HfTokenizer};

/// The longest tokenizer.json that is read (the largest published ones have 35 MB).
const MAX_TOKENIZER: u64 = 512 << 20;
/// The longest of the small JSON files beside it.
const MAX_CONFIG: u64 = 64 << 20;

/// A file that has a tokenizer as other programs store it.
fn other_tokenizer(folder: &Path) -> Option<&'static str> {
    let names = ["tokenizer.model", "tekken.json", "vocab.json", "vocab.txt"];
    names.into_iter().find(|name| folder.join(name).exists())
}

/// A tokenizer with the special ids its model folder names.
pub struct Tokenizer {
    inner: HfTokenizer,
    /// The added vocabulary with "special tokens are plain text" switched on.
    plain: AddedVocabulary,
    /// The decoder, taken apart for streaming.
    stages: Vec<Stage>,
    bos: Option<(u32, String)>,
    eos: Option<(u32, String)>,
    ends: Vec<u32>,
}

impl Tokenizer {
    /// Reads tokenizer.json (and tokenizer_config.json, special_tokens_map.json) in `folder`; or what a GGUF file says
    /// about its tokenizer: that of `folder`, or `folder` itself.
    ///
    /// tokenizer.json alone decides what is added to a text: `add_bos_token` and the like in
    /// tokenizer_config.json are ignored, as is truncation and padding stored in it.
    pub fn open(folder: &Path) -> Result<Tokenizer> {
        let path = folder.join("tokenizer.json");
        let json = if folder.is_dir() { read(&path, MAX_TOKENIZER)? } else { None };
        let Some(json) = json else {
            if let Some(path) = gguf_at(folder)? {
                let checkpoint = Checkpoint::open(&path)?;
                let metadata = checkpoint.metadata().ok_or(Error::Closed)?;
                let at_path = |e: Error| Error::Tokenizer(format!("{}: {e}", path.display()));
                return Tokenizer::from_gguf(metadata).map_err(at_path);
            }
            return Err(Error::Tokenizer(match other_tokenizer(folder) {
                Some(name) => format!(
                    "{}: found {name} but no tokenizer.json; convert it (transformers: \
                     AutoTokenizer.from_pretrained(folder).save_pretrained(folder))",
                    folder.display()
                ),
                None => format!(
                    "{}: no tokenizer.json; take it from the model that this one was made from",
                    folder.display()
                ),
            }));
        };
        let at_path = |e: Error| Error::Tokenizer(format!("{}: {e}", path.display()));
        let mut tokenizer = Tokenizer::from_json(&json).map_err(at_path)?;

        let config = read_json(&folder.join("tokenizer_config.json"), MAX_CONFIG)?;
        let map = read_json(&folder.join("special_tokens_map.json"), MAX_CONFIG)?;
        let special = |name: &str| {
            let found = [&config, &map].into_iter().flatten().find_map(|file| file.get(name))?;
            let text = found.as_str().or_else(|| found.get("content")?.as_str())?;
            Some((tokenizer.id(text)?, text.to_owned()))
        };
        (tokenizer.bos, tokenizer.eos) = (special("bos_token"), special("eos_token"));
        tokenizer.ends = tokenizer.eos.iter().map(|(id, _)| *id).collect();
        Ok(tokenizer)
    }

    /// A tokenizer from the metadata of a GGUF file.
    pub fn from_gguf(metadata: Metadata<'_>) -> Result<Tokenizer> {
        let gguf::Built { inner, bos, eos, ends } =
            guard(|| gguf::build(metadata).map_err(tokenizers::Error::from))?;
        let mut tokenizer = Tokenizer::new(inner);
        let named = |id: u32| Some((id, tokenizer.token(id)?));
        (tokenizer.bos, tokenizer.eos) = (bos.and_then(named), eos.and_then(named));
        tokenizer.ends = ends;
        Ok(tokenizer)
    }

    /// A tokenizer from the text of a tokenizer.json, without special ids.
    pub fn from_json(json: &[u8]) -> Result<Tokenizer> {
        // The crate panics on some malformed JSON, so that is looked for first.
        serde_json::from_slice::<serde::de::IgnoredAny>(json)
            .map_err(|e| Error::Tokenizer(format!("JSON: {e}")))?;
        let inner = guard(|| {
            let mut inner = HfTokenizer::from_bytes(json)?;
            inner.with_truncation(None)?.with_padding(None);
            Ok(inner)
        })?;
        Ok(Tokenizer::new(inner))
    }

    fn new(inner: HfTokenizer) -> Tokenizer {
        let mut plain = inner.get_added_vocabulary().clone();
        plain.set_encode_special_tokens(true);
        let stages = stages(inner.get_decoder());
        Tokenizer { inner, plain, stages, bos: None, eos: None, ends: Vec::new() }
    }

    /// Ids of `text`. `add_special`: what the post-processor adds (BOS); not added when the text already
    /// starts with it. `parse_special`: special tokens written in the text become their ids; else they
    /// are plain text. Added tokens that are not special always become their ids.
    pub fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<u32>> {
        let inner = &self.inner;
        guard(|| {
            // `inner.encode` with a choice of the added vocabulary.
            let added = if parse_special { inner.get_added_vocabulary() } else { &self.plain };
            let mut pieces = added.extract_and_normalize(inner.get_normalizer(), text);
            if let Some(pre_tokenizer) = inner.get_pre_tokenizer() {
                pre_tokenizer.pre_tokenize(&mut pieces)?;
            }
            inner.get_model().tokenize_in_pretokenized(&mut pieces, None)?;
            let encoding = pieces.into_encoding(None, 0, OffsetType::None)?;
            let ids = encoding.get_ids().to_vec();
            if !add_special {
                return Ok(ids);
            }
            let whole = inner.post_process(encoding, None, true)?;
            let added = whole.get_special_tokens_mask().iter().take_while(|&&m| m == 1).count();
            let (prefix, rest) = whole.get_ids().split_at(added);
            Ok(if ids.starts_with(prefix) { rest } else { whole.get_ids() }.to_vec())
        })
    }

    /// Text of `ids`; invalid UTF-8 becomes U+FFFD; ids that the vocabulary lacks (the padding of a
    /// model's vocabulary) give no text.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let pieces: Vec<String> =
            ids.iter().filter_map(|&id| self.piece(id, skip_special)).collect();
        match self.inner.get_decoder() {
            _ if pieces.is_empty() => Ok(String::new()), // some decoders panic without tokens
            Some(decoder) => guard(|| decoder.decode(pieces)),
            None => Ok(pieces.join(" ")),
        }
    }

    /// The text of `id` as the decoder takes it.
    fn piece(&self, id: u32, skip_special: bool) -> Option<String> {
        let piece = self.inner.id_to_token(id)?;
        let skipped = skip_special && self.inner.get_added_vocabulary().is_special_token(&piece);
        (!skipped).then_some(piece)
    }

    /// Number of ids, special ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The id of a token's exact text, special or not.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The text of one id as the vocabulary spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Whether `id` is a special token.
    pub fn is_special(&self, id: u32) -> bool {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        added.get(&id).is_some_and(|token| token.special)
    }

    /// Whether `id` is one of the tokens that are found before a text is cut.
    fn is_added(&self, id: u32) -> bool {
        self.inner.get_added_vocabulary().get_added_tokens_decoder().contains_key(&id)
    }

    /// BOS id and text if the tokenizer has one.
    pub fn bos(&self) -> Option<(u32, &str)> {
        self.bos.as_ref().map(|(id, text)| (*id, text.as_str()))
    }

    /// EOS id and text if the tokenizer has one.
    pub fn eos(&self) -> Option<(u32, &str)> {
        self.eos.as_ref().map(|(id, text)| (*id, text.as_str()))
    }

    /// The ids that end an answer: EOS, and what a GGUF file has beside it.
    pub fn ends(&self) -> &[u32] {
        &self.ends
    }
}

/// Runs code of the `tokenizers` crate, which panics on some broken tokenizers.
fn guard<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    // Unwind safety: the crate's only interior state is a cache behind a lock that it handles poisoned.
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => result.map_err(|e| Error::Tokenizer(e.to_string())),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("panic");
            Err(Error::Tokenizer(format!("broken tokenizer: {text}")))
        }
    }
}

/// One step of a decoder, for tokens that come one by one. What it gives joined is what the whole step
/// gives for all tokens.
enum Stage {
    /// Token by token; `true`: the first token is treated differently.
    Each(DecoderWrapper, bool),
    /// GPT-2's characters to bytes to UTF-8; joins all tokens.
    ByteLevel,
    /// `<0x41>` to bytes; a run of them is text only if all of it is valid UTF-8, so the run is held.
    ByteFallback,
    /// Cuts up to `n` characters from the start of the joined text.
    CutStart(char, usize),
    /// No decoder: a space between tokens.
    Spaces,
    /// Anything else: exact only when all tokens are known. `true`: they are parts of one token.
    Whole(DecoderWrapper, bool),
}

/// What a stage remembers between tokens.
#[derive(Clone, Default)]
struct State {
    started: bool,
    cut: usize,
    bytes: Vec<u8>,
    held: Vec<String>,
}

/// More steps than any published tokenizer has; beyond, the whole text waits for the end.
const MAX_STAGES: usize = 16;

fn stages(decoder: Option<&DecoderWrapper>) -> Vec<Stage> {
    let Some(root) = decoder else { return vec![Stage::Spaces] };
    let mut stages = Vec::new();
    let mut joined = false; // from here on the tokens are parts of one
    let mut rest = vec![root];
    while let Some(decoder) = rest.pop() {
        if stages.len() + rest.len() > MAX_STAGES {
            return vec![Stage::Whole(root.clone(), false)];
        }
        stages.push(match decoder {
            DecoderWrapper::Sequence(sequence) => {
                rest.extend(sequence.get_decoders().iter().rev());
                continue;
            }
            DecoderWrapper::Fuse(_) => {
                joined = true;
                continue;
            }
            DecoderWrapper::Strip(strip) if joined && strip.stop == 0 => {
                Stage::CutStart(strip.content, strip.start)
            }
            _ if joined => Stage::Whole(decoder.clone(), true),
            DecoderWrapper::Replace(_) | DecoderWrapper::Strip(_) => {
                Stage::Each(decoder.clone(), false)
            }
            DecoderWrapper::Metaspace(_) | DecoderWrapper::WordPiece(_) => {
                Stage::Each(decoder.clone(), true)
            }
            DecoderWrapper::ByteFallback(_) => Stage::ByteFallback,
            DecoderWrapper::ByteLevel(_) => {
                joined = true;
                Stage::ByteLevel
            }
            DecoderWrapper::BPE(_) | DecoderWrapper::CTC(_) => Stage::Whole(decoder.clone(), false),
        });
    }
    stages
}

impl Stage {
    /// What `token` completes.
    fn push(&self, state: &mut State, token: String) -> tokenizers::Result<Vec<String>> {
        let first = !std::mem::replace(&mut state.started, true);
        match self {
            Stage::Each(decoder, positional) if *positional && !first => {
                Ok(decoder.decode_chain(vec![String::new(), token])?.split_off(1))
            }
            Stage::Each(decoder, _) => decoder.decode_chain(vec![token]),
            Stage::ByteLevel => {
                let bytes: Option<Vec<u8>> = token.chars().map(byte_of).collect();
                state.bytes.extend(bytes.unwrap_or_else(|| token.into_bytes()));
                Ok(vec![utf8(&mut state.bytes, false)])
            }
            Stage::ByteFallback => {
                let byte = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
                let byte = byte.filter(|hex| hex.len() == 2);
                if let Some(byte) = byte.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                    state.bytes.push(byte);
                    return Ok(Vec::new());
                }
                let mut out = self.finish(state)?;
                out.push(token);
                Ok(out)
            }
            Stage::CutStart(content, most) => {
                let mut rest = token.as_str();
                while state.cut < *most {
                    match rest.strip_prefix(*content) {
                        Some(shorter) => (rest, state.cut) = (shorter, state.cut + 1),
                        None if rest.is_empty() => break,
                        None => state.cut = *most,
                    }
                }
                Ok(vec![rest.to_owned()])
            }
            Stage::Spaces if first => Ok(vec![token]),
            Stage::Spaces => Ok(vec![format!(" {token}")]),
            Stage::Whole(..) => {
                state.held.push(token);
                Ok(Vec::new())
            }
        }
    }

    /// What is left when there are no more tokens.
    fn finish(&self, state: &mut State) -> tokenizers::Result<Vec<String>> {
        let bytes = std::mem::take(&mut state.bytes);
        let held = std::mem::take(&mut state.held);
        match self {
            Stage::ByteLevel => Ok(vec![utf8(&mut { bytes }, true)]),
            Stage::ByteFallback if !bytes.is_empty() => Ok(match String::from_utf8(bytes) {
                Ok(text) => vec![text],
                Err(e) => vec!["\u{fffd}".to_owned(); e.as_bytes().len()],
            }),
            Stage::Whole(decoder, true) => decoder.decode_chain(vec![held.concat()]),
            Stage::Whole(decoder, false) if !held.is_empty() => decoder.decode_chain(held),
            _ => Ok(Vec::new()),
        }
    }
}

/// The byte that GPT-2's alphabet spells `c`: printable bytes are themselves, the others follow U+0100.
fn byte_of(c: char) -> Option<u8> {
    Some(match c as u32 {
        c @ (33..=126 | 161..=172 | 174..=255) => c as u8,
        c @ 256..=288 => (c - 256) as u8,
        c @ 289..=322 => (c - 289 + 127) as u8,
        323 => 173,
        _ => return None,
    })
}

/// Takes the text from the front of `bytes`; an unfinished character stays there unless `last`.
fn utf8(bytes: &mut Vec<u8>, last: bool) -> String {
    let mut text = String::with_capacity(bytes.len());
    let mut rest = bytes.as_slice();
    while let Err(e) = str::from_utf8(rest) {
        let (valid, invalid) = rest.split_at(e.valid_up_to());
        text.push_str(&String::from_utf8_lossy(valid)); // borrows: it is valid
        rest = match e.error_len() {
            None if !last => {
                *bytes = invalid.to_vec();
                return text;
            }
            length => &invalid[length.unwrap_or(invalid.len())..],
        };
        text.push('\u{fffd}');
    }
    text.push_str(&String::from_utf8_lossy(rest));
    bytes.clear();
    text
}

/// Gives `token` to the first stage, what that gives to the second, and so on; the last appends to `text`.
fn feed(
    stages: &[Stage],
    states: &mut [State],
    token: String,
    text: &mut String,
) -> tokenizers::Result<()> {
    let (Some((stage, stages)), Some((state, states))) =
        (stages.split_first(), states.split_first_mut())
    else {
        text.push_str(&token);
        return Ok(());
    };
    for token in stage.push(state, token)? {
        feed(stages, states, token, text)?;
    }
    Ok(())
}

/// Decodes ids one by one; what it has given always is a prefix of the whole text.
///
/// Text is held back only where later ids can change it: an unfinished character, or a run of
/// SentencePiece byte tokens (`<0xE4>`), which is replaced by U+FFFD as a whole if one byte of it is wrong.
pub struct Decoder {
    skip_special: bool,
    states: Vec<State>,
}

impl Decoder {
    /// `skip_special`: special tokens give no text.
    pub fn new(skip_special: bool) -> Decoder {
        Decoder { skip_special, states: Vec::new() }
    }

    /// The text that `id` completes; empty while a character is unfinished.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String> {
        let mut text = String::new();
        if let Some(piece) = tokenizer.piece(id, self.skip_special) {
            self.states.resize(tokenizer.stages.len(), State::default());
            guard(|| feed(&tokenizer.stages, &mut self.states, piece, &mut text))?;
        }
        Ok(text)
    }

    /// What is left; unfinished bytes become U+FFFD. push()es and finish() joined equal `decode` of all
    /// ids. Starts a new text.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String> {
        let mut text = String::new();
        let mut states = std::mem::take(&mut self.states);
        guard(|| {
            let mut stages = tokenizer.stages.as_slice();
            let mut states = states.as_mut_slice();
            while let (Some((stage, later)), Some((state, states_later))) =
                (stages.split_first(), states.split_first_mut())
            {
                for token in stage.finish(state)? {
                    feed(later, states_later, token, &mut text)?;
                }
                (stages, states) = (later, states_later);
            }
            Ok(())
        })?;
        Ok(text)
    }
}
