//! Kernels of layers that keep a state: a causal convolution, and one step of a recurrence over a matrix.
//! Written once for every instruction set, as `float.rs`, whose rules hold here.
//!
//! Orders that every set keeps: a convolution is one chain of fused multiply-adds, the oldest position
//! first; a sum over the rows of a state is four chains by index modulo 4, ascending, then
//! `(0 + 1) + (2 + 3)`.

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
