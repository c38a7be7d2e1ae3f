//! compressed-tensors (llm-compressor): integers, `pack-quantized` of 4 and 8 bits and int8 bytes; MXFP4; NVFP4, also ModelOpt's.
//!
//! | tensor | holds |
//! |---|---|
//! | `weight_packed` i32 `[n, k / (32 / bits)]` | codes plus half their range, neighbours in a row, the first in the lowest bits |
//! | `weight_zero_point` i32 `[n / (32 / bits), groups]` | likewise, neighbours in a column |
//! | `weight` i8 `[n, k]`, `weight_zero_point` i8 like the scales | `int-quantized`: as they are |
//! | `weight_scale` `[n, groups]` | or of another spread: see [`Scaling`] |
//! | `weight_packed` u8 `[n, k / 2]`, `weight_scale` u8 `[n, k / 32]` | MXFP4: codes, the first in the low nibble; exponents |
//! | `weight_packed` u8 `[n, k / 2]`, `weight_scale` e4m3 `[n, k / 16]`, `weight_global_scale` f32 | NVFP4: the same; scales, divided by that of the matrix |
//! | `weight` u8 `[n, k / 2]`, `weight_scale` e4m3 `[n, k / 16]`, `weight_scale_2` f32 | ModelOpt's: the same, times that of the matrix |

use super::encoded::{Codes, Encoded, Floats, Groups, Scaling, Words, Zeros};
use super::{GROUP, Grouped};

/// `pack-quantized`. `count`: groups.
pub fn packed<'a>(
    bits: u32,
    k: usize,
    weight_packed: &'a [u8],
    zero_point: Option<&'a [u8]>,
    count: usize,
    scales: Scaling<'a>,
    groups: Groups<'a>,
) -> Encoded<'a> {
    let shifts = Words::ascending(bits);
    let (each, several) = (32 / bits as usize, (32 / bits).ilog2());
    let down = k.div_ceil(each);
    let words =
        Words { bytes: weight_packed, bits, shifts, tall: 0, down, wide: several, right: 1 };
    let zeros =
        |bytes| Words { bytes, bits, shifts, tall: several, down: count, wide: 0, right: 1 };
    Encoded {
        k,
        first: 0,
        codes: Codes::Words(words),
        groups,
        scales,
        zeros: match zero_point {
            Some(bytes) => Zeros::of(zeros(bytes), 0), // both have the same half range more
            None => Zeros::All(1 << (bits - 1)),
        },
    }
}

/// `int-quantized`.
pub fn int8<'a>(
    k: usize,
    weight: &'a [u8],
    zero_point: Option<&'a [u8]>,
    scales: Scaling<'a>,
    group: usize,
) -> Encoded<'a> {
    let zeros = zero_point.map_or(Zeros::All(0), Zeros::Int8);
    Encoded { k, first: 0, codes: Codes::Int8(weight), groups: Groups::Even(group), scales, zeros }
}

/// `mxfp4-pack-quantized`.
pub fn fp4<'a>(k: usize, weight_packed: &'a [u8], scale: &'a [u8]) -> Encoded<'a> {
    let floats = Floats::Power(scale);
    Encoded {
        k,
        first: 0,
        codes: Codes::Fp4(weight_packed),
        groups: Groups::Even(GROUP),
        scales: Scaling { floats, rows: 1, down: k.div_ceil(GROUP), right: 1, times: 1.0 },
        zeros: Zeros::All(0),
    }
}

/// NVFP4. `times`: the scale of the matrix.
pub fn nvfp4<'a>(k: usize, codes: &'a [u8], scale: &'a [u8], times: f32) -> Encoded<'a> {
    let group = Grouped::NVFP4.group;
    let floats = Floats::Float8(scale);
    Encoded {
        k,
        first: 0,
        codes: Codes::Fp4(codes),
        groups: Groups::Even(group),
        scales: Scaling { floats, rows: 1, down: k.div_ceil(group), right: 1, times },
        zeros: Zeros::All(0),
    }
}
