//! Quantization that knows what its weights are multiplied by. The error that counts is that of the product,
//! `sum over inputs x of ((w - w') x)^2 = (w - w') H (w - w')^T` with `H = sum of x x^T`; weights are rounded one after
//! the other, and those that follow make up for the error (Frantar et al. 2023, "GPTQ", after Hassibi and Stork's
//! optimal brain surgeon). Scalar code; who calls it brings the factor of `H` and carries errors from block to block.
//!
//! With `H = M M^T`, `M` upper triangular, the error is `sum over k of M_kk^2 (v_k - w'_k)^2`, where `v_k = w_k + sum over
//! j < k of (w_j - w'_j) M_jk / M_kk`: each weight is rounded to what is nearest to `v_k`, not to `w_k` (Chee et al. 2023,
//! "QuIP", show that this is GPTQ).

use super::q4::{WITH_ZERO, with_zero};
use super::{BLOCK, BlockGrouped, BlockQ4, BlockQ8, GROUP, Grouped, MAX, TINY, amax};
use half::f16;
use std::ops::Range;

/// What the weights of a row pass on, inside each block of inputs and from block to block.
pub struct Feedback {
    /// For block b, for each of its inputs k: `M_jk / M_kk` for all j in the blocks before.
    before: Vec<Vec<f32>>,
    inside: Vec<Inside>,
}

/// The same inside a block.
struct Inside {
    /// `M_jk / M_kk`, in rows of 256, where j < k. Empty: all zero.
    moves: Vec<f32>,
    /// `M_kk^2`.
    weights: [f32; BLOCK],
}

/// All errors count alike, and nothing is passed on.
static NONE: Inside = Inside { moves: Vec::new(), weights: [1.0; BLOCK] };

impl Feedback {
    /// From `M`, `[k][k]`, of which what lies below the diagonal is not read.
    pub fn new(m: &[f32], k: usize) -> Feedback {
        let at = |i: usize, j: usize| m[i * k + j];
        let (mut before, mut inside) = (Vec::new(), Vec::new());
        for first in (0..k).step_by(BLOCK) {
            let n = BLOCK.min(k - first);
            let mut panel = vec![0.0; n * first];
            // Rows of `M` are read as they lie.
            for j in 0..first {
                for i in 0..n {
                    panel[i * first + j] = at(j, first + i) / at(first + i, first + i);
                }
            }
            let mut moves = vec![0.0; n * BLOCK];
            let mut weights = [1.0; BLOCK];
            for j in 0..n {
                weights[j] = at(first + j, first + j).powi(2);
                for i in j + 1..n {
                    moves[j * BLOCK + i] = at(first + j, first + i) / at(first + i, first + i);
                }
            }
            before.push(panel);
            inside.push(Inside { moves, weights });
        }
        Feedback { before, inside }
    }

    /// For each input of block `b` what it takes of the errors `w - w'` of all inputs before the block.
    pub fn before(&self, b: usize) -> &[f32] {
        &self.before[b]
    }

    /// Weights `256 b ..` of a row in the int4 form; `x` are they, `v` with what the blocks before passed on.
    pub fn q4(&self, b: usize, x: &[f32], v: &[f32]) -> BlockQ4 {
        let m = amax(x);
        if m < TINY {
            return BlockQ4::ZERO;
        }
        let top = if x.contains(&0.0) { WITH_ZERO } else { MAX };
        let mut least = f64::INFINITY;
        let mut found = BlockQ4::ZERO;
        for stretch in STRETCHES {
            let (block, error) = q4(&self.inside[b], x, v, m * stretch / top);
            if error < least {
                (least, found) = (error, block);
            }
        }
        found
    }

    /// The same in the int8 form.
    pub fn q8(&self, b: usize, x: &[f32], v: &[f32]) -> BlockQ8 {
        let m = amax(x);
        if m < TINY {
            return BlockQ8::ZERO;
        }
        let d = m / MAX;
        let mut block = BlockQ8 { d, ..BlockQ8::ZERO };
        let mut row = Row::new(x, v, 1.0 / d);
        for k in 0..x.len() {
            let q = row.v[k].round_ties_even().clamp(-MAX, MAX);
            block.q[k] = if x[k] == 0.0 { 0 } else { q as i8 };
            row.follow(&self.inside[b], k, f32::from(block.q[k]), x.len());
        }
        block
    }

    /// The same in a form that [`BlockGrouped::quantize`] makes.
    pub fn grouped(&self, how: Grouped, b: usize, x: &[f32], v: &[f32]) -> BlockGrouped {
        grouped(how, Some(&self.inside[b]), x, v)
    }
}

/// Block scales that are tried, over the one that just holds the largest weight.
const STRETCHES: [f32; 4] = [0.92, 1.0, 1.04, 1.08];
/// Scales of a group that are tried, likewise.
pub(crate) const FACTORS: [f32; 5] = [1.0, 0.96, 0.92, 0.86, 0.8];

/// A block on its way.
#[derive(Clone, Copy)]
struct Row {
    /// As it was.
    w: [f32; BLOCK],
    /// With what was passed on.
    v: [f32; BLOCK],
}

impl Row {
    fn new(x: &[f32], v: &[f32], scale: f32) -> Row {
        let mut row = Row { w: [0.0; BLOCK], v: [0.0; BLOCK] };
        for k in 0..x.len() {
            (row.w[k], row.v[k]) = (x[k] * scale, v[k] * scale);
        }
        row
    }

    /// Weight `k` became `value`: tells those before `end`; gives what counts of the error.
    #[inline(always)]
    fn follow(&mut self, block: &Inside, k: usize, value: f32, end: usize) -> f32 {
        let (error, rest) = (self.w[k] - value, self.v[k] - value);
        if let Some(moves) = block.moves.get(k * BLOCK + k + 1..k * BLOCK + end) {
            for (v, moved) in self.v[k + 1..end].iter_mut().zip(moves) {
                *v += error * moved;
            }
        }
        block.weights[k] * rest * rest
    }
}

/// The int4 block with scale `d`, and its error.
fn q4(inside: &Inside, x: &[f32], v: &[f32], d: f32) -> (BlockQ4, f64) {
    let mut block = BlockQ4 { d, ..BlockQ4::ZERO };
    let mut row = Row::new(x, v, 1.0 / d);
    let mut sum = 0.0;
    for (g, exact) in x.chunks(GROUP).enumerate() {
        let range = g * GROUP..g * GROUP + exact.len();
        let zeros = exact.contains(&0.0);
        let (sc, mn) = best(inside, &row, range.clone(), zeros);
        (block.sc[g], block.mn[g]) = (sc as u8, mn as i8);
        for k in range {
            // A pruned weight stays zero.
            let q = if x[k] == 0.0 { mn / sc } else { code(row.v[k], sc, mn) };
            block.q[k] = q as u8;
            sum += f64::from(row.follow(inside, k, q * sc - mn, x.len()));
        }
    }
    (block, sum * f64::from(d) * f64::from(d))
}

fn code(w: f32, sc: f32, mn: f32) -> f32 {
    ((w + mn) / sc).round_ties_even().clamp(0.0, 15.0)
}

/// Scale and offset of an int4 group with the least error, feedback within the group included. `zeros`: zero must be
/// among the values.
fn best(inside: &Inside, row: &Row, range: Range<usize>, zeros: bool) -> (f32, f32) {
    let group = &row.v[range.clone()];
    let lo = group.iter().copied().fold(f32::INFINITY, f32::min).max(-MAX);
    let hi = group.iter().copied().fold(f32::NEG_INFINITY, f32::max).min(MAX);
    let span = ((hi - lo) / 15.0).floor() + 1.0;
    let most = if zeros { 15.0 } else { 16.0 };
    let (mut least, mut found) = (f32::INFINITY, (1.0, 0.0));
    for step in [-3.0, -2.0, -1.0, 0.0f32] {
        let sc = (span + step).clamp(1.0, most);
        let centre = (7.5 * sc - 0.5 * (lo + hi)).round_ties_even();
        for shift in [-0.25, 0.0, 0.25f32] {
            // Every code must stay in int8: -127 <= -mn and 15*sc - mn <= 127.
            let mn = (centre + (shift * sc).round_ties_even()).clamp(15.0 * sc - MAX, MAX);
            let mn = if zeros { with_zero(sc, mn) } else { mn };
            let value = |w: f32| code(w, sc, mn) * sc - mn;
            let error = trial(inside, row, range.clone(), least, value);
            if error < least {
                (least, found) = (error, (sc, mn));
            }
        }
    }
    found
}

/// The error of a group whose weights become `value` of what they are then; it may end early above `most`.
#[inline(always)]
fn trial(
    inside: &Inside,
    row: &Row,
    range: Range<usize>,
    most: f32,
    value: impl Fn(f32) -> f32,
) -> f32 {
    let mut trial = *row;
    let mut error = 0.0;
    for k in range.clone() {
        let value = value(trial.v[k]);
        error += trial.follow(inside, k, value, range.end);
        if error >= most {
            break;
        }
    }
    error
}

impl BlockGrouped {
    /// Quantizes at most [`BLOCK`] finite weights; missing ones are zero. Codes are signed, scales are int8 times an f16 of
    /// the block: of those tried the one with the least squared error. A weight that is exactly zero stays so. Where an
    /// f16 cannot be large enough the block is not finite.
    pub fn quantize(how: Grouped, x: &[f32]) -> BlockGrouped {
        grouped(how, None, x, x)
    }

    /// The block of weights up to `m` in magnitude before it has any, and its scale: none if nothing is to be added.
    pub(crate) fn begun(how: Grouped, m: f32) -> (BlockGrouped, Option<f32>) {
        debug_assert!(how == Grouped::INT5 || how == Grouped::INT6);
        if m < TINY {
            return (BlockGrouped::ZERO, None);
        }
        let half = -f32::from(how.signed());
        // Rounded up, so that the largest integer is at most 127; the smallest f16 is coarse.
        let (least, mut d) = (m / half / MAX, f16::from_f32(m / half / MAX));
        if d.to_f32() < least {
            d = f16::from_bits(d.to_bits() + 1);
        }
        let zero = how.signed().unsigned_abs();
        let mut block = BlockGrouped { d: d.to_bits(), q: [zero; BLOCK], ..BlockGrouped::ZERO };
        let d = Some(d.to_f32()).filter(|d| d.is_finite());
        if d.is_none() {
            block.s.fill(1);
        }
        (block, d)
    }
}

fn grouped(how: Grouped, inside: Option<&Inside>, x: &[f32], v: &[f32]) -> BlockGrouped {
    let (mut block, d) = BlockGrouped::begun(how, amax(x));
    let Some(d) = d else { return block };
    let half = -f32::from(how.signed());
    let inside = inside.unwrap_or(&NONE);
    let mut row = Row::new(x, v, 1.0);
    for (u, exact) in x.chunks(how.unit()).enumerate() {
        let range = u * how.unit()..u * how.unit() + exact.len();
        let group = &row.v[range.clone()];
        let lo = group.iter().copied().fold(0.0, f32::min);
        let hi = group.iter().copied().fold(0.0, f32::max);
        // There is one code more below zero than above.
        let whole = if hi > -lo { -hi / half } else { -lo / half };
        let code = |v: f32, s: f32| (v / s).round_ties_even().clamp(-half, half - 1.0);
        let (mut least, mut found) = (f32::INFINITY, 1.0);
        for factor in FACTORS {
            let integer = (whole * factor / d).round_ties_even().clamp(-MAX, MAX);
            let integer = if integer == 0.0 { 1.0 } else { integer };
            let s = integer * d;
            let error = trial(inside, &row, range.clone(), least, |v| code(v, s) * s);
            if error < least {
                (least, found) = (error, integer);
            }
        }
        block.s[u] = u16::from(found as i8 as u8);
        let s = found * d;
        for k in range {
            let q = if x[k] == 0.0 { 0.0 } else { code(row.v[k], s) };
            block.q[k] = (q + half) as u8;
            row.follow(inside, k, q * s, x.len());
        }
    }
    block
}
