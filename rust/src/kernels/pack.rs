//! Quantizing 16 rows of weights to int4, int5 or int6 side by side: lane = row, so that nothing is summed across
//! lanes. The numbers are those of [`BlockQ4::quantize`] and [`BlockGrouped::quantize`], bit by bit; this only makes
//! them faster.

use super::layout::{self, Q4_HEADER, ROWS};
use super::simd::F32x16;
use super::{array, array_mut};
use crate::quant::{BLOCK, BlockGrouped, BlockQ4, FACTORS, GROUP, Grouped, MAX, TINY};

/// An integer of magnitude below 2^22, plus this: its low bits are those of the sum.
const INTEGER: f32 = 12_582_912.0; // 1.5 * 2^23

/// Quantizes one block of 16 rows of `k` finite weights each and packs it. `out` is as long as the block.
#[inline(always)]
pub(super) fn pack_q4<V: F32x16>(x: &[[f32; BLOCK]; ROWS], k: usize, out: &mut [u8]) {
    out[..Q4_HEADER].fill(0);
    // Blocks that end in a group, and rows with zeros, are treated apart by the specification.
    let mut alone = [true; ROWS];
    if k.is_multiple_of(2 * GROUP) {
        alone = lanes::<V>(x, k, out);
    }
    for r in (0..ROWS).filter(|&r| alone[r]) {
        layout::put_q4(&BlockQ4::quantize(&x[r][..k]), r, out);
    }
}

/// All rows at once. Gives those that are to be done alone: with zeros.
#[inline(always)]
fn lanes<V: F32x16>(x: &[[f32; BLOCK]; ROWS], k: usize, out: &mut [u8]) -> [bool; ROWS] {
    let mut w = columns::<V>(x, k);
    let (mut most, mut least) = (V::splat(0.0), V::splat(f32::INFINITY));
    for w in &w[..k] {
        most = most.max(w.abs());
        least = least.min(w.abs());
    }
    let (top, mut lanes) = (V::splat(MAX), [0.0; ROWS]);
    most.div(top).store(&mut lanes);
    for r in 0..ROWS {
        out[4 * r..4 * r + 4].copy_from_slice(&lanes[r].to_le_bytes());
    }
    let inv = most.if_less(V::splat(TINY), V::splat(0.0), top.div(most));
    for (t, w) in w[..k].as_chunks_mut::<{ 2 * GROUP }>().0.iter_mut().enumerate() {
        for i in 0..2 * GROUP {
            w[i] = w[i].mul(inv);
        }
        let (low, high) = (array(w, 0), array(w, GROUP));
        let [(s0, m0), (s1, m1)] = [best(low), best(high)];
        let one = V::splat(1.0);
        let scales = integers(s1.sub(one).mul(V::splat(16.0)).add(s0.sub(one)));
        let mins = [integers(m0), integers(m1)];
        for r in 0..ROWS {
            out[64 + 16 * t + r] = scales[r] as u8;
            out[128 + 32 * t + 2 * r] = mins[0][r] as u8;
            out[128 + 32 * t + 2 * r + 1] = mins[1][r] as u8;
        }
        let (inv0, inv1) = (one.div(s0), one.div(s1));
        for j in 0..8 {
            let mut bytes = [one; 4];
            for i in 0..4 {
                let low = code(low[4 * j + i], inv0, m0);
                bytes[i] = code(high[4 * j + i], inv1, m1).mul(V::splat(16.0)).add(low);
            }
            let low = integers(bytes[1].mul(V::splat(256.0)).add(bytes[0]));
            let high = integers(bytes[3].mul(V::splat(256.0)).add(bytes[2]));
            let line: &mut [u8; 4 * ROWS] = array_mut(out, Q4_HEADER + 512 * t + 64 * j);
            for r in 0..ROWS {
                let four = low[r] & 0xffff | high[r] << 16;
                line[4 * r..4 * r + 4].copy_from_slice(&four.to_le_bytes());
            }
        }
    }
    least.store(&mut lanes);
    lanes.map(|least| least < TINY)
}

/// The first `k` numbers of each row, those of a column side by side.
#[inline(always)]
fn columns<V: F32x16>(x: &[[f32; BLOCK]; ROWS], k: usize) -> [V; BLOCK] {
    let mut w = [V::splat(0.0); BLOCK];
    for (i, w) in w[..k.next_multiple_of(ROWS)].as_chunks_mut::<ROWS>().0.iter_mut().enumerate() {
        for r in 0..ROWS {
            w[r] = V::load(array(&x[r], ROWS * i));
        }
        V::transpose(w);
    }
    w
}

/// Quantizes one block of 16 rows of `k` finite weights each to int5 or int6.
#[inline(always)]
pub(super) fn quantize_grouped<V: F32x16>(
    how: Grouped,
    x: &[[f32; BLOCK]; ROWS],
    k: usize,
    out: &mut [BlockGrouped; ROWS],
) {
    let (zero, one, half) = (V::splat(0.0), V::splat(1.0), -f32::from(how.signed()));
    let (bottom, top, half) = (V::splat(-half), V::splat(half - 1.0), V::splat(half));
    let w = columns::<V>(x, k);
    let mut most = zero;
    for w in &w[..k] {
        most = most.max(w.abs());
    }
    let (mut lanes, mut d) = ([0.0; ROWS], [1.0; ROWS]);
    most.store(&mut lanes);
    for r in 0..ROWS {
        let scale;
        (out[r], scale) = BlockGrouped::begun(how, lanes[r]);
        d[r] = scale.unwrap_or(1.0);
        lanes[r] = scale.map_or(0.0, |_| 1.0);
    }
    let (d, done) = (V::load(&d), lanes);
    for (u, w) in w[..k].chunks(how.unit()).enumerate() {
        let (mut lo, mut hi) = (zero, zero);
        for &w in w {
            (lo, hi) = (lo.min(w), hi.max(w));
        }
        let (lo, hi) = (zero.sub(lo), zero.sub(hi));
        let whole = lo.if_less(zero.sub(hi), hi, lo).div(half);
        let (mut least, mut found) = (V::splat(f32::INFINITY), one);
        for factor in FACTORS {
            let integer = whole.mul(V::splat(factor)).div(d).round();
            let integer = integer.max(V::splat(-MAX)).min(V::splat(MAX));
            let integer = integer.abs().if_less(one, one, integer);
            let s = integer.mul(d);
            let mut error = zero;
            for &w in w {
                let rest = w.sub(w.div(s).round().max(bottom).min(top).mul(s));
                error = error.add(rest.mul(rest));
            }
            found = error.if_less(least, integer, found);
            least = error.min(least);
        }
        let s = found.mul(d);
        found.store(&mut lanes);
        for r in (0..ROWS).filter(|&r| done[r] != 0.0) {
            out[r].s[u] = u16::from(lanes[r] as i8 as u8);
        }
        for (i, &w) in w.iter().enumerate() {
            let codes = integers(w.div(s).round().max(bottom).min(top).add(half));
            for r in (0..ROWS).filter(|&r| done[r] != 0.0) {
                out[r].q[u * how.unit() + i] = codes[r] as u8;
            }
        }
    }
}

/// Scale and offset of a group of each row, as the function of that name beside [`BlockQ4::quantize`].
#[inline(always)]
fn best<V: F32x16>(w: &[V; GROUP]) -> (V, V) {
    let (one, top) = (V::splat(1.0), V::splat(MAX));
    let (mut lo, mut hi) = (w[0], w[0]);
    for i in 1..GROUP {
        (lo, hi) = (lo.min(w[i]), hi.max(w[i]));
    }
    let span = hi.sub(lo).div(V::splat(15.0)).floor().add(one);
    let middle = V::splat(0.5).mul(lo.add(hi));
    let mut least = V::splat(f32::INFINITY);
    let mut found = (one, V::splat(0.0));
    for step in [-1.0, 0.0, 1.0] {
        let sc = span.add(V::splat(step)).sub(one).max(one).min(V::splat(16.0));
        let centre = V::splat(7.5).mul(sc).sub(middle).round();
        let inv = one.div(sc);
        // Sums in a tree 16-8-4-2-1.
        let mut rest = [one; 8];
        for i in 0..8 {
            let mut x = [one; 4];
            for n in 0..4 {
                let w = w[i + 8 * n];
                x[n] = code(w, inv, centre).mul(sc).sub(w);
            }
            rest[i] = x[0].add(x[2]).add(x[1].add(x[3]));
        }
        let mean = tree(rest).mul(V::splat(1.0 / GROUP as f32)).round();
        let mn = mean.max(V::splat(15.0).mul(sc).sub(top)).min(top);
        let mut squares = [one; 8];
        for i in 0..8 {
            let mut x = [one; 4];
            for n in 0..4 {
                let w = w[i + 8 * n];
                let e = code(w, inv, mn).mul(sc).sub(mn).sub(w);
                x[n] = e.mul(e);
            }
            squares[i] = x[0].add(x[2]).add(x[1].add(x[3]));
        }
        let error = tree(squares);
        found.0 = error.if_less(least, sc, found.0);
        found.1 = error.if_less(least, mn, found.1);
        least = error.min(least);
    }
    found
}

/// The nearest code.
#[inline(always)]
fn code<V: F32x16>(w: V, inv: V, mn: V) -> V {
    w.add(mn).mul(inv).round().max(V::splat(0.0)).min(V::splat(15.0))
}

#[inline(always)]
fn tree<V: F32x16>(x: [V; 8]) -> V {
    let four = [x[0].add(x[4]), x[1].add(x[5]), x[2].add(x[6]), x[3].add(x[7])];
    four[0].add(four[2]).add(four[1].add(four[3]))
}

/// Integers of magnitude below 2^16: the low 16 bits of each.
#[inline(always)]
fn integers<V: F32x16>(x: V) -> [u32; ROWS] {
    let mut lanes = [0.0; ROWS];
    x.add(V::splat(INTEGER)).store(&mut lanes);
    let mut out = [0; ROWS];
    for r in 0..ROWS {
        out[r] = lanes[r].to_bits();
    }
    out
}
