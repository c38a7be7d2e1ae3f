//! Whether a model fits into memory, and how much of it keys and values may take: decided from headers, before
//! anything is loaded, so that what does not fit is an error and not the end of the process. Allocates nothing.
//!
//! What counts is memory that can be had without swapping, of the machine and of the cgroup. Weights that are mapped
//! from the cache take none that the system could not take back: a model may be larger than memory, and is then read
//! from the disk again and again.

use super::cache::WORTH;
use super::describe::{CHUNK, Description};
use super::kv;
use crate::{Error, Result};

/// What a user asks for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wish {
    /// Packed weights may be kept on disk.
    pub cache: bool,
    /// Positions of a sequence; `None`: the model's, or what memory holds.
    pub context_length: Option<usize>,
    /// The most that keys and values may take; `None`: half of what is left.
    pub kv_bytes: Option<u64>,
    /// Sequences at once.
    pub max_batch: usize,
}

/// What a model will take and may take, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Packed weights.
    pub weights: u64,
    /// They are mapped from the disk.
    pub mapped: bool,
    /// Activations, logits and the tokenizer.
    pub working: u64,
    /// Most that is needed at once while it is loaded, beside the tokenizer.
    pub loading: u64,
    /// The most for keys and values.
    pub kv_bytes: u64,
    /// Positions that one sequence may have.
    pub context_length: usize,
    /// What there was to take from.
    pub available: u64,
    /// What was lowered, and what will be slow: sentences for people.
    pub notes: Vec<String>,
}

impl Description {
    /// Bytes of keys, values and states of one sequence of so many positions.
    pub fn kv_bytes(&self, positions: usize) -> u64 {
        kv::bytes_for(&self.kv_groups, positions, CHUNK)
    }

    /// What the model may take of `available` bytes; an error if that is not enough.
    pub fn budget(&self, wish: &Wish, available: u64) -> Result<Budget> {
        let weights = self.packed.iter().fold(0u64, |sum, (_, bytes)| sum.saturating_add(*bytes));
        let mapped = wish.cache && weights >= WORTH;
        // One matrix is packed before it is written; what is mapped can be had back.
        let (held, loading) = if mapped { (0, self.largest) } else { (weights, weights) };
        let least = self.kv_bytes(1);
        let needed = loading.max(held.saturating_add(least)).saturating_add(self.working);
        let short =
            |what: String, requested| Err(Error::OutOfMemory { what, requested, available });
        if needed > available {
            let what = match mapped {
                true => "the working memory and the largest matrix of this model: it is too large for this \
                         machine; take a smaller one"
                    .to_owned(),
                false => format!(
                    "{} of packed weights, {} of working memory and one page of keys and values: {}take fewer \
                     bits (quantization=\"int4\") or a smaller model",
                    size(weights),
                    size(self.working),
                    if weights >= WORTH { "let weight_cache keep them on disk, " } else { "" },
                ),
            };
            return short(what, needed);
        }
        let left = available - self.working - held;
        // Mapped weights should stay in memory too; if they can't, they get most of it.
        let room = if mapped { left.saturating_sub(weights).max(left / 4) } else { left };
        let most = self.context_length;
        let context = wish.context_length.map_or(most, |asked| asked.min(most));
        let one = |positions| self.kv_bytes(positions);
        let fits = |bytes| kv::longest(&self.kv_groups, bytes, context, CHUNK).min(context);
        let kv_bytes = match (wish.kv_bytes, wish.context_length) {
            (Some(given), _) => {
                // No more is taken than all sequences of the batch need.
                let taken = given.min(one(context).saturating_mul(wish.max_batch.max(1) as u64));
                if taken > left {
                    let what = format!(
                        "kv_cache_bytes: {} for keys and values, {} are left beside the model: leave it to \
                         \"auto\", or take kv_cache_dtype=\"int8\", a shorter context_length or a smaller max_batch",
                        size(taken),
                        size(left)
                    );
                    return short(what, taken);
                }
                given
            }
            (None, Some(positions)) if one(positions) > left => {
                let what = format!(
                    "keys and values of context_length={positions}: {} are left beside the model, which hold {} \
                     positions; take a shorter context_length, kv_cache_dtype=\"int8\", or fewer bits \
                     (quantization=\"int4\")",
                    size(left),
                    fits(left)
                );
                return short(what, one(positions));
            }
            (None, Some(positions)) => (room / 2).max(one(positions)),
            (None, None) => (room / 2).max(least),
        };
        let context_length = fits(kv_bytes);
        let mut notes = Vec::new();
        if context_length < context {
            notes.push(format!(
                "context_length is {context_length}, not {context}: {} for keys and values hold no more",
                size(kv_bytes)
            ));
        }
        if mapped && weights.saturating_add(self.working) > available {
            notes.push(format!(
                "the weights take {} and {} of memory are free: they will be read from the disk again and again, \
                 which is slow; fewer bits (quantization=\"int4\") or a smaller model would be faster",
                size(weights),
                size(available)
            ));
        }
        let working = self.working;
        Ok(Budget { weights, mapped, working, loading, kv_bytes, context_length, available, notes })
    }
}

/// A number of bytes, for people.
pub(super) fn size(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{KvGroup, Sees};

    const MB: u64 = 1_000_000;

    /// 1 kB of keys and values for each position.
    fn model(weights: u64) -> Description {
        Description {
            architecture: String::new(),
            family: String::new(),
            parameters: 0,
            active_parameters: 0,
            hidden: 0,
            vocab: 0,
            context_length: 100_000,
            layers: Vec::new(),
            quantization: None,
            stored: Vec::new(),
            packed: vec![("int4", weights / 2), ("int8", weights / 2)],
            kv_groups: vec![KvGroup { sees: Sees::All, page_bytes: 64_000 }],
            largest: weights / 10,
            working: 50 * MB,
        }
    }

    fn wish(cache: bool) -> Wish {
        Wish { cache, context_length: None, kv_bytes: None, max_batch: 4 }
    }

    fn error(found: Result<Budget>) -> (String, u64, u64) {
        match found {
            Err(Error::OutOfMemory { what, requested, available }) => (what, requested, available),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn held_weights_must_fit_and_mapped_ones_need_not() {
        let model = model(800 * MB);
        let (what, requested, available) = error(model.budget(&wish(false), 800 * MB));
        assert!(what.contains("weight_cache") && what.contains("int4"), "{what}");
        assert_eq!((requested, available), (850 * MB + 64_000, 800 * MB));
        assert!(model.budget(&wish(false), 851 * MB).is_ok());
        let mapped = model.budget(&wish(true), 400 * MB).unwrap();
        assert!(mapped.mapped && mapped.notes[1].contains("read from the disk"), "{mapped:?}");
        assert_eq!(mapped.loading, 80 * MB);
        let (what, ..) = error(model.budget(&wish(true), 129 * MB));
        assert!(what.contains("smaller"), "{what}");
    }

    #[test]
    fn an_automatic_context_is_lowered_and_said_and_leaves_mapped_weights_their_place() {
        let model = model(800 * MB);
        let roomy = model.budget(&wish(true), 2000 * MB).unwrap();
        assert_eq!((roomy.context_length, roomy.notes.len()), (100_000, 0));
        // 950 - 50 - 800: half of 225 MB, a quarter of what is left beside the working memory.
        let tight = model.budget(&wish(true), 950 * MB).unwrap();
        assert_eq!(tight.kv_bytes, 900 * MB / 8);
        assert_eq!(tight.context_length, 100_000);
        let tight = model.budget(&wish(true), 450 * MB).unwrap();
        assert_eq!((tight.kv_bytes, tight.context_length), (50 * MB, 50_000 / 64 * 64));
        assert!(tight.notes[0].contains("49984") && tight.notes[0].contains("100000"), "{tight:?}");
    }

    #[test]
    fn what_was_asked_for_is_kept_to_or_refused() {
        let model = model(80 * MB);
        let asked = |context_length, kv_bytes| Wish { context_length, kv_bytes, ..wish(false) };
        // 70 MB are left.
        let given = model.budget(&asked(Some(60_000), None), 200 * MB).unwrap();
        assert_eq!((given.context_length, given.kv_bytes), (60_000, 60_032_000));
        let (what, requested, _) = error(model.budget(&asked(Some(80_000), None), 200 * MB));
        assert!(what.contains("hold 69952 positions") && what.contains("int8"), "{what}");
        assert_eq!(requested, 80_000_000);
        let (what, requested, _) = error(model.budget(&asked(None, Some(71 * MB)), 200 * MB));
        assert!(what.contains("kv_cache_bytes"), "{what}");
        assert_eq!(requested, 71 * MB);
        // Four sequences of 10,000 take 40 MB at most, whatever is allowed.
        let most = asked(Some(10_000), Some(u64::MAX));
        assert_eq!(model.budget(&most, 200 * MB).unwrap().context_length, 10_000);
        // Small ones lower the context and say so.
        let small = model.budget(&asked(None, Some(640_000)), 200 * MB).unwrap();
        assert_eq!((small.context_length, small.notes.len()), (640, 1));
    }
}
