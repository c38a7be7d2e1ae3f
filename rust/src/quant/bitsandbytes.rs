//! bitsandbytes (Dettmers et al. 2022, 2023): 4 bits (NF4, FP4), and int8 ("LLM.int8").
//!
//! | tensor | holds |
//! |---|---|
//! | `weight` u8 `[n * k / 2, 1]` | codes, row-major, the first in the high nibble |
//! | `weight.quant_map` f32 `[16]` | what they stand for |
//! | `weight.absmax` f32 `[n * k / block]` | scales of `block` neighbours, counted through all rows |
//! | ... or u8, with `weight.nested_quant_map` f32 `[256]` and `weight.nested_absmax` f32 | codes of scales |
//! | `weight` i8 `[n, k]`, `SCB` f32 `[n]` | int8: 127 is the row's `SCB` |

use super::encoded::{Codes, Encoded, Floats, Groups, Scaling, Zeros};

/// 4 bits. All rows are one, since blocks go on from row to row: `numbers` are all of them.
pub fn nibbles<'a>(
    numbers: usize,
    weight: &'a [u8],
    map: &'a [u8],
    absmax: Floats<'a>,
    block: usize,
) -> Encoded<'a> {
    Encoded {
        k: numbers,
        first: 0,
        codes: Codes::Nibbles(weight, map),
        groups: Groups::Even(block),
        scales: Scaling { floats: absmax, rows: 1, down: 0, right: 1, times: 1.0 },
        zeros: Zeros::All(0),
    }
}

/// Int8.
pub fn llm_int8<'a>(k: usize, weight: &'a [u8], scb: &'a [u8]) -> Encoded<'a> {
    let scales =
        Scaling { floats: Floats::F32(scb), rows: 1, down: 1, right: 0, times: 1.0 / 127.0 };
    super::compressed::int8(k, weight, None, scales, k)
}
