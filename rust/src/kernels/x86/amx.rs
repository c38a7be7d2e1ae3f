//! AMX: tiles of 16 rows of 64 bytes, and one instruction that multiplies two of them as int8.
//!
//! Many tokens only; few are left to `avx512vnni`. A B tile is 16 lines of the packed order, as they lie
//! (64 k by 16 rows of weights); an A tile is 16 tokens' activations of 64 k, side by side. For every
//! block of K and pair of row blocks: int4 weights are unpacked to a panel of int8 (8 KiB), then all
//! tokens run against it, 32 at a time, in 2 x 2 tiles of exact integers.
//!
//! The tile unit works while the other units have time. So each 64-k step of the tiles is followed by a
//! share of two other jobs: the float step of the 32 tokens before, and the unpacking of the panel that
//! comes next. What limits is L1: tiles alone take half of its loads. Activations are read past it
//! (`tileloaddt1`), which leaves it to the panels and the sums.
//!
//! AMX has no stable intrinsics: the instructions are in `asm!`. Tile contents live from one `asm!` to the
//! next. That is sound because nothing else touches tiles: the compiler never uses them on its own, the
//! statements stay in order (none is `pure`), no code of others runs between them, and the operating
//! system saves and restores tiles with a thread.

use super::super::layout::{Q8_HEADER, ROWS, block_offset};
use super::super::{Acts, Form, Kernels};
use super::avx512vnni::{self, unpack};
use crate::quant::BLOCK;
use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::sync::LazyLock;

pub(in super::super) const KERNELS: Kernels = Kernels {
    name: "amx",
    needs: &["amx-int8", "avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx2", "fma", "f16c"],
    gemm_q4,
    gemm_q8,
    tiled: 16,
    ..avx512vnni::KERNELS
};

/// Whether the CPU has AMX with int8, and the operating system lets this process use it: "amx-int8".
pub(in super::super) fn allowed() -> bool {
    const TILE_AND_INT8: u32 = 1 << 24 | 1 << 25;
    static ALLOWED: LazyLock<bool> = LazyLock::new(|| {
        __cpuid(0).eax >= 7
            && __cpuid_count(7, 0).edx & TILE_AND_INT8 == TILE_AND_INT8
            && permission()
    });
    *ALLOWED
}

/// Asks Linux for the use of tile registers, once for the process: threads inherit it.
#[cfg(target_os = "linux")]
fn permission() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XTILEDATA: libc::c_long = 18;
    // SAFETY: this request only changes how much state the system keeps for this process.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn permission() -> bool {
    false
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn gemm_q4(w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    // SAFETY: the shapes were checked by `Kernels::gemm`.
    unsafe { if a.tiled { gemm::<true>(w, a, y) } else { avx512vnni::gemm_q4(w, a, y) } }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn gemm_q8(w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    // SAFETY: the shapes were checked by `Kernels::gemm`.
    unsafe { if a.tiled { gemm::<false>(w, a, y) } else { avx512vnni::gemm_q8(w, a, y) } }
}

/// What the tiles are: eight of 16 rows of 64 bytes. The layout is the CPU's.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIG: Config = Config {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Scratch of one call, on the stack, not initialised.
#[repr(C, align(64))]
struct Scratch {
    /// Two panels of unpacked weights, of two row blocks each: one in use, one in the making.
    panels: [[[u8; ROWS * BLOCK]; 2]; 2],
    /// Integers of 32 tokens by two row blocks.
    sums: [[i32; 2 * ROWS]; 32],
}

/// Integers of up to 32 tokens by two row blocks that wait for their float step. The pointers are those
/// of the next token.
#[derive(Clone, Copy)]
struct Waiting {
    left: usize,
    sums: *const i32,
    /// The token's scale, and the scales of both row blocks.
    s: *const f32,
    d: [*const f32; 2],
    /// Where the token's sums go; the next token's are `ld` further on.
    y: *mut f32,
    /// The first block of K, which starts from zero.
    first: bool,
    /// There is a second row block.
    two: bool,
}

impl Waiting {
    const NOTHING: Waiting = Waiting {
        left: 0,
        sums: std::ptr::null(),
        s: std::ptr::null(),
        d: [std::ptr::null(); 2],
        y: std::ptr::null_mut(),
        first: true,
        two: true,
    };

    /// The float step of the next `n` tokens, or of those that are left.
    ///
    /// # Safety
    /// The pointers are valid for `left` tokens, `y` for rows `ld` apart of two row blocks.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn run(&mut self, n: usize, ld: usize) {
        let n = n.min(self.left);
        if n == 0 {
            return;
        }
        self.left -= n;
        // Masks instead of branches: the old value, or zero for the first block of K; both row blocks or one.
        let there = [0xffff, if self.two { 0xffff } else { 0 }];
        let keep = there.map(|there| if self.first { 0 } else { there });
        // SAFETY: the caller's promise.
        unsafe {
            let d = [_mm512_load_ps(self.d[0]), _mm512_load_ps(self.d[1])];
            for i in 0..n {
                let s = _mm512_set1_ps(*self.s.add(i));
                for h in 0..2 {
                    let y = self.y.wrapping_add(i * ld + h * ROWS);
                    let sums = self.sums.add((2 * i + h) * ROWS);
                    let dot = _mm512_cvtepi32_ps(_mm512_load_si512(sums.cast()));
                    let acc = _mm512_maskz_loadu_ps(keep[h], y);
                    let acc = _mm512_fmadd_ps(dot, _mm512_mul_ps(d[h], s), acc);
                    _mm512_mask_storeu_ps(y, there[h], acc);
                }
            }
            self.s = self.s.add(n);
            self.sums = self.sums.add(2 * ROWS * n);
            self.y = self.y.wrapping_add(n * ld);
        }
    }
}

/// One block of K of two row blocks, and how far it is prepared.
#[derive(Clone, Copy)]
struct Pair {
    blocks: [*const u8; 2],
    panel: *mut [u8; ROWS * BLOCK],
    /// Pieces, of 64 k of one row block each, that are still to prepare; `pieces` in all.
    next: usize,
    pieces: usize,
}

impl Pair {
    /// Prepares the pieces before `to`: unpacks int4 weights, asks for int8 weights, which are used where
    /// they lie.
    ///
    /// # Safety
    /// The blocks have `32 * pieces` k, and `panel` is that of two row blocks.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn prepare<const Q4: bool>(&mut self, to: usize) {
        // SAFETY: the caller's promise; prefetches never fault.
        unsafe {
            for piece in self.next..to {
                let (t, h) = (piece / 2, piece % 2);
                if Q4 {
                    let out = self.panel.add(h).cast::<u8>().add(1024 * t);
                    unpack::<0>(self.blocks[h], t, out);
                } else {
                    for j in 0..16 {
                        let line = self.blocks[h].add(Q8_HEADER + 1024 * t + 64 * j);
                        _mm_prefetch::<_MM_HINT_T0>(line.cast());
                    }
                }
            }
        }
        self.next = to;
    }

    /// Where the tiles of both row blocks begin.
    ///
    /// # Safety
    /// As [`Pair::prepare`].
    unsafe fn tiles<const Q4: bool>(&self) -> [*const u8; 2] {
        // SAFETY: the caller's promise.
        unsafe {
            if Q4 {
                [self.panel.cast(), self.panel.add(1).cast()]
            } else {
                self.blocks.map(|block| block.add(Q8_HEADER))
            }
        }
    }
}

/// Many tokens against row blocks.
///
/// # Safety
/// Shapes as `Kernels::gemm` checks them, activations tiled, and the CPU and the system allow AMX.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn gemm<const Q4: bool>(w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
    let form = if Q4 { Form::Q4 } else { Form::Q8 };
    let size = form.row_block_bytes(a.k);
    let row_blocks = w.len() / size;
    let ld = row_blocks * ROWS;
    // The last pair may overlap the one before: it computes the same again. One row block alone is taken twice.
    let two = row_blocks > 1;
    let row_block = |i: usize| (i / a.blocks() * 2).min(row_blocks.saturating_sub(2));
    let count = row_blocks.div_ceil(2) * a.blocks();
    let y = y.as_mut_ptr();
    let mut scratch = MaybeUninit::<Scratch>::uninit();
    // SAFETY: places only; nothing is read before it is written.
    let (panels, sums) = unsafe {
        let scratch = scratch.as_mut_ptr();
        (&raw mut (*scratch).panels, (&raw mut (*scratch).sums).cast::<i32>())
    };
    // Job `i`: block `i % blocks` of pair `i / blocks`. The job behind the last has no pieces.
    let job = |i: usize| {
        let offset = block_offset(form, i % a.blocks());
        let block = |rb: usize| w.as_ptr().wrapping_add(rb * size + offset);
        Pair {
            blocks: [block(row_block(i)), block(row_block(i) + usize::from(two))],
            panel: panels.cast::<[u8; ROWS * BLOCK]>().wrapping_add(i % 2 * 2),
            next: 0,
            pieces: if i < count { a.len(i % a.blocks()) / 32 } else { 0 },
        }
    };
    // Steps of 32 tokens or fewer that the tokens make.
    let turns = if a.m < 32 { a.m.div_ceil(16) } else { a.m.div_ceil(32) };
    // What the tiles hold, and what waits for its float step.
    let (mut held, mut waiting) = (Waiting::NOTHING, Waiting::NOTHING);
    // SAFETY: every address below lies in `w`, `a`, `y` or `scratch`: tokens `start..start + tokens` are
    // tokens of `a`, and `len` k of each of two row blocks are those of block `b`. Tile registers are
    // configured here, on this thread, and given back at the end.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, preserves_flags, readonly));
        let mut now = job(0);
        now.prepare::<Q4>(now.pieces);
        for i in 0..count {
            let (rb, b) = (row_block(i), i % a.blocks());
            let len = a.len(b);
            let steps = len / 64;
            let tiles = now.tiles::<Q4>();
            let mut next = job(i + 1);
            let (mut t, mut done) = (0, 0);
            while t < a.m {
                // The last tokens may overlap those before: their tiles are computed again, but only the
                // new ones take the float step.
                let tokens = if a.m - t > 16 && a.m >= 32 { 32 } else { 16 };
                let start = t.min(a.m - tokens);
                let q = a.q.as_ptr().add(b * BLOCK * a.m + start * 64);
                // The step that begins stores the tiles held; the others have time for what they held.
                let share = held.left.div_ceil((steps - 1).max(1));
                for step in 0..steps {
                    let (q, tiles) =
                        (q.add(64 * a.m * step), tiles.map(|tile| tile.add(1024 * step)));
                    match (tokens, step) {
                        (32, 0) => begin_32(q, tiles, sums),
                        (32, _) => multiply_32(q, tiles),
                        (_, 0) => begin_16(q, tiles, sums),
                        _ => multiply_16(q, tiles),
                    }
                    if step == 0 {
                        waiting = held;
                    }
                    if step > 0 || steps == 1 {
                        waiting.run(share, ld);
                    }
                    done += 1;
                    next.prepare::<Q4>((done * next.pieces).div_ceil(turns * steps));
                }
                let skip = t - start;
                held = Waiting {
                    left: tokens - skip,
                    sums: sums.add(skip * 2 * ROWS),
                    s: a.s.as_ptr().add(b * a.m + t),
                    d: now.blocks.map(|block| block.cast()),
                    y: y.add(t * ld + rb * ROWS),
                    first: b == 0,
                    two,
                };
                t = start + tokens;
            }
            now = next;
        }
        store(sums);
        asm!("tilerelease", options(nostack, preserves_flags, nomem));
        held.run(32, ld);
    }
}

/// Adds the products of 32 tokens and 32 rows over 64 k to tiles 0 to 3.
///
/// # Safety
/// Tiles are configured; `q` is 32 times 64 bytes; each of `w` is 1024 bytes.
#[inline(always)]
unsafe fn multiply_32(q: *const i8, w: [*const u8; 2]) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "tileloadd tmm6, [{w0} + {line}]",
            "tileloaddt1 tmm4, [{q0} + {line}]",
            "tdpbssd tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{w1} + {line}]",
            "tdpbssd tmm1, tmm4, tmm7",
            "tileloaddt1 tmm5, [{q1} + {line}]",
            "tdpbssd tmm2, tmm5, tmm6",
            "tdpbssd tmm3, tmm5, tmm7",
            q0 = in(reg) q, q1 = in(reg) q.add(16 * 64),
            w0 = in(reg) w[0], w1 = in(reg) w[1], line = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags, readonly),
        );
    }
}

/// As [`multiply_32`], of 16 tokens, to tiles 0 and 1.
///
/// # Safety
/// As [`multiply_32`], for 16 times 64 bytes.
#[inline(always)]
unsafe fn multiply_16(q: *const i8, w: [*const u8; 2]) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "tileloadd tmm6, [{w0} + {line}]",
            "tileloaddt1 tmm4, [{q} + {line}]",
            "tdpbssd tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{w1} + {line}]",
            "tdpbssd tmm1, tmm4, tmm7",
            q = in(reg) q,
            w0 = in(reg) w[0], w1 = in(reg) w[1], line = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags, readonly),
        );
    }
}

/// [`store`] of what the tiles hold, which is over then, and the first step of other 32 tokens. Each tile is written
/// right before it starts again: alone, the four stores would hold up the multiplications.
///
/// # Safety
/// As [`multiply_32`] and [`store`].
#[inline(always)]
unsafe fn begin_32(q: *const i8, w: [*const u8; 2], sums: *mut i32) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "tileloadd tmm6, [{w0} + {line}]",
            "tileloaddt1 tmm4, [{q0} + {line}]",
            "tilestored [{sums} + {token}], tmm0",
            "tilezero tmm0",
            "tdpbssd tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{w1} + {line}]",
            "tilestored [{sums} + {token} + 64], tmm1",
            "tilezero tmm1",
            "tdpbssd tmm1, tmm4, tmm7",
            "tileloaddt1 tmm5, [{q1} + {line}]",
            "tilestored [{more} + {token}], tmm2",
            "tilezero tmm2",
            "tdpbssd tmm2, tmm5, tmm6",
            "tilestored [{more} + {token} + 64], tmm3",
            "tilezero tmm3",
            "tdpbssd tmm3, tmm5, tmm7",
            q0 = in(reg) q, q1 = in(reg) q.add(16 * 64),
            w0 = in(reg) w[0], w1 = in(reg) w[1], line = in(reg) 64usize,
            sums = in(reg) sums, more = in(reg) sums.add(16 * 2 * ROWS),
            token = in(reg) 4 * 2 * ROWS,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags),
        );
    }
}

/// As [`begin_32`], of 16 tokens.
///
/// # Safety
/// As [`multiply_16`] and [`store`].
#[inline(always)]
unsafe fn begin_16(q: *const i8, w: [*const u8; 2], sums: *mut i32) {
    // SAFETY: the caller's promise.
    unsafe {
        store(sums);
        asm!(
            "tilezero tmm0", "tilezero tmm1",
            out("tmm0") _, out("tmm1") _,
            options(nostack, preserves_flags, nomem),
        );
        multiply_16(q, w);
    }
}

/// Writes tiles 0 to 3 as the sums of 32 tokens by 32 rows.
///
/// # Safety
/// Tiles are configured; `sums` has room for 32 times 32.
#[inline(always)]
unsafe fn store(sums: *mut i32) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "tilestored [{sums} + {token}], tmm0",
            "tilestored [{sums} + {token} + 64], tmm1",
            "tilestored [{more} + {token}], tmm2",
            "tilestored [{more} + {token} + 64], tmm3",
            sums = in(reg) sums, more = in(reg) sums.add(16 * 2 * ROWS),
            token = in(reg) 4 * 2 * ROWS,
            options(nostack, preserves_flags),
        );
    }
}
