//! A model: architecture as data (`spec`), weights, the one forward pass, the paged KV cache.

pub mod kv;
pub mod spec;

use crate::Result;
use std::sync::atomic::AtomicBool;

/// Positions a KV page holds.
pub const PAGE: usize = 64;

/// Stands in a page table where a page was freed because no later position sees it.
pub const NO_PAGE: u32 = u32::MAX;

/// Layers that share a page table because they see the same positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvGroup {
    /// Position p sees the keys of positions p - window + 1 ..= p; `None` = all up to p.
    pub window: Option<usize>,
    /// Bytes of one page, all layers of the group together.
    pub page_bytes: usize,
}

/// Consecutive positions of one sequence in a batch.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// Their token ids; not empty.
    pub tokens: &'a [u32],
    /// Position of `tokens[0]`.
    pub start: usize,
    /// For each group: page ids of positions 64*i .. 64*i + 64, `NO_PAGE` where freed.
    pub pages: &'a [Vec<u32>],
    /// Which logits are asked for.
    pub wanted: Wanted,
}

/// The positions of a chunk whose logits are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// None: their keys and values are enough.
    None,
    /// Those of the last position.
    Last,
    /// Those of every position.
    All,
}

/// What the engine asks of a model.
pub trait Forward {
    /// Memory for keys and values.
    type Kv;
    /// Width of a row of logits.
    fn vocab(&self) -> usize;
    /// Positions the model was made for.
    fn context_length(&self) -> usize;
    /// Its page tables.
    fn kv_groups(&self) -> Vec<KvGroup>;
    /// Memory for this many pages of each group.
    fn new_kv(&self, pages: &[usize]) -> Result<Self::Kv>;
    /// Runs every chunk; the logits of the wanted rows, f32 [rows, vocab], in order. Looks at
    /// `interrupt` between layers: `Error::Interrupted` leaves the chunks' positions undefined.
    fn forward(
        &self,
        kv: &mut Self::Kv,
        batch: &[Chunk<'_>],
        interrupt: &AtomicBool,
    ) -> Result<Vec<f32>>;
}
