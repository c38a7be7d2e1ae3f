//! How well a model predicts a text, and how far its predictions are from another model's. Takes token ids and
//! loaded models; reads no file, keeps no logits beyond the piece it looks at.

mod statistics;

pub use statistics::{Distance, Estimate, Evaluation, QUANTILES};

use crate::model::{Chunk, Forward, NO_PAGE, PAGE, Sees, Wanted};
use crate::{Error, Result};
use statistics::Sums;
use std::sync::atomic::AtomicBool;

/// Bytes of logits that one piece may take.
const PIECE_BYTES: usize = 64 << 20;

/// Token ids of one context, of which those from `first` on are predicted, each from all before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// The context.
    pub tokens: Vec<u32>,
    /// Index of the first token that counts; at least 1.
    pub first: usize,
}

/// Cuts a text as llama.cpp's `perplexity` does: chunks of `context` tokens, what is left over dropped. The first
/// token of each is replaced by `bos`, if that is given; the predictions made at the second half of it count.
pub fn chunks(tokens: &[u32], context: usize, bos: Option<u32>) -> Vec<Window> {
    let window = |chunk: &[u32]| {
        let mut tokens = chunk.to_vec();
        tokens[0] = bos.unwrap_or(tokens[0]);
        Window { tokens, first: context / 2 + 1 }
    };
    tokens.chunks_exact(context).map(window).collect()
}

/// A document as one context, cut at `context` tokens; all but its first count. `None`: nothing is predicted.
pub fn document(mut tokens: Vec<u32>, context: usize) -> Option<Window> {
    tokens.truncate(context);
    (tokens.len() > 1).then_some(Window { tokens, first: 1 })
}

/// Measures `model` on `windows`, and its distance from `reference` if there is one. Rows of logits are shared
/// among `threads`. `progress` is told the windows done. Ends with `Error::Interrupted` soon after `interrupt`.
pub fn evaluate<M: Forward + Sync>(
    model: &M,
    reference: Option<&M>,
    windows: &[Window],
    threads: usize,
    interrupt: &AtomicBool,
    progress: &mut dyn FnMut(usize),
) -> Result<Evaluation> {
    let Some(longest) = windows.iter().map(|w| w.tokens.len()).max() else {
        return Err(Error::parameter("text", "too few tokens to predict one", "a longer text"));
    };
    let all = [Some(model), reference];
    for model in all.iter().flatten() {
        if longest > model.context_length() {
            let most = format!("at most {} tokens, the model's context", model.context_length());
            return Err(Error::parameter("context", longest, most));
        }
    }
    let vocab = model.vocab();
    if let Some(other) = reference.filter(|other| other.vocab() != vocab) {
        return Err(Error::parameter(
            "reference",
            format!("a vocabulary of {}", other.vocab()),
            format!("that of the model, {vocab}"),
        ));
    }
    let rows = (PIECE_BYTES / (vocab * size_of::<f32>())).clamp(16, 512);
    let readers = all.into_iter().flatten().map(|model| Reader::new(model, longest));
    let mut readers: Vec<_> = readers.collect::<Result<_>>()?;
    let mut sums = Sums::default();
    for (i, window) in windows.iter().enumerate() {
        let (first, end) = (window.first - 1, window.tokens.len() - 1);
        readers.iter_mut().for_each(Reader::restart);
        for at in (0..first).step_by(rows) {
            for reader in &mut readers {
                reader.read(window, at, first.min(at + rows), Wanted::None, interrupt)?;
            }
        }
        sums.begin();
        for at in (first..end).step_by(rows) {
            let to = end.min(at + rows);
            let read =
                |reader: &mut Reader<'_, M>| reader.read(window, at, to, Wanted::All, interrupt);
            let logits = readers.iter_mut().map(read).collect::<Result<Vec<_>>>()?;
            sums.add(&logits, vocab, &window.tokens[at + 1..=to], threads)?;
        }
        progress(i + 1);
    }
    Ok(sums.finish())
}

/// A model that reads one context after the other.
struct Reader<'a, M: Forward> {
    model: &'a M,
    kv: M::Kv,
    tables: Vec<Vec<u32>>,
}

impl<'a, M: Forward> Reader<'a, M> {
    fn new(model: &'a M, longest: usize) -> Result<Self> {
        let groups = model.kv_groups();
        let pages = |sees: Sees| if sees == Sees::State { 2 } else { longest.div_ceil(PAGE) };
        let pages: Vec<usize> = groups.iter().map(|group| pages(group.sees)).collect();
        let tables = pages.iter().map(|&n| (0..n as u32).collect()).collect();
        Ok(Reader { kv: model.new_kv(&pages)?, tables, model })
    }

    /// Before a new context.
    fn restart(&mut self) {
        for (table, group) in self.tables.iter_mut().zip(self.model.kv_groups()) {
            if group.sees == Sees::State {
                *table = vec![NO_PAGE, 0];
            }
        }
    }

    /// Tokens `from..to` of a context; those before were read.
    fn read(
        &mut self,
        window: &Window,
        from: usize,
        to: usize,
        wanted: Wanted,
        interrupt: &AtomicBool,
    ) -> Result<Vec<f32>> {
        let long = self.model.long_after().is_some_and(|after| window.tokens.len() > after);
        let tokens = &window.tokens[from..to];
        let chunk = Chunk { tokens, start: from, long, pages: &self.tables, wanted };
        let logits = self.model.forward(&mut self.kv, &[chunk], interrupt)?;
        for (table, group) in self.tables.iter_mut().zip(self.model.kv_groups()) {
            if group.sees == Sees::State {
                *table = vec![table[1], 1 - table[1]];
            }
        }
        Ok(logits)
    }
}

#[cfg(test)]
mod tests;
