//! The grouped forms on x86. Linear codes are multiplied as they are; of others a shuffle of bytes looks up the values,
//! and the integer instructions of each set multiply those. A group's integer meets its scale in one float step.
//!
//! Products are of unsigned by signed bytes. So a table holds the values plus what makes the least of them 0 (the
//! *bias*), and a sum over a group starts at minus the bias times the sum of its activations.

use super::super::grouped::Header;
use super::super::layout::{ROWS, block_offset, grouped_header};
use super::super::{Acts, Form};
use super::avx2::Ymm2;
use super::avx512vnni::Zmm;
use super::{avx2, avx512vnni};
use crate::quant::{BLOCK, Codes, GROUP, GROUPS, Grouped};
use std::arch::x86_64::*;
use std::slice;

/// The 16 values of codes plus the bias, and the bias.
fn biased(how: Grouped) -> ([u8; 16], i32) {
    let bias = match how.codes {
        Codes::Linear(_) => 0,
        Codes::Fp4 => 12,
        Codes::Uneven => 127,
    };
    (how.table().map(|value| (i32::from(value) + bias) as u8), bias)
}

/// Where a sum over group `g` of block `b` of token `t` starts.
///
/// # Safety
/// There are such a block and token.
#[inline(always)]
unsafe fn start(bias: i32, a: &Acts<'_>, b: usize, t: usize, g: usize) -> i32 {
    // SAFETY: the caller's promise; a block has sums of eight groups.
    -bias * i32::from(unsafe { *a.sums.get_unchecked(b * a.m + t).get_unchecked(g) })
}

/// The sums of groups of block `b` of token `t` as f32.
///
/// # Safety
/// There are such a block and token.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn sums(a: &Acts<'_>, b: usize, t: usize, out: &mut [f32; GROUPS]) {
    // SAFETY: the caller's promise; a block has sums of eight groups.
    unsafe {
        let sums = a.sums.get_unchecked(b * a.m + t);
        let sums = _mm256_cvtepi16_epi32(_mm_loadu_si128(sums.as_ptr().cast()));
        _mm256_storeu_ps(out.as_mut_ptr(), _mm256_cvtepi32_ps(sums));
    }
}

/// Codes are multiplied as they are.
const LINEAR: u8 = 0;
/// Values plus the bias are looked up, and at most 24, or any with VNNI.
const NARROW: u8 = 1;
/// Values are looked up, and at most 127 in magnitude.
const WIDE: u8 = 2;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn gemm_avx2(how: Grouped, w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    // SAFETY: the shapes were checked by `Kernels::gemm`.
    unsafe {
        match how.codes {
            Codes::Linear(_) => all_rows::<LINEAR, false>(how, w, a, y),
            Codes::Fp4 => all_rows::<NARROW, false>(how, w, a, y),
            Codes::Uneven => all_rows::<WIDE, false>(how, w, a, y),
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
pub(super) unsafe fn gemm_avxvnni(how: Grouped, w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    // SAFETY: the shapes were checked by `Kernels::gemm`.
    unsafe {
        match how.codes {
            Codes::Linear(_) => all_rows::<LINEAR, true>(how, w, a, y),
            _ => all_rows::<NARROW, true>(how, w, a, y),
        }
    }
}

/// # Safety
/// As [`rows`].
unsafe fn all_rows<const CODES: u8, const VNNI: bool>(
    how: Grouped,
    w: &[u8],
    a: &Acts<'_>,
    y: &mut [f32],
) {
    // SAFETY: the caller's promise.
    unsafe {
        for (rb, w) in w.chunks_exact(Form::Grouped(how).row_block_bytes(a.k)).enumerate() {
            let mut t = 0;
            while t < a.m {
                t += match (a.m - t, VNNI) {
                    (6.., true) => rows_avxvnni::<6, 1, CODES>(how, w, a, y, rb, t),
                    (4.., true) => rows_avxvnni::<4, 1, CODES>(how, w, a, y, rb, t),
                    (2.., true) => rows_avxvnni::<2, 2, CODES>(how, w, a, y, rb, t),
                    (_, true) => rows_avxvnni::<1, 2, CODES>(how, w, a, y, rb, t),
                    (4.., _) => rows_avx2::<4, 1, CODES>(how, w, a, y, rb, t),
                    (2.., _) => rows_avx2::<2, 2, CODES>(how, w, a, y, rb, t),
                    _ => rows_avx2::<1, 2, CODES>(how, w, a, y, rb, t),
                };
            }
        }
    }
}

macro_rules! rows {
    ($name:ident, $features:literal, $vnni:literal) => {
        /// [`rows`] for one set.
        ///
        /// # Safety
        /// As [`rows`].
        #[target_feature(enable = $features)]
        unsafe fn $name<const M: usize, const H: usize, const CODES: u8>(
            how: Grouped,
            w: &[u8],
            a: &Acts<'_>,
            y: &mut [f32],
            rb: usize,
            t0: usize,
        ) -> usize {
            // SAFETY: the caller's promise.
            unsafe { rows::<M, H, CODES, $vnni>(how, w, a, y, rb, t0) }
        }
    };
}

rows!(rows_avx2, "avx2,fma,f16c", false);
rows!(rows_avxvnni, "avx2,fma,f16c,avxvnni", true);

/// Row block `rb` against tokens `t0..t0 + M`, `H` halves of 8 rows at once. Gives `M`.
///
/// Without VNNI `vpmaddubsw` adds pairs in i16. Four of them fit (24 * 127 * 2 * 4 = 24384 < 2^15) if codes are linear or
/// narrow: half a group. Of wide values one does (127 * 127 * 2 = 32258), and their signs move to the activations.
///
/// # Safety
/// The CPU has AVX2, FMA and F16C, and AVX-VNNI if `VNNI`. Shapes are as `Kernels::gemm` checks them, `t0 + M <= a.m`, and
/// `CODES` says of codes what `how` does.
#[inline(always)]
unsafe fn rows<const M: usize, const H: usize, const CODES: u8, const VNNI: bool>(
    how: Grouped,
    w: &[u8],
    a: &Acts<'_>,
    y: &mut [f32],
    rb: usize,
    t0: usize,
) -> usize {
    let (biased, bias) = biased(how);
    let table = if CODES == WIDE { how.table().map(|value| value as u8) } else { biased };
    let head = grouped_header(how);
    let mut header = Header::ZERO;
    let mut sum = [[0.0; GROUPS]; M];
    // SAFETY: the CPU has the instructions; every address below lies in this row block of the weights, in `a` or in `y`.
    unsafe {
        let nibble = _mm256_set1_epi8(0x0f);
        let ones = _mm256_set1_epi16(1);
        let zero = _mm256_setzero_si256();
        let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
        let mut p = w.as_ptr();
        let mut acc = [[_mm256_setzero_ps(); M]; 2];
        for b in 0..a.blocks() {
            let len = a.len(b);
            let q = a.q.as_ptr().add(b * BLOCK * a.m + t0 * len);
            for line in 0..head / 64 {
                avx2::prefetch(p.add(64 * line));
            }
            header.read::<Ymm2>(how, slice::from_raw_parts(p, head));
            if CODES == LINEAR {
                for (i, sum) in sum.iter_mut().enumerate() {
                    sums(a, b, t0 + i, sum);
                }
            }
            for h0 in (0..2).step_by(H) {
                let mut part = [[_mm256_setzero_ps(); H]; M];
                for t in 0..len / 64 {
                    let lines = p.add(head + 512 * t + 32 * h0);
                    let mut dots = [[[zero; H]; M]; 2];
                    if CODES == NARROW {
                        for (g, dots) in dots.iter_mut().enumerate() {
                            for (i, dots) in dots.iter_mut().enumerate() {
                                let start = start(bias, a, b, t0 + i, 2 * t + g);
                                *dots = [_mm256_set1_epi32(start); H];
                            }
                        }
                    }
                    for half in 0..2 {
                        let mut c = [[[zero; H]; M]; 2];
                        for j in 4 * half..4 * half + 4 {
                            if h0 == 0 {
                                avx2::prefetch(lines.add(64 * j));
                            }
                            let mut v = [[zero; H]; 2];
                            for h in 0..H {
                                let x = _mm256_load_si256(lines.add(64 * j + 32 * h).cast());
                                v[0][h] = _mm256_and_si256(x, nibble);
                                v[1][h] = _mm256_and_si256(_mm256_srli_epi16::<4>(x), nibble);
                                if CODES != LINEAR {
                                    v[0][h] = _mm256_shuffle_epi8(table, v[0][h]);
                                    v[1][h] = _mm256_shuffle_epi8(table, v[1][h]);
                                }
                            }
                            for i in 0..M {
                                let q = q.add(i * len + 64 * t);
                                for g in 0..2 {
                                    let x = avx2::four(q, j + 8 * g);
                                    for h in 0..H {
                                        let dot = &mut dots[g][i][h];
                                        if VNNI {
                                            *dot = _mm256_dpbusd_avx_epi32(*dot, v[g][h], x);
                                        } else if CODES == WIDE {
                                            let x = _mm256_sign_epi8(x, v[g][h]);
                                            let w = _mm256_abs_epi8(v[g][h]);
                                            let x = _mm256_maddubs_epi16(w, x);
                                            let x = _mm256_madd_epi16(x, ones);
                                            *dot = _mm256_add_epi32(*dot, x);
                                        } else {
                                            let x = _mm256_maddubs_epi16(v[g][h], x);
                                            c[g][i][h] = _mm256_add_epi16(c[g][i][h], x);
                                        }
                                    }
                                }
                            }
                        }
                        if CODES != WIDE && !VNNI {
                            for g in 0..2 {
                                for i in 0..M {
                                    for h in 0..H {
                                        let x = _mm256_madd_epi16(c[g][i][h], ones);
                                        dots[g][i][h] = _mm256_add_epi32(dots[g][i][h], x);
                                    }
                                }
                            }
                        }
                    }
                    for (g, dots) in dots.iter().enumerate() {
                        let g = 2 * t + g;
                        for h in 0..H {
                            let at = 8 * (h0 + h);
                            let s = _mm256_load_ps(header.s.get_unchecked(g).as_ptr().add(at));
                            let o = _mm256_load_ps(header.o.get_unchecked(g).as_ptr().add(at));
                            for i in 0..M {
                                let dot = _mm256_cvtepi32_ps(dots[i][h]);
                                part[i][h] = _mm256_fmadd_ps(dot, s, part[i][h]);
                                if CODES == LINEAR {
                                    let sum = _mm256_set1_ps(*sum[i].get_unchecked(g));
                                    part[i][h] = _mm256_fmadd_ps(sum, o, part[i][h]);
                                }
                            }
                        }
                    }
                }
                for i in 0..M {
                    let s = _mm256_set1_ps(*a.s.get_unchecked(b * a.m + t0 + i));
                    for h in 0..H {
                        acc[h0 + h][i] = _mm256_fmadd_ps(part[i][h], s, acc[h0 + h][i]);
                    }
                }
            }
            p = p.add(head + len / 2 * ROWS);
        }
        avx2::store(&acc, y, a.m, rb, t0);
    }
    M
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn gemm_avx512vnni(how: Grouped, w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    // SAFETY: the shapes were checked by `Kernels::gemm`.
    unsafe {
        match (how.codes, a.m) {
            (Codes::Linear(_), 1) => direct::<1, true>(how, w, a, y),
            (Codes::Linear(_), 2) => direct::<2, true>(how, w, a, y),
            (Codes::Linear(_), 3) => direct::<3, true>(how, w, a, y),
            (Codes::Linear(_), 4) => direct::<4, true>(how, w, a, y),
            (Codes::Linear(_), _) => panels::<true>(how, w, a, y),
            (_, 1) => direct::<1, false>(how, w, a, y),
            (_, 2) => direct::<2, false>(how, w, a, y),
            (_, 3) => direct::<3, false>(how, w, a, y),
            (_, 4) => direct::<4, false>(how, w, a, y),
            _ => panels::<false>(how, w, a, y),
        }
    }
}

/// The low and the high codes of a line, or their values plus the bias.
///
/// # Safety
/// `line` points at 64 bytes at a multiple of 64.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn codes<const LINEAR: bool>(table: __m512i, line: *const u8) -> [__m512i; 2] {
    let nibble = _mm512_set1_epi8(0x0f);
    // SAFETY: the caller's promise.
    let v = unsafe { _mm512_load_si512(line.cast()) };
    let high = _mm512_and_si512(_mm512_srli_epi16::<4>(v), nibble);
    let low = _mm512_and_si512(v, nibble);
    if LINEAR {
        return [low, high];
    }
    [_mm512_shuffle_epi8(table, low), _mm512_shuffle_epi8(table, high)]
}

/// All `M` tokens against weights as they lie.
///
/// # Safety
/// Shapes as `Kernels::gemm` checks them, `a.m == M`, and `LINEAR` says of codes what `how` does.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn direct<const M: usize, const LINEAR: bool>(
    how: Grouped,
    w: &[u8],
    a: &Acts<'_>,
    y: &mut [f32],
) {
    let size = Form::Grouped(how).row_block_bytes(a.k);
    let (row_blocks, head) = (w.len() / size, grouped_header(how));
    let (table, bias) = biased(how);
    let mut header = Header::ZERO;
    let mut sum = [[0.0; GROUPS]; M];
    // SAFETY: every address below lies in block `b` of row block `rb` of `w`, in `a` or in `y`, whose lengths were
    // checked; prefetches never fault.
    unsafe {
        let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
        for rb in 0..row_blocks {
            let mut p = w.as_ptr().add(rb * size);
            let mut acc = [_mm512_setzero_ps(); M];
            for b in 0..a.blocks() {
                let len = a.len(b);
                let q = a.q.as_ptr().add(b * BLOCK * M);
                for line in 0..head / 64 {
                    avx512vnni::prefetch(p.add(64 * line));
                }
                header.read::<Zmm>(how, slice::from_raw_parts(p, head));
                if LINEAR {
                    for (i, sum) in sum.iter_mut().enumerate() {
                        sums(a, b, i, sum);
                    }
                }
                let mut part = [_mm512_setzero_ps(); M];
                for t in 0..len / 64 {
                    let lines = p.add(head + 512 * t);
                    let mut c = [[_mm512_setzero_si512(); M]; 2];
                    if !LINEAR {
                        for g in 0..2 {
                            for i in 0..M {
                                c[g][i] = _mm512_set1_epi32(start(bias, a, b, i, 2 * t + g));
                            }
                        }
                    }
                    for j in 0..8 {
                        avx512vnni::prefetch(lines.add(64 * j));
                        let v = codes::<LINEAR>(table, lines.add(64 * j));
                        for i in 0..M {
                            let q = q.add(i * len + 64 * t);
                            for g in 0..2 {
                                let x = _mm512_set1_epi32(avx512vnni::four(q, j + 8 * g));
                                c[g][i] = _mm512_dpbusd_epi32(c[g][i], v[g], x);
                            }
                        }
                    }
                    for g in 0..2 {
                        let s = _mm512_load_ps(header.s.get_unchecked(2 * t + g).as_ptr());
                        let o = _mm512_load_ps(header.o.get_unchecked(2 * t + g).as_ptr());
                        for i in 0..M {
                            part[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(c[g][i]), s, part[i]);
                            if LINEAR {
                                let sum = _mm512_set1_ps(*sum[i].get_unchecked(2 * t + g));
                                part[i] = _mm512_fmadd_ps(sum, o, part[i]);
                            }
                        }
                    }
                }
                for i in 0..M {
                    let s = _mm512_set1_ps(*a.s.get_unchecked(b * M + i));
                    acc[i] = _mm512_fmadd_ps(part[i], s, acc[i]);
                }
                p = p.add(head + len / 2 * ROWS);
            }
            for (i, acc) in acc.into_iter().enumerate() {
                let y = y.as_mut_ptr().add((i * row_blocks + rb) * ROWS);
                _mm512_storeu_ps(y, acc);
            }
        }
    }
}

/// A block of two row blocks: its codes, or their values plus the bias, line `j` of row block `h` at `[h][j]`.
#[repr(C, align(64))]
struct Panel {
    lines: [[[u8; 64]; BLOCK / 4]; 2],
    headers: [Header; 2],
}

/// Tokens of a tile: 12 sums of integers and 12 of floats.
const TILE: usize = 6;

/// Many tokens: look up a block of two row blocks, run all tokens against it, go on along K.
///
/// # Safety
/// Shapes as `Kernels::gemm` checks them, and `LINEAR` says of codes what `how` does.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn panels<const LINEAR: bool>(how: Grouped, w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    let form = Form::Grouped(how);
    let size = form.row_block_bytes(a.k);
    let (row_blocks, head) = (w.len() / size, grouped_header(how));
    let (table, bias) = biased(how);
    let mut panel = Panel { lines: [[[0; 64]; BLOCK / 4]; 2], headers: [Header::ZERO; 2] };
    // SAFETY: as in `direct`.
    unsafe {
        let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
        let mut rb = 0;
        while rb < row_blocks {
            let pair = (row_blocks - rb).min(2);
            for b in 0..a.blocks() {
                for h in 0..pair {
                    let block = w.as_ptr().add((rb + h) * size + block_offset(form, b));
                    for line in 0..head / 64 {
                        avx512vnni::prefetch(block.add(64 * line));
                    }
                    panel.headers[h].read::<Zmm>(how, slice::from_raw_parts(block, head));
                    for j in 0..a.len(b) / 8 {
                        let line = block.add(head + 64 * j);
                        avx512vnni::prefetch(line);
                        let [low, high] = codes::<LINEAR>(table, line);
                        let out = &mut panel.lines[h][j / 8 * 16 + j % 8..];
                        _mm512_store_si512(out[0].as_mut_ptr().cast(), low);
                        _mm512_store_si512(out[8].as_mut_ptr().cast(), high);
                    }
                }
                let mut t = 0;
                while t < a.m {
                    let out = y.as_mut_ptr().add((t * row_blocks + rb) * ROWS);
                    let ld = row_blocks * ROWS;
                    t += match (pair, a.m - t) {
                        (2, TILE..) => tile::<TILE, 2, LINEAR>(&panel, bias, a, b, t, out, ld),
                        (2, 2..) => tile::<2, 2, LINEAR>(&panel, bias, a, b, t, out, ld),
                        (2, _) => tile::<1, 2, LINEAR>(&panel, bias, a, b, t, out, ld),
                        (_, TILE..) => tile::<TILE, 1, LINEAR>(&panel, bias, a, b, t, out, ld),
                        _ => tile::<1, 1, LINEAR>(&panel, bias, a, b, t, out, ld),
                    };
                }
            }
            rb += pair;
        }
    }
}

/// `T` tokens against `R` row blocks of the panel, on top of `y`; block 0 starts from zero. Gives `T`.
///
/// # Safety
/// `t + T <= a.m`; `y` has `T` rows `ld` apart with `16 * R` values each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2")]
unsafe fn tile<const T: usize, const R: usize, const LINEAR: bool>(
    panel: &Panel,
    bias: i32,
    a: &Acts<'_>,
    b: usize,
    t: usize,
    y: *mut f32,
    ld: usize,
) -> usize {
    let len = a.len(b);
    // SAFETY: the caller's promise, and the panel has `len / 4` lines for each row block.
    unsafe {
        let q = a.q.as_ptr().add(b * BLOCK * a.m + t * len);
        let mut sum = [[0.0; GROUPS]; T];
        if LINEAR {
            for (i, sum) in sum.iter_mut().enumerate() {
                sums(a, b, t + i, sum);
            }
        }
        let mut part = [[_mm512_setzero_ps(); R]; T];
        for g in 0..len / GROUP {
            let mut c = [[_mm512_setzero_si512(); R]; T];
            if !LINEAR {
                for i in 0..T {
                    c[i] = [_mm512_set1_epi32(start(bias, a, b, t + i, g)); R];
                }
            }
            for j in 8 * g..8 * g + 8 {
                let mut w = [_mm512_setzero_si512(); R];
                for h in 0..R {
                    let line = panel.lines.get_unchecked(h).get_unchecked(j);
                    w[h] = _mm512_load_si512(line.as_ptr().cast());
                }
                for i in 0..T {
                    let x = _mm512_set1_epi32(avx512vnni::four(q.add(i * len), j));
                    for h in 0..R {
                        c[i][h] = _mm512_dpbusd_epi32(c[i][h], w[h], x);
                    }
                }
            }
            for h in 0..R {
                let header = panel.headers.get_unchecked(h);
                let s = _mm512_load_ps(header.s.get_unchecked(g).as_ptr());
                let o = _mm512_load_ps(header.o.get_unchecked(g).as_ptr());
                for i in 0..T {
                    let dot = _mm512_cvtepi32_ps(c[i][h]);
                    part[i][h] = _mm512_fmadd_ps(dot, s, part[i][h]);
                    if LINEAR {
                        let sum = _mm512_set1_ps(*sum[i].get_unchecked(g));
                        part[i][h] = _mm512_fmadd_ps(sum, o, part[i][h]);
                    }
                }
            }
        }
        for i in 0..T {
            let s = _mm512_set1_ps(*a.s.get_unchecked(b * a.m + t + i));
            for h in 0..R {
                let y = y.add(i * ld + h * ROWS);
                let acc = if b == 0 { _mm512_setzero_ps() } else { _mm512_loadu_ps(y) };
                _mm512_storeu_ps(y, _mm512_fmadd_ps(part[i][h], s, acc));
            }
        }
    }
    T
}
