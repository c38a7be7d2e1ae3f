//! Kernels of layers that keep a state: a causal convolution, and one step of a recurrence over a matrix.
//! Written once for every instruction set, as `float.rs`, whose rules hold here.
//!
//! Orders that every set keeps: a convolution is one chain of fused multiply-adds, the oldest position
//! first; a sum over the rows of a state is four chains by index modulo 4, ascending, then
//! `(0 + 1) + (2 + 3)`.

use super::activation::{exp, sigmoid};
use super::simd::F32x16;

/// One position of one head's recurrence, for 16 columns of its state `S`, `[k.len(), 16]`.
#[derive(Clone, Copy)]
pub struct Recur<'a> {
    /// Reads the state.
    pub q: &'a [f32],
    /// Writes it.
    pub k: &'a [f32],
    /// What is written.
    pub v: &'a [f32; 16],
    /// What is left of the old state.
    pub decay: f32,
    /// How much is written.
    pub beta: f32,
    /// What the state already holds for `k` is not written again.
    pub delta: bool,
}

/// Decay and strength of a head, of its rates: with `d = ln(1 + e^(dt + bias))`, `e^(decay d)`, and `sigmoid(b)` of a delta
/// net, else `d`.
pub fn rates(dt: f32, bias: f32, decay: f32, b: Option<f32>) -> [f32; 2] {
    let d = softplus(dt + bias);
    [exp(decay * d), b.map_or(d, sigmoid)]
}

/// `ln(1 + e^x) = max(x, 0) + 2 artanh(z)`, `z = y / (2 + y)`, `y = e^-|x|`: z is at most 1/3, and the first term left
/// out of the series 1e-9 of the sum.
fn softplus(x: f32) -> f32 {
    let y = exp(-x.abs());
    let z = y / (2.0 + y);
    let t = z * z;
    let series = (1.0f32 / 15.0)
        .mul_add(t, 1.0 / 13.0)
        .mul_add(t, 1.0 / 11.0)
        .mul_add(t, 1.0 / 9.0)
        .mul_add(t, 1.0 / 7.0)
        .mul_add(t, 1.0 / 5.0)
        .mul_add(t, 1.0 / 3.0)
        .mul_add(t, 1.0);
    (2.0 * z).mul_add(series, x.max(0.0))
}

/// `out = bias? + sum over j of rows[j] * taps[j]`, then `out * sigmoid(out)` if `silu`.
#[inline(always)]
pub(super) fn conv(
    rows: &[&[f32]],
    taps: &[&[f32]],
    bias: Option<&[f32]>,
    silu: bool,
    out: &mut [f32],
) {
    match bias {
        Some(bias) => out.copy_from_slice(bias),
        None => out.fill(0.0),
    }
    for (row, taps) in rows.iter().zip(taps) {
        for ((out, &x), &tap) in out.iter_mut().zip(*row).zip(*taps) {
            *out = x.mul_add(tap, *out);
        }
    }
    if silu {
        for out in out {
            *out *= super::float::sigmoid(*out);
        }
    }
}

/// `u = beta * (v - decay * S^T k)` if `delta`, else `beta * v`; `S = decay * S + k u^T`; `out = S^T q`.
/// `k.len()` is a multiple of 4.
#[inline(always)]
pub(super) fn recur<V: F32x16>(r: &Recur<'_>, state: &mut [f32], out: &mut [f32; 16]) {
    let (mut u, decay) = (V::load(r.v), V::splat(r.decay));
    let fours = state.as_chunks_mut().0.as_chunks_mut().0;
    let (ks, qs) = (r.k.as_chunks::<4>().0, r.q.as_chunks::<4>().0);
    if r.delta {
        let mut sums = [V::splat(0.0); 4];
        for (rows, k) in fours.iter().zip(ks) {
            for j in 0..4 {
                sums[j] = V::load(&rows[j]).fma(V::splat(k[j]), sums[j]);
            }
        }
        u = total(sums).fma(V::splat(-r.decay), u);
    }
    u = u.mul(V::splat(r.beta));
    let mut sums = [V::splat(0.0); 4];
    for ((rows, k), q) in fours.iter_mut().zip(ks).zip(qs) {
        let rows: &mut [[f32; 16]; 4] = rows;
        for j in 0..4 {
            let s = V::splat(k[j]).fma(u, V::load(&rows[j]).mul(decay));
            s.store(&mut rows[j]);
            sums[j] = s.fma(V::splat(q[j]), sums[j]);
        }
    }
    total(sums).store(out);
}

#[inline(always)]
fn total<V: F32x16>(sums: [V; 4]) -> V {
    let one = V::splat(1.0);
    sums[0].fma(one, sums[1]).fma(one, sums[2].fma(one, sums[3]))
}
