//! Loops that only read memory, or only repeat one instruction.

use std::arch::asm;
use std::arch::x86_64::*;

pub(super) fn prefetch(p: *const u8) {
    // SAFETY: every x86-64 has SSE, and a prefetch never faults.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
}

#[target_feature(enable = "avx512f")]
pub(super) unsafe fn read_512(lines: &[[u8; 64]], ahead: usize) -> u8 {
    let mut sum = _mm512_setzero_si512();
    for line in lines {
        prefetch(line.as_ptr().wrapping_add(ahead));
        // SAFETY: a line is 64 bytes.
        sum = _mm512_xor_si512(sum, unsafe { _mm512_loadu_si512(line.as_ptr().cast()) });
    }
    _mm512_reduce_or_epi64(sum) as u8
}

/// Name, loop and operations of one turn of the loop, the set's own first.
pub(super) fn peaks(set: &str) -> Vec<(&'static str, unsafe fn(usize), usize)> {
    let amx = ("tdpbssd", tile as unsafe fn(usize), 4 * 2 * 16 * 16 * 64);
    let vnni = ("vpdpbusd zmm", vnni_512 as unsafe fn(usize), 12 * 2 * 64);
    let vex = ("vpdpbusd ymm", vnni_256 as unsafe fn(usize), 12 * 2 * 32);
    // Exact int8 takes vpmaddubsw, vpmaddwd and vpaddd for each 32 products.
    let avx2 = ("vpmaddubsw, vpmaddwd, vpaddd", madd_256 as unsafe fn(usize), 12 * 2 * 32);
    let (fma_512, fma_256) = (
        ("f32 fma zmm", fma_512 as unsafe fn(usize), 12 * 2 * 16),
        ("f32 fma ymm", fma_256 as unsafe fn(usize), 12 * 2 * 8),
    );
    match set {
        "amx" => vec![amx, vnni, fma_512],
        "avx512vnni" => vec![vnni, fma_512],
        "avxvnni" => vec![vex, fma_256],
        "avx2" => vec![avx2, fma_256],
        _ => vec![],
    }
}

/// A loop over 12 times an instruction, on register `\i`, that neither load nor wait for each other.
/// All registers hold zeros: numbers that are not normal would slow some CPUs down.
macro_rules! peak {
    ($name:ident, $features:literal, $instruction:literal) => {
        #[target_feature(enable = $features)]
        unsafe fn $name(n: usize) {
            // SAFETY: registers only, all of them declared.
            unsafe {
                asm!(
                    "vzeroall",
                    "2:",
                    ".irp i, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11",
                    $instruction,
                    ".endr",
                    "dec {n}",
                    "jnz 2b",
                    n = inout(reg) n => _,
                    out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _,
                    out("ymm4") _, out("ymm5") _, out("ymm6") _, out("ymm7") _,
                    out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
                    out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
                    options(nostack, nomem),
                );
            }
        }
    };
}

peak!(vnni_512, "avx512f,avx512vnni", "vpdpbusd zmm\\i, zmm14, zmm15");
peak!(vnni_256, "avx2,avxvnni", "{{vex}} vpdpbusd ymm\\i, ymm14, ymm15");
peak!(
    madd_256,
    "avx2",
    "vpmaddubsw ymm13, ymm14, ymm15; vpmaddwd ymm13, ymm13, ymm15; vpaddd ymm\\i, ymm\\i, ymm13"
);
peak!(fma_512, "avx512f", "vfmadd231ps zmm\\i, zmm14, zmm15");
peak!(fma_256, "avx2,fma", "vfmadd231ps ymm\\i, ymm14, ymm15");

/// # Safety
/// The set `amx` is available: it asked for the permission.
unsafe fn tile(n: usize) {
    #[repr(align(64))]
    struct Config([u8; 64]);
    let mut config = Config([0; 64]);
    config.0[0] = 1;
    for t in 0..8 {
        (config.0[16 + 2 * t], config.0[48 + t]) = (64, 16);
    }
    // SAFETY: tile registers only, configured here and given back.
    unsafe {
        asm!(
            "ldtilecfg [{config}]",
            "2:", "tdpbssd tmm0, tmm6, tmm7", "tdpbssd tmm1, tmm6, tmm7",
            "tdpbssd tmm2, tmm6, tmm7", "tdpbssd tmm3, tmm6, tmm7", "dec {n}", "jnz 2b",
            "tilerelease",
            config = in(reg) config.0.as_ptr(), n = inout(reg) n => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, readonly),
        );
    }
}
