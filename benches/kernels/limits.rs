//! What the machine can do: reading memory, multiplying in registers, waking threads; and how all is timed.

#[cfg(target_arch = "x86_64")]
use super::x86;
use ferrule::kernels::Kernels;
use std::hint::{black_box, spin_loop};
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

// ---------------------------------------------------------------------------------------------------
// Threads and time

/// CPUs this process may use.
#[cfg(target_os = "linux")]
pub(crate) fn cpus() -> Vec<usize> {
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
pub(crate) fn cpus() -> Vec<usize> {
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

pub(crate) struct Time {
    /// From the first start to the last end.
    pub(crate) wall: f64,
    /// CPU time of the busiest thread.
    pub(crate) cpu: f64,
}

/// Median times of five runs of `work(thread, run)` on every thread; one more run warms up.
pub(crate) fn time(threads: usize, work: impl Fn(usize, usize) + Sync) -> Time {
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
pub(crate) fn part(len: usize, i: usize, n: usize) -> std::ops::Range<usize> {
    len * i / n..len * (i + 1) / n
}

// ---------------------------------------------------------------------------------------------------
// Memory

/// Touched memory, at a multiple of 2 MiB, with huge pages where the system gives them.
pub(crate) struct Memory {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Memory {
    pub(crate) fn new(len: usize) -> Memory {
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
    pub(crate) fn get(&self) -> &[u8] {
        &self.bytes[self.start..][..self.len]
    }
    pub(crate) fn get_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..][..self.len]
    }
    /// `piece` again and again, as often as it fits.
    pub(crate) fn filled(piece: &[u8], len: usize) -> Memory {
        let mut memory = Memory::new(len / piece.len() * piece.len());
        for out in memory.get_mut().chunks_exact_mut(piece.len()) {
            out.copy_from_slice(piece);
        }
        memory
    }
}

// ---------------------------------------------------------------------------------------------------
// Limits

/// Bytes a second that plain 64-byte loads read, with the best of a few prefetch distances.
pub(crate) fn bandwidth(memory: &Memory, threads: usize) -> f64 {
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
pub(crate) fn report(what: &str, bytes: usize, t: &Time, threads: usize, limit: f64) {
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
pub(crate) fn peak(set: &Kernels, threads: usize) -> Option<f64> {
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

/// What it costs to hand work to other threads.
pub(crate) fn sync(threads: usize) {
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
