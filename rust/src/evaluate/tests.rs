//! Numbers worked out by hand, and a model that predicts what is known.

use super::statistics::of_rows;
use super::*;
use crate::model::kv::PageCopy;
use crate::model::{Chunk, KvGroup, NO_PAGE, Sees};

/// Predicts that each token is followed by the next id, with a logit of `sure`.
struct Counts {
    sure: f32,
    state: bool,
}

impl Forward for Counts {
    type Kv = Vec<u32>;

    fn vocab(&self) -> usize {
        8
    }

    fn context_length(&self) -> usize {
        300
    }

    fn kv_groups(&self) -> Vec<KvGroup> {
        let sees = if self.state { Sees::State } else { Sees::All };
        vec![KvGroup { sees, page_bytes: 4 }]
    }

    fn new_kv(&self, pages: &[usize]) -> Result<Vec<u32>> {
        Ok(vec![0; pages[0]])
    }

    fn copy_pages(&self, _: &mut Vec<u32>, _: &[PageCopy]) {} // evaluation shares no pages

    fn forward(&self, kv: &mut Vec<u32>, batch: &[Chunk<'_>], _: &AtomicBool) -> Result<Vec<f32>> {
        let mut logits = Vec::new();
        for chunk in batch {
            if self.state {
                // The page of a state holds how many tokens came before.
                let before = chunk.pages[0][0];
                let seen = if before == NO_PAGE { 0 } else { kv[before as usize] };
                assert_eq!(seen as usize, chunk.start);
                kv[chunk.pages[0][1] as usize] = seen + chunk.tokens.len() as u32;
            }
            if chunk.wanted == Wanted::All {
                for &token in chunk.tokens {
                    let mut row = vec![0.0; 8];
                    row[(token as usize + 1) % 8] = self.sure;
                    logits.extend(row);
                }
            }
        }
        Ok(logits)
    }
}

fn ids(n: u32) -> Vec<u32> {
    (0..n).map(|i| i % 8).collect()
}

#[test]
fn chunks_are_those_of_llama_cpp() {
    let windows = chunks(&ids(20), 8, Some(7));
    assert_eq!(windows.len(), 2, "the last four tokens are dropped");
    assert_eq!(windows[1], Window { tokens: vec![7, 1, 2, 3, 4, 5, 6, 7], first: 5 });
    assert_eq!(chunks(&ids(8), 8, None)[0].tokens, ids(8));
}

#[test]
fn a_document_counts_from_its_second_token_on() {
    assert_eq!(document(ids(20), 8), Some(Window { tokens: ids(8), first: 1 }));
    assert_eq!(document(vec![3], 8), None);
}

#[test]
fn perplexity_of_a_known_model() {
    for state in [false, true] {
        let model = Counts { sure: 2.0, state };
        let windows = chunks(&ids(900), 300, None);
        let stop = AtomicBool::new(false);
        let mut seen = Vec::new();
        let found = evaluate(&model, None, &windows, 2, &stop, &mut |n| seen.push(n)).unwrap();
        // Every prediction is right, with p = e^2 / (e^2 + 7).
        let p = 2f64.exp() / (2f64.exp() + 7.0);
        assert!((found.perplexity.value - 1.0 / p).abs() < 1e-9);
        assert_eq!(found.accuracy.value, 1.0);
        assert_eq!((found.tokens, found.contexts), (3 * 149, 3));
        assert_eq!(seen, [1, 2, 3]);
        assert_eq!(found.distance, None);
    }
}

#[test]
fn distance_of_two_known_models() {
    let (model, reference) =
        (Counts { sure: 1.0, state: false }, Counts { sure: 2.0, state: false });
    let windows = [document(ids(100), 300).unwrap(), document(ids(50), 300).unwrap()];
    let stop = AtomicBool::new(false);
    let found = evaluate(&model, Some(&reference), &windows, 2, &stop, &mut |_| {}).unwrap();
    let distance = found.distance.unwrap();
    let (p, q) = (2f64.exp() / (2f64.exp() + 7.0), 1f64.exp() / (1f64.exp() + 7.0));
    let kl = p * (p / q).ln() + (1.0 - p) * ((1.0 - p) / (1.0 - q)).ln();
    assert!((distance.kl.value - kl).abs() < 1e-9);
    assert!(distance.kl_quantiles.iter().all(|q| (q - kl).abs() < 1e-6));
    assert!((distance.ratio.value - p / q).abs() < 1e-9);
    assert!((distance.rms_dp.value - (p - q)).abs() < 1e-9);
    assert_eq!((distance.same_top.value, distance.flips.value), (1.0, 0.0));
}

#[test]
fn flips_and_tops_are_counted() {
    let (zero, one) = (vec![1.0, 0.0], vec![0.0, 1.0]);
    let rows = [
        (zero.clone(), zero.clone(), 0), // both right
        (zero.clone(), zero.clone(), 1), // both wrong
        (zero.clone(), one.clone(), 0),  // a flip to right
        (one.clone(), zero.clone(), 0),  // a flip to wrong
        (vec![1.0, 1.0], zero, 0),       // the lowest of equals
    ];
    let found = of_rows(&rows, 1);
    let distance = found.distance.unwrap();
    assert_eq!(found.accuracy.value, 3.0 / 5.0);
    assert_eq!(distance.same_top.value, 3.0 / 5.0);
    assert_eq!(distance.flips.value, 2.0 / 5.0);
    assert_eq!(distance.flips.interval, None, "one context says nothing about the spread");
}

#[test]
fn intervals_come_from_the_spread_of_contexts() {
    // Accuracies 1, 1, 0, 0 of four contexts with one token each.
    let (zero, one) = (vec![1.0, 0.0], vec![0.0, 1.0]);
    let rows: Vec<_> = [0, 0, 1, 1].map(|t| (zero.clone(), one.clone(), t)).into();
    let found = of_rows(&rows, 4);
    let half = 1.959_963_984_540_054 * (4.0f64 / 3.0 * 4.0 * 0.25).sqrt() / 4.0;
    let (low, high) = found.accuracy.interval.unwrap();
    assert!((low - (0.5 - half)).abs() < 1e-12 && (high - (0.5 + half)).abs() < 1e-12);
}

#[test]
fn what_does_not_fit_is_an_error() {
    let model = Counts { sure: 1.0, state: false };
    let stop = AtomicBool::new(false);
    let long = [document(ids(301), 400).unwrap()];
    let error = evaluate(&model, None, &long, 1, &stop, &mut |_| {}).unwrap_err();
    assert_eq!(
        error.to_string(),
        "context: found 301, expected at most 300 tokens, the model's context"
    );
    let nan = Counts { sure: f32::NAN, state: false };
    let error = evaluate(&nan, None, &[document(ids(9), 9).unwrap()], 1, &stop, &mut |_| {});
    assert!(matches!(error, Err(Error::Numeric(_))));
}
