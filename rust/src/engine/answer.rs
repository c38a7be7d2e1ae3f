//! One request's answer: logits in, tokens and text out, until a reason to end.
//! Knows nothing of batches or pages, so nothing here can depend on them.

use super::text::{Piece, Text};
use super::{Event, FinishReason, Request, RequestId, TokenLogprobs};
use crate::model::Draw;
use crate::sample::{self, Scratch};
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};
use std::ops::Range;

/// Why an answer is over.
#[derive(Debug)]
pub(super) struct End {
    reason: FinishReason,
    stop_match: Option<String>,
}

pub(super) struct Answer {
    id: RequestId,
    request: Request, // without the prompt
    prompt_tokens: usize,
    vocab: usize,
    limit: usize,   // tokens the answer may have
    ends: Vec<u32>, // ids that end it
    text: Text,
    scored: usize, // prompt positions whose logits are dealt with
    prompt_logprobs: Vec<Option<TokenLogprobs>>,
    prompt_logits: Vec<f32>, // [scored, vocab]
}

impl Answer {
    /// The prompt and its answer; `context`: tokens that both may have together.
    pub(super) fn new(
        id: RequestId,
        mut request: Request,
        context: usize,
        eos: &[u32],
        vocab: usize,
    ) -> Result<(Vec<u32>, Answer)> {
        let prompt = std::mem::take(&mut request.prompt);
        let mut ends = request.stop_token_ids.clone();
        if !request.ignore_eos {
            ends.extend_from_slice(eos);
        }
        let mut prompt_logits = Vec::new();
        if request.prompt_logits {
            let floats = prompt.len().saturating_mul(vocab);
            prompt_logits.try_reserve_exact(floats).map_err(|_| Error::OutOfMemory {
                what: format!("logits of {} prompt tokens", prompt.len()),
                requested: floats as u64 * 4,
                available: 0,
            })?;
        }
        let answer = Answer {
            id,
            prompt_tokens: prompt.len(),
            vocab,
            limit: request.max_tokens.unwrap_or(context - prompt.len()),
            ends,
            text: Text::new(request.skip_special_tokens, std::mem::take(&mut request.stop)),
            scored: 0,
            prompt_logprobs: Vec::new(),
            prompt_logits,
            request,
        };
        Ok((prompt, answer))
    }

    /// The logits of prompt positions are still wanted.
    pub(super) fn scores_prompt(&self) -> bool {
        (self.request.prompt_logits || self.request.prompt_logprobs.is_some())
            && self.scored < self.prompt_tokens
    }

    /// How the token after `tokens` is drawn, if it may be drawn where the logits are: if nothing else looks at them.
    pub(super) fn drawn(&self, tokens: &[u32], scratch: &mut Scratch) -> Option<Draw<'_>> {
        let request = &self.request;
        let answered = tokens.len().checked_sub(self.prompt_tokens)?;
        let seen = self.scores_prompt()
            || request.logprobs.is_some()
            || !request.processors.is_empty()
            || self.limit == 0;
        if seen {
            return None;
        }
        let sampling = &request.sampling;
        let coin = sample::coin(sampling.seed, answered as u64);
        let (prompt, answer) = tokens.split_at(self.prompt_tokens);
        let banned = self.banned(answered);
        let edits = sample::edits(sampling, self.vocab, prompt, answer, banned, scratch);
        Some(Draw { edits, sampling, coin })
    }

    /// What must not come after so many tokens.
    fn banned(&self, answered: usize) -> &[u32] {
        if answered < self.request.min_tokens { &self.ends } else { &[] }
    }

    /// Adds a token that was drawn.
    pub(super) fn push(
        &mut self,
        tokens: &mut Vec<u32>,
        token: u32,
        logprobs: Vec<TokenLogprobs>,
        tokenizer: &Tokenizer,
        events: &mut Vec<Event>,
    ) -> Result<Option<End>> {
        tokens.push(token);
        let (text, end) = self.extend(token, tokens.len() - self.prompt_tokens, tokenizer)?;
        events.push(Event::Chunk { id: self.id, text, token_ids: vec![token], logprobs });
        Ok(end)
    }

    /// Takes the logits of computed `positions`: of all of them while `scores_prompt`, else of the
    /// last, or none if more of `tokens` is to be computed. Draws the next token if all is.
    pub(super) fn advance(
        &mut self,
        tokens: &mut Vec<u32>,
        positions: Range<usize>,
        logits: &mut [f32],
        tokenizer: &Tokenizer,
        scratch: &mut Scratch,
        events: &mut Vec<Event>,
    ) -> Result<Option<End>> {
        if self.scores_prompt() {
            self.score(tokens, positions.start, logits)?;
        }
        if positions.end < tokens.len() {
            return Ok(None);
        }
        if self.limit == 0 {
            return Ok(Some(End { reason: FinishReason::Length, stop_match: None }));
        }
        let last = logits.len() - self.vocab;
        let (token, logprobs) = self.draw(tokens, &mut logits[last..], scratch)?;
        self.push(tokens, token, logprobs.into_iter().collect(), tokenizer, events)
    }

    /// Gives out the text held back.
    pub(super) fn cancel(&mut self, tokenizer: &Tokenizer, events: &mut Vec<Event>) -> Result<End> {
        let Piece { text, stop } = self.text.finish(tokenizer)?;
        if !text.is_empty() {
            let (token_ids, logprobs) = (Vec::new(), Vec::new());
            events.push(Event::Chunk { id: self.id, text, token_ids, logprobs });
        }
        Ok(End { reason: FinishReason::Cancelled, stop_match: stop })
    }

    /// The event that ends a request with so many tokens in all.
    pub(super) fn done(self, end: End, tokens: usize, cached: usize) -> Event {
        Event::Done {
            id: self.id,
            reason: end.reason,
            stop_match: end.stop_match,
            prompt_tokens: self.prompt_tokens,
            cached_tokens: cached,
            completion_tokens: tokens - self.prompt_tokens,
            prompt_logprobs: self.request.prompt_logprobs.map(|_| self.prompt_logprobs),
            prompt_logits: self.request.prompt_logits.then_some(self.prompt_logits),
        }
    }

    /// `logits` of the positions from `start` on. A preempted prompt may come a second time.
    fn score(&mut self, prompt: &[u32], start: usize, logits: &[f32]) -> Result<()> {
        let rows = logits.chunks_exact(self.vocab).enumerate();
        for (position, row) in rows.map(|(i, row)| (start + i, row)) {
            if position < self.scored {
                continue;
            }
            check_finite(row, position)?;
            if self.request.prompt_logits {
                self.prompt_logits.extend_from_slice(row);
            }
            if let Some(count) = self.request.prompt_logprobs {
                if position == 0 {
                    self.prompt_logprobs.push(None);
                }
                if let Some(&next) = prompt.get(position + 1) {
                    let (token, top) = sample::logprobs(row, next, count);
                    self.prompt_logprobs.push(Some(TokenLogprobs { token, top }));
                }
            }
            self.scored += 1;
        }
        Ok(())
    }

    /// The token after `tokens`, whose last has these logits.
    fn draw(
        &mut self,
        tokens: &[u32],
        logits: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<(u32, Option<TokenLogprobs>)> {
        check_finite(logits, tokens.len() - 1)?;
        let raw = self.request.logprobs.map(|count| (logits.to_vec(), count));
        let (prompt, answer) = tokens.split_at(self.prompt_tokens);
        let sampling = &self.request.sampling;
        sample::adjust(sampling, logits, prompt, answer, self.banned(answer.len()), scratch);
        for processor in &mut self.request.processors {
            processor.process(tokens, logits)?;
        }
        let processed = !self.request.processors.is_empty();
        if processed && let Some(id) = logits.iter().position(|x| x.is_nan()) {
            return Err(Error::Processor(format!(
                "the logits processors left NaN for id {id} of token {} of the answer",
                answer.len()
            )));
        }
        let coin = sample::coin(sampling.seed, answer.len() as u64);
        let token = sample::draw(sampling, logits, coin, scratch)?;
        let logprobs = raw.map(|(raw, count)| {
            let (token, top) = sample::logprobs(&raw, token, count);
            TokenLogprobs { token, top }
        });
        Ok((token, logprobs))
    }

    /// The text that `token`, the `count`th of the answer, adds, and whether it was the last.
    fn extend(
        &mut self,
        token: u32,
        count: usize,
        tokenizer: &Tokenizer,
    ) -> Result<(String, Option<End>)> {
        let ends = self.ends.contains(&token);
        let mut piece = Piece::default();
        if !ends {
            piece = self.text.push(tokenizer, token, count >= self.request.min_tokens)?;
        }
        if piece.stop.is_none() && (ends || count == self.limit) {
            let rest = self.text.finish(tokenizer)?;
            piece.text.push_str(&rest.text);
            piece.stop = rest.stop;
        }
        let Piece { text, stop } = piece;
        let reason = match stop.is_some() || ends {
            true => FinishReason::Stop,
            false if count == self.limit => FinishReason::Length,
            false => return Ok((text, None)),
        };
        let named = self.request.stop_token_ids.contains(&token);
        let stop_match = stop.or_else(|| named.then(|| tokenizer.token(token)).flatten());
        Ok((text, Some(End { reason, stop_match })))
    }
}

/// A model's logits are numbers.
fn check_finite(logits: &[f32], position: usize) -> Result<()> {
    if sample::are_numbers(logits) {
        return Ok(());
    }
    match logits.iter().position(|x| x.is_nan() || *x == f32::INFINITY) {
        Some(id) => Err(Error::Numeric(format!(
            "the logits after the token at position {position}: found {} for id {id}, expected a \
             number; the weights are damaged or their numbers leave the range of the arithmetic",
            logits[id]
        ))),
        None => Ok(()),
    }
}
