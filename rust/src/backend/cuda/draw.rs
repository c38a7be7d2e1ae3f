//! Tokens drawn where the logits are, as launches. Reads back ids and nothing else.

use super::{Buf, Cuda, Draw, THREADS, launch};
use crate::sample::Sampling;

impl Cuda {
    /// [`Backend::draw`](super::Backend::draw).
    pub(super) fn draw_tokens(&self, logits: &Buf, how: &[Draw<'_>]) -> Vec<Option<u32>> {
        let rows = logits.rows;
        assert_eq!(rows, how.len());
        // Blocks of a part of a row each: enough of them for one row to keep a device busy.
        let parts = (logits.width / 2048).clamp(1, 64);
        let halves = |x: u64| [x as u32, (x >> 32) as u32];
        // Typical sampling is the host's.
        let here = how.iter().map(|d| d.sampling.least_weight()).collect::<Vec<_>>();
        let top_k = |s: &Sampling| if s.top_k < logits.width { s.top_k as u32 } else { 0 };
        let words = how.iter().zip(&here).flat_map(|(d, least)| {
            let s = d.sampling;
            let per_temperature = 1.0 / f64::from(s.temperature);
            let share = f64::from(s.top_p).to_bits();
            let least = least.unwrap_or(1);
            let numbers = [per_temperature.to_bits(), least, d.coin.to_bits(), share];
            let greedy = (s.temperature == 0.0).into();
            numbers.map(halves).into_iter().flatten().chain([greedy, top_k(s)])
        });
        let words: Vec<u32> = words.collect();
        let edited: usize = how.iter().map(|d| d.edits.len()).sum();
        let mut memory = self.drawn.lock().unwrap_or_else(|e| e.into_inner());
        // A power of two, so that one graph serves many numbers of edits.
        let bytes = rows * (16 * parts + 8 + 4) + 4 * edited;
        self.device.grow(&mut memory, bytes.next_power_of_two());
        let best = memory.at;
        let limits = best + 8 * (rows * parts) as u64;
        let sums = limits + 8 * rows as u64;
        let out = sums + 8 * (rows * parts) as u64;
        let filtered = |s: &Sampling| s.temperature > 0.0 && (top_k(s) > 0 || s.top_p < 1.0);
        let filters = how.iter().any(|d| filtered(d.sampling));
        let params = launch::Draw {
            logits: logits.at,
            how: self.device.input(&words),
            best,
            limits: if filters { limits } else { 0 },
            sums,
            out,
            vocab: logits.width as u32,
            parts: parts as u32,
        };
        let edits = launch::Edits {
            logits: logits.at,
            edits: if edited > 0 { self.device.input(&edit_words(how)) } else { 0 },
            saved: out + 4 * rows as u64,
            rows: rows as u32,
            vocab: logits.width as u32,
            restore: 0,
            pad: 0,
        };
        if edited > 0 {
            self.launch("edit", [rows, 1, 1], THREADS, &edits);
        }
        self.launch("draw_best", [rows, parts, 1], THREADS, &params);
        if filters {
            self.launch("draw_limit", [rows, 1, 1], 512, &params);
        }
        self.launch("draw_sums", [rows, parts, 1], THREADS, &params);
        self.launch("draw_pick", [rows, 1, 1], THREADS, &params);
        let ids = self.device.download(out, rows);
        let id = |(x, least): (&f32, Option<u64>)| {
            Some(x.to_bits()).filter(|&id| least.is_some() && (id as usize) < logits.width)
        };
        let ids: Vec<_> = ids.iter().zip(here).map(id).collect();
        if edited > 0 && ids.contains(&None) {
            self.launch("edit", [rows, 1, 1], THREADS, &launch::Edits { restore: 1, ..edits });
        }
        ids
    }
}

/// The first edit of each row and the end of all, padded to 16 bytes; then the edits.
fn edit_words(how: &[Draw<'_>]) -> Vec<u32> {
    let mut words = vec![0];
    for d in how {
        words.push(words[words.len() - 1] + d.edits.len() as u32);
    }
    words.resize(words.len().next_multiple_of(4), 0);
    words.extend(
        how.iter()
            .flat_map(|d| &d.edits)
            .flat_map(|e| [e.id, e.add.to_bits(), e.penalty.to_bits(), e.subtract.to_bits()]),
    );
    words
}
