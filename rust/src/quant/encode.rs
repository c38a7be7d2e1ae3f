//! f32 -> the blocks of ggml's types that are made of a scale (and an offset) and codes. Each scale is the best of some,
//! each offset beside it the one of least squares, both as f16, and codes are the nearest: the square of the error is
//! what counts. Never reads a block; what it makes, [`Blocks::decode`] reads.

use super::{Blocks, UNEVEN, amax};
use half::f16;

/// Scales that are tried, each way.
const TRIES: i32 = 9;

impl Blocks {
    /// Types that [`Blocks::encode`] makes.
    pub const MADE: [Blocks; 9] = [
        Blocks::Q8_0,
        Blocks::Q4_0,
        Blocks::Q4_1,
        Blocks::Q5_0,
        Blocks::Q5_1,
        Blocks::Q4_K,
        Blocks::Q5_K,
        Blocks::Q6_K,
        Blocks::IQ4_NL,
    ];

    /// Makes blocks of finite numbers, as many as make whole ones; `out` is as long as they are. False: some number is too
    /// large for a scale in f16. Panics for other types than those of [`Blocks::MADE`].
    pub fn encode(self, x: &[f32], out: &mut [u8]) -> bool {
        out.fill(0);
        let blocks = x.chunks_exact(self.weights()).zip(out.chunks_exact_mut(self.bytes()));
        blocks.into_iter().all(|(x, b)| match self {
            Blocks::Q8_0 => q8_0(x, b),
            Blocks::Q4_0 => signed(x, b, 8),
            Blocks::Q5_0 => signed(x, b, 16),
            Blocks::Q4_1 => offset(x, b, 15),
            Blocks::Q5_1 => offset(x, b, 31),
            Blocks::IQ4_NL => uneven(x, b),
            Blocks::Q4_K => minima(x, b, 15),
            Blocks::Q5_K => minima(x, b, 31),
            Blocks::Q6_K => q6_k(x, b),
            _ => unreachable!("{} is not made", self.name()),
        })
    }
}

/// Sets code `i` where `run` bytes hold the lowest bits of as many codes, then the next bits of the next.
fn put(b: &mut [u8], run: usize, bits: usize, i: usize, q: u8) {
    let (slot, within) = (i / run, i % run);
    let slots = 8 / bits;
    b[slot / slots * run + within] |= (q & ((1 << bits) - 1)) << (bits * (slot % slots));
}

/// Rounded to f16; false if that overflows.
fn half(x: f32, out: &mut [u8]) -> (f32, bool) {
    let x = f16::from_f32(x);
    out.copy_from_slice(&x.to_le_bytes());
    (x.to_f32(), x.is_finite())
}

fn rounded(x: f32) -> f32 {
    f16::from_f32(x).to_f32()
}

/// The nearest of the whole numbers from `low` to `high`.
fn whole(x: f32, low: f32, high: f32) -> f32 {
    x.round_ties_even().clamp(low, high)
}

/// `1 / d`, or 0 where that overflows: all codes are those of 0 then.
fn inverse(d: f32) -> f32 {
    let inverse = 1.0 / d;
    if inverse.is_finite() { inverse } else { 0.0 }
}

/// The scale `d`, as `round` has it, with the least square error of `d * near(x / d)`. `top` is the level of the largest
/// magnitude; scales for `step` more or less than that, and so on, are tried, of either sign.
fn scale(
    x: &[f32],
    (top, step): (f32, f32),
    round: fn(f32) -> f32,
    near: impl Fn(f32) -> f32,
) -> f32 {
    let most = amax(x);
    if most == 0.0 {
        return 0.0;
    }
    let (mut best, mut least) = (f32::INFINITY, f32::INFINITY); // what overflows is found by no comparison
    for more in -TRIES..=TRIES {
        for sign in [1.0, -1.0] {
            let inv = inverse(sign * most / (top + step * more as f32));
            let (mut xq, mut qq) = (0.0f32, 0.0f32);
            for x in x {
                let q = near(x * inv);
                xq += x * q;
                qq += q * q;
            }
            if qq == 0.0 {
                continue;
            }
            let d = round(xq / qq);
            let inv = inverse(d);
            let error = x.iter().fold(0.0f32, |sum, x| {
                let e = d * near(x * inv) - x;
                e.mul_add(e, sum)
            });
            if error < least {
                (best, least) = (d, error);
            }
        }
    }
    best
}

fn q8_0(x: &[f32], b: &mut [u8]) -> bool {
    let (d, fits) = half(amax(x) / 127.0, &mut b[..2]);
    let inv = inverse(d);
    for (b, x) in b[2..].iter_mut().zip(x) {
        *b = whole(x * inv, -127.0, 127.0) as i8 as u8;
    }
    fits
}

/// Codes of 4 or 5 bits from `-top` on.
fn signed(x: &[f32], b: &mut [u8], top: u8) -> bool {
    let (low, high) = (-f32::from(top), f32::from(top) - 1.0);
    let (d, fits) = half(scale(x, (-low, 0.1), rounded, |x| whole(x, low, high)), &mut b[..2]);
    let inv = inverse(d);
    codes(&mut b[2..], top == 16, |i| (whole(x[i] * inv, low, high) - low) as u8);
    fits
}

/// 32 codes of 4 bits, or of 5, whose highest bits come first.
fn codes(b: &mut [u8], five: bool, code: impl Fn(usize) -> u8) {
    let (high, low) = b.split_at_mut(if five { 4 } else { 0 });
    for i in 0..32 {
        let q = code(i);
        put(low, 16, 4, i, q);
        if five {
            high[i / 8] |= (q >> 4) << (i % 8);
        }
    }
}

fn uneven(x: &[f32], b: &mut [u8]) -> bool {
    let nearest = |x: f32| {
        let above = UNEVEN.partition_point(|level| f32::from(*level) < x).clamp(1, 15);
        let (low, high) = (f32::from(UNEVEN[above - 1]), f32::from(UNEVEN[above]));
        if x - low <= high - x { above - 1 } else { above }
    };
    let top = f32::from(UNEVEN[0]).abs();
    let d = scale(x, (top, 1.6), rounded, |x| f32::from(UNEVEN[nearest(x)]));
    let (d, fits) = half(d, &mut b[..2]);
    let inv = inverse(d);
    codes(&mut b[2..], false, |i| nearest(x[i] * inv) as u8);
    fits
}

/// Scale `d` and offset `m` of `d * q + m` with the least square error, `q` from 0 to `top`; both as `round` has them.
fn affine(x: &[f32], top: f32, round: fn(f32) -> f32, most: f32) -> (f32, f32) {
    let (low, high) =
        x.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), x| (l.min(*x), h.max(*x)));
    let (low, high) = (low.min(most), high.max(low.min(most)));
    if low == high {
        return (0.0, round(low));
    }
    let n = x.len() as f32;
    let (mut best, mut least) = ((f32::INFINITY, 0.0), f32::INFINITY);
    for step in -TRIES..=TRIES {
        let inv = inverse((high - low) / (top + 0.1 * step as f32));
        let (mut q1, mut q2, mut x1, mut xq) = (0.0f32, 0.0f32, 0.0f32, 0.0f32);
        for x in x {
            let q = whole((x - low) * inv, 0.0, top);
            (q1, q2, x1, xq) = (q1 + q, q.mul_add(q, q2), x1 + x, x.mul_add(q, xq));
        }
        let spread = n * q2 - q1 * q1;
        let (mut d, mut m) = ((n * xq - x1 * q1) / spread, (q2 * x1 - q1 * xq) / spread);
        if spread <= 0.0 || m > most {
            m = if spread > 0.0 { most } else { low }; // an offset that can't be, or one code for all
            d = if q2 > 0.0 { (xq - m * q1) / q2 } else { 0.0 };
        }
        let (d, m) = (round(d), round(m));
        let error = affine_error(x, d, m, top);
        if error < least {
            (best, least) = ((d, m), error);
        }
    }
    best
}

fn affine_error(x: &[f32], d: f32, m: f32, top: f32) -> f32 {
    let inv = inverse(d);
    x.iter().fold(0.0f32, |sum, x| {
        let e = whole((x - m) * inv, 0.0, top).mul_add(d, m) - x;
        e.mul_add(e, sum)
    })
}

fn offset(x: &[f32], b: &mut [u8], top: u8) -> bool {
    let top = f32::from(top);
    let (d, m) = affine(x, top, rounded, f32::INFINITY);
    let ((d, first), (m, second)) = (half(d, &mut b[..2]), half(m, &mut b[2..4]));
    let inv = inverse(d);
    codes(&mut b[4..], top == 31.0, |i| whole((x[i] - m) * inv, 0.0, top) as u8);
    first && second
}

/// Q4_K and Q5_K: of each 32 a scale and a minimum that is subtracted, both of 6 bits.
fn minima(x: &[f32], b: &mut [u8], top: u8) -> bool {
    let limit = f32::from(top);
    let groups = x.as_chunks::<32>().0;
    let found: Vec<(f32, f32)> = groups.iter().map(|x| affine(x, limit, |x| x, 0.0)).collect();
    let largest = |of: fn(&(f32, f32)) -> f32| found.iter().map(of).fold(0.0, f32::max);
    let (d, first) = half(largest(|f| f.0) / 63.0, &mut b[..2]);
    let (dmin, second) = half(largest(|f| -f.1) / 63.0, &mut b[2..4]);
    for (g, (x, (s, m))) in groups.iter().zip(&found).enumerate() {
        // The nearest of each, and their neighbours.
        let (sc, mn) = (whole(s * inverse(d), 0.0, 63.0), whole(-m * inverse(dmin), 0.0, 63.0));
        let (mut best, mut least) = ((sc, mn), f32::INFINITY);
        for sc in [sc, sc - 1.0, sc + 1.0].into_iter().filter(|s| (0.0..=63.0).contains(s)) {
            for mn in [mn, mn - 1.0, mn + 1.0].into_iter().filter(|m| (0.0..=63.0).contains(m)) {
                let error = affine_error(x, d * sc, -(dmin * mn), limit);
                if error < least {
                    (best, least) = ((sc, mn), error);
                }
            }
        }
        let (sc, mn) = best;
        let (inv, m) = (inverse(d * sc), dmin * mn);
        let (s, n) = (sc as u8, mn as u8);
        if g < 4 {
            b[4 + g] |= s;
            b[8 + g] |= n;
        } else {
            b[8 + g] = s & 15 | n << 4;
            b[g] |= s >> 4 << 6;
            b[4 + g] |= n >> 4 << 6;
        }
        for (i, x) in x.iter().enumerate() {
            let q = whole((x + m) * inv, 0.0, limit) as u8;
            match top {
                15 => put(&mut b[16..], 32, 4, 32 * g + i, q),
                _ => {
                    put(&mut b[48..], 32, 4, 32 * g + i, q);
                    put(&mut b[16..], 32, 1, 32 * g + i, q >> 4);
                }
            }
        }
    }
    first && second
}

/// Of each 16 a scale of 8 bits.
fn q6_k(x: &[f32], b: &mut [u8]) -> bool {
    let near = |x: f32| whole(x, -32.0, 31.0);
    let groups = x.as_chunks::<16>().0;
    let found: Vec<f32> = groups.iter().map(|x| scale(x, (32.0, 0.1), |d| d, near)).collect();
    let largest = found.iter().fold(0.0f32, |m, s| if s.abs() > m.abs() { *s } else { m });
    // The largest has the code of the largest magnitude, -128.
    let (d, fits) = half(largest / -128.0, &mut b[208..]);
    for (g, (x, s)) in groups.iter().zip(&found).enumerate() {
        let s = whole(s * inverse(d), -128.0, 127.0);
        let (mut best, mut least) = (s, f32::INFINITY);
        for s in [s, s - 1.0, s + 1.0].into_iter().filter(|s| (-128.0..=127.0).contains(s)) {
            let inv = inverse(d * s);
            let error = x.iter().fold(0.0f32, |sum, x| {
                let e = d * s * near(x * inv) - x;
                e.mul_add(e, sum)
            });
            if error < least {
                (best, least) = (s, error);
            }
        }
        b[192 + g] = best as i8 as u8;
        let inv = inverse(d * best);
        for (i, x) in x.iter().enumerate() {
            let (i, q) = (16 * g + i, (near(x * inv) + 32.0) as u8);
            put(b, 64, 4, i, q);
            put(&mut b[128..192], 32, 2, i, q >> 4);
        }
    }
    fits
}

#[cfg(test)]
mod tests {
    use super::super::BLOCK;
    use super::*;

    /// Noise as of a normal distribution, and as many rows of what is not like it.
    fn rows() -> Vec<[f32; BLOCK]> {
        let mut seed = 1u64;
        let mut uniform = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
            (seed >> 40) as f32 / (1 << 24) as f32
        };
        let mut rows = Vec::new();
        for _ in 0..64 {
            rows.push(std::array::from_fn(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0));
        }
        rows.push([0.0; BLOCK]);
        rows.push([3.0; BLOCK]);
        rows.push([-1e-9; BLOCK]);
        rows.push(std::array::from_fn(|i| if i == 77 { 4000.0 } else { 0.001 }));
        rows.push(std::array::from_fn(|i| -1.0 - i as f32));
        rows
    }

    fn decoded(blocks: Blocks, x: &[f32]) -> Option<Vec<f32>> {
        let mut bytes = vec![0xff; x.len() / blocks.weights() * blocks.bytes()];
        let fits = blocks.encode(x, &mut bytes);
        let mut out = vec![0.0; x.len()];
        blocks.decode(&bytes, &mut out);
        fits.then_some(out)
    }

    fn error(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    }

    /// The noise in normally distributed weights: no more than so much of their power. What ggml's plain quantizers
    /// leave stands beside it (llama-quantize's types over the same rows, measured with the package gguf where it has one).
    #[test]
    fn noise_is_small() {
        let limits: [f64; 9] =
            [2.8e-5, 0.0063, 0.0048, 0.0016, 0.0012, 0.0049, 0.0012, 0.0003, 0.0058];
        let rows = rows();
        for (blocks, limit) in Blocks::MADE.into_iter().zip(limits) {
            let (mut off, mut power) = (0.0, 0.0);
            for row in &rows[..64] {
                off += error(&decoded(blocks, row).unwrap(), row);
                power += error(row, &[0.0; BLOCK]);
            }
            println!("{}: {:.6}", blocks.name(), off / power);
            assert!(off / power < limit, "{}: {}", blocks.name(), off / power);
        }
    }

    /// What a block says is said again, but for a little where scales have codes.
    #[test]
    fn what_a_block_says_is_said_again() {
        for blocks in Blocks::MADE {
            let part =
                if blocks.weights() == BLOCK || blocks == Blocks::IQ4_NL { 5e-4 } else { 1e-12 };
            for row in rows() {
                let once = decoded(blocks, &row).unwrap();
                assert!(once.iter().all(|x| x.is_finite()), "{}", blocks.name());
                let again = error(&decoded(blocks, &once).unwrap(), &once);
                let power = error(&once, &[0.0; BLOCK]);
                assert!(again <= part * power, "{}: {again} of {power}", blocks.name());
            }
        }
    }

    #[test]
    fn numbers_beyond_a_scale_are_told() {
        for blocks in Blocks::MADE {
            assert!(decoded(blocks, &[3e9; BLOCK]).is_none(), "{}", blocks.name());
        }
    }
}
