//! One sequence after the other through a model, without an engine: for evaluation and calibration.

use super::{Chunk, Forward, NO_PAGE, PAGE, Sees, Wanted};
use crate::Result;
use std::sync::atomic::AtomicBool;

/// A model with room for one sequence.
pub struct Sequence<'a, M: Forward> {
    model: &'a M,
    kv: M::Kv,
    tables: Vec<Vec<u32>>,
    len: usize,
    long: bool,
}

impl<'a, M: Forward> Sequence<'a, M> {
    /// Room for `longest` tokens.
    pub fn new(model: &'a M, longest: usize) -> Result<Sequence<'a, M>> {
        let groups = model.kv_groups();
        let pages = |sees: Sees| if sees == Sees::State { 2 } else { longest.div_ceil(PAGE) };
        let pages: Vec<usize> = groups.iter().map(|group| pages(group.sees)).collect();
        let tables = pages.iter().map(|&n| (0..n as u32).collect()).collect();
        Ok(Sequence { kv: model.new_kv(&pages)?, tables, model, len: 0, long: false })
    }

    /// A new sequence, of `len` tokens in all.
    pub fn restart(&mut self, len: usize) {
        self.len = 0;
        self.long = self.model.long_after().is_some_and(|after| len > after);
        for (table, group) in self.tables.iter_mut().zip(self.model.kv_groups()) {
            if group.sees == Sees::State {
                *table = vec![NO_PAGE, 0];
            }
        }
    }

    /// Reads the next tokens; the logits wanted.
    pub fn read(
        &mut self,
        tokens: &[u32],
        wanted: Wanted,
        interrupt: &AtomicBool,
    ) -> Result<Vec<f32>> {
        let (start, pages) = (self.len, &self.tables[..]);
        let chunk = Chunk { tokens, start, long: self.long, pages, wanted };
        let logits = self.model.forward(&mut self.kv, &[chunk], interrupt)?;
        self.len += tokens.len();
        for (table, group) in self.tables.iter_mut().zip(self.model.kv_groups()) {
            if group.sees == Sees::State {
                *table = vec![table[1], 1 - table[1]];
            }
        }
        Ok(logits)
    }
}
