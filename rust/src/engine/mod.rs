//! Requests in, tokens out. `step()` is deterministic given its inputs: no clock, no thread inside.

use crate::sample::{Logprob, Sampling};
use crate::Result;

/// Identifies a request inside one engine.
pub type RequestId = u64;

/// A Python (or test) function that may change the logits before a draw.
pub trait LogitsProcessor: Send {
    /// `ids` = prompt and answer so far; `logits` are changed in place.
    fn process(&mut self, ids: &[u32], logits: &mut [f32]) -> Result<()>;
}

/// What to generate.
pub struct Request {
    /// Token ids; not empty.
    pub prompt: Vec<u32>,
    /// At most this many tokens; `None` = the rest of the context.
    pub max_tokens: Option<usize>,
    /// End tokens and stop strings are banned before this many tokens.
    pub min_tokens: usize,
    /// How to draw.
    pub sampling: Sampling,
    /// The answer ends before the first of these.
    pub stop: Vec<String>,
    /// The answer ends at these ids (their text is not part of it).
    pub stop_token_ids: Vec<u32>,
    /// Do not end at the model's end tokens.
    pub ignore_eos: bool,
    /// Special tokens give no text.
    pub skip_special_tokens: bool,
    /// Report log-probabilities of each token, and of this many likeliest.
    pub logprobs: Option<usize>,
    /// The same for the prompt's tokens (the first has none).
    pub prompt_logprobs: Option<usize>,
    /// All logits of the prompt, f32 [n, vocab], instead of an answer.
    pub prompt_logits: bool,
    /// Called in order before each draw.
    pub processors: Vec<Box<dyn LogitsProcessor>>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum FinishReason { Stop, Length, Cancelled }

/// One token's log-probability and the likeliest ones.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct TokenLogprobs { pub token: Logprob, pub top: Vec<Logprob> }

/// What happened to a request in a step.
#[derive(Debug)]
pub enum Event {
    /// New text and ids; text may be empty while a character or stop string is open.
    Chunk {
        /// Whose.
        id: RequestId,
        /// Whole characters only.
        text: String,
        /// The new ids.
        token_ids: Vec<u32>,
        /// One for each new id if asked for.
        logprobs: Vec<TokenLogprobs>,
    },
    /// The request is over; nothing follows.
    Done {
        /// Whose.
        id: RequestId,
        /// Why.
        reason: FinishReason,
        /// The stop string or the text of the stop token that ended it.
        stop_match: Option<String>,
        /// Prompt tokens.
        prompt_tokens: usize,
        /// Prompt tokens whose keys and values were in the prefix cache.
        cached_tokens: usize,
        /// Tokens generated.
        completion_tokens: usize,
        /// For each prompt token but the first, if asked for (`None` for the first).
        prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
        /// [prompt_tokens, vocab] if asked for.
        prompt_logits: Option<Vec<f32>>,
    },
    /// The request failed.
    Failed {
        /// Whose.
        id: RequestId,
        /// Why.
        error: crate::Error,
    },
}

/// Limits of an engine.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Sequences computed at once.
    pub max_batch: usize,
    /// Requests that may wait.
    pub max_queue: usize,
    /// Prompt tokens computed in one step, all sequences together.
    pub chunk_tokens: usize,
    /// Tokens a sequence may hold, prompt and answer.
    pub context_length: usize,
    /// Bytes for keys and values.
    pub kv_bytes: u64,
    /// Keep keys and values of finished prompts for reuse.
    pub prefix_cache: bool,
}
