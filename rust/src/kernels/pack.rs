//! Quantizing 16 rows of weights to int4 side by side: lane = row, so that nothing is summed across lanes. The
//! numbers are those of [`BlockQ4::quantize`], bit by bit; this only makes them faster.

use super::layout::{self, Q4_HEADER, ROWS};
use crate::quant::{BLOCK, BlockQ4, GROUP, MAX, TINY};

/// One number of each row.
type Lanes = [f32; ROWS];

/// Quantizes one block of 16 rows of `k` weights each and packs it. `out` is as long as the block.
#[inline(always)]
pub(super) fn pack_q4(x: &[[f32; BLOCK]; ROWS], k: usize, out: &mut [u8]) {
    let whole = k.is_multiple_of(2 * GROUP);
    let mut w = [[0.0; ROWS]; BLOCK];
    let (mut most, mut zero) = ([0.0f32; ROWS], [false; ROWS]);
    for i in 0..k {
        for r in 0..ROWS {
            w[i][r] = x[r][i];
            most[r] = most[r].max(x[r][i].abs());
            zero[r] |= x[r][i] == 0.0;
        }
    }
    out[..Q4_HEADER].fill(0);
    let mut inv = [0.0; ROWS];
    for r in 0..ROWS {
        inv[r] = if most[r] < TINY { 0.0 } else { MAX / most[r] };
        out[4 * r..4 * r + 4].copy_from_slice(&(most[r] / MAX).to_le_bytes());
    }
    if whole {
        for t in 0..k / (2 * GROUP) {
            let mut codes = [[[0; ROWS]; GROUP]; 2];
            for (half, codes) in codes.iter_mut().enumerate() {
                let mut group = [[0.0; ROWS]; GROUP];
                for i in 0..GROUP {
                    for r in 0..ROWS {
                        group[i][r] = w[2 * GROUP * t + GROUP * half + i][r] * inv[r];
                    }
                }
                let (sc, mn) = best(&group);
                let reciprocal = reciprocals(&sc);
                for i in 0..GROUP {
                    let q = nearest(&group[i], &reciprocal, &mn);
                    for r in 0..ROWS {
                        codes[i][r] = q[r] as i32;
                    }
                }
                for r in 0..ROWS {
                    let code = sc[r] as u8 - 1;
                    let byte = &mut out[64 + 16 * t + r];
                    *byte = if half == 0 { code } else { *byte | code << 4 };
                    out[128 + 32 * t + 2 * r + half] = mn[r] as i8 as u8;
                }
            }
            for j in 0..8 {
                let mut line = [0i32; ROWS];
                for i in 0..4 {
                    let (low, high) = (&codes[0][4 * j + i], &codes[1][4 * j + i]);
                    for r in 0..ROWS {
                        line[r] |= (low[r] | high[r] << 4) << (8 * i);
                    }
                }
                let out = &mut out[Q4_HEADER + 512 * t + 64 * j..][..64];
                for r in 0..ROWS {
                    out[4 * r..4 * r + 4].copy_from_slice(&line[r].to_le_bytes());
                }
            }
        }
    }
    // What the specification treats apart: blocks that end in a group, and rows with zeros.
    for r in 0..ROWS {
        if !whole || zero[r] || most[r] < TINY {
            layout::put_q4(&BlockQ4::quantize(&x[r][..k]), r, out);
        }
    }
}

/// Scale and offset of a group of each row, as the function of that name beside [`BlockQ4::quantize`].
#[inline(always)]
fn best(w: &[Lanes; GROUP]) -> (Lanes, Lanes) {
    let (mut lo, mut hi) = (w[0], w[0]);
    for i in 1..GROUP {
        for r in 0..ROWS {
            lo[r] = lo[r].min(w[i][r]);
            hi[r] = hi[r].max(w[i][r]);
        }
    }
    let mut least = [f32::INFINITY; ROWS];
    let mut found = ([1.0; ROWS], [0.0; ROWS]);
    for step in [-1.0, 0.0, 1.0] {
        let (mut sc, mut centre) = ([0.0; ROWS], [0.0; ROWS]);
        for r in 0..ROWS {
            let span = ((hi[r] - lo[r]) / 15.0).floor() + 1.0;
            sc[r] = (span + step - 1.0).clamp(1.0, 16.0);
            centre[r] = (7.5 * sc[r] - 0.5 * (lo[r] + hi[r])).round_ties_even();
        }
        let reciprocal = reciprocals(&sc);
        let mut rest = [[0.0; ROWS]; GROUP];
        for i in 0..GROUP {
            let q = nearest(&w[i], &reciprocal, &centre);
            for r in 0..ROWS {
                rest[i][r] = q[r] * sc[r] - w[i][r];
            }
        }
        let sum = sum(&mut rest);
        let mut mn = [0.0; ROWS];
        for r in 0..ROWS {
            let mean = (sum[r] / GROUP as f32).round_ties_even();
            mn[r] = mean.clamp(15.0 * sc[r] - MAX, MAX);
        }
        let mut squares = [[0.0; ROWS]; GROUP];
        for i in 0..GROUP {
            let q = nearest(&w[i], &reciprocal, &mn);
            for r in 0..ROWS {
                let e = q[r] * sc[r] - mn[r] - w[i][r];
                squares[i][r] = e * e;
            }
        }
        let error = self::sum(&mut squares);
        for r in 0..ROWS {
            let better = error[r] < least[r];
            least[r] = if better { error[r] } else { least[r] };
            found.0[r] = if better { sc[r] } else { found.0[r] };
            found.1[r] = if better { mn[r] } else { found.1[r] };
        }
    }
    found
}

#[inline(always)]
fn reciprocals(sc: &Lanes) -> Lanes {
    let mut out = [0.0; ROWS];
    for r in 0..ROWS {
        out[r] = 1.0 / sc[r];
    }
    out
}

/// The nearest code of one weight of each row.
#[inline(always)]
fn nearest(w: &Lanes, reciprocal: &Lanes, mn: &Lanes) -> Lanes {
    let mut q = [0.0; ROWS];
    for r in 0..ROWS {
        q[r] = ((w[r] + mn[r]) * reciprocal[r]).round_ties_even().clamp(0.0, 15.0);
    }
    q
}

/// The sum over a group, in a tree 16-8-4-2-1. Overwrites the terms.
#[inline(always)]
fn sum(terms: &mut [Lanes; GROUP]) -> Lanes {
    let mut n = GROUP / 2;
    while n > 0 {
        for i in 0..n {
            for r in 0..ROWS {
                terms[i][r] += terms[i + n][r];
            }
        }
        n /= 2;
    }
    terms[0]
}
