//! GPTQ (Frantar et al. 2023) as AutoGPTQ and GPTQModel write it, for 4 and 8 bits.
//!
//! | tensor | holds |
//! |---|---|
//! | `qweight` i32 `[k / (32 / bits), n]` | codes, one word for neighbours in a column, the first in the lowest bits |
//! | `qzeros` i32 `[groups, n / (32 / bits)]` | zero points, one word for neighbours in a row; one less than they are, but in `gptq_v2` |
//! | `scales` `[groups, n]` | |
//! | `g_idx` i32 `[k]` | the group of each input, wherever it lies: "act-order" |

use super::encoded::{Codes, Encoded, Floats, Groups, Scaling, Words, Zeros};

/// See above. `v2`: zero points are stored as they are.
pub fn gptq<'a>(
    bits: u32,
    v2: bool,
    (n, k): (usize, usize),
    qweight: &'a [u8],
    qzeros: &'a [u8],
    scales: Floats<'a>,
    groups: Groups<'a>,
) -> Encoded<'a> {
    let shifts = Words::ascending(bits);
    let several = (32 / bits).ilog2();
    let words = Words { bytes: qweight, bits, shifts, tall: 0, down: 1, wide: several, right: n };
    let zeros = n.div_ceil(32 / bits as usize);
    let zeros =
        Words { bytes: qzeros, bits, shifts, tall: several, down: 1, wide: 0, right: zeros };
    Encoded {
        k,
        first: 0,
        codes: Codes::Words(words),
        groups,
        scales: Scaling { floats: scales, rows: 1, down: 1, right: n, times: 1.0 },
        zeros: Zeros::of(zeros, if v2 { 0 } else { 1 }),
    }
}
