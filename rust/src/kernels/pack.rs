//! Quantizing 16 rows of weights to int4 side by side: lane = row, so that nothing is summed across lanes. The
//! numbers are those of [`BlockQ4::quantize`], bit by bit; this only makes them faster.

use super::layout::{self, Q4_HEADER, ROWS};
use crate::quant::{BLOCK, BlockQ4, GROUP, MAX, TINY};

/// Quantizes one block of 16 rows of `k` finite weights each and packs it. `out` is as long as the block.
#[inline(always)]
pub(super) fn pack_q4(x: &[[f32; BLOCK]; ROWS], k: usize, out: &mut [u8]) {
    let whole = k.is_multiple_of(2 * GROUP);
    let mut w = [Lanes::ZERO; BLOCK];
    let (mut most, mut zero) = (Lanes::ZERO, [false; ROWS]);
    // Transposed 4 by 4: numbers that stand together are read together.
    for i in (0..k).step_by(4) {
        let i = apart(i);
        for r in (0..ROWS).step_by(4) {
            let r = apart(r);
            for c in 0..4 {
                for j in 0..4 {
                    w[i + c].0[r + j] = x[r + j][i + c];
                }
            }
        }
    }
    for i in 0..k {
        let i = apart(i);
        for r in 0..ROWS {
            zero[r] |= w[i].0[r] == 0.0;
        }
        most = most.max(w[i].abs());
    }
    let mut inv = Lanes::splat(MAX).div(most);
    let d = most.div(Lanes::splat(MAX));
    out[..Q4_HEADER].fill(0);
    for r in 0..ROWS {
        inv.0[r] = if most.0[r] < TINY { 0.0 } else { inv.0[r] };
        out[4 * r..4 * r + 4].copy_from_slice(&d.0[r].to_le_bytes());
    }
    let w = &mut w[..if whole { k } else { 0 }];
    for i in 0..w.len() {
        let i = apart(i);
        w[i] = w[i].mul(inv);
    }
    for (t, groups) in w.as_chunks::<{ 2 * GROUP }>().0.iter().enumerate() {
        let mut codes = [[[0i32; ROWS]; GROUP]; 2];
        for (half, group) in groups.as_chunks::<GROUP>().0.iter().enumerate() {
            let (sc, mn) = best(group);
            let reciprocal = Lanes::splat(1.0).div(sc);
            for i in 0..GROUP {
                let i = apart(i);
                let q = group[i].code(reciprocal, mn);
                for r in 0..ROWS {
                    codes[half][i][r] = q.0[r] as i32;
                }
            }
            for r in 0..ROWS {
                out[64 + 16 * t + r] |= (sc.0[r] as u8).wrapping_sub(1) << (4 * half);
                out[128 + 32 * t + 2 * r + half] = mn.0[r] as i8 as u8;
            }
        }
        for j in 0..8 {
            let j = apart(j);
            let mut line = [0i32; ROWS];
            for i in 0..4 {
                for r in 0..ROWS {
                    let (low, high) = (codes[0][4 * j + i][r], codes[1][4 * j + i][r]);
                    line[r] |= (low | high << 4) << (8 * i);
                }
            }
            let out = &mut out[Q4_HEADER + 512 * t + 64 * j..][..64];
            for r in 0..ROWS {
                out[4 * r..4 * r + 4].copy_from_slice(&line[r].to_le_bytes());
            }
        }
    }
    // What the specification treats apart: blocks that end in a group, and rows with zeros.
    for r in 0..ROWS {
        if !whole || zero[r] || most.0[r] < TINY {
            layout::put_q4(&BlockQ4::quantize(&x[r][..k]), r, out);
        }
    }
}

/// Scale and offset of a group of each row, as the function of that name beside [`BlockQ4::quantize`].
#[inline(always)]
fn best(w: &[Lanes; GROUP]) -> (Lanes, Lanes) {
    let (one, top) = (Lanes::splat(1.0), Lanes::splat(MAX));
    let (mut lo, mut hi) = (w[0], w[0]);
    for i in 1..GROUP {
        let i = apart(i);
        (lo, hi) = (lo.min(w[i]), hi.max(w[i]));
    }
    let span = hi.sub(lo).div(Lanes::splat(15.0)).floor().add(one);
    let middle = Lanes::splat(0.5).mul(lo.add(hi));
    let mut least = Lanes::splat(f32::INFINITY);
    let mut found = (one, Lanes::ZERO);
    for step in [-1.0, 0.0, 1.0] {
        let sc = span.add(Lanes::splat(step)).sub(one).max(one).min(Lanes::splat(16.0));
        let centre = Lanes::splat(7.5).mul(sc).sub(middle).round();
        let reciprocal = one.div(sc);
        let mut terms = [Lanes::ZERO; GROUP];
        for i in 0..GROUP {
            let i = apart(i);
            terms[i] = w[i].code(reciprocal, centre).mul(sc).sub(w[i]);
        }
        let mean = sum(&mut terms).div(Lanes::splat(GROUP as f32)).round();
        let mn = mean.max(Lanes::splat(15.0).mul(sc).sub(top)).min(top);
        for i in 0..GROUP {
            let i = apart(i);
            let e = w[i].code(reciprocal, mn).mul(sc).sub(mn).sub(w[i]);
            terms[i] = e.mul(e);
        }
        let error = sum(&mut terms);
        for r in 0..ROWS {
            let better = error.0[r] < least.0[r];
            least.0[r] = if better { error.0[r] } else { least.0[r] };
            found.0.0[r] = if better { sc.0[r] } else { found.0.0[r] };
            found.1.0[r] = if better { mn.0[r] } else { found.1.0[r] };
        }
    }
    found
}

/// The sum over a group, in a tree 16-8-4-2-1. Overwrites the terms.
#[inline(always)]
fn sum(terms: &mut [Lanes; GROUP]) -> Lanes {
    let mut n = GROUP / 2;
    while n > 0 {
        for i in 0..n {
            let i = apart(i);
            terms[i] = terms[i].add(terms[i + n]);
        }
        n /= 2;
    }
    terms[0]
}

/// `i`, without the compiler knowing: it would put several `i` into one vector, and gather.
#[inline(always)]
fn apart(i: usize) -> usize {
    #[cfg(all(any(target_arch = "x86_64", target_arch = "aarch64"), not(miri)))]
    {
        let mut i = i;
        // SAFETY: no instruction.
        unsafe {
            std::arch::asm!("/* {0} */", inout(reg) i, options(pure, nomem, nostack, preserves_flags))
        };
        i
    }
    #[cfg(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), not(miri))))]
    i
}

/// One number of each row.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Lanes([f32; ROWS]);

/// Functions of two numbers, lane by lane.
macro_rules! lanes {
    ($($name:ident = |$a:ident, $b:ident| $value:expr;)+) => {
        $(#[inline(always)]
        fn $name(self, other: Lanes) -> Lanes {
            let mut out = [0.0; ROWS];
            for r in 0..ROWS {
                let ($a, $b) = (self.0[r], other.0[r]);
                out[r] = $value;
            }
            Lanes(out)
        })+
    };
}

impl Lanes {
    const ZERO: Lanes = Lanes([0.0; ROWS]);

    #[inline(always)]
    fn splat(x: f32) -> Lanes {
        Lanes([x; ROWS])
    }

    lanes! {
        add = |a, b| a + b;
        sub = |a, b| a - b;
        mul = |a, b| a * b;
        div = |a, b| a / b;
        // Not those of f32, which take care of NaN.
        min = |a, b| if a < b { a } else { b };
        max = |a, b| if a > b { a } else { b };
    }

    #[inline(always)]
    fn abs(self) -> Lanes {
        let mut out = self.0;
        for r in 0..ROWS {
            out[r] = out[r].abs();
        }
        Lanes(out)
    }

    #[inline(always)]
    fn floor(self) -> Lanes {
        let mut out = self.0;
        for r in 0..ROWS {
            out[r] = out[r].floor();
        }
        Lanes(out)
    }

    /// To the nearest integer, ties to even.
    #[inline(always)]
    fn round(self) -> Lanes {
        let mut out = self.0;
        for r in 0..ROWS {
            out[r] = out[r].round_ties_even();
        }
        Lanes(out)
    }

    /// The nearest code.
    #[inline(always)]
    fn code(self, reciprocal: Lanes, mn: Lanes) -> Lanes {
        self.add(mn).mul(reciprocal).round().max(Lanes::ZERO).min(Lanes::splat(15.0))
    }
}
