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
//! grouped block, 16 rows x 256 k   header, padded to a multiple of 64 bytes | 4 x (8 + 2 h) lines
//!    g groups of 16 to 128 k; the header with
//!    f16 or bf16 scales   s[g][16] | m[g][16] of the same, or i8 z[g][16], or neither
//!    integer scales       f16 d[16] | f16 e[16] | i8 s[g][16] | i8 m[g][16], or i8 z[g][16], or neither
//!    powers of two        u8 s[g][16] | the same
//!    sub-block t, lines 0..8: the low four bits of codes, as in int4; with groups of 16
//!       line j, byte 4r+i: low nibble  = q[r][64t + 32(j/4) + 4(j%4)+i], high nibble = that 16 k later
//!    h bits beyond (0, 1 or 2): line 8 + p, byte b: those of the codes in byte b of line j = 4p/h..4(p+1)/h,
//!       at bit 2h(j - 4p/h) of the low nibble's, h bits further of the high nibble's
//! float, 16 rows x K            [K][16] of f32, f16 or bf16
//! ```
//!
//! The last block of a row has only the lines that K needs; its header is whole.

use crate::quant::{BLOCK, BlockGrouped, BlockQ4, BlockQ8, Grouped, Offset, Scales};
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

/// How the weights of a packed matrix are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// [`BlockQ4`].
    Q4,
    /// [`BlockQ8`].
    Q8,
    /// As stored in the checkpoint.
    Bf16,
    /// As stored in the checkpoint.
    F16,
    /// As stored in the checkpoint.
    F32,
    /// [`BlockGrouped`], against int8 activations.
    Grouped(Grouped),
    /// The same bytes, against f32 activations.
    GroupedFloat(Grouped),
}

impl Form {
    /// MXFP4 against int8 activations.
    pub const MXFP4: Form = Form::Grouped(Grouped::MXFP4);
    /// Five bits against int8 activations.
    pub const INT5: Form = Form::Grouped(Grouped::INT5);
    /// Six bits against int8 activations.
    pub const INT6: Form = Form::Grouped(Grouped::INT6);

    /// The name shown to users.
    pub fn name(self) -> &'static str {
        match self {
            Form::Q4 => "int4",
            Form::Q8 => "int8",
            Form::Bf16 => "bf16",
            Form::F16 => "f16",
            Form::F32 => "f32",
            Form::Grouped(Grouped::MXFP4) | Form::GroupedFloat(Grouped::MXFP4) => "mxfp4",
            Form::Grouped(Grouped::INT5) | Form::GroupedFloat(Grouped::INT5) => "int5",
            Form::Grouped(Grouped::INT6) | Form::GroupedFloat(Grouped::INT6) => "int6",
            Form::Grouped(_) | Form::GroupedFloat(_) => "grouped",
        }
    }

    /// Whether activations are quantized to int8 to meet these weights.
    pub fn is_quantized(self) -> bool {
        matches!(self, Form::Q4 | Form::Q8 | Form::Grouped(_))
    }

    /// Bytes of a row block of `k` inputs.
    pub fn row_block_bytes(self, k: usize) -> usize {
        let padded = padded_k(k);
        let blocks = padded.div_ceil(BLOCK);
        match self {
            Form::Q4 => blocks * Q4_HEADER + padded * ROWS / 2,
            Form::Q8 => blocks * Q8_HEADER + padded * ROWS,
            Form::Grouped(how) | Form::GroupedFloat(how) => {
                blocks * grouped_header(how) + padded / 64 * grouped_lines(how)
            }
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
        Form::Grouped(how) | Form::GroupedFloat(how) => {
            b * (grouped_header(how) + BLOCK / 64 * grouped_lines(how))
        }
        Form::Bf16 | Form::F16 | Form::F32 => unreachable!("float forms have no blocks"),
    }
}

/// Writes one block of 16 rows. `out` is as long as the block.
pub fn pack_q4(rows: &[BlockQ4; ROWS], out: &mut [u8]) {
    for (r, row) in rows.iter().enumerate() {
        put_q4(row, r, out);
    }
}

/// Writes row `r` of a block.
pub(super) fn put_q4(row: &BlockQ4, r: usize, out: &mut [u8]) {
    let (header, lines) = out.split_at_mut(Q4_HEADER);
    header[4 * r..4 * r + 4].copy_from_slice(&row.d.to_le_bytes());
    for t in 0..4 {
        header[64 + 16 * t + r] = (row.sc[2 * t] - 1) | (row.sc[2 * t + 1] - 1) << 4;
        header[128 + 32 * t + 2 * r] = row.mn[2 * t] as u8;
        header[128 + 32 * t + 2 * r + 1] = row.mn[2 * t + 1] as u8;
    }
    put_codes(&row.q, r, lines);
}

/// Where the scales and the offsets of a grouped block begin, and bytes of each.
pub(super) fn grouped_fields(how: Grouped) -> [(usize, usize); 2] {
    let (start, width) = match how.scales {
        Scales::F16 | Scales::Bf16 => (0, 2),
        Scales::Integer => (64, 1),
        Scales::Power => (0, 1),
    };
    let offset = match how.offset() {
        Some(Offset::Min) => width,
        Some(Offset::Zero) => 1,
        Some(Offset::Signed) | None => 0,
    };
    [(start, width), (start + how.groups() * ROWS * width, offset)]
}

/// Bytes before the lines of a grouped block.
pub(super) fn grouped_header(how: Grouped) -> usize {
    let [_, (start, width)] = grouped_fields(how);
    (start + how.groups() * ROWS * width).next_multiple_of(64)
}

/// Bytes of the lines of 64 k.
pub(super) fn grouped_lines(how: Grouped) -> usize {
    64 * (8 + 2 * how.high())
}

/// Writes one block of 16 rows. `out` is as long as the block.
pub fn pack_grouped(how: Grouped, rows: &[BlockGrouped; ROWS], out: &mut [u8]) {
    out.fill(0);
    let (header, lines) = out.split_at_mut(grouped_header(how));
    let (fields, places) = (grouped_fields(how), places(how));
    for (r, row) in rows.iter().enumerate() {
        if how.scales == Scales::Integer {
            header[2 * r..][..2].copy_from_slice(&row.d.to_le_bytes());
            header[32 + 2 * r..][..2].copy_from_slice(&row.e.to_le_bytes());
        }
        for g in 0..how.groups() {
            let u = g * how.group / how.unit();
            let values = [row.s[u], row.o[u]];
            for ((start, width), value) in fields.into_iter().zip(values) {
                let out = &mut header[start + (g * ROWS + r) * width..][..width];
                out.copy_from_slice(&value.to_le_bytes()[..width]);
            }
        }
        for (q, lines) in row.q.chunks_exact(64).zip(lines.chunks_exact_mut(grouped_lines(how))) {
            for (q, [low, high]) in q.iter().zip(&places) {
                lines[low.0 + 4 * r] |= (q & 15) << low.1;
                if how.high() > 0 {
                    lines[high.0 + 4 * r] |= q >> 4 << high.1;
                }
            }
        }
    }
}

/// Where the code of one of 64 k lies in the lines: a byte of row 0, and a bit of it; and where its bits beyond 4 do.
type Place = [(usize, usize); 2];

/// The places of 64 codes.
fn places(how: Grouped) -> [Place; 64] {
    let (unit, h) = (how.unit(), how.high());
    std::array::from_fn(|k| {
        // A pair of units shares the nibbles of its lines.
        let (pair, half, i) = (k / (2 * unit), k / unit % 2, k % unit);
        let j = pair * unit / 4 + i / 4;
        let high = (64 * (8 + j * h / 4), h * (2 * (j % (4 / h.max(1))) + half));
        [(64 * j + i % 4, 4 * half), (high.0 + i % 4, high.1)]
    })
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

/// One block of one packed row.
pub fn unpack_grouped(how: Grouped, block: &[u8], r: usize) -> BlockGrouped {
    let (header, lines) = block.split_at(grouped_header(how));
    let mut row = BlockGrouped::ZERO;
    if how.scales == Scales::Integer {
        row.d = u16::from_le_bytes([header[2 * r], header[2 * r + 1]]);
        row.e = u16::from_le_bytes([header[32 + 2 * r], header[32 + 2 * r + 1]]);
    }
    let [scales, offsets] = grouped_fields(how);
    for u in 0..BLOCK / how.unit() {
        let value = |(start, width): (usize, usize)| {
            let at = start + (u * how.unit() / how.group * ROWS + r) * width;
            header[at..at + width].iter().rev().fold(0, |value, &b| value << 8 | u16::from(b))
        };
        (row.s[u], row.o[u]) = (value(scales), value(offsets));
    }
    let places = places(how);
    for (q, lines) in row.q.chunks_exact_mut(64).zip(lines.chunks_exact(grouped_lines(how))) {
        for (q, [low, high]) in q.iter_mut().zip(&places) {
            *q = lines[low.0 + 4 * r] >> low.1 & 15;
            if how.high() > 0 {
                *q |= (lines[high.0 + 4 * r] >> high.1 & ((1 << how.high()) - 1)) << 4;
            }
        }
    }
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
        Form::Grouped(how) | Form::GroupedFloat(how) => {
            for (block, out) in blocks(form, row_block).zip(out.chunks_mut(BLOCK)) {
                out.copy_from_slice(&unpack_grouped(how, block, r).dequantize(how)[..out.len()]);
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

/// Whether a row block holds only what a packer writes: finite numbers, and int8 values within plus or minus 127.
pub fn is_valid(form: Form, row_block: &[u8]) -> bool {
    let scales = |block: &[u8]| (0..ROWS).all(|r| f32_at(block, r).is_finite());
    match form {
        Form::Q4 => blocks(form, row_block).all(|block| {
            let each = |t: usize, r: usize| {
                let (sc, mn) = (block[64 + 16 * t + r], &block[128 + 32 * t + 2 * r..][..2]);
                let fits = |sc: u8, mn: u8| {
                    let (top, mn) = (15 * (i16::from(sc) + 1), i16::from(mn as i8));
                    (-127..=127).contains(&mn) && top - mn <= 127
                };
                fits(sc & 15, mn[0]) && fits(sc >> 4, mn[1])
            };
            scales(block) && (0..4).all(|t| (0..ROWS).all(|r| each(t, r)))
        }),
        Form::Q8 => blocks(form, row_block)
            .all(|block| scales(block) && !block[Q8_HEADER..].contains(&(i8::MIN as u8))),
        // Of these MXFP4, in which 255 is not a number, comes from outside, and what begins with f16.
        Form::Grouped(how @ Grouped::MXFP4) | Form::GroupedFloat(how @ Grouped::MXFP4) => {
            blocks(form, row_block).all(|block| !block[..grouped_header(how)].contains(&255))
        }
        Form::Grouped(Grouped::INT5 | Grouped::INT6) => blocks(form, row_block).all(|block| {
            let finite = |b: &[u8; 2]| f16::from_le_bytes(*b).is_finite();
            block[..4 * ROWS].as_chunks().0.iter().all(finite)
        }),
        Form::Grouped(_) | Form::GroupedFloat(_) => false,
        Form::Bf16 => {
            let finite = |b: &[u8; 2]| bf16::from_le_bytes(*b).is_finite();
            row_block.as_chunks().0.iter().all(finite)
        }
        Form::F16 => {
            let finite = |b: &[u8; 2]| f16::from_le_bytes(*b).is_finite();
            row_block.as_chunks().0.iter().all(finite)
        }
        Form::F32 => (0..row_block.len() / 4).all(|i| f32_at(row_block, i).is_finite()),
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
