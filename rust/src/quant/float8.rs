//! FP8 E4M3 without infinities (Micikevicius et al. 2022; torch's `float8_e4m3fn`): a byte for each weight, and scales
//! that multiply, also where they are called `weight_scale_inv`.

use super::encoded::{Codes, Encoded, Groups, Scaling, Zeros};

/// The value of each byte: a sign, four bits of exponent, three of mantissa; all ones is "not a number".
pub(super) const E4M3: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut byte = 0;
    while byte < 256 {
        let (exponent, mantissa) = ((byte >> 3) & 15, (byte & 7) as f32);
        let magnitude = match exponent {
            0 => mantissa / 512.0,
            _ if byte & 127 == 127 => f32::NAN,
            _ => (8.0 + mantissa) / 1024.0 * (1u32 << exponent) as f32,
        };
        values[byte] = if byte < 128 { magnitude } else { -magnitude };
        byte += 1;
    }
    values
};

/// Bytes `[n, k]`, with one scale for each `group` columns.
pub fn float8<'a>(k: usize, weight: &'a [u8], scales: Scaling<'a>, group: usize) -> Encoded<'a> {
    Encoded {
        k,
        first: 0,
        codes: Codes::Float8(weight),
        groups: Groups::Even(group),
        scales,
        zeros: Zeros::All(0),
    }
}
