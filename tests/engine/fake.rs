//! A model for tests of the engine: cheap, deterministic, and as sensitive as a real one to what is
//! in which page.
//!
//! Its "keys and values" of a position are a hash of the token and of all values that the position
//! sees, read through the page table; its logits are a hash of the position's values. So they depend
//! on every token before (in a group with a window through the values inside it), and any page that
//! is wrong, stale, shared by mistake or freed too early changes them. In a group of states the value
//! is a hash of the token and the value before it, which is all that is kept.

use ferrule::model::kv::PageCopy;
use ferrule::model::{Chunk, Forward, KvGroup, NO_PAGE, PAGE, Sees, Wanted};
use ferrule::{Error, Result};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

pub(crate) const VOCAB: usize = 400;
/// The logits after this token are NaN; it is never drawn.
pub(crate) const NAN_TOKEN: u32 = 399;
pub(crate) const PAGE_BYTES: usize = 1000;

/// What a forward pass does instead of its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    Interrupted,
    Error,
}

pub(crate) struct Fake {
    pub(crate) sees: Vec<Sees>,
    pub(crate) context: usize,
    pub(crate) long_after: Option<usize>,
    /// (call, trouble): what goes wrong at which forward pass.
    pub(crate) trouble: Vec<(usize, Trouble)>,
    /// Sizes of the chunks of each call.
    pub(crate) calls: Mutex<Vec<Vec<usize>>>,
}

impl Fake {
    pub(crate) fn new(sees: &[Sees], context: usize) -> Fake {
        let sees = sees.to_vec();
        Fake { sees, context, long_after: None, trouble: Vec::new(), calls: Mutex::default() }
    }
}

fn mix(a: u64, b: u64) -> u64 {
    let x = (a ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ (x >> 29)
}

/// Values in pages: [group][page][position % PAGE].
pub(crate) struct Memory(Vec<Vec<[u64; PAGE]>>);

impl Forward for Fake {
    type Kv = Memory;

    fn vocab(&self) -> usize {
        VOCAB
    }

    fn context_length(&self) -> usize {
        self.context
    }

    fn long_after(&self) -> Option<usize> {
        self.long_after
    }

    fn kv_groups(&self) -> Vec<KvGroup> {
        self.sees.iter().map(|&sees| KvGroup { sees, page_bytes: PAGE_BYTES }).collect()
    }

    fn new_kv(&self, pages: &[usize]) -> Result<Memory> {
        Ok(Memory(pages.iter().map(|&n| vec![[u64::MAX; PAGE]; n]).collect()))
    }

    fn copy_pages(&self, kv: &mut Memory, copies: &[PageCopy]) {
        for copy in copies {
            kv.0[copy.group][copy.to as usize] = kv.0[copy.group][copy.from as usize];
        }
    }

    fn forward(
        &self,
        kv: &mut Memory,
        batch: &[Chunk<'_>],
        interrupt: &AtomicBool,
    ) -> Result<Vec<f32>> {
        let mut calls = self.calls.lock().unwrap();
        let trouble = self.trouble.iter().find(|(call, _)| *call == calls.len()).map(|(_, t)| *t);
        calls.push(batch.iter().map(|chunk| chunk.tokens.len()).collect());
        assert!(!batch.is_empty() && batch.iter().all(|chunk| !chunk.tokens.is_empty()));
        self.check_tables(batch);
        let interrupted = interrupt.load(Ordering::SeqCst) || trouble == Some(Trouble::Interrupted);
        let mut logits = Vec::new();
        for chunk in batch {
            for (i, &token) in chunk.tokens.iter().enumerate() {
                assert!((token as usize) < VOCAB);
                let position = chunk.start + i;
                let mut state = 0;
                for (g, pages) in chunk.pages.iter().enumerate() {
                    let mut value = mix(g as u64, u64::from(token));
                    if chunk.long || self.long_after.is_some_and(|after| position >= after) {
                        value = mix(value, 1);
                    }
                    let first = match self.sees[g] {
                        Sees::All => 0,
                        Sees::Window(w) => (position + 1).saturating_sub(w),
                        Sees::State => {
                            if position > 0 {
                                let read = if i == 0 { pages[0] } else { pages[1] };
                                value = mix(value, kv.0[g][read as usize][0]);
                            }
                            position
                        }
                    };
                    for p in first..position {
                        value = mix(value, kv.0[g][pages[p / PAGE] as usize][p % PAGE]);
                    }
                    if interrupted {
                        value = 13; // undefined
                    }
                    let at = match self.sees[g] {
                        Sees::State => (pages[1], 0),
                        _ => (pages[position / PAGE], position % PAGE),
                    };
                    kv.0[g][at.0 as usize][at.1] = value;
                    state = mix(state, value);
                }
                let wanted = match chunk.wanted {
                    Wanted::None => false,
                    Wanted::Last => i + 1 == chunk.tokens.len(),
                    Wanted::All => true,
                };
                if wanted {
                    let logit = |id| match (token, id as u32) {
                        (NAN_TOKEN, _) => f32::NAN,
                        (_, NAN_TOKEN) => f32::NEG_INFINITY,
                        _ => (mix(state, id) >> 40) as f32 * (8.0 / (1 << 24) as f32) - 4.0,
                    };
                    logits.extend((0..VOCAB as u64).map(logit));
                }
            }
        }
        if interrupted {
            return Err(Error::Interrupted);
        }
        match trouble {
            Some(_) => Err(Error::Unsupported("the fake broke".into())),
            None => Ok(logits),
        }
    }
}

impl Fake {
    /// A page that one chunk writes is in no other chunk's table, and not the state that it reads.
    fn check_tables(&self, batch: &[Chunk<'_>]) {
        for (a, chunk) in batch.iter().enumerate() {
            let end = chunk.start + chunk.tokens.len();
            for (g, pages) in chunk.pages.iter().enumerate() {
                let written = match self.sees[g] {
                    Sees::State => {
                        assert!(pages.len() == 2 && pages[0] != pages[1]);
                        assert_eq!(pages[0] == NO_PAGE, chunk.start == 0);
                        1..2
                    }
                    _ => chunk.start / PAGE..end.div_ceil(PAGE),
                };
                for written in &pages[written] {
                    assert_ne!(*written, NO_PAGE);
                    for (b, other) in batch.iter().enumerate() {
                        assert!(a == b || !other.pages[g].contains(written), "page {written}");
                    }
                }
            }
        }
    }
}
