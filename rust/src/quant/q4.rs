//! The int4 form: 4.5 bits a weight.

use super::{BLOCK, GROUP, GROUPS, MAX, TINY, amax};

/// One row's next [`BLOCK`] weights: `w[k] = d * w8(k)`, `w8(k) = sc[g] * q[k] - mn[g]`, `g = k / 32`.
///
/// Invariants: `q < 16`, `1 <= sc <= 16`, `|mn| <= 127`, `|w8| <= 127`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockQ4 {
    /// Scale of the block.
    pub d: f32,
    /// Integer scale of each group.
    pub sc: [u8; GROUPS],
    /// Integer offset of each group.
    pub mn: [i8; GROUPS],
    /// One code in each byte.
    pub q: [u8; BLOCK],
}

/// Group scales tried around the one that spans the group's range exactly. Smaller ones clip the
/// extremes and resolve the middle better; of the three tried, the least squared error wins.
const TRIED: [f32; 3] = [-1.0, 0.0, 1.0];

impl BlockQ4 {
    /// All weights zero.
    pub const ZERO: BlockQ4 = BlockQ4 { d: 0.0, sc: [1; GROUPS], mn: [0; GROUPS], q: [0; BLOCK] };

    /// Quantizes at most [`BLOCK`] finite weights; missing ones are zero.
    ///
    /// `d = amax / 127` makes a grid of int8 steps; in each group the scale and the offset on this
    /// grid are searched for the least squared error. On normally distributed weights
    /// that leaves a fifth less noise than Q4_0, which has as many bits (`tests.rs`); `benches/quality.py` measures
    /// models. A weight that is exactly zero, as pruning leaves them, stays so.
    #[inline(always)] // so that `kernels` compiles it for each instruction set
    pub fn quantize(x: &[f32]) -> BlockQ4 {
        let m = amax(x);
        if m < TINY {
            return BlockQ4::ZERO;
        }
        let zeros = x.contains(&0.0);
        let top = if zeros { WITH_ZERO } else { MAX };
        let inv = top / m;
        let mut block = BlockQ4 { d: m / top, ..BlockQ4::ZERO };
        for (g, x) in x.chunks(GROUP).enumerate() {
            let mut w = [0f32; GROUP];
            for (w, x) in w.iter_mut().zip(x) {
                *w = x * inv;
            }
            let (sc, mn) = best(&w, zeros && x.contains(&0.0));
            block.sc[g] = sc as u8;
            block.mn[g] = mn as i8;
            let codes = codes(&w, sc, mn);
            for (q, c) in block.q[g * GROUP..].iter_mut().zip(codes) {
                *q = c as u8;
            }
        }
        block
    }

    /// The exact int8 value of weight `k`.
    pub fn w8(&self, k: usize) -> i8 {
        let g = k / GROUP;
        (i16::from(self.sc[g]) * i16::from(self.q[k]) - i16::from(self.mn[g])) as i8
    }

    /// The weights as f32.
    pub fn dequantize(&self) -> [f32; BLOCK] {
        std::array::from_fn(|k| self.d * f32::from(self.w8(k)))
    }
}

/// The int8 value of the largest weight of a block with weights that are exactly zero: 7 steps of 15, so that zero and
/// both ends can be values of one group.
pub(super) const WITH_ZERO: f32 = 105.0;

/// The multiple of `sc`, at most 15, nearest to `mn` that leaves all codes in int8: zero is among the values then.
#[inline(always)]
pub(super) fn with_zero(sc: f32, mn: f32) -> f32 {
    // From -mn <= 127 and 15*sc - mn <= 127, for -mn = -q*sc with q in 0..=15.
    let (least, most) = ((15.0 - MAX / sc).ceil().max(0.0), (MAX / sc).floor().min(15.0));
    (mn / sc).round_ties_even().clamp(least, most) * sc
}

/// Scale and offset (integers) with the least squared error for a group on the int8 grid. `zeros`: zero must be among
/// the values.
#[inline(always)]
fn best(w: &[f32; GROUP], zeros: bool) -> (f32, f32) {
    let (lo, hi) = (fold(w, f32::min), fold(w, f32::max));
    let span = ((hi - lo) / 15.0).floor() + 1.0;
    let most = if zeros { 15.0 } else { 16.0 };
    let (mut least, mut found) = (f32::INFINITY, (1.0, 0.0));
    for step in TRIED {
        let sc = (span + step - 1.0).clamp(1.0, most);
        // Every code must stay in int8: -127 <= -mn and 15*sc - mn <= 127.
        let lowest = 15.0 * sc - MAX;
        // Centre the 16 codes on the range, then move the offset to the mean of what it left over.
        let centre = (7.5 * sc - 0.5 * (lo + hi)).round_ties_even();
        let q = codes(w, sc, centre);
        let mut rest = [0.0; GROUP];
        for i in 0..GROUP {
            rest[i] = q[i] * sc - w[i];
        }
        let mean = fold(&rest, |a, b| a + b) / GROUP as f32;
        let mn = mean.round_ties_even().clamp(lowest, MAX);
        let mn = if zeros { with_zero(sc, mn) } else { mn };
        let q = codes(w, sc, mn);
        let mut squares = [0.0; GROUP];
        for i in 0..GROUP {
            let e = q[i] * sc - mn - w[i];
            squares[i] = e * e;
        }
        let error = fold(&squares, |a, b| a + b);
        if error < least {
            (least, found) = (error, (sc, mn));
        }
    }
    found
}

/// The nearest code of each weight.
#[inline(always)]
fn codes(w: &[f32; GROUP], sc: f32, mn: f32) -> [f32; GROUP] {
    let inv = 1.0 / sc;
    let mut q = [0.0; GROUP];
    for i in 0..GROUP {
        // A loop: a closure handed to the standard library would miss the caller's CPU features.
        q[i] = ((w[i] + mn) * inv).round_ties_even().clamp(0.0, 15.0);
    }
    q
}

/// Combines 32 values in a tree (16, 8, 4, 2, 1), which a compiler may do in vectors.
#[inline(always)]
fn fold(w: &[f32; GROUP], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut a = *w;
    let mut n = GROUP / 2;
    while n > 0 {
        for i in 0..n {
            a[i] = f(a[i], a[i + n]);
        }
        n /= 2;
    }
    a[0]
}
