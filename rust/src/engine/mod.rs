//! Requests in, tokens out: continuous batching over one model.
//! `step()` is deterministic given its inputs: no clock, no thread inside.
//!
//! What a request gets depends on the request alone: never on who else runs, how its prompt was cut
//! into chunks, whether it was preempted, or what was in the prefix cache. `tests/engine/` holds
//! the engine to that.

mod answer;
mod request;
mod scheduler;
mod text;

pub use request::{
    EngineConfig, Event, FinishReason, LogitsProcessor, Request, RequestId, TokenLogprobs,
};

use crate::model::kv::{self, KvPool, PageCount};
use crate::model::{Chunk, Draw, Drawn, Forward, KvGroup, Wanted};
use crate::sample::Scratch;
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};
use answer::{Answer, End};
use scheduler::{Scheduler, Slot, Work};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What an engine is busy with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineStats {
    /// Requests that have pages.
    pub running: usize,
    /// Requests that wait for their first pages, or for new ones after they were preempted.
    pub waiting: usize,
    /// Pages of each group of layers.
    pub pages: Vec<PageCount>,
    /// How often a sequence had to give its pages to an older one.
    pub preemptions: u64,
}

/// A model, its KV cache and the requests on it.
pub struct Engine<M: Forward> {
    model: Arc<M>,
    tokenizer: Arc<Tokenizer>,
    eos: Vec<u32>,
    config: EngineConfig,
    groups: Vec<KvGroup>,
    kv: M::Kv,
    scheduler: Scheduler<Answer>,
    scratch: Scratch,
    next_id: RequestId,
    interrupt: Arc<AtomicBool>,
    pending: Vec<Event>, // of cancelled requests, for the next step
}

impl<M: Forward> Engine<M> {
    /// An idle engine; `eos` are the ids at which an answer ends.
    pub fn new(
        model: Arc<M>,
        tokenizer: Arc<Tokenizer>,
        eos: Vec<u32>,
        mut config: EngineConfig,
    ) -> Result<Self> {
        config.check(model.context_length())?;
        if let Some(&id) = eos.iter().find(|&&id| id as usize >= model.vocab()) {
            return Err(Error::parameter("eos", id, format!("an id below {}", model.vocab())));
        }
        config.chunk_tokens = config.chunk_tokens.min(config.context_length);
        let (context, chunk) = (config.context_length, config.chunk_tokens);
        let groups = model.kv_groups();
        let pages = kv::divide(&groups, config.kv_bytes, context, chunk, config.max_batch - 1)
            .ok_or_else(|| Error::OutOfMemory {
                what: "keys and values of one page of tokens (kv_bytes)".into(),
                requested: kv::bytes_for(&groups, 1, chunk),
                available: config.kv_bytes,
            })?;
        let kv = model.new_kv(&pages)?;
        let pool = KvPool::new(&groups, &pages, config.prefix_cache);
        let mut scheduler = Scheduler::new(pool, config.max_batch, chunk);
        scheduler.long_after = model.long_after();
        Ok(Engine {
            model,
            tokenizer,
            eos,
            config,
            groups,
            kv,
            scheduler,
            scratch: Scratch::default(),
            next_id: 0,
            interrupt: Arc::default(),
            pending: Vec::new(),
        })
    }

    /// Tokens a sequence may hold: as configured, or fewer where the KV cache holds no more.
    pub fn context_length(&self) -> usize {
        self.config.context_length.min(self.scheduler.pool.capacity())
    }

    /// Takes a request after all checks; what it says comes out of later steps.
    pub fn submit(&mut self, request: Request) -> Result<RequestId> {
        let (present, limit) = (self.scheduler.slots.len(), self.config.max_queue);
        if present >= self.config.max_batch.saturating_add(limit) {
            return Err(Error::QueueFull { queued: present - self.config.max_batch, limit });
        }
        request.check(self.model.vocab(), self.config.context_length)?;
        let least = request.max_tokens.unwrap_or(request.min_tokens.max(1));
        let tokens = request.prompt.len() + least;
        let context = self.context_length();
        if tokens > context {
            let pages = self.scheduler.pool.counts().into_iter().zip(&self.groups);
            return Err(Error::OutOfMemory {
                what: format!(
                    "keys and values of {tokens} tokens (prompt {} + answer), the cache holds \
                     {context}: give a larger kv_bytes or a smaller max_tokens",
                    request.prompt.len()
                ),
                requested: kv::bytes_for(&self.groups, tokens, self.config.chunk_tokens),
                available: pages.map(|(n, g)| n.total as u64 * g.page_bytes as u64).sum(),
            });
        }
        let id = self.next_id;
        self.next_id += 1;
        let (prompt, answer) = Answer::new(id, request, context, &self.eos, self.model.vocab())?;
        self.scheduler.push(id, prompt, answer.scores_prompt(), answer);
        Ok(id)
    }

    /// Ends a request and frees its pages; the next step says `Done` with `Cancelled`.
    /// False: there is no such request any more.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        let Some(mut slot) = self.scheduler.remove(id) else { return false };
        let end = slot.data.cancel(&self.tokenizer, &mut self.pending);
        self.pending.push(over(slot, end));
        true
    }

    /// Setting it makes a running `step` return within about one layer, with nothing lost: what
    /// that step computed is computed again by the next. To cancel from another thread, first leave
    /// a message for the thread that drives the engine, then set this; it is cleared here.
    pub fn interrupt(&self) -> Arc<AtomicBool> {
        self.interrupt.clone()
    }

    /// Nothing to do and nothing to say.
    pub fn is_idle(&self) -> bool {
        self.scheduler.slots.is_empty() && self.pending.is_empty()
    }

    /// Whether a request waits for pages: its own first ones, or new ones after a preemption.
    pub fn is_waiting(&self, id: RequestId) -> bool {
        self.scheduler.slots.iter().any(|slot| slot.id == id && !slot.running)
    }

    /// What it is busy with.
    pub fn stats(&self) -> EngineStats {
        let running = self.scheduler.slots.iter().filter(|slot| slot.running).count();
        EngineStats {
            running,
            waiting: self.scheduler.slots.len() - running,
            pages: self.scheduler.pool.counts(),
            preemptions: self.scheduler.preemptions,
        }
    }

    /// One forward pass over a batch: a token of each answer, and chunks of prompts.
    pub fn step(&mut self) -> Vec<Event> {
        let mut events = std::mem::take(&mut self.pending);
        let plan = self.scheduler.plan();
        let copies = std::mem::take(&mut self.scheduler.copies);
        self.model.copy_pages(&mut self.kv, &copies);
        if plan.is_empty() {
            return events;
        }
        let slots = &self.scheduler.slots;
        let chunk = |work: &Work| {
            let slot = &slots[work.slot];
            let wanted = match work.end == slot.tokens.len() {
                _ if slot.data.scores_prompt() => Wanted::All,
                true => Wanted::Last,
                false => Wanted::None,
            };
            let (tokens, start) = (&slot.tokens[work.start..work.end], work.start);
            Chunk { tokens, start, long: slot.long, pages: slot.pages.tables(), wanted }
        };
        let batch: Vec<Chunk<'_>> = plan.iter().map(chunk).collect();
        let rows = |chunk: &Chunk<'_>| match chunk.wanted {
            Wanted::None => 0,
            Wanted::Last => 1,
            Wanted::All => chunk.tokens.len(),
        };
        let rows: Vec<usize> = batch.iter().map(rows).collect();
        // A row for each that ends at its last token; where all of them are only drawn from, the model does it.
        let wants = batch.iter().zip(&plan).filter(|(chunk, _)| chunk.wanted != Wanted::None);
        let scratch = &mut self.scratch;
        let draws: Option<Vec<Draw<'_>>> = wants
            .map(|(_, work)| slots[work.slot].data.drawn(&slots[work.slot].tokens, scratch))
            .collect();
        let computed = match draws.filter(|draws| !draws.is_empty()) {
            Some(draws) => self
                .model
                .forward_and_draw(&mut self.kv, &batch, &draws, &self.interrupt)
                .map(|drawn| (Vec::new(), drawn)),
            None => self
                .model
                .forward(&mut self.kv, &batch, &self.interrupt)
                .map(|logits| (logits, Vec::new())),
        };
        let (mut logits, drawn) = match computed {
            Ok(computed) => computed,
            Err(Error::Interrupted) => {
                self.interrupt.store(false, Ordering::SeqCst);
                return events;
            }
            Err(error) => {
                let ids: Vec<_> = plan.iter().map(|work| slots[work.slot].id).collect();
                for id in ids {
                    self.scheduler.remove(id);
                    events.push(Event::Failed { id, error: same(&error) });
                }
                return events;
            }
        };
        let mut rest = logits.as_mut_slice();
        let mut drawn = drawn.into_iter();
        let mut ended = Vec::new();
        for (work, rows) in plan.iter().zip(rows) {
            let drawn = (rows > 0).then(|| drawn.next()).flatten();
            let here = if drawn.is_none() { rows * self.model.vocab() } else { 0 };
            let (mine, others) = rest.split_at_mut(here);
            rest = others;
            self.scheduler.commit(work);
            let slot = &mut self.scheduler.slots[work.slot];
            let (tokens, tokenizer) = (&mut slot.tokens, &*self.tokenizer);
            let mut look = |logits: &mut [f32]| {
                let positions = work.start..work.end;
                let scratch = &mut self.scratch;
                slot.data.advance(tokens, positions, logits, tokenizer, scratch, &mut events)
            };
            let result = match drawn {
                None => look(mine),
                Some(Drawn::Logits(mut logits)) => look(&mut logits),
                Some(Drawn::Token(token)) => {
                    slot.data.push(tokens, token, Vec::new(), tokenizer, &mut events)
                }
            };
            match result {
                Ok(None) => {}
                Ok(Some(end)) => ended.push((slot.id, Ok(end))),
                Err(error) => ended.push((slot.id, Err(error))),
            }
        }
        for (id, end) in ended {
            events.extend(self.scheduler.remove(id).map(|slot| over(slot, end)));
        }
        events
    }
}

/// The last event of a request.
fn over(slot: Slot<Answer>, end: Result<End>) -> Event {
    let cached = slot.cached.unwrap_or(0);
    match end {
        Ok(end) => slot.data.done(end, slot.tokens.len(), cached),
        Err(error) => Event::Failed { id: slot.id, error },
    }
}

/// The error of a batch, once for each of its sequences.
fn same(error: &Error) -> Error {
    match error {
        Error::OutOfMemory { what, requested, available } => {
            Error::OutOfMemory { what: what.clone(), requested: *requested, available: *available }
        }
        Error::Device(what) => Error::Device(what.clone()),
        other => Error::Unsupported(format!("the forward pass failed: {other}")),
    }
}
