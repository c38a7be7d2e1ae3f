//! From the CPU's packed order to the tiles that kernels read, and back. Pure: needs no device.
//!
//! A tile is 32 rows, a lane each, over all of K; 16 bytes of one lane stand beside those of the next. The order is at
//! `Matrix` in `kernels/product.cuh`; stored floats are 16 bytes a lane (8 or 4 numbers) for the next inputs, padded with
//! zeros. So an int4 weight is 4.5 bits as on the CPU, and the numbers are the same.

use crate::kernels::{Form, layout};
#[cfg(test)]
use crate::quant::BlockQ8;
use crate::quant::{BLOCK, BlockGrouped, BlockQ4, Codes, GROUP, GROUPS, Grouped, Offset, Scales};
use layout::{ROWS, ROWS_PADDED};

/// Rows of a tile.
const TILE: usize = ROWS_PADDED;
/// Bytes of one line of a tile: 16 for each lane.
const LINE: usize = 16 * TILE;

/// Groups of 32 inputs, and blocks of 256.
pub(super) fn groups(k: usize) -> (usize, usize) {
    (k.div_ceil(GROUP), k.div_ceil(BLOCK))
}

/// Bytes of a tile; `None`: kernels do not read this form.
pub(super) fn tile_bytes(form: Form, k: usize) -> Option<usize> {
    let (groups, blocks) = groups(k);
    match form {
        Form::Q4 => Some(LINE * (blocks + groups)),
        Form::Q8 => Some(4 * TILE * blocks + 2 * LINE * groups),
        Form::Bf16 | Form::F16 => Some(LINE * k.div_ceil(8)),
        Form::F32 => Some(LINE * k.div_ceil(4)),
        Form::Grouped(how) => Some(128 * head(how).words * blocks + grouped_lines(how) * groups),
        Form::GroupedFloat(_) => None,
    }
}

/// Bytes of 32 inputs of a grouped matrix.
fn grouped_lines(how: Grouped) -> usize {
    LINE + 4 * TILE * how.high()
}

/// The header of a grouped row as `kernels/grouped.cuh` reads it.
pub(super) struct Head {
    /// What the kernels have to know of the form.
    pub(super) how: u32,
    /// Words.
    pub(super) words: usize,
    /// First byte of the scales, and bytes of each.
    pub(super) scales: [usize; 2],
    /// Likewise of the offsets.
    pub(super) offsets: [usize; 2],
}

/// The header of rows of this form.
pub(super) fn head(how: Grouped) -> Head {
    let (scales, width) = match how.scales {
        Scales::F16 => (0, 2),
        Scales::Bf16 => (1, 2),
        Scales::Integer => (2, 1),
        Scales::Power => (3, 1),
    };
    let (offset, offset_width) = match how.offset() {
        None => (0, 0),
        Some(Offset::Signed) => (1, 0),
        Some(Offset::Zero) => (2, 1),
        Some(Offset::Min) => (3, width),
    };
    let table = match how.codes {
        Codes::Uneven => 1,
        Codes::Fp4 => 2,
        Codes::Linear(_) | Codes::Linear5(_) | Codes::Linear6(_) => 0,
    };
    let start = if how.scales == Scales::Integer { 4 } else { 0 };
    let offsets = start + how.groups() * width;
    Head {
        how: how.high() as u32 | table << 2 | offset << 4 | scales << 6 | how.group.ilog2() << 8,
        words: (offsets + how.groups() * offset_width).div_ceil(4),
        scales: [start, width],
        offsets: [offsets, offset_width],
    }
}

/// The form as the kernels of `rows.cu` and `gemv_float.cu` number it.
pub(super) fn code(form: Form) -> u32 {
    match form {
        Form::Q4 => 0,
        Form::Q8 => 1,
        Form::Bf16 => 2,
        Form::F16 => 3,
        Form::F32 => 4,
        Form::Grouped(_) | Form::GroupedFloat(_) => 5,
    }
}

/// Bytes of a matrix; `None`: kernels do not read this form.
pub(super) fn bytes(form: Form, n: usize, k: usize) -> Option<usize> {
    tile_bytes(form, k).map(|bytes| n.div_ceil(TILE) * bytes)
}

/// Turns the packed matrix `from` into tiles, by several threads.
pub(super) fn tiles(form: Form, k: usize, from: &[u8], out: &mut [u8]) {
    each(form, k, from.chunks_exact(pair_bytes(form, k)), out, tile);
}

/// Bytes of the two row blocks of the packed matrix that become a tile.
pub(super) fn pair_bytes(form: Form, k: usize) -> usize {
    2 * form.row_block_bytes(k)
}

/// The packed matrix that gave the tiles.
#[cfg(test)]
pub(super) fn packed(form: Form, k: usize, from: &[u8], out: &mut [u8]) {
    let size = tile_bytes(form, k).unwrap();
    let pairs = out.chunks_exact_mut(2 * form.row_block_bytes(k));
    from.chunks_exact(size).zip(pairs).for_each(|(tile, pair)| untile(form, k, tile, pair));
}

fn each<'a>(
    form: Form,
    k: usize,
    from: impl ExactSizeIterator<Item = &'a [u8]>,
    out: &mut [u8],
    work: fn(Form, usize, &[u8], &mut [u8]),
) {
    let Some(size) = tile_bytes(form, k) else { return };
    let mut jobs: Vec<_> = from.zip(out.chunks_exact_mut(size)).collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let share = jobs.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        for jobs in jobs.chunks_mut(share) {
            scope.spawn(|| jobs.iter_mut().for_each(|(from, out)| work(form, k, from, out)));
        }
    });
}

/// Two row blocks to a tile.
fn tile(form: Form, k: usize, pair: &[u8], out: &mut [u8]) {
    out.fill(0);
    for (half, block) in pair.chunks_exact(pair.len() / 2).enumerate() {
        for r in 0..ROWS {
            let lane = half * ROWS + r;
            match form {
                Form::Q4 => {
                    let mut at = 0;
                    for (b, block) in layout::blocks(form, block).enumerate() {
                        let count = groups(k - b * BLOCK).0.min(GROUPS);
                        put_q4(&layout::unpack_q4(block, r), count, lane, &mut out[at..]);
                        at += LINE * (1 + count);
                    }
                }
                Form::Q8 => {
                    let mut at = 0;
                    for (b, block) in layout::blocks(form, block).enumerate() {
                        let count = groups(k - b * BLOCK).0.min(GROUPS);
                        let row = layout::unpack_q8(block, r);
                        out[at + 4 * lane..][..4].copy_from_slice(&row.d.to_le_bytes());
                        at += 4 * TILE;
                        for line in row.q.as_chunks::<16>().0.iter().take(2 * count) {
                            let bytes = line.map(|q| q as u8);
                            out[at + 16 * lane..][..16].copy_from_slice(&bytes);
                            at += LINE;
                        }
                    }
                }
                Form::Grouped(how) => {
                    let mut at = 0;
                    for (b, block) in layout::blocks(form, block).enumerate() {
                        let count = groups(k - b * BLOCK).0.min(GROUPS);
                        let row = layout::unpack_grouped(how, block, r);
                        put_grouped(how, &row, count, lane, &mut out[at..]);
                        at += 128 * head(how).words + grouped_lines(how) * count;
                    }
                }
                _ => {
                    let width = if form == Form::F32 { 4 } else { 2 };
                    for (i, lanes) in block.chunks_exact(ROWS * width).enumerate() {
                        let at = i * width / 16 * LINE + 16 * lane + i * width % 16;
                        out[at..at + width].copy_from_slice(&lanes[r * width..][..width]);
                    }
                }
            }
        }
    }
}

fn put_q4(row: &BlockQ4, groups: usize, lane: usize, out: &mut [u8]) {
    let header = &mut out[16 * lane..][..16];
    header[..4].copy_from_slice(&row.d.to_le_bytes());
    for g in 0..GROUPS {
        header[4 + g / 2] |= (row.sc[g] - 1) << (4 * (g % 2));
        header[8 + g] = row.mn[g] as u8;
    }
    for (g, codes) in row.q.as_chunks::<GROUP>().0.iter().enumerate().take(groups) {
        let line = &mut out[(1 + g) * LINE + 16 * lane..][..16];
        for (i, byte) in line.iter_mut().enumerate() {
            *byte = codes[i] | codes[i + 16] << 4;
        }
    }
}

fn put_grouped(how: Grouped, row: &BlockGrouped, groups: usize, lane: usize, out: &mut [u8]) {
    let Head { words, scales, offsets, .. } = head(how);
    let (header, rest) = out.split_at_mut(4 * TILE * words);
    let mut put = |at: usize, bytes: &[u8]| {
        for (i, &byte) in (at..).zip(bytes) {
            header[i / 4 * 4 * TILE + 4 * lane + i % 4] = byte;
        }
    };
    if how.scales == Scales::Integer {
        put(0, &row.d.to_le_bytes());
        put(2, &row.e.to_le_bytes());
    }
    for g in 0..how.groups() {
        let u = g * how.group / how.unit();
        for ([at, width], value) in [(scales, row.s[u]), (offsets, row.o[u])] {
            put(at + g * width, &value.to_le_bytes()[..width]);
        }
    }
    let (lines, more) = rest.split_at_mut(LINE * groups);
    for (g, codes) in row.q.as_chunks::<GROUP>().0.iter().enumerate().take(groups) {
        for (i, byte) in lines[g * LINE + 16 * lane..][..16].iter_mut().enumerate() {
            *byte = codes[i] & 15 | (codes[i + 16] & 15) << 4;
        }
        for (k, code) in codes.iter().enumerate() {
            let (half, j, byte) = (k / 16, k % 16 / 4, k % 4);
            let (word, bit) = match how.high() {
                0 => break,
                1 => (0, 4 * half + j),
                _ => (half, 2 * j),
            };
            let word = g * how.high() + word;
            more[4 * TILE * word + 4 * lane + byte] |= (code >> 4) << bit;
        }
    }
}

/// A tile to two row blocks.
#[cfg(test)]
fn untile(form: Form, k: usize, from: &[u8], pair: &mut [u8]) {
    let size = pair.len() / 2;
    for (half, out) in pair.chunks_exact_mut(size).enumerate() {
        let lane = |r: usize| half * ROWS + r;
        if !form.is_quantized() {
            let width = if form == Form::F32 { 4 } else { 2 };
            for (i, lanes) in out.chunks_exact_mut(ROWS * width).enumerate() {
                for r in 0..ROWS {
                    let at = i * width / 16 * LINE + 16 * lane(r) + i * width % 16;
                    lanes[r * width..][..width].copy_from_slice(&from[at..at + width]);
                }
            }
            continue;
        }
        let (mut at, mut done) = (0, 0);
        for b in 0..groups(k).1 {
            let count = groups(k - b * BLOCK).0.min(GROUPS);
            let len = form.row_block_bytes((k - b * BLOCK).min(BLOCK));
            let float = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().unwrap());
            if form == Form::Q4 {
                let rows: [BlockQ4; ROWS] = std::array::from_fn(|r| {
                    let line = |i: usize| &from[at + i * LINE + 16 * lane(r)..][..16];
                    let mut row = BlockQ4 { d: float(&line(0)[..4]), ..BlockQ4::ZERO };
                    for g in 0..GROUPS {
                        row.sc[g] = (line(0)[4 + g / 2] >> (4 * (g % 2)) & 15) + 1;
                        row.mn[g] = line(0)[8 + g] as i8;
                        for i in 0..if g < count { 16 } else { 0 } {
                            row.q[g * GROUP + i] = line(1 + g)[i] & 15;
                            row.q[g * GROUP + 16 + i] = line(1 + g)[i] >> 4;
                        }
                    }
                    row
                });
                layout::pack_q4(&rows, &mut out[done..done + len]);
                at += LINE * (1 + count);
            } else {
                let rows: [BlockQ8; ROWS] = std::array::from_fn(|r| {
                    let d = float(&from[at + 4 * lane(r)..][..4]);
                    let mut row = BlockQ8 { d, ..BlockQ8::ZERO };
                    for i in 0..2 * count {
                        let line = &from[at + 4 * TILE + i * LINE + 16 * lane(r)..][..16];
                        for (q, &byte) in row.q[16 * i..].iter_mut().zip(line) {
                            *q = byte as i8;
                        }
                    }
                    row
                });
                layout::pack_q8(&rows, &mut out[done..done + len]);
                at += 4 * TILE + 2 * LINE * count;
            }
            done += len;
        }
    }
}
