//! AVX-512 with VNNI: 16 rows are the 16 lanes of one register.
//!
//! Few tokens multiply the packed weights as they lie; more, 16 at a time, each line after it became int8 in a
//! register. Many tokens unpack a block of int4 to int8 once (4 KiB, in L1) and run it against all tokens. All give
//! the exact integer of each block.

use super::super::layout::{Q4_HEADER, Q8_HEADER, ROWS, block_offset};
use super::super::{Acts, Form, Kernels, scalar};
use super::grouped512;
use super::zmm::FLOATS;
use crate::quant::BLOCK;
use std::arch::x86_64::*;
use std::ops::Range;
use std::sync::OnceLock;

pub(in super::super) const KERNELS: Kernels = Kernels {
    name: "avx512vnni",
    needs: &["avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx2", "fma", "f16c"],
    gemm_q4,
    gemm_q8,
    gemm_grouped: grouped512::gemm,
    float: FLOATS,
    ..scalar::KERNELS
};

/// Bytes read ahead of the multiplication, into L1 and into L2: a stream from DRAM runs at 65 % of its
/// speed without. Tuned on Emerald Rapids; speed only, never results.
const NEAR: usize = 2304;
const FAR: usize = 18_432;
/// Kernels for one token to sixteen from the one with that number on.
type Few = [unsafe fn(&[u8], &Acts<'_>, &mut [f32], usize); 16];

/// [`Few`]: `$direct` for the first numbers of tokens, [`lines`] for the others.
macro_rules! few {
    ($direct:ident[$rows:literal], $streams:expr; $($few:literal)+; $q4:expr; $($more:literal)+) => {
        [$($direct::<$few, $rows, $streams>,)+ $(lines::<$more, $q4>),+]
    };
    ($direct:ident, $streams:expr; $($few:literal)+; $q4:expr; $($more:literal)+) => {
        [$($direct::<$few, $streams>,)+ $(lines::<$more, $q4>),+]
    };
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn gemm_q4(w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    const FEW: Few = few!(direct_q4[1], false; 1 2 3 4 5 6 7 8; true; 9 10 11 12 13 14 15 16);
    // SAFETY: the shapes were checked by `Kernels::gemm`.
    unsafe {
        match a.m {
            1 if streams() => direct_q4::<1, 1, true>(w, a, y, 0),
            // Two streams from memory, with twice as much to do between the lines of each: one alone waits for L1's few
            // buffers of lines (one thread of a Granite Rapids: 14.4 of 18 GB/s, two row blocks at a time 17.0).
            1 if w.len() > Form::Q4.row_block_bytes(a.k) => direct_q4::<1, 2, false>(w, a, y, 0),
            ..=32 => few(&FEW, w, a, y),
            _ => panels(w, a, y),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn gemm_q8(w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    const FEW: Few = few!(direct_q8, false; 1 2 3 4; false; 5 6 7 8 9 10 11 12 13 14 15 16);
    const STREAMS: Few = few!(direct_q8, true; 1 2 3 4; false; 5 6 7 8 9 10 11 12 13 14 15 16);
    // SAFETY: the shapes were checked by `Kernels::gemm`.
    unsafe { few(if streams() { &STREAMS } else { &FEW }, w, a, y) }
}

/// [`Tile`]s of so many tokens.
macro_rules! tiles {
    ($($t:literal)+) => { [$(tile::<$t>),+] };
}

/// All tokens; after the first pass, the weights come from the cache.
///
/// # Safety
/// As the kernels.
unsafe fn few(kernels: &Few, w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    for tokens in passes(a.m) {
        // SAFETY: the caller's promise, and `passes` gives tokens that there are, at most 16 at once.
        unsafe { kernels[tokens.len() - 1](w, a, y, tokens.start) }
    }
}

/// The tokens `0..m` in as few parts of at most 16 as there can be, which are about as long as each other.
fn passes(m: usize) -> impl Iterator<Item = Range<usize>> {
    let parts = m.div_ceil(16);
    (0..parts).map(move |i| i * m / parts..(i + 1) * m / parts)
}

/// Four consecutive int8 as one 32-bit lane.
///
/// # Safety
/// Four bytes from `p + 4 * j` on can be read.
#[inline(always)]
pub(super) unsafe fn four(p: *const i8, j: usize) -> i32 {
    // SAFETY: the caller's promise; the read may be unaligned.
    unsafe { p.add(4 * j).cast::<i32>().read_unaligned() }
}

/// Tokens `t0..t0 + M` against int4 weights as they lie, `R` row blocks at a time.
///
/// The group sums `sum q*a` are below 2^24 (15 * 127 * 16 * 256 = 7.8e6 with their scales), so adding
/// them up in f32 is exact, and cheaper than integer multiplication.
///
/// # Safety
/// Shapes as `Kernels::gemm` checks them, `t0 + M <= a.m`, and at least `R` row blocks.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn direct_q4<const M: usize, const R: usize, const STREAMS: bool>(
    w: &[u8],
    a: &Acts<'_>,
    y: &mut [f32],
    t0: usize,
) {
    let size = Form::Q4.row_block_bytes(a.k);
    let row_blocks = w.len() / size;
    let low = _mm512_set1_epi8(0x0f);
    let high = _mm512_set1_epi8(0xf0u8 as i8);
    // Scale codes are scale minus one; the high nibbles carry a factor of 16 that the table takes out.
    let scales: [f32; 16] = std::array::from_fn(|i| (i + 1) as f32);
    // SAFETY: every address below lies in block `b` of row blocks `rb` and on of `w`, in `a` or in `y`, whose
    // lengths were checked; prefetches never fault.
    unsafe {
        let table_low = _mm512_loadu_ps(scales.as_ptr());
        let table_high = _mm512_mul_ps(table_low, _mm512_set1_ps(1.0 / 16.0));
        for rb in (0..row_blocks).step_by(R) {
            // The last ones may overlap those before: they are computed again.
            let rb = rb.min(row_blocks - R);
            let mut p: [_; R] = std::array::from_fn(|r| w.as_ptr().add((rb + r) * size));
            let mut acc = [[_mm512_setzero_ps(); M]; R];
            for b in 0..a.blocks() {
                let len = a.len(b);
                let q = a.q.as_ptr().add(b * BLOCK * a.m + t0 * len);
                let at = b * a.m + t0;
                for p in p {
                    if STREAMS {
                        prefetch_block(p, Q4_HEADER + len / 2 * ROWS);
                    } else {
                        for line in 0..Q4_HEADER / 64 {
                            prefetch(p.add(64 * line));
                        }
                    }
                }
                let mut sum = [[_mm512_setzero_ps(); M]; R];
                let mut mins = [[_mm512_setzero_si512(); M]; R];
                for t in 0..len / 64 {
                    let lines = p.map(|p| p.add(Q4_HEADER + 512 * t));
                    let mut c0 = [[_mm512_setzero_si512(); M]; R];
                    let mut c1 = [[_mm512_setzero_si512(); M]; R];
                    for j in 0..8 {
                        for r in 0..R {
                            if !STREAMS {
                                prefetch(lines[r].add(64 * j));
                            }
                            let v = _mm512_load_si512(lines[r].add(64 * j).cast());
                            let (lo, hi) = (_mm512_and_si512(v, low), _mm512_and_si512(v, high));
                            for i in 0..M {
                                let q = q.add(i * len + 64 * t);
                                let x = _mm512_set1_epi32(four(q, j));
                                c0[r][i] = _mm512_dpbusd_epi32(c0[r][i], lo, x);
                                let x = _mm512_set1_epi32(four(q, j + 8));
                                c1[r][i] = _mm512_dpbusd_epi32(c1[r][i], hi, x);
                            }
                        }
                    }
                    for r in 0..R {
                        let codes = _mm_load_si128(p[r].add(64 + 16 * t).cast());
                        let codes = _mm512_cvtepu8_epi32(codes);
                        let s0 = _mm512_permutexvar_ps(codes, table_low);
                        let s1 = _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(codes), table_high);
                        let mn = _mm256_load_si256(p[r].add(128 + 32 * t).cast());
                        let mn = _mm512_cvtepi8_epi16(mn);
                        for i in 0..M {
                            let sum = &mut sum[r][i];
                            *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(c0[r][i]), s0, *sum);
                            *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(c1[r][i]), s1, *sum);
                            let pair = a.sums.as_ptr().add(at + i).cast::<i32>().add(t);
                            let pair = _mm512_set1_epi32(pair.read_unaligned());
                            mins[r][i] = _mm512_dpwssd_epi32(mins[r][i], mn, pair);
                        }
                    }
                }
                for r in 0..R {
                    let d = _mm512_load_ps(p[r].cast());
                    for i in 0..M {
                        let dot = _mm512_sub_ps(sum[r][i], _mm512_cvtepi32_ps(mins[r][i]));
                        let scale = _mm512_mul_ps(d, _mm512_set1_ps(*a.s.get_unchecked(at + i)));
                        acc[r][i] = _mm512_fmadd_ps(dot, scale, acc[r][i]);
                    }
                    p[r] = p[r].add(Q4_HEADER + len / 2 * ROWS);
                }
            }
            for (r, acc) in acc.into_iter().enumerate() {
                for (i, acc) in acc.into_iter().enumerate() {
                    let y = y.as_mut_ptr().add(((t0 + i) * row_blocks + rb + r) * ROWS);
                    _mm512_storeu_ps(y, acc);
                }
            }
        }
    }
}

/// Tokens `t0..t0 + M` against int8 weights as they lie. `vpdpbusd` takes unsigned times signed: the
/// weights are read plus 128 (xor 0x80), and the sum starts at -128 times the sum of the activations.
///
/// # Safety
/// As [`direct_q4`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn direct_q8<const M: usize, const STREAMS: bool>(
    w: &[u8],
    a: &Acts<'_>,
    y: &mut [f32],
    t0: usize,
) {
    let size = Form::Q8.row_block_bytes(a.k);
    let row_blocks = w.len() / size;
    let flip = _mm512_set1_epi8(-128);
    // SAFETY: as in `direct_q4`.
    unsafe {
        for rb in 0..row_blocks {
            let mut p = w.as_ptr().add(rb * size);
            let mut acc = [_mm512_setzero_ps(); M];
            for b in 0..a.blocks() {
                let len = a.len(b);
                let q = a.q.as_ptr().add(b * BLOCK * a.m + t0 * len);
                let at = b * a.m + t0;
                if STREAMS {
                    prefetch_block(p, Q8_HEADER + len * ROWS);
                } else {
                    prefetch(p);
                }
                let lines = p.add(Q8_HEADER);
                let mut c0 = negative::<M>(a, at);
                let mut c1 = [_mm512_setzero_si512(); M];
                let mut j = 0;
                while j < len / 4 {
                    if !STREAMS {
                        prefetch(lines.add(64 * j));
                        prefetch(lines.add(64 * j + 64));
                    }
                    let v0 = _mm512_load_si512(lines.add(64 * j).cast());
                    let v1 = _mm512_load_si512(lines.add(64 * j + 64).cast());
                    let (v0, v1) = (_mm512_xor_si512(v0, flip), _mm512_xor_si512(v1, flip));
                    for i in 0..M {
                        let q = q.add(i * len);
                        c0[i] = _mm512_dpbusd_epi32(c0[i], v0, _mm512_set1_epi32(four(q, j)));
                        c1[i] = _mm512_dpbusd_epi32(c1[i], v1, _mm512_set1_epi32(four(q, j + 1)));
                    }
                    j += 2;
                }
                let d = _mm512_load_ps(p.cast());
                for i in 0..M {
                    let dot = _mm512_cvtepi32_ps(_mm512_add_epi32(c0[i], c1[i]));
                    let scale = _mm512_mul_ps(d, _mm512_set1_ps(*a.s.get_unchecked(at + i)));
                    acc[i] = _mm512_fmadd_ps(dot, scale, acc[i]);
                }
                p = lines.add(len * ROWS);
            }
            for (i, acc) in acc.into_iter().enumerate() {
                let y = y.as_mut_ptr().add(((t0 + i) * row_blocks + rb) * ROWS);
                _mm512_storeu_ps(y, acc);
            }
        }
    }
}

/// Tokens `t0..t0 + M` against int4 or int8 weights: each line of 16 rows becomes int8 plus 128 in a register, and is
/// multiplied with all tokens.
///
/// # Safety
/// As [`direct_q4`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn lines<const M: usize, const Q4: bool>(w: &[u8], a: &Acts<'_>, y: &mut [f32], t0: usize) {
    let (form, header) = if Q4 { (Form::Q4, Q4_HEADER) } else { (Form::Q8, Q8_HEADER) };
    let size = form.row_block_bytes(a.k);
    let row_blocks = w.len() / size;
    let flip = _mm512_set1_epi8(-128);
    // SAFETY: as in `direct_q4`.
    unsafe {
        for rb in 0..row_blocks {
            let mut acc = [_mm512_setzero_ps(); M];
            for b in 0..a.blocks() {
                let p = w.as_ptr().add(rb * size + block_offset(form, b));
                let len = a.len(b);
                let q = a.q.as_ptr().add(b * BLOCK * a.m + t0 * len);
                let at = b * a.m + t0;
                for line in 0..header / 64 {
                    prefetch(p.add(64 * line));
                }
                let mut c = negative::<M>(a, at);
                for t in 0..len / 64 {
                    let q = q.add(64 * t);
                    if Q4 {
                        let scales = Scales::read::<0x80>(p, t);
                        for j in 0..8 {
                            let line = p.add(header + 512 * t + 64 * j);
                            prefetch(line);
                            let (low, high) = scales.apply(_mm512_load_si512(line.cast()));
                            times(low, q, len, j, &mut c);
                            times(high, q, len, j + 8, &mut c);
                        }
                    } else {
                        for j in 0..16 {
                            let line = p.add(header + 1024 * t + 64 * j);
                            prefetch(line);
                            let v = _mm512_xor_si512(_mm512_load_si512(line.cast()), flip);
                            times(v, q, len, j, &mut c);
                        }
                    }
                }
                let d = _mm512_load_ps(p.cast());
                for i in 0..M {
                    let scale = _mm512_mul_ps(d, _mm512_set1_ps(*a.s.get_unchecked(at + i)));
                    acc[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(c[i]), scale, acc[i]);
                }
            }
            for (i, acc) in acc.into_iter().enumerate() {
                let y = y.as_mut_ptr().add(((t0 + i) * row_blocks + rb) * ROWS);
                _mm512_storeu_ps(y, acc);
            }
        }
    }
}

/// What sums start at whose weights are 128 too large: -128 times the sum of the activations, from `at` on.
///
/// # Safety
/// `at + M` is at most the number of totals.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn negative<const M: usize>(a: &Acts<'_>, at: usize) -> [__m512i; M] {
    let mut c = [_mm512_setzero_si512(); M];
    for (i, c) in c.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *c = _mm512_set1_epi32(-128 * unsafe { *a.totals.get_unchecked(at + i) });
    }
    c
}

/// Adds the products of a line with the `j`th four values of each of the tokens, which are `len` apart.
///
/// # Safety
/// So many values can be read from `q` on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn times<const M: usize>(
    line: __m512i,
    q: *const i8,
    len: usize,
    j: usize,
    c: &mut [__m512i; M],
) {
    for (i, c) in c.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        let x = unsafe { four(q.add(i * len), j) };
        *c = _mm512_dpbusd_epi32(*c, line, _mm512_set1_epi32(x));
    }
}

/// Asks for the bytes that this stream needs next.
///
/// # Safety
/// The CPU has SSE. Any address may be asked for.
#[inline(always)]
pub(super) unsafe fn prefetch(p: *const u8) {
    // SAFETY: a prefetch reads nothing that the program sees and never faults.
    unsafe {
        _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(NEAR).cast());
        _mm_prefetch::<_MM_HINT_T1>(p.wrapping_add(FAR).cast());
    }
}

/// Whether this CPU's own prefetchers keep up with a stream of weights, but for the ends of 4 KiB pages. AMD's do
/// where the multiplication is quick: one token against int4 weights on Zen 4 runs at 21 GB/s if every line is asked
/// for, at 25 if only the beginning of the block after the next is (of 31 that one thread reads).
pub(super) fn streams() -> bool {
    static STREAMS: OnceLock<bool> = OnceLock::new();
    *STREAMS.get_or_init(|| {
        let id = __cpuid(0);
        [id.ebx, id.edx, id.ecx].map(u32::to_le_bytes).concat() == *b"AuthenticAMD"
    })
}

/// Asks for the beginning of the block after the next, of blocks of `size` bytes.
///
/// # Safety
/// As [`prefetch`].
#[inline(always)]
pub(super) unsafe fn prefetch_block(p: *const u8, size: usize) {
    for at in (0..256).step_by(64) {
        // SAFETY: a prefetch reads nothing that the program sees and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.wrapping_add(2 * size + at).cast()) };
    }
}

/// int8 weights of one block of a row block, plus 128 each.
#[repr(C, align(64))]
struct Panel([[u8; 64]; BLOCK / 4]);

/// Many tokens against int4 weights: unpack a block of a row block, run all tokens against it, go on along K.
///
/// # Safety
/// As [`direct_q4`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn panels(w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    const TILES: [Tile; 16] = tiles!(1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16);
    let size = Form::Q4.row_block_bytes(a.k);
    let row_blocks = w.len() / size;
    let mut panel = Panel([[0; 64]; BLOCK / 4]);
    // SAFETY: as in `direct_q4`.
    unsafe {
        for rb in 0..row_blocks {
            for b in 0..a.blocks() {
                let block = w.as_ptr().add(rb * size + block_offset(Form::Q4, b));
                for t in 0..a.len(b) / 64 {
                    unpack::<0x80>(block, t, panel.0.as_mut_ptr().cast::<u8>().add(1024 * t));
                }
                let d = _mm512_load_ps(block.cast());
                for tokens in passes(a.m) {
                    let y = y.as_mut_ptr().add((tokens.start * row_blocks + rb) * ROWS);
                    TILES[tokens.len() - 1](&panel, a, b, tokens.start, d, y, row_blocks * ROWS);
                }
            }
        }
    }
}

/// How the nibbles of a sub-block become int8, for the low and the high ones: times the scale in each 16-bit half,
/// minus the byte. `q <= 15` and `scale <= 16`: both products of a half stay in their bytes.
struct Scales([(__m512i, __m512i); 2]);

impl Scales {
    /// Of sub-block `t` (64 k) of an int4 block of 16 rows; the int8 will be xor `FLIP`.
    ///
    /// # Safety
    /// `block` is an int4 block with more than `64 * t` k, 64-byte aligned.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn read<const FLIP: u8>(block: *const u8, t: usize) -> Scales {
        // Times this, the low byte of a lane stands in all four.
        let all = _mm512_set1_epi32(0x0101_0101);
        let one = _mm512_set1_epi32(1);
        let flip = _mm512_set1_epi8(FLIP as i8);
        // SAFETY: the caller's promise.
        let (codes, mn) = unsafe {
            let codes = _mm_load_si128(block.add(64 + 16 * t).cast());
            (codes, _mm256_load_si256(block.add(128 + 32 * t).cast()))
        };
        let codes = _mm512_cvtepu8_epi32(codes);
        let s0 = _mm512_add_epi32(_mm512_and_si512(codes, _mm512_set1_epi32(15)), one);
        let s0 = _mm512_or_si512(s0, _mm512_slli_epi32::<16>(s0));
        let s1 = _mm512_add_epi32(_mm512_srli_epi32::<4>(codes), one);
        let s1 = _mm512_or_si512(s1, _mm512_slli_epi32::<16>(s1));
        let mn = _mm512_cvtepu16_epi32(mn);
        let m0 = _mm512_and_si512(mn, _mm512_set1_epi32(255));
        let m1 = _mm512_srli_epi32::<8>(mn);
        // Byte offsets, all four bytes of a lane alike; 0xff * 0x01010101 does not overflow. Modulo 256: subtracting
        // mn ^ 0x80 is subtracting mn and adding 128.
        let m0 = _mm512_xor_si512(_mm512_mullo_epi32(m0, all), flip);
        let m1 = _mm512_xor_si512(_mm512_mullo_epi32(m1, all), flip);
        Scales([(s0, m0), (s1, m1)])
    }

    /// The int8 of a line's low nibbles and of its high ones.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    fn apply(&self, line: __m512i) -> (__m512i, __m512i) {
        let nibble = _mm512_set1_epi8(0x0f);
        let low = _mm512_and_si512(line, nibble);
        let high = _mm512_and_si512(_mm512_srli_epi16::<4>(line), nibble);
        let [(s0, m0), (s1, m1)] = self.0;
        let low = _mm512_sub_epi8(_mm512_mullo_epi16(low, s0), m0);
        (low, _mm512_sub_epi8(_mm512_mullo_epi16(high, s1), m1))
    }
}

/// Unpacks sub-block `t` (64 k) of an int4 block of 16 rows to int8, xor `FLIP`: 16 lines from `out` on.
///
/// # Safety
/// `block` is an int4 block with more than `64 * t` k; `out` has room for 1024 bytes; both are 64-byte
/// aligned.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn unpack<const FLIP: u8>(block: *const u8, t: usize, out: *mut u8) {
    // SAFETY: the caller's promise.
    unsafe {
        // A quarter of the header.
        prefetch(block.add(64 * t));
        let scales = Scales::read::<FLIP>(block, t);
        for j in 0..8 {
            let line = block.add(Q4_HEADER + 512 * t + 64 * j);
            prefetch(line);
            let (low, high) = scales.apply(_mm512_load_si512(line.cast()));
            _mm512_store_si512(out.add(64 * j).cast(), low);
            _mm512_store_si512(out.add(64 * j + 512).cast(), high);
        }
    }
}

/// [`tile`] of a number of tokens.
type Tile = unsafe fn(&Panel, &Acts<'_>, usize, usize, __m512, *mut f32, usize);

/// `T` tokens from `t` on against block `b`: its exact integers, then the float step into `y`. Block 0 starts from zero.
///
/// # Safety
/// `t + T <= a.m`; `y` has `T` rows `ld` apart with 16 values each.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn tile<const T: usize>(
    panel: &Panel,
    a: &Acts<'_>,
    b: usize,
    t: usize,
    d: __m512,
    y: *mut f32,
    ld: usize,
) {
    let (len, at) = (a.len(b), b * a.m + t);
    // SAFETY: the caller's promise, and the panel has `len / 4` lines.
    unsafe {
        let q = a.q.as_ptr().add(b * BLOCK * a.m + t * len);
        let mut c = negative::<T>(a, at);
        for (j, line) in panel.0[..len / 4].iter().enumerate() {
            times(_mm512_load_si512(line.as_ptr().cast()), q, len, j, &mut c);
        }
        for (i, c) in c.iter().enumerate() {
            let y = y.add(i * ld);
            let acc = if b == 0 { _mm512_setzero_ps() } else { _mm512_loadu_ps(y) };
            let scale = _mm512_mul_ps(d, _mm512_set1_ps(*a.s.get_unchecked(at + i)));
            _mm512_storeu_ps(y, _mm512_fmadd_ps(_mm512_cvtepi32_ps(*c), scale, acc));
        }
    }
}
