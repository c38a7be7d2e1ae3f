//! Decides what the next forward pass computes: which positions of which sequences, in which pages.
//! Pure bookkeeping; knows nothing of models, logits or text.
//!
//! Sequences are ordered by age (their id). The rules:
//! - Each step computes one position of every sequence that has an answer under way, and up to
//!   `chunk_tokens` positions of prompts, the oldest first.
//! - A waiting sequence starts when the batch has a place and the pages for all its tokens are
//!   available, and never before an older one that waits for pages.
//! - A waiting sequence whose next page an older one is computing waits for it and shares it.
//! - A sequence without room for its next position takes the pages of the youngest running one that
//!   is younger than itself; that one waits again and is later computed anew. If there is none, it
//!   keeps its pages and pauses.
//!
//! The oldest running sequence can have every page, and one alone fits (the engine has checked), so
//! each plan but that of an empty scheduler makes progress.

use super::RequestId;
use crate::model::PAGE;
use crate::model::kv::{Key, KvPool, PageCopy, Pages, extend_keys};

/// A sequence.
#[derive(Debug)]
pub(super) struct Slot<T> {
    pub(super) id: RequestId,
    /// Prompt and answer.
    pub(super) tokens: Vec<u32>,
    pub(super) pages: Pages,
    /// The prompt has more than [`Scheduler::long_after`] tokens.
    pub(super) long: bool,
    pub(super) running: bool,
    /// No prefix is looked up: the logits of all positions are wanted.
    pub(super) computes_all: bool,
    /// Tokens found in the prefix cache when it first ran.
    pub(super) cached: Option<usize>,
    /// What the engine keeps with it.
    pub(super) data: T,
    keys: Vec<Key>, // of the full pages of `tokens`; empty if the pool does not reuse pages
}

/// Positions `start..end` of `slots[slot]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Work {
    pub(super) slot: usize,
    pub(super) start: usize,
    pub(super) end: usize,
}

#[derive(Debug)]
pub(super) struct Scheduler<T> {
    pub(super) pool: KvPool,
    /// The oldest first.
    pub(super) slots: Vec<Slot<T>>,
    pub(super) preemptions: u64,
    /// To be done before the next forward pass.
    pub(super) copies: Vec<PageCopy>,
    /// Sequences with longer prompts share no pages with others.
    pub(super) long_after: Option<usize>,
    max_batch: usize,
    chunk_tokens: usize,
}

impl<T> Scheduler<T> {
    pub(super) fn new(pool: KvPool, max_batch: usize, chunk_tokens: usize) -> Scheduler<T> {
        Scheduler {
            pool,
            slots: Vec::new(),
            preemptions: 0,
            copies: Vec::new(),
            long_after: None,
            max_batch,
            chunk_tokens,
        }
    }

    /// Adds a sequence; ids rise.
    pub(super) fn push(&mut self, id: RequestId, tokens: Vec<u32>, computes_all: bool, data: T) {
        let mut keys = Vec::new();
        let long = self.long_after.is_some_and(|after| tokens.len() > after);
        if self.pool.reuses() {
            extend_keys(&mut keys, &tokens, long);
        }
        self.slots.push(Slot {
            id,
            tokens,
            pages: Pages::default(),
            long,
            running: false,
            computes_all,
            cached: None,
            data,
            keys,
        });
    }

    /// Takes a sequence out; its pages go back to the pool.
    pub(super) fn remove(&mut self, id: RequestId) -> Option<Slot<T>> {
        let index = self.slots.binary_search_by_key(&id, |slot| slot.id).ok()?;
        let mut slot = self.slots.remove(index);
        self.pool.keep_last(&mut slot.pages, &slot.keys, &slot.tokens, slot.long);
        self.pool.release(&mut slot.pages);
        Some(slot)
    }

    /// The work of the next forward pass, with pages for all of it; the oldest sequence first.
    /// Until it is committed it may be planned again.
    pub(super) fn plan(&mut self) -> Vec<Work> {
        let mut plan = Vec::new();
        let mut budget = self.chunk_tokens;
        let mut running = self.slots.iter().filter(|slot| slot.running).count();
        let mut starting = true;
        for i in 0..self.slots.len() {
            if !self.slots[i].running {
                if !starting || budget == 0 || running >= self.max_batch || self.awaits_prefix(i) {
                    continue;
                }
                starting = self.start(i, running == 0);
                if !starting {
                    continue;
                }
                running += 1;
            }
            let start = self.slots[i].pages.len();
            let missing = self.slots[i].tokens.len() - start;
            let count = if missing == 1 { 1 } else { missing.min(budget) };
            let end = loop {
                let end = self.pool.reserve(&mut self.slots[i].pages, start + count);
                if end > start || count == 0 || !self.preempt_after(i) {
                    break end;
                }
                running -= 1;
            };
            if end > start {
                if missing > 1 {
                    budget -= end - start;
                }
                plan.push(Work { slot: i, start, end });
            }
        }
        plan
    }

    /// The work was done.
    pub(super) fn commit(&mut self, work: &Work) {
        let slot = &mut self.slots[work.slot];
        if self.pool.reuses() {
            extend_keys(&mut slot.keys, &slot.tokens, slot.long);
        }
        self.pool.commit(&mut slot.pages, work.end, &slot.keys);
        let computed = &slot.tokens[..work.end];
        self.pool.keep_heads(work.start / PAGE, &slot.keys, computed, slot.long);
    }

    /// Tokens that a lookup may find: the last one is always computed.
    fn findable(slot: &Slot<T>) -> &[u32] {
        &slot.tokens[..if slot.computes_all { 0 } else { slot.tokens.len() - 1 }]
    }

    /// Keys of the pages that a lookup may find.
    fn prefix(slot: &Slot<T>) -> &[Key] {
        let pages = Self::findable(slot).len() / PAGE;
        &slot.keys[..pages.min(slot.keys.len())]
    }

    /// An older sequence is about to compute the first page that this one lacks.
    fn awaits_prefix(&self, i: usize) -> bool {
        let prefix = Self::prefix(&self.slots[i]);
        let found = self.pool.find(prefix);
        let Some(next) = prefix.get(found) else { return false };
        self.slots[..i].iter().any(|older| {
            older.running
                && older.pages.len() <= found * PAGE
                && older.keys.get(found) == Some(next)
        })
    }

    /// Gives a waiting sequence what the cache holds of it, if the rest has room too.
    fn start(&mut self, i: usize, alone: bool) -> bool {
        let slot = &mut self.slots[i];
        let mut pages = self.pool.adopt(Self::prefix(slot));
        if !alone && !self.pool.has_room(&pages, slot.tokens.len() + 1, self.chunk_tokens) {
            self.pool.release(&mut pages);
            return false;
        }
        let tokens = Self::findable(slot);
        self.pool.adopt_head(&mut pages, &slot.keys, tokens, slot.long, &mut self.copies);
        slot.cached.get_or_insert(pages.len());
        slot.pages = pages;
        slot.running = true;
        true
    }

    /// Takes the pages of the youngest running sequence if it is younger than `slots[i]`.
    fn preempt_after(&mut self, i: usize) -> bool {
        let Some(slot) = self.slots[i + 1..].iter_mut().rfind(|slot| slot.running) else {
            return false;
        };
        self.pool.release(&mut slot.pages);
        slot.running = false;
        self.preemptions += 1;
        true
    }
}

#[cfg(test)]
mod tests;
