//! Weights that a packed form holds exactly: those of the grouped forms; ternary blocks, and int4 with one scale for
//! each 256 inputs or more, in the int4 form; int8 with such scales in the int8 form. Never rounds, but for int8's -128.

use super::{NotFinite, Part, Parts};
use crate::kernels::{Form, layout};
use crate::quant::{BLOCK, BlockGrouped, BlockQ4, BlockQ8, Blocks, Encoded, GROUP, Grouped, Kept};
use layout::ROWS;

/// Whether `form` holds `parts` exactly; else they are quantized.
pub(super) fn holds(form: Form, parts: &Parts<'_>) -> bool {
    match form {
        // Made from floats, too.
        Form::INT5 | Form::INT6 => parts.parts.iter().all(|part| {
            part.blocks.is_some_and(|blocks| match (blocks.kept(), form) {
                (Kept::Grouped(own), Form::Grouped(how)) => own == how,
                _ => false,
            })
        }),
        Form::Grouped(_) | Form::GroupedFloat(_) => true,
        Form::Q4 => parts.parts.iter().all(|part| {
            part.blocks.is_some_and(Blocks::is_ternary)
                || whole_rows(part, parts.k).is_some_and(Encoded::fits_q4)
        }),
        Form::Q8 => {
            parts.parts.iter().all(|part| whole_rows(part, parts.k).is_some_and(Encoded::fits_q8))
        }
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
        Form::Q8 => each(form, parts, rb, out, BlockQ8::ZERO, int8, layout::pack_q8),
        _ => each(form, parts, rb, out, BlockQ4::ZERO, int4, layout::pack_q4),
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
    if let Some(encoded) = part.encoded {
        let row = encoded.grouped(start, len);
        return match encoded.kept() {
            Kept::Grouped(own) => row.joined(own, how),
            _ => row,
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

/// The matrix that a part consists of rows of, if it does.
fn whole_rows<'p>(part: &'p Part<'_>, k: usize) -> Option<&'p Encoded<'p>> {
    let whole =
        |e: &&Encoded<'_>| e.k == k && part.row.is_multiple_of(k) && e.first.is_multiple_of(k);
    part.encoded.as_ref().filter(whole).filter(|_| part.column == 1)
}

fn int8(part: &Part<'_>, start: usize, len: usize) -> Result<BlockQ8, usize> {
    part.encoded.and_then(|e| e.q8(start, len)).ok_or(0)
}

fn int4(part: &Part<'_>, start: usize, len: usize) -> Result<BlockQ4, usize> {
    if let Some(encoded) = part.encoded {
        return encoded.q4(start, len).ok_or(0);
    }
    let blocks = part.blocks.unwrap_or(Blocks::TQ2_0); // `holds` has looked
    let bytes = &part.bytes[start / BLOCK * blocks.bytes()..][..blocks.bytes()];
    blocks.ternary(bytes).filter(|block| block.d.is_finite()).ok_or(0)
}
