//! Text <-> token ids, exactly as Hugging Face `tokenizers` does; streaming decode.

use crate::Result;
use std::path::Path;

/// A tokenizer with the special ids its model folder names.
pub struct Tokenizer {}

impl Tokenizer {
    /// Reads tokenizer.json (and tokenizer_config.json, special_tokens_map.json) in `folder`.
    pub fn open(_folder: &Path) -> Result<Tokenizer> { todo!() }
    /// Ids of `text`. `add_special`: what the post-processor adds (BOS), never twice.
    /// `parse_special`: special tokens written in the text become their ids; else they are plain text.
    pub fn encode(&self, _text: &str, _add_special: bool, _parse_special: bool) -> Result<Vec<u32>> { todo!() }
    /// Text of `ids`; invalid UTF-8 becomes U+FFFD; an id outside the vocabulary is skipped if it is
    /// padding (below the model's vocab size), else an error.
    pub fn decode(&self, _ids: &[u32], _skip_special: bool) -> Result<String> { todo!() }
    /// Number of ids, special ones included.
    pub fn vocab_size(&self) -> usize { todo!() }
    /// The id of a token's exact text, special or not.
    pub fn id(&self, _token: &str) -> Option<u32> { todo!() }
    /// The text of one id as the vocabulary spells it.
    pub fn token(&self, _id: u32) -> Option<String> { todo!() }
    /// Whether `id` is a special token.
    pub fn is_special(&self, _id: u32) -> bool { todo!() }
    /// BOS id and text if the tokenizer has one.
    pub fn bos(&self) -> Option<(u32, &str)> { todo!() }
    /// EOS id and text if the tokenizer has one.
    pub fn eos(&self) -> Option<(u32, &str)> { todo!() }
}

/// Decodes ids one by one; what it has given always is a prefix of the whole text.
pub struct Decoder {}

impl Decoder {
    /// `skip_special`: special tokens give no text.
    pub fn new(_skip_special: bool) -> Decoder { Decoder {} }
    /// The text that `id` completes; empty while a character is unfinished.
    pub fn push(&mut self, _tokenizer: &Tokenizer, _id: u32) -> Result<String> { todo!() }
    /// What is left; unfinished bytes become U+FFFD. push()es and finish() joined equal `decode` of all ids.
    pub fn finish(&mut self, _tokenizer: &Tokenizer) -> Result<String> { todo!() }
}
