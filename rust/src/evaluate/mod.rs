//! How well a model predicts a text, and how far its predictions are from another model's. Takes token ids and
//! loaded models; reads no file, keeps no logits beyond the piece it looks at.

mod statistics;

pub use statistics::{Distance, Estimate, Evaluation, QUANTILES};

use crate::model::{Forward, Sequence, Wanted};
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
    let readers = all.into_iter().flatten().map(|model| Sequence::new(model, longest));
    let mut readers: Vec<_> = readers.collect::<Result<_>>()?;
    let mut sums = Sums::default();
    for (i, window) in windows.iter().enumerate() {
        let (first, end) = (window.first - 1, window.tokens.len() - 1);
        readers.iter_mut().for_each(|reader| reader.restart(window.tokens.len()));
        for at in (0..first).step_by(rows) {
            for reader in &mut readers {
                reader.read(&window.tokens[at..first.min(at + rows)], Wanted::None, interrupt)?;
            }
        }
        sums.begin();
        for at in (first..end).step_by(rows) {
            let to = end.min(at + rows);
            let read = |reader: &mut Sequence<'_, M>| {
                reader.read(&window.tokens[at..to], Wanted::All, interrupt)
            };
            let logits = readers.iter_mut().map(read).collect::<Result<Vec<_>>>()?;
            sums.add(&logits, vocab, &window.tokens[at + 1..=to], threads)?;
        }
        progress(i + 1);
    }
    Ok(sums.finish())
}

#[cfg(test)]
mod tests;
