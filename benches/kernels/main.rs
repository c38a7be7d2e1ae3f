//! What the kernels reach, next to what this machine can do, measured in the same run.
//!
//! ```text
//! cargo bench --bench kernels -- <peak|bw|sync|gemv|gemm|attn> [set] [threads]
//! ```
//!
//! Threads are pinned, each to one CPU of the process. Weights and keys are cycled through more than
//! 1.2 GB, so that no cache holds them. Bandwidth counts wall-clock time; arithmetic counts the CPU time
//! of the busiest thread, which leaves out what other processes took. Figures are medians of five runs.
//! Before a kernel is timed, a sample of its results is compared with `scalar`, bit by bit.

#![allow(unsafe_code)] // pinning, instruction peaks, raw memory

mod limits;
#[cfg(target_arch = "x86_64")]
mod x86;

use ferrule::kernels::layout::{Form, ROWS, pack_grouped};
use ferrule::kernels::{self, Acts, Attend, Kernels, KvDtype, PAGE, scratch_len};
use ferrule::quant::{BLOCK, BlockGrouped, GROUPS, Grouped, Scales, UNITS};
use limits::{Memory, Time, bandwidth, cpus, part, peak, report, sync, time};
use std::hint::black_box;

/// Bytes that no cache holds.
const BIG: usize = 1_250_000_000;
/// Rows and inputs of a matrix.
const SIDE: usize = 4096;
/// Rows of one call: two row blocks, as the backend does it.
const ROWS_A_CALL: usize = 2 * ROWS;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let what = args.first().map_or("", String::as_str);
    let set = args.get(1).map_or_else(|| kernels::choose(None), |name| kernels::choose(Some(name)));
    let set = set.unwrap_or_else(|e| fail(&e.to_string()));
    let threads = match args.get(2) {
        None => cpus().len(),
        Some(n) => n.parse().ok().filter(|&n| n > 0).unwrap_or_else(|| fail("threads: a number")),
    };
    println!("{what}, {}, {threads} thread(s)", set.name());
    match what {
        "peak" => {
            peak(set, threads);
        }
        "bw" => {
            bandwidth(&Memory::new(BIG), threads);
        }
        "sync" => sync(threads),
        "gemv" => gemv(set, threads),
        "gemm" => gemm(set, threads),
        "attn" => attention(set, threads),
        _ => fail("usage: kernels <peak|bw|sync|gemv|gemm|attn> [set] [threads]"),
    }
}

fn fail(message: &str) -> ! {
    eprintln!("{message}");
    std::process::exit(2)
}

/// SplitMix64 (Steele et al. 2014), as numbers in -1..1.
struct Random(u64);

impl Random {
    fn values(&mut self, n: usize) -> Vec<f32> {
        let one = |_| {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(one).collect()
    }
}

// ---------------------------------------------------------------------------------------------------
// Matrices

/// Quantized activations; see [`Acts`].
struct Tokens {
    m: usize,
    q: Memory,
    tiled: bool,
    s: Vec<f32>,
    sums: Vec<[i16; GROUPS]>,
    totals: Vec<i32>,
}

impl Tokens {
    fn new(set: &Kernels, form: Form, m: usize) -> Tokens {
        let blocks = SIDE / BLOCK;
        let mut random = Random(m as u64);
        let (mut q, tiled) = (Memory::new(m * SIDE), set.tiled(form, m));
        let (mut s, mut sums) = (vec![0.0; m * blocks], vec![[0; GROUPS]; m * blocks]);
        let mut totals = vec![0; m * blocks];
        for i in 0..m * blocks {
            let mut int8 = [0; BLOCK];
            (s[i], totals[i]) = set.quantize(&random.values(BLOCK), &mut int8, &mut sums[i]);
            let (b, t) = (i / m, i % m);
            for (j, x) in int8.into_iter().enumerate() {
                let piece = if tiled { 64 } else { BLOCK };
                let at = b * BLOCK * m + (j / piece * m + t) * piece + j % piece;
                q.get_mut()[at] = x as u8;
            }
        }
        Tokens { m, q, tiled, s, sums, totals }
    }
    fn acts(&self) -> Acts<'_> {
        let q = self.q.get();
        // SAFETY: bytes as int8.
        let q = unsafe { std::slice::from_raw_parts(q.as_ptr().cast(), q.len()) };
        let Tokens { m, tiled, s, sums, totals, .. } = self;
        Acts { m: *m, k: SIDE, q, tiled: *tiled, s, sums, totals }
    }
}

/// Many matrices of 4096 x 4096, the same one at different places.
fn matrices(set: &Kernels, form: Form) -> Memory {
    let size = form.row_block_bytes(SIDE);
    let mut matrix = Memory::new(form.bytes(SIDE, SIDE));
    let mut random = Random(1);
    // Random row blocks to begin with, then copies of them: packing all would take long.
    let (some, rest) = matrix.get_mut().split_at_mut(8 * size);
    for out in some.chunks_exact_mut(form.row_block_bytes(BLOCK)) {
        if let Form::Grouped(how) = form {
            // 1, 7 or 2^-8, and 1 for integers to be times.
            let s = match how.scales {
                Scales::Power => 120,
                Scales::Integer => 7,
                Scales::F16 | Scales::Bf16 => 0x3c00,
            };
            let (s, o) = ([s; UNITS], [s; UNITS]);
            let mut rows =
                [BlockGrouped { d: 0x3c00, e: 0x3c00, s, o, ..BlockGrouped::ZERO }; ROWS];
            for row in &mut rows {
                for (code, x) in row.q.iter_mut().zip(random.values(BLOCK)) {
                    *code = (8.0 * x + 8.0) as u8;
                }
            }
            pack_grouped(how, &rows, out);
            continue;
        }
        let mut rows = [[0.0; BLOCK]; ROWS];
        for row in &mut rows {
            row.copy_from_slice(&random.values(BLOCK));
        }
        set.pack(form, &rows, BLOCK, out);
    }
    for out in rest.chunks_exact_mut(some.len()) {
        out.copy_from_slice(some);
    }
    Memory::filled(matrix.get(), BIG)
}

/// Compares the first rows of the first matrix with `scalar`.
fn check(set: &Kernels, form: Form, memory: &Memory, m: usize) {
    let w = &memory.get()[..2 * form.row_block_bytes(SIDE)];
    let run = |set: &Kernels| {
        let mut y = vec![0.0f32; m * ROWS_A_CALL];
        set.gemm(form, w, &Tokens::new(set, form, m).acts(), &mut y);
        y.into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    let scalar = kernels::available().find(|k| k.name() == "scalar");
    assert!(scalar.is_some_and(|scalar| run(scalar) == run(set)), "{form:?} differs from scalar");
}

/// Times products of `m` tokens with `count` matrices a run, going on where the last run ended.
fn products(
    set: &Kernels,
    form: Form,
    memory: &Memory,
    m: usize,
    count: usize,
    threads: usize,
) -> Time {
    let tokens = Tokens::new(set, form, m);
    check(set, form, memory, m);
    let matrices = memory.get().len() / form.bytes(SIDE, SIDE);
    let chunk = 2 * form.row_block_bytes(SIDE);
    time(threads, |thread, run| {
        let mut y = vec![0.0; m * ROWS_A_CALL + ROWS];
        let start = y.as_ptr().addr().wrapping_neg() % 64 / 4;
        let y = &mut y[start..][..m * ROWS_A_CALL];
        for i in 0..count {
            let at = (run * count + i) % matrices * form.bytes(SIDE, SIDE);
            let matrix = &memory.get()[at..][..form.bytes(SIDE, SIDE)];
            for part in part(SIDE / ROWS_A_CALL, thread, threads) {
                set.gemm(form, &matrix[part * chunk..][..chunk], &tokens.acts(), black_box(y));
            }
        }
    })
}

/// The forms to time, and what they are called here.
const FORMS: [(&str, Form); 8] = [
    ("int4", Form::Q4),
    ("int8", Form::Q8),
    ("mxfp4", Form::MXFP4),
    ("Q4_0", Form::Grouped(Grouped::Q4_0)),
    ("Q4_K", Form::Grouped(Grouped::Q4_K)),
    ("Q5_K", Form::Grouped(Grouped::Q5_K)),
    ("Q6_K", Form::Grouped(Grouped::Q6_K)),
    ("IQ4_XS", Form::Grouped(Grouped::IQ4_XS)),
];

/// One to four tokens: bytes of weights a second against what memory gives.
fn gemv(set: &Kernels, threads: usize) {
    for (name, form) in FORMS {
        let memory = matrices(set, form);
        let limit = bandwidth(&memory, threads);
        for m in [1, 2, 4] {
            let matrices = memory.get().len() / form.bytes(SIDE, SIDE);
            let t = products(set, form, &memory, m, matrices, threads);
            let what = format!("{name:6} M={m}");
            report(&what, memory.get().len(), &t, threads, limit);
        }
    }
}

/// Many tokens: operations a second against what the set's instruction gives.
fn gemm(set: &Kernels, threads: usize) {
    let limit = peak(set, threads);
    for (name, form) in FORMS {
        let memory = matrices(set, form);
        for m in [8, 16, 32, 128, 512] {
            let ops = 2 * m * SIDE * SIDE;
            let matrices = memory.get().len() / form.bytes(SIDE, SIDE);
            // About 1e11 operations a run.
            let count = (100_000_000_000 / ops).clamp(1, matrices);
            let t = products(set, form, &memory, m, count, threads);
            let rate = (count * ops) as f64 / t.cpu;
            let share =
                limit.map_or(String::new(), |l| format!(", {:.0} % of the peak", 100.0 * rate / l));
            let wall = (count * ops) as f64 / t.wall / 1e9;
            println!(
                "{name:6} M={m:3}: {:7.0} GOP/s{share} (by the wall clock {wall:.0})",
                rate / 1e9
            );
        }
    }
}

// ---------------------------------------------------------------------------------------------------
// Attention

/// Decode at context 4096: 8 key/value heads of 128 dimensions, 4 query heads each.
fn attention(set: &Kernels, threads: usize) {
    const CONTEXT: usize = 4096;
    const D: usize = 128;
    const HEADS: usize = 8;
    const GROUP: usize = 4;
    for dtype in [KvDtype::F16, KvDtype::Int8] {
        let page = dtype.page_bytes(D, true);
        let mut one = vec![0u8; page * CONTEXT / PAGE * HEADS];
        let mut random = Random(3);
        for page in one.chunks_exact_mut(page) {
            for slot in 0..PAGE {
                set.write_kv(dtype, &random.values(D), &random.values(D), slot, page);
            }
        }
        // Layer after layer; a page has the records of its heads side by side.
        let memory = Memory::filled(&one, BIG);
        let limit = bandwidth(&memory, threads);
        let layers = memory.get().len() / one.len();
        let q = random.values(GROUP * D);
        let table: Vec<u32> = (0..(CONTEXT / PAGE) as u32).collect();
        let head =
            |set: &Kernels, layer: usize, head: usize, out: &mut [f32], scratch: &mut [f32]| {
                let a = Attend {
                    q: &q,
                    d: D,
                    latent: None,
                    scale: 0.1,
                    softcap: None,
                    sinks: None,
                    seen: &[(0, CONTEXT as u32); GROUP],
                    kv: &memory.get()[layer * one.len()..][..one.len()],
                    table: &table,
                    page_stride: HEADS * page,
                    head_offset: head * page,
                };
                set.attend(dtype, &a, out, scratch);
            };
        let buffers = || (vec![0.0f32; GROUP * D], vec![0.0f32; scratch_len(GROUP, D)]);
        let sample = |set: &Kernels| {
            let (mut out, mut scratch) = buffers();
            head(set, 0, 1, &mut out, &mut scratch);
            out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        let scalar = kernels::available().find(|k| k.name() == "scalar");
        assert!(scalar.is_some_and(|scalar| sample(scalar) == sample(set)), "differs from scalar");
        let t = time(threads, |thread, _| {
            let (mut out, mut scratch) = buffers();
            for layer in 0..layers {
                for h in part(HEADS, thread, threads) {
                    head(set, layer, h, black_box(&mut out), &mut scratch);
                }
            }
        });
        report(&format!("attention {dtype:?}"), layers * one.len(), &t, threads, limit);
    }
}
