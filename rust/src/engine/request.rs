//! What goes into an engine and what comes out, and the checks of both at the door.
//! Never computes anything.

use crate::sample::{Logprob, Sampling};
use crate::{Error, Result};

/// Identifies a request inside one engine.
pub type RequestId = u64;

/// A Python (or test) function that may change the logits before a draw.
pub trait LogitsProcessor: Send {
    /// `ids` = prompt and answer so far; `logits` are changed in place. They come with penalties,
    /// bias and bans applied, and what is left here is what is drawn from.
    fn process(&mut self, ids: &[u32], logits: &mut [f32]) -> Result<()>;
}

/// What to generate.
pub struct Request {
    /// Token ids; not empty.
    pub prompt: Vec<u32>,
    /// At most this many tokens; `None` = the rest of the engine's context. 0 only with `prompt_logprobs` or
    /// `prompt_logits`: the prompt is scored and nothing is generated.
    pub max_tokens: Option<usize>,
    /// End tokens are banned before this many tokens, and stop strings that are complete before that
    /// do not count.
    pub min_tokens: usize,
    /// How to draw.
    pub sampling: Sampling,
    /// The answer ends before the one that is complete first (of several, the longest).
    pub stop: Vec<String>,
    /// The answer ends at these ids. As the model's end tokens, they are among the answer's ids, but
    /// their text is not part of it.
    pub stop_token_ids: Vec<u32>,
    /// Do not end at the model's end tokens.
    pub ignore_eos: bool,
    /// Special tokens give no text.
    pub skip_special_tokens: bool,
    /// Report log-probabilities of each token, and of this many likeliest, under the model's own
    /// logits: before penalties, bias, bans, processors and temperature.
    pub logprobs: Option<usize>,
    /// The same for the prompt's tokens (the first has none). Turns prefix lookup off.
    pub prompt_logprobs: Option<usize>,
    /// All logits of the prompt, f32 [n, vocab]. Turns prefix lookup off.
    pub prompt_logits: bool,
    /// Called in order before each draw.
    pub processors: Vec<Box<dyn LogitsProcessor>>,
}

impl Request {
    /// A request with the defaults of every other field.
    pub fn new(prompt: Vec<u32>) -> Request {
        Request {
            prompt,
            max_tokens: None,
            min_tokens: 0,
            sampling: Sampling::default(),
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            skip_special_tokens: true,
            logprobs: None,
            prompt_logprobs: None,
            prompt_logits: false,
            processors: Vec::new(),
        }
    }

    pub(super) fn check(&self, vocab: usize, context_length: usize) -> Result<()> {
        let prompt_tokens = self.prompt.len();
        if prompt_tokens == 0 {
            return Err(Error::parameter("prompt", "no tokens", "at least one token"));
        }
        check_ids("prompt", &self.prompt, vocab)?;
        check_ids("stop_token_ids", &self.stop_token_ids, vocab)?;
        let max_tokens = self.max_tokens;
        if max_tokens.unwrap_or(1).saturating_add(prompt_tokens) > context_length {
            return Err(Error::ContextLength { prompt_tokens, max_tokens, context_length });
        }
        let scores = self.prompt_logits || self.prompt_logprobs.is_some();
        if max_tokens == Some(0) && !scores {
            return Err(Error::parameter(
                "max_tokens",
                0,
                "at least 1 unless prompt_logprobs or prompt_logits are asked for",
            ));
        }
        let most = max_tokens.unwrap_or(context_length - prompt_tokens);
        if self.min_tokens > most {
            let expected = format!("at most {most}, the tokens that the answer may have");
            return Err(Error::parameter("min_tokens", self.min_tokens, expected));
        }
        if let Some(i) = self.stop.iter().position(String::is_empty) {
            return Err(Error::parameter("stop", format!("an empty string at {i}"), "some text"));
        }
        let counts = [("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)];
        for (field, count) in counts {
            if let Some(count) = count.filter(|&count| count > vocab) {
                return Err(Error::parameter(
                    field,
                    count,
                    format!("at most {vocab} (the vocabulary)"),
                ));
            }
        }
        self.sampling.check(vocab)
    }
}

fn check_ids(field: &'static str, ids: &[u32], vocab: usize) -> Result<()> {
    match ids.iter().position(|&id| id as usize >= vocab) {
        Some(i) => Err(Error::parameter(
            field,
            format!("id {} at index {i}", ids[i]),
            format!("ids below {vocab} (the vocabulary)"),
        )),
        None => Ok(()),
    }
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// At an end token, a stop token or a stop string.
    Stop,
    /// At `max_tokens` or the end of the context.
    Length,
    /// By `cancel`.
    Cancelled,
}

/// One token's log-probability and the likeliest ones.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// Of the token itself.
    pub token: Logprob,
    /// As many as were asked for, the likeliest first.
    pub top: Vec<Logprob>,
}

/// What happened to a request in a step.
#[derive(Debug)]
pub enum Event {
    /// New text and ids; text may be empty while a character or stop string is open, ids when a
    /// cancelled request's held text comes out. All texts joined are the answer.
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
        /// The stop string that ended it, or the text of the token of `stop_token_ids` that did;
        /// `None` at the model's own end tokens.
        stop_match: Option<String>,
        /// Prompt tokens.
        prompt_tokens: usize,
        /// Prompt tokens whose keys and values were in the prefix cache.
        cached_tokens: usize,
        /// Tokens generated.
        completion_tokens: usize,
        /// One for each prompt token if asked for (`None` for the first); fewer if cancelled.
        prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
        /// [prompt_tokens, vocab] if asked for; fewer rows if cancelled.
        prompt_logits: Option<Vec<f32>>,
    },
    /// The request failed; nothing follows.
    Failed {
        /// Whose.
        id: RequestId,
        /// Why.
        error: Error,
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
    /// Bytes for keys and values; no more are taken than `max_batch` full contexts need.
    pub kv_bytes: u64,
    /// Keep keys and values of full pages for later requests that begin with the same tokens.
    pub prefix_cache: bool,
}

impl EngineConfig {
    pub(super) fn check(&self, model_context: usize) -> Result<()> {
        let fields = [
            ("max_batch", self.max_batch),
            ("chunk_tokens", self.chunk_tokens),
            ("context_length", self.context_length),
        ];
        for (field, value) in fields {
            if value == 0 {
                return Err(Error::parameter(field, value, "at least 1"));
            }
        }
        if self.context_length > model_context {
            let expected = format!("at most {model_context}, the model's context");
            return Err(Error::parameter("context_length", self.context_length, expected));
        }
        Ok(())
    }
}
