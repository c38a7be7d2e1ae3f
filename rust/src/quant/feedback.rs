//! Quantization that knows what its weights are multiplied by. The error that counts is that of the product,
//! `sum over inputs x of ((w - w') x)^2 = (w - w') H (w - w')^T` with `H = sum of x x^T`; weights are rounded one after
//! the other, and those that follow make up for the error (Frantar et al. 2023, "GPTQ", after Hassibi and Stork's
//! optimal brain surgeon). `H` is taken of [`BLOCK`] inputs at a time, as scales are.

use super::q4::{WITH_ZERO, with_zero};
use super::{BLOCK, BlockQ4, BlockQ8, GROUP, MAX, TINY, amax};
use std::ops::Range;

/// How much of the mean of H's diagonal is added to it: what calibration did not see may come, too.
const DAMP: f64 = 0.01;

/// For each block of inputs the upper triangle `U` with `U^T U = H^-1`, `[256][256]`.
pub struct Feedback {
    blocks: Vec<Vec<f32>>,
}

impl Feedback {
    /// From `H` of each block, `[blocks][256][256]`, of `k` inputs in all.
    pub fn new(h: &[f32], k: usize) -> Feedback {
        let blocks = h.chunks(BLOCK * BLOCK).enumerate();
        let blocks = blocks.map(|(b, h)| triangle(h, BLOCK.min(k - b * BLOCK)));
        Feedback { blocks: blocks.collect() }
    }

    /// Weights `256 b ..` of a row in the int4 form.
    pub fn q4(&self, b: usize, x: &[f32]) -> BlockQ4 {
        let m = amax(x);
        if m < TINY {
            return BlockQ4::ZERO;
        }
        let top = if x.contains(&0.0) { WITH_ZERO } else { MAX };
        let u = &self.blocks[b];
        let mut least = f64::INFINITY;
        let mut found = BlockQ4::ZERO;
        for stretch in STRETCHES {
            let (block, error) = q4(u, x, m * stretch / top);
            if error < least {
                (least, found) = (error, block);
            }
        }
        found
    }

    /// Weights `256 b ..` of a row in the int8 form.
    pub fn q8(&self, b: usize, x: &[f32]) -> BlockQ8 {
        let m = amax(x);
        if m < TINY {
            return BlockQ8::ZERO;
        }
        let (u, d) = (&self.blocks[b], m / MAX);
        let mut block = BlockQ8 { d, ..BlockQ8::ZERO };
        let mut w = scaled(x, d);
        for k in 0..x.len() {
            let q = w[k].round_ties_even().clamp(-MAX, MAX);
            block.q[k] = if x[k] == 0.0 { 0 } else { q as i8 };
            follow(u, &mut w, k, f32::from(block.q[k]), k + 1..x.len());
        }
        block
    }
}

/// Block scales that are tried, over the one that just holds the largest weight.
const STRETCHES: [f32; 4] = [0.92, 1.0, 1.04, 1.08];

fn scaled(x: &[f32], d: f32) -> [f32; BLOCK] {
    let (mut w, inv) = ([0.0; BLOCK], 1.0 / d);
    for (w, x) in w.iter_mut().zip(x) {
        *w = x * inv;
    }
    w
}

/// Weight `k` became `q`: moves `rest`; gives the square of the error that is left.
#[inline]
fn follow(u: &[f32], w: &mut [f32; BLOCK], k: usize, q: f32, rest: Range<usize>) -> f32 {
    let row = &u[k * BLOCK..][..BLOCK];
    let error = (w[k] - q) / row[k];
    for (w, u) in w[rest.clone()].iter_mut().zip(&row[rest]) {
        *w -= error * u;
    }
    error * error
}

/// The block with scale `d`, and its error.
fn q4(u: &[f32], x: &[f32], d: f32) -> (BlockQ4, f64) {
    let mut block = BlockQ4 { d, ..BlockQ4::ZERO };
    let mut w = scaled(x, d);
    let mut sum = 0.0;
    for (g, exact) in x.chunks(GROUP).enumerate() {
        let range = g * GROUP..g * GROUP + exact.len();
        let zeros = exact.contains(&0.0);
        let (sc, mn) = best(u, &w, range.clone(), zeros);
        (block.sc[g], block.mn[g]) = (sc as u8, mn as i8);
        for k in range {
            // A pruned weight stays zero.
            let q = if x[k] == 0.0 { mn / sc } else { code(w[k], sc, mn) };
            block.q[k] = q as u8;
            sum += f64::from(follow(u, &mut w, k, q * sc - mn, k + 1..x.len()));
        }
    }
    (block, sum * f64::from(d) * f64::from(d))
}

fn code(w: f32, sc: f32, mn: f32) -> f32 {
    ((w + mn) / sc).round_ties_even().clamp(0.0, 15.0)
}

/// Scale and offset of a group with the least error, feedback within the group included. `zeros`: zero must be among
/// the values.
fn best(u: &[f32], w: &[f32; BLOCK], range: Range<usize>, zeros: bool) -> (f32, f32) {
    let group = &w[range.clone()];
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
            let mut trial = *w;
            let mut error = 0.0;
            for k in range.clone() {
                let q = code(trial[k], sc, mn) * sc - mn;
                error += follow(u, &mut trial, k, q, k + 1..range.end);
                if error >= least {
                    break;
                }
            }
            if error < least {
                (least, found) = (error, (sc, mn));
            }
        }
    }
    found
}

/// `U` of one block of `n` inputs, in rows of 256.
fn triangle(h: &[f32], n: usize) -> Vec<f32> {
    let at = |i: usize, j: usize| f64::from(h[i * BLOCK + j]);
    let mean = (0..n).map(|i| at(i, i)).sum::<f64>() / n as f64;
    // Inputs that were never seen count alike.
    let (mean, damp) = if mean > 0.0 { (mean, DAMP) } else { (1.0, 1.0) };
    // H = M M^T with M upper, from the last column on; then U = M^-1.
    let mut m = vec![0.0f64; n * n];
    for j in (0..n).rev() {
        for i in (0..=j).rev() {
            let known: f64 = (j + 1..n).map(|k| m[i * n + k] * m[j * n + k]).sum();
            let damped = if i == j { at(i, j) + damp * mean } else { at(i, j) };
            let rest = damped - known;
            m[i * n + j] = if i == j { rest.max(1e-9 * mean).sqrt() } else { rest / m[j * n + j] };
        }
    }
    let mut u = vec![0.0f32; BLOCK * BLOCK];
    let mut inverse = vec![0.0f64; n * n];
    for j in 0..n {
        inverse[j * n + j] = 1.0 / m[j * n + j];
        for i in (0..j).rev() {
            let sum: f64 = (i + 1..=j).map(|k| m[i * n + k] * inverse[k * n + j]).sum();
            inverse[i * n + j] = -sum / m[i * n + i];
        }
    }
    for i in 0..n {
        for j in i..n {
            u[i * BLOCK + j] = inverse[i * n + j] as f32;
        }
    }
    u
}
