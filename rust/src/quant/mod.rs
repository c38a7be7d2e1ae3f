//! The canonical quantized forms of a weight, and the arithmetic that makes and reads them.
//! Scalar code without an instruction set, without I/O. `kernels::pack` brings these forms into the
//! order the kernels read.
//!
//! Two forms are int8 values with one f32 scale per row and [`BLOCK`] inputs, `w = d * w8`:
//!
//! | form | stored | bits per weight |
//! |---|---|---|
//! | [`BlockQ8`] | `w8` itself | 8.125 |
//! | [`BlockQ4`] | a nibble `q`, and per [`GROUP`] inputs a scale `sc` and an offset `mn`: `w8 = sc*q - mn` | 4.5 |
//!
//! An int4 weight therefore *is* an int8 weight, exactly. A dot product is an exact integer over one
//! block and one float step per block, whatever the instruction set, the batch or the phase.
//!
//! The third, [`BlockGrouped`], keeps the formats of checkpoints in 4 to 6 bits as they are: no integers of a block
//! could stand for a scale and an offset of each group. A dot product is an exact integer and a float step for each 32
//! or 16 inputs. Two of its forms, `int5` and `int6`, are made from floats, too.

mod awq;
mod bitsandbytes;
mod blocks;
mod compressed;
mod encode;
mod encoded;
mod feedback;
mod float8;
mod gptq;
mod grids;
mod grouped;
mod q4;
mod q8;

pub use awq::awq;
pub use bitsandbytes::{llm_int8, nibbles};
pub use blocks::{Blocks, Kept};
pub use compressed::{fp4, int8, nvfp4, packed};
pub use encoded::{Encoded, Floats, Groups, Scaling};
pub(crate) use feedback::FACTORS;
pub use feedback::Feedback;
pub use float8::float8;
pub use gptq::gptq;
pub(crate) use grouped::half_power;
pub use grouped::{BlockGrouped, Codes, Grouped, Offset, Scales, TWICE, UNEVEN, UNITS};
pub use q4::BlockQ4;
pub use q8::BlockQ8;

/// Inputs (k) that share one f32 scale, of weights and of activations.
pub const BLOCK: usize = 256;
/// Inputs that share one integer scale and offset in the int4 form.
pub const GROUP: usize = 32;
/// Groups of a block.
pub const GROUPS: usize = BLOCK / GROUP;
/// The largest magnitude of an int8 value, of weights and of activations. -128 is never used: its
/// absolute value has no int8.
pub const MAX: f32 = 127.0;
/// Blocks whose largest magnitude is below this become zeros, so that products of two scales stay
/// normal numbers.
pub const TINY: f32 = 1.0 / (1u128 << 80) as f32;

/// Largest magnitude of finite values.
#[inline(always)]
pub(crate) fn amax(x: &[f32]) -> f32 {
    // Sixteen running maxima, so that a compiler may use vectors; a maximum has no order. One instruction each, as
    // `f32::max` is not: what is not a number is not larger.
    let larger = |x: f32, m: f32| if x > m { x } else { m };
    let mut m = [0.0f32; 16];
    let (chunks, rest) = x.as_chunks::<16>();
    for x in chunks {
        for i in 0..16 {
            m[i] = larger(x[i].abs(), m[i]);
        }
    }
    for (m, x) in m.iter_mut().zip(rest) {
        *m = larger(x.abs(), *m);
    }
    m.into_iter().fold(0.0, larger)
}

#[cfg(test)]
mod tests;
