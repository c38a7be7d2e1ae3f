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

use ferrule::kernels::layout::{Form, ROWS, pack_grouped};
use ferrule::kernels::{self, Acts, Attend, Kernels, KvDtype, PAGE, scratch_len};
use ferrule::quant::{BLOCK, BlockGrouped, GROUPS, Grouped, Scales, UNITS};
use std::hint::{black_box, spin_loop};
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

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

// ---------------------------------------------------------------------------------------------------
// Threads and time

/// CPUs this process may use.
#[cfg(target_os = "linux")]
fn cpus() -> Vec<usize> {
    // SAFETY: a mask of zeros is valid, and the call fills it.
    let mask = unsafe {
        let mut mask: libc::cpu_set_t = std::mem::zeroed();
        assert_eq!(libc::sched_getaffinity(0, size_of_val(&mask), &mut mask), 0);
        mask
    };
    // SAFETY: the index is below the size of the mask.
    (0..libc::CPU_SETSIZE as usize).filter(|&i| unsafe { libc::CPU_ISSET(i, &mask) }).collect()
}

#[cfg(not(target_os = "linux"))]
fn cpus() -> Vec<usize> {
    (0..std::thread::available_parallelism().map_or(1, usize::from)).collect()
}

#[cfg(target_os = "linux")]
fn pin(cpu: usize) {
    // SAFETY: as in `cpus`.
    unsafe {
        let mut mask: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut mask);
        libc::sched_setaffinity(0, size_of_val(&mask), &mask);
    }
}

#[cfg(not(target_os = "linux"))]
fn pin(_: usize) {}

/// Seconds of CPU time of this thread.
#[cfg(unix)]
fn cpu_time() -> f64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call fills `t`.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut t) };
    t.tv_sec as f64 + t.tv_nsec as f64 * 1e-9
}

#[cfg(not(unix))]
fn cpu_time() -> f64 {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_secs_f64()
}

struct Time {
    /// From the first start to the last end.
    wall: f64,
    /// CPU time of the busiest thread.
    cpu: f64,
}

/// Median times of five runs of `work(thread, run)` on every thread; one more run warms up.
fn time(threads: usize, work: impl Fn(usize, usize) + Sync) -> Time {
    let cpus = cpus();
    let (mut walls, mut busiest) = (Vec::new(), Vec::new());
    for run in 0..6 {
        let barrier = Barrier::new(threads);
        let times: Vec<_> = std::thread::scope(|scope| {
            let one = |thread: usize| {
                let (barrier, work, cpu) = (&barrier, &work, cpus[thread % cpus.len()]);
                scope.spawn(move || {
                    pin(cpu);
                    barrier.wait();
                    let (start, cpu) = (Instant::now(), cpu_time());
                    work(thread, run);
                    (start, Instant::now(), cpu_time() - cpu)
                })
            };
            let all: Vec<_> = (0..threads).map(one).collect();
            all.into_iter().map(|t| t.join().expect("a bench thread failed")).collect()
        });
        let (Some(start), Some(end)) =
            (times.iter().map(|t| t.0).min(), times.iter().map(|t| t.1).max())
        else {
            unreachable!("there is a thread")
        };
        if run > 0 {
            walls.push((end - start).as_secs_f64());
            busiest.push(times.iter().map(|t| t.2).fold(0.0, f64::max));
        }
    }
    walls.sort_by(f64::total_cmp);
    busiest.sort_by(f64::total_cmp);
    Time { wall: walls[2], cpu: busiest[2] }
}

/// Part `i` of `n` of a range.
fn part(len: usize, i: usize, n: usize) -> std::ops::Range<usize> {
    len * i / n..len * (i + 1) / n
}

// ---------------------------------------------------------------------------------------------------
// Memory

/// Touched memory, at a multiple of 2 MiB, with huge pages where the system gives them.
struct Memory {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Memory {
    fn new(len: usize) -> Memory {
        const HUGE: usize = 2 << 20;
        let mut bytes = Vec::<u8>::with_capacity(len + HUGE);
        let start = bytes.as_ptr().addr().next_multiple_of(HUGE) - bytes.as_ptr().addr();
        #[cfg(target_os = "linux")]
        // SAFETY: advice about memory of ours that has not been touched yet.
        unsafe {
            libc::madvise(bytes.as_mut_ptr().add(start).cast(), len, libc::MADV_HUGEPAGE);
        }
        bytes.resize(len + HUGE, 1);
        Memory { bytes, start, len }
    }
    fn get(&self) -> &[u8] {
        &self.bytes[self.start..][..self.len]
    }
    fn get_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..][..self.len]
    }
    /// `piece` again and again, as often as it fits.
    fn filled(piece: &[u8], len: usize) -> Memory {
        let mut memory = Memory::new(len / piece.len() * piece.len());
        for out in memory.get_mut().chunks_exact_mut(piece.len()) {
            out.copy_from_slice(piece);
        }
        memory
    }
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
// Limits

/// Bytes a second that plain 64-byte loads read, with the best of a few prefetch distances.
fn bandwidth(memory: &Memory, threads: usize) -> f64 {
    let lines = memory.get().as_chunks::<64>().0;
    let mut best = 0.0f64;
    for ahead in [0, 2048, 4096, 8192] {
        let t = time(threads, |thread, _| {
            black_box(read(&lines[part(lines.len(), thread, threads)], ahead));
        });
        let rate = (64 * lines.len()) as f64 / t.wall;
        println!("read, prefetch {ahead:4} ahead: {:6.1} GB/s", rate / 1e9);
        best = best.max(rate);
    }
    best
}

/// Prints what reading `bytes` in some time makes of the limit.
fn report(what: &str, bytes: usize, t: &Time, threads: usize, limit: f64) {
    let rate = bytes as f64 / t.wall;
    let busy = bytes as f64 / threads as f64 / t.cpu / 1e9;
    let share = 100.0 * rate / limit;
    let rate = rate / 1e9;
    println!(
        "{what}: {rate:6.1} GB/s, {share:3.0} % of the limit ({busy:.1} a thread by its CPU time)"
    );
}

#[cfg(target_arch = "x86_64")]
fn read(lines: &[[u8; 64]], ahead: usize) -> u8 {
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the CPU has the instructions.
        unsafe { x86::read_512(lines, ahead) }
    } else {
        read_any(lines, |line| x86::prefetch(line.as_ptr().wrapping_add(ahead)))
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn read(lines: &[[u8; 64]], _: usize) -> u8 {
    read_any(lines, |_| ())
}

fn read_any(lines: &[[u8; 64]], prefetch: impl Fn(&[u8; 64])) -> u8 {
    let mut sum = [0u8; 64];
    for line in lines {
        prefetch(line);
        for (sum, x) in sum.iter_mut().zip(line) {
            *sum ^= x;
        }
    }
    sum.into_iter().fold(0, |a, b| a ^ b)
}

/// Operations a second of the set's best integer instruction, from registers; a multiplication and an
/// addition are two operations.
fn peak(set: &Kernels, threads: usize) -> Option<f64> {
    #[cfg(not(target_arch = "x86_64"))]
    let (best, _) = (None, (set, threads)); // no such loops here
    #[cfg(target_arch = "x86_64")]
    let mut best = None;
    #[cfg(target_arch = "x86_64")]
    for (name, loop_, ops) in x86::peaks(set.name()) {
        let n = 2_000_000;
        // SAFETY: the chosen set, which `kernels::choose` gave, has these instructions.
        let t = time(threads, |_, _| unsafe { loop_(n) });
        let rate = (n * ops * threads) as f64 / t.cpu;
        println!("peak of {name}: {:.0} GOP/s", rate / 1e9);
        best = best.or(Some(rate));
    }
    if best.is_none() {
        println!("no peak is known for {}", set.name());
    }
    best
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::*;

    pub(crate) fn prefetch(p: *const u8) {
        // SAFETY: every x86-64 has SSE, and a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }

    #[target_feature(enable = "avx512f")]
    pub(crate) unsafe fn read_512(lines: &[[u8; 64]], ahead: usize) -> u8 {
        let mut sum = _mm512_setzero_si512();
        for line in lines {
            prefetch(line.as_ptr().wrapping_add(ahead));
            // SAFETY: a line is 64 bytes.
            sum = _mm512_xor_si512(sum, unsafe { _mm512_loadu_si512(line.as_ptr().cast()) });
        }
        _mm512_reduce_or_epi64(sum) as u8
    }

    /// Name, loop and operations of one turn of the loop, the set's own first.
    pub(crate) fn peaks(set: &str) -> Vec<(&'static str, unsafe fn(usize), usize)> {
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
}

/// What it costs to hand work to other threads.
fn sync(threads: usize) {
    const TURNS: usize = 100_000;
    let (arrived, epoch) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let t = time(threads, |_, run| {
        for turn in 1..=TURNS {
            let turn = run * TURNS + turn;
            if arrived.fetch_add(1, Ordering::AcqRel) == threads - 1 {
                arrived.store(0, Ordering::Relaxed);
                epoch.store(turn, Ordering::Release);
            }
            while epoch.load(Ordering::Acquire) < turn {
                spin_loop();
            }
        }
    });
    println!("barrier of spinning threads: {:.0} ns", t.wall / TURNS as f64 * 1e9);
    const WAKES: usize = 10_000;
    let t = time(1, |_, _| {
        let main = std::thread::current();
        let turn = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let other = scope.spawn(|| {
                for i in (1..2 * WAKES).step_by(2) {
                    while turn.load(Ordering::Acquire) < i {
                        std::thread::park();
                    }
                    turn.store(i + 1, Ordering::Release);
                    main.unpark();
                }
            });
            for i in (1..2 * WAKES).step_by(2) {
                turn.store(i, Ordering::Release);
                other.thread().unpark();
                while turn.load(Ordering::Acquire) < i + 1 {
                    std::thread::park();
                }
            }
        });
    });
    println!("wake a parked thread and be woken: {:.1} us", t.wall / WAKES as f64 * 1e6);
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
                let at = if tiled { (j / 64 * m + t) * 64 + j % 64 } else { t * BLOCK + j };
                q.get_mut()[b * BLOCK * m + at] = x as u8;
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
