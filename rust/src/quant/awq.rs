//! AWQ (Lin et al. 2023) as AutoAWQ's "gemm" version writes it: 4 bits.
//!
//! | tensor | holds |
//! |---|---|
//! | `qweight` i32 `[k, n / 8]` | codes, one word for 8 neighbours in a row, in the order below |
//! | `qzeros` i32 `[groups, n / 8]` | zero points, likewise |
//! | `scales` `[groups, n]` | |

use super::encoded::{Codes, Encoded, Floats, Groups, Scaling, Words, Zeros};

/// Nibbles 0 to 7 of a word are outputs 0, 2, 4, 6, 1, 3, 5, 7: the bit of each output.
const SHIFTS: [u8; 8] = [0, 16, 4, 20, 8, 24, 12, 28];

/// See above.
pub fn awq<'a>(
    (n, k): (usize, usize),
    qweight: &'a [u8],
    qzeros: &'a [u8],
    scales: Floats<'a>,
    group: usize,
) -> Encoded<'a> {
    let words = |bytes| Words {
        bytes,
        bits: 4,
        shifts: SHIFTS,
        tall: 3,
        down: 1,
        wide: 0,
        right: n.div_ceil(8),
    };
    Encoded {
        k,
        first: 0,
        codes: Codes::Words(words(qweight)),
        groups: Groups::Even(group),
        scales: Scaling { floats: scales, rows: 1, down: 1, right: n, times: 1.0 },
        zeros: Zeros::of(words(qzeros), 0),
    }
}
