//! Weights that a packed form holds exactly: those of the grouped forms, and ternary blocks in the int4 form. Never
//! rounds.

use super::{NotFinite, Part, Parts};
use crate::kernels::{Form, layout};
use crate::quant::{BLOCK, BlockGrouped, BlockQ4, Blocks, GROUP, Grouped, Kept};
use layout::ROWS;

/// Whether `form` holds `parts` exactly; else they are quantized.
pub(super) fn holds(form: Form, parts: &Parts<'_>) -> bool {
    match form {
        Form::Grouped(_) | Form::GroupedFloat(_) => true,
        Form::Q4 => parts.parts.iter().all(|part| part.blocks.is_some_and(Blocks::is_ternary)),
        _ => false,
    }
}

/// Row block `rb` of `parts`, as they are.
pub(super) fn pack(
    form: Form,
    parts: &Parts<'_>,
    rb: usize,
    out: &mut [u8],
) -> Result<(), NotFinite> {
    match form {
        Form::Grouped(how) | Form::GroupedFloat(how) => {
            let read = |part: &Part<'_>, start, len| {
                let row = grouped(how, part, start, len);
                row.not_finite(how).map_or(Ok(row), Err)
            };
            let pack = |rows: &[_; ROWS], out: &mut [u8]| layout::pack_grouped(how, rows, out);
            each(form, parts, rb, out, BlockGrouped::ZERO, read, pack)
        }
        _ => each(form, parts, rb, out, BlockQ4::ZERO, ternary, layout::pack_q4),
    }
}

/// `read` gives up to [`BLOCK`] numbers of a part from one number on, or the place of one that is not finite.
fn each<B: Copy>(
    form: Form,
    parts: &Parts<'_>,
    rb: usize,
    out: &mut [u8],
    zero: B,
    read: impl Fn(&Part<'_>, usize, usize) -> Result<B, usize>,
    pack: impl Fn(&[B; ROWS], &mut [u8]),
) -> Result<(), NotFinite> {
    let mut done = 0;
    for b in (0..parts.k).step_by(BLOCK) {
        let len = BLOCK.min(parts.k - b);
        let mut rows = [zero; ROWS];
        for (r, row) in rows.iter_mut().enumerate() {
            let Some((p, i)) = parts.locate(rb * ROWS + r) else { continue };
            let part = &parts.parts[p];
            *row = read(part, i * part.row + b, len).map_err(|at| (p, i, b + at))?;
        }
        let bytes = form.row_block_bytes(len);
        pack(&rows, &mut out[done..done + bytes]);
        done += bytes;
    }
    Ok(())
}

fn grouped(how: Grouped, part: &Part<'_>, start: usize, len: usize) -> BlockGrouped {
    if let Some(blocks) = part.blocks {
        let (weights, bytes) = (blocks.weights(), blocks.bytes());
        let bytes = &part.bytes[start / weights * bytes..][..len / weights * bytes];
        return match (blocks.kept(), blocks.grouped(bytes)) {
            (Kept::Grouped(own), Some(row)) => row.joined(own, how),
            _ => BlockGrouped::ZERO, // the plan has looked
        };
    }
    // MXFP4 in two tensors.
    let mut row = BlockGrouped::ZERO;
    for (j, byte) in part.bytes[start / 2..][..len / 2].iter().enumerate() {
        (row.q[2 * j], row.q[2 * j + 1]) = (byte & 15, byte >> 4);
    }
    for (s, &e) in row.s.iter_mut().zip(&part.scales[start / GROUP..][..len / GROUP]) {
        *s = u16::from(e);
    }
    row
}

fn ternary(part: &Part<'_>, start: usize, _: usize) -> Result<BlockQ4, usize> {
    let blocks = part.blocks.unwrap_or(Blocks::TQ2_0); // `holds` has looked
    let bytes = &part.bytes[start / BLOCK * blocks.bytes()..][..blocks.bytes()];
    blocks.ternary(bytes).filter(|block| block.d.is_finite()).ok_or(0)
}
