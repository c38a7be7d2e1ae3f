//! R16K4, the one packed order of a weight matrix, read by every instruction set from the same bytes.
//! Plain scalar code; only load time and the embedding lookup come here.
//!
//! Sixteen output rows stand side by side: a 64-byte line holds, for 16 rows, 4 consecutive k, so that
//! one 32-bit lane is one row. A *row block* is 16 rows over all of K, contiguous, so that a thread
//! reads one stream. N is padded to 32 rows and K to 64; padding weights are zero.
//!
//! ```text
//! int8 block, 16 rows x 256 k   f32 d[16] | 64 lines; line j, byte 4r+i = w8[r][4j+i]
//! int4 block, 16 rows x 256 k   f32 d[16] | u8 sc[4][16] | i8 mn[4][16][2] | 4 x 8 lines
//!    sub-block t (64 k), line j, byte 4r+i: low nibble  = q[r][64t + 4j+i]       (group 2t)
//!                                           high nibble = q[r][64t + 32 + 4j+i]  (group 2t+1)
//!    sc[t][r]: low nibble = scale of group 2t minus one, high nibble = of group 2t+1 minus one
//! mxfp4 block, 16 rows x 256 k  u8 e[8][16] | 4 x 8 lines as in int4, of E2M1 codes
//! float, 16 rows x K            [K][16] of f32, f16 or bf16
//! ```
//!
//! The last block of a row has only the lines that K needs; its header is whole.

use crate::quant::{BLOCK, BlockMxfp4, BlockQ4, BlockQ8, GROUPS};
use half::{bf16, f16};

/// Rows of a row block.
pub const ROWS: usize = 16;
/// Rows that N is padded to: AMX takes two row blocks at once.
pub const ROWS_PADDED: usize = 32;
/// Inputs that K is padded to.
pub const K_PADDED: usize = 64;
/// Bytes before the lines of an int4 block: d, sc, mn.
pub(super) const Q4_HEADER: usize = 256;
/// Bytes before the lines of an int8 block: d.
pub(super) const Q8_HEADER: usize = 64;
/// Bytes before the lines of an MXFP4 block: e.
pub(super) const MXFP4_HEADER: usize = 128;

/// How the weights of a packed matrix are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Form {
    /// [`BlockQ4`].
    Q4 = 0,
    /// [`BlockQ8`].
    Q8 = 1,
    /// As stored in the checkpoint.
    Bf16 = 2,
    /// As stored in the checkpoint.
    F16 = 3,
    /// As stored in the checkpoint.
    F32 = 4,
    /// [`BlockMxfp4`], against int8 activations.
    Mxfp4 = 5,
    /// The same bytes, against f32 activations.
    Mxfp4Float = 6,
}

impl Form {
    /// Every form.
    pub const ALL: [Form; 7] =
        [Form::Q4, Form::Q8, Form::Bf16, Form::F16, Form::F32, Form::Mxfp4, Form::Mxfp4Float];

    /// The name shown to users.
    pub fn name(self) -> &'static str {
        match self {
            Form::Q4 => "int4",
            Form::Q8 => "int8",
            Form::Bf16 => "bf16",
            Form::F16 => "f16",
            Form::F32 => "f32",
            Form::Mxfp4 | Form::Mxfp4Float => "mxfp4",
        }
    }

    /// Whether activations are quantized to int8 to meet these weights.
    pub fn is_quantized(self) -> bool {
        matches!(self, Form::Q4 | Form::Q8 | Form::Mxfp4)
    }

    /// Bytes of a row block of `k` inputs.
    pub fn row_block_bytes(self, k: usize) -> usize {
        let padded = padded_k(k);
        let blocks = padded.div_ceil(BLOCK);
        match self {
            Form::Q4 => blocks * Q4_HEADER + padded * ROWS / 2,
            Form::Q8 => blocks * Q8_HEADER + padded * ROWS,
            Form::Mxfp4 | Form::Mxfp4Float => blocks * MXFP4_HEADER + padded * ROWS / 2,
            Form::Bf16 | Form::F16 => k * ROWS * 2,
            Form::F32 => k * ROWS * 4,
        }
    }

    /// Bytes of a packed matrix of `n` rows and `k` inputs.
    pub fn bytes(self, n: usize, k: usize) -> usize {
        n.next_multiple_of(ROWS_PADDED) / ROWS * self.row_block_bytes(k)
    }
}

/// K as the quantized forms store it.
pub fn padded_k(k: usize) -> usize {
    k.next_multiple_of(K_PADDED)
}

/// Byte offset of block `b` in a row block.
pub(super) fn block_offset(form: Form, b: usize) -> usize {
    match form {
        Form::Q4 => b * (Q4_HEADER + BLOCK * ROWS / 2),
        Form::Q8 => b * (Q8_HEADER + BLOCK * ROWS),
        Form::Mxfp4 | Form::Mxfp4Float => b * (MXFP4_HEADER + BLOCK * ROWS / 2),
        Form::Bf16 | Form::F16 | Form::F32 => unreachable!("float forms have no blocks"),
    }
}

/// Writes one block of 16 rows. `out` is as long as the block.
pub fn pack_q4(rows: &[BlockQ4; ROWS], out: &mut [u8]) {
    let (header, lines) = out.split_at_mut(Q4_HEADER);
    for (r, row) in rows.iter().enumerate() {
        header[4 * r..4 * r + 4].copy_from_slice(&row.d.to_le_bytes());
        for t in 0..4 {
            header[64 + 16 * t + r] = (row.sc[2 * t] - 1) | (row.sc[2 * t + 1] - 1) << 4;
            header[128 + 32 * t + 2 * r] = row.mn[2 * t] as u8;
            header[128 + 32 * t + 2 * r + 1] = row.mn[2 * t + 1] as u8;
        }
        put_codes(&row.q, r, lines);
    }
}

/// Writes one block of 16 rows. `out` is as long as the block.
pub fn pack_mxfp4(rows: &[BlockMxfp4; ROWS], out: &mut [u8]) {
    let (header, lines) = out.split_at_mut(MXFP4_HEADER);
    for (r, row) in rows.iter().enumerate() {
        for g in 0..GROUPS {
            header[16 * g + r] = row.e[g];
        }
        put_codes(&row.q, r, lines);
    }
}

/// The 4-bit codes of row `r` into its lines.
fn put_codes(q: &[u8; BLOCK], r: usize, lines: &mut [u8]) {
    for (t, lines) in lines.chunks_exact_mut(8 * 64).enumerate() {
        for j in 0..8 {
            for i in 0..4 {
                let k = 64 * t + 4 * j + i;
                lines[64 * j + 4 * r + i] = q[k] | q[k + 32] << 4;
            }
        }
    }
}

/// The 4-bit codes of row `r` from its lines.
fn get_codes(lines: &[u8], r: usize, q: &mut [u8; BLOCK]) {
    for (t, lines) in lines.chunks_exact(8 * 64).enumerate() {
        for j in 0..8 {
            for i in 0..4 {
                let (k, code) = (64 * t + 4 * j + i, lines[64 * j + 4 * r + i]);
                (q[k], q[k + 32]) = (code & 15, code >> 4);
            }
        }
    }
}

/// Writes one block of 16 rows. `out` is as long as the block.
pub fn pack_q8(rows: &[BlockQ8; ROWS], out: &mut [u8]) {
    let (header, lines) = out.split_at_mut(Q8_HEADER);
    for (r, row) in rows.iter().enumerate() {
        header[4 * r..4 * r + 4].copy_from_slice(&row.d.to_le_bytes());
        for (j, line) in lines.chunks_exact_mut(64).enumerate() {
            for i in 0..4 {
                line[4 * r + i] = row.q[4 * j + i] as u8;
            }
        }
    }
}

/// One block of one packed int4 row.
pub fn unpack_q4(block: &[u8], r: usize) -> BlockQ4 {
    let (header, lines) = block.split_at(Q4_HEADER);
    let mut row = BlockQ4 { d: f32_at(header, r), ..BlockQ4::ZERO };
    for t in 0..4 {
        let sc = header[64 + 16 * t + r];
        (row.sc[2 * t], row.sc[2 * t + 1]) = ((sc & 15) + 1, (sc >> 4) + 1);
        row.mn[2 * t] = header[128 + 32 * t + 2 * r] as i8;
        row.mn[2 * t + 1] = header[128 + 32 * t + 2 * r + 1] as i8;
    }
    get_codes(lines, r, &mut row.q);
    row
}

/// One block of one packed MXFP4 row.
pub(super) fn unpack_mxfp4(block: &[u8], r: usize) -> BlockMxfp4 {
    let (header, lines) = block.split_at(MXFP4_HEADER);
    let mut row = BlockMxfp4::ZERO;
    for g in 0..GROUPS {
        row.e[g] = header[16 * g + r];
    }
    get_codes(lines, r, &mut row.q);
    row
}

/// One block of one packed int8 row.
pub fn unpack_q8(block: &[u8], r: usize) -> BlockQ8 {
    let (header, lines) = block.split_at(Q8_HEADER);
    let mut row = BlockQ8 { d: f32_at(header, r), ..BlockQ8::ZERO };
    for (j, line) in lines.chunks_exact(64).enumerate() {
        for i in 0..4 {
            row.q[4 * j + i] = line[4 * r + i] as i8;
        }
    }
    row
}

fn f32_at(bytes: &[u8], i: usize) -> f32 {
    f32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
}

/// Splits a row block into its blocks.
pub fn blocks(form: Form, row_block: &[u8]) -> std::slice::Chunks<'_, u8> {
    row_block.chunks(block_offset(form, 1))
}

/// Row `n` of a packed matrix as f32; `out.len()` is K.
pub fn unpack_row(form: Form, packed: &[u8], n: usize, out: &mut [f32]) {
    let size = form.row_block_bytes(out.len());
    let (row_block, r) = (&packed[n / ROWS * size..][..size], n % ROWS);
    let at = |k: usize, width: usize| &row_block[(k * ROWS + r) * width..][..width];
    match form {
        Form::Q4 => {
            for (block, out) in blocks(form, row_block).zip(out.chunks_mut(BLOCK)) {
                out.copy_from_slice(&unpack_q4(block, r).dequantize()[..out.len()]);
            }
        }
        Form::Q8 => {
            for (block, out) in blocks(form, row_block).zip(out.chunks_mut(BLOCK)) {
                out.copy_from_slice(&unpack_q8(block, r).dequantize()[..out.len()]);
            }
        }
        Form::Mxfp4 | Form::Mxfp4Float => {
            for (block, out) in blocks(form, row_block).zip(out.chunks_mut(BLOCK)) {
                out.copy_from_slice(&unpack_mxfp4(block, r).dequantize()[..out.len()]);
            }
        }
        Form::Bf16 => {
            for (k, out) in out.iter_mut().enumerate() {
                *out = bf16::from_le_bytes([at(k, 2)[0], at(k, 2)[1]]).to_f32();
            }
        }
        Form::F16 => {
            for (k, out) in out.iter_mut().enumerate() {
                *out = f16::from_le_bytes([at(k, 2)[0], at(k, 2)[1]]).to_f32();
            }
        }
        Form::F32 => {
            for (k, out) in out.iter_mut().enumerate() {
                *out = f32_at(at(k, 4), 0);
            }
        }
    }
}

/// Writes one row block of stored floats. `row(r)` gives the little-endian bytes of row `r`, or `None`
/// for padding; `width` is bytes per weight.
pub fn pack_float<'a>(width: usize, row: impl Fn(usize) -> Option<&'a [u8]>, out: &mut [u8]) {
    out.fill(0);
    for r in 0..ROWS {
        let Some(row) = row(r) else { continue };
        for (k, value) in row.chunks_exact(width).enumerate() {
            out[(k * ROWS + r) * width..][..width].copy_from_slice(value);
        }
    }
}
