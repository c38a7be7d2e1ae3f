//! Sixteen f32 side by side: the one vector type the float kernels are written in. Each instruction set
//! implements it with its own registers; every operation is one IEEE operation per lane, so all
//! implementations give the same bits.

use half::{bf16, f16};

/// Sixteen lanes of f32.
pub(super) trait F32x16: Copy {
    /// Whether the CPU has registers for a tile of 16 of these (else a tile of 4 is used).
    const WIDE: bool;

    fn splat(x: f32) -> Self;
    fn load(x: &[f32; 16]) -> Self;
    fn load_f16(x: &[u16; 16]) -> Self;
    fn load_bf16(x: &[u16; 16]) -> Self;
    fn load_i8(x: &[i8; 16]) -> Self;
    /// `table[i]` in each lane; `i < 16`.
    fn lookup(table: &[f32; 16], i: &[u32; 16]) -> Self;
    fn store(self, out: &mut [f32; 16]);
    /// Rounds to nearest, ties to even.
    fn store_f16(self, out: &mut [u16; 16]);
    /// `self * a + b` with one rounding.
    fn fma(self, a: Self, b: Self) -> Self;
    fn mul(self, a: Self) -> Self;
    fn add(self, a: Self) -> Self;
    fn sub(self, a: Self) -> Self;
    fn div(self, a: Self) -> Self;
    /// The smaller; of numbers that are no NaN.
    fn min(self, a: Self) -> Self;
    /// The larger; of numbers that are no NaN.
    fn max(self, a: Self) -> Self;
    fn abs(self) -> Self;
    fn floor(self) -> Self;
    /// To the nearest integer, ties to even.
    fn round(self) -> Self;
    /// `yes` where `self < a`, else `no`.
    fn if_less(self, a: Self, yes: Self, no: Self) -> Self;
    /// Lane `j` of vector `i` becomes lane `i` of vector `j`.
    fn transpose(x: &mut [Self; 16]);
    /// Asks for the line at an address, any address, into L2. Speed only.
    fn prefetch(_: *const u8) {}
}

/// Functions of two numbers, lane by lane.
macro_rules! each {
    ($($name:ident = |$x:ident, $a:ident| $value:expr;)+) => {
        $(#[inline(always)]
        fn $name(self, a: Self) -> Self {
            let mut out = self;
            for i in 0..16 {
                let ($x, $a) = (self.0[i], a.0[i]);
                out.0[i] = $value;
            }
            out
        })+
    };
}

/// The specification of [`F32x16`].
#[derive(Clone, Copy)]
pub(super) struct Lanes([f32; 16]);

impl F32x16 for Lanes {
    const WIDE: bool = false;

    fn splat(x: f32) -> Self {
        Lanes([x; 16])
    }
    fn load(x: &[f32; 16]) -> Self {
        Lanes(*x)
    }
    fn load_f16(x: &[u16; 16]) -> Self {
        Lanes(x.map(|x| f16::from_bits(x).to_f32()))
    }
    fn load_bf16(x: &[u16; 16]) -> Self {
        Lanes(x.map(|x| bf16::from_bits(x).to_f32()))
    }
    fn load_i8(x: &[i8; 16]) -> Self {
        Lanes(x.map(f32::from))
    }
    fn lookup(table: &[f32; 16], i: &[u32; 16]) -> Self {
        Lanes(i.map(|i| table[i as usize]))
    }
    fn store(self, out: &mut [f32; 16]) {
        *out = self.0;
    }
    fn store_f16(self, out: &mut [u16; 16]) {
        *out = self.0.map(|x| f16::from_f32(x).to_bits());
    }
    fn fma(self, a: Self, b: Self) -> Self {
        Lanes(std::array::from_fn(|i| self.0[i].mul_add(a.0[i], b.0[i])))
    }
    each! {
        mul = |x, a| x * a;
        add = |x, a| x + a;
        sub = |x, a| x - a;
        div = |x, a| x / a;
        // Not those of f32, which take care of NaN.
        min = |x, a| if x < a { x } else { a };
        max = |x, a| if x > a { x } else { a };
    }
    #[inline(always)]
    fn abs(self) -> Self {
        Lanes(self.0.map(f32::abs))
    }
    #[inline(always)]
    fn floor(self) -> Self {
        Lanes(self.0.map(f32::floor))
    }
    #[inline(always)]
    fn round(self) -> Self {
        Lanes(self.0.map(f32::round_ties_even))
    }
    #[inline(always)]
    fn if_less(self, a: Self, yes: Self, no: Self) -> Self {
        Lanes(std::array::from_fn(|i| if self.0[i] < a.0[i] { yes.0[i] } else { no.0[i] }))
    }
    #[inline(always)]
    fn transpose(x: &mut [Self; 16]) {
        *x = std::array::from_fn(|j| Lanes(x.map(|x| x.0[j])));
    }
}
