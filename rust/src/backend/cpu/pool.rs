//! The thread pool: a region of work is claimed piece by piece by whoever comes.
//!
//! The caller works too and never waits for a thread that has not begun: on a machine that is busy with
//! something else a late worker finds nothing left and costs nothing. Who waits (a worker for the next region, the
//! caller for the last piece) spins briefly, because the regions of one step follow each other within microseconds,
//! and then sleeps: on an idle core the system puts a thread that waits for a busy one, and that is the thread waited
//! for. With more threads than CPUs nobody spins.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*};
use std::sync::{Arc, Mutex};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long to spin before sleeping.
const SPIN: Duration = Duration::from_micros(50);
/// How long a worker runs before it offers its core to others. It does so between regions, where it holds nothing:
/// taken off its core inside a region, it would keep all others waiting.
const TURN: Duration = Duration::from_millis(1);

type Job = *const (dyn Fn(usize) + Sync);

struct Shared {
    /// Odd while a region is open; grows with each opening and closing.
    epoch: AtomicU64,
    /// The open region's work. Written only while the region is closed and `inside` is 0.
    job: UnsafeCell<Option<Job>>,
    /// Workers that may be running `job`.
    inside: AtomicUsize,
    /// A worker panicked in a region.
    panicked: AtomicBool,
    stop: AtomicBool,
    asleep: Vec<AtomicBool>,
    /// The caller sleeps until `inside` is 0.
    waiting: AtomicBool,
    caller: Mutex<Option<Thread>>,
    spin: Duration,
}

impl Shared {
    /// Whether `ready` came true while it was worth spinning.
    fn spin(&self, ready: impl Fn() -> bool) -> bool {
        let start = Instant::now();
        loop {
            for _ in 0..32 {
                if ready() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() >= self.spin {
                return false;
            }
        }
    }
}

// SAFETY: `job` is the only field that is not already `Sync`. It is written by the one caller that holds
// `Pool::region`, while the region is closed and nobody is inside, and read by workers between entering and
// leaving an open region; both sides order this by `epoch` and `inside` (SeqCst). The pointee is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above; the raw pointer is only used while the caller of `run` keeps its pointee alive.
unsafe impl Send for Shared {}

/// Threads that work together on one region at a time.
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<(Thread, Option<JoinHandle<()>>)>,
    region: Mutex<()>,
}

impl Pool {
    /// A pool of `threads`, the caller of [`Pool::run`] counted in.
    pub(super) fn new(threads: usize) -> std::io::Result<Pool> {
        let cpus = std::thread::available_parallelism().map_or(threads, usize::from);
        let shared = Arc::new(Shared {
            epoch: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            inside: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            asleep: (1..threads).map(|_| AtomicBool::new(false)).collect(),
            waiting: AtomicBool::new(false),
            caller: Mutex::new(None),
            spin: if threads > cpus { Duration::ZERO } else { SPIN },
        });
        let mut pool = Pool { shared, workers: Vec::new(), region: Mutex::new(()) };
        for i in 0..threads.saturating_sub(1) {
            let shared = pool.shared.clone();
            let handle = std::thread::Builder::new()
                .name(format!("ferrule-{}", i + 1))
                .spawn(move || worker(&shared, i))?;
            pool.workers.push((handle.thread().clone(), Some(handle)));
        }
        Ok(pool)
    }

    /// Threads, the caller counted in.
    pub(super) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `work(thread)` on the caller (thread 0) and on each worker that comes in time. `work` claims its
    /// pieces itself and must be complete when the caller's own call has returned and all others have.
    pub(super) fn run(&self, work: &(dyn Fn(usize) + Sync)) {
        if self.workers.is_empty() {
            return work(0);
        }
        let region = self.region.lock().unwrap_or_else(|e| e.into_inner());
        let shared = &*self.shared;
        // SAFETY: the region is closed and nobody is inside (the last `run` waited for that), so no worker
        // reads `job`. The lifetime is cut off here; `Close` below waits, even if `work` panics, until no
        // worker can use the pointer any more.
        unsafe {
            *shared.job.get() =
                Some(std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Job>(work))
        };
        shared.panicked.store(false, SeqCst);
        shared.epoch.fetch_add(1, SeqCst);
        for ((thread, _), asleep) in self.workers.iter().zip(&shared.asleep) {
            if asleep.load(SeqCst) {
                thread.unpark();
            }
        }
        let close = Close(shared);
        work(0);
        drop(close);
        let panicked = shared.panicked.load(SeqCst);
        drop(region);
        assert!(!panicked, "a worker thread panicked");
    }
}

/// Closes the open region and waits until everyone has left.
struct Close<'a>(&'a Shared);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        let shared = self.0;
        shared.epoch.fetch_add(1, SeqCst);
        if shared.spin(|| shared.inside.load(SeqCst) == 0) {
            return;
        }
        *shared.caller.lock().unwrap_or_else(|e| e.into_inner()) = Some(std::thread::current());
        // Announce the sleep, look once more, sleep: who leaves goes, then looks who waits.
        shared.waiting.store(true, SeqCst);
        while shared.inside.load(SeqCst) != 0 {
            std::thread::park();
        }
        shared.waiting.store(false, SeqCst);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        for (thread, handle) in &mut self.workers {
            thread.unpark();
            if let Some(handle) = handle.take() {
                let _ = handle.join(); // a worker that panicked was reported by `run`
            }
        }
    }
}

fn worker(shared: &Shared, index: usize) {
    let (mut done, mut since) = (0, Instant::now());
    loop {
        if since.elapsed() > TURN {
            std::thread::yield_now();
            since = Instant::now();
        }
        let open = || {
            let epoch = shared.epoch.load(SeqCst);
            (epoch % 2 == 1 && epoch != done).then_some(epoch)
        };
        let stop = || shared.stop.load(SeqCst);
        while !shared.spin(|| open().is_some() || stop()) {
            // Announce the sleep, look once more, sleep: the caller opens, then looks who sleeps.
            shared.asleep[index].store(true, SeqCst);
            if open().is_none() && !stop() {
                std::thread::park();
            }
            shared.asleep[index].store(false, SeqCst);
        }
        if stop() {
            return;
        }
        let Some(open) = open() else { continue };
        shared.inside.fetch_add(1, SeqCst);
        // Either the caller sees us inside and waits, or we see that it has closed the region.
        if shared.epoch.load(SeqCst) == open {
            // SAFETY: we are inside an open region: `job` was set before it opened and stays valid until
            // `inside` is 0 again.
            let job = unsafe { (*shared.job.get()).map(|job| &*job) };
            if let Some(job) = job {
                let run = std::panic::AssertUnwindSafe(|| job(index + 1));
                if std::panic::catch_unwind(run).is_err() {
                    shared.panicked.store(true, SeqCst);
                }
            }
        }
        if shared.inside.fetch_sub(1, SeqCst) == 1
            && shared.waiting.load(SeqCst)
            && let Some(caller) = &*shared.caller.lock().unwrap_or_else(|e| e.into_inner())
        {
            caller.unpark();
        }
        done = open;
    }
}

/// Pieces `0..total`, claimed in runs of `grain`: each thread first takes from its own share, in order, then
/// from the others' shares.
pub(super) struct Claims {
    shares: Vec<Share>,
    grain: usize,
}

#[repr(align(128))] // no two cursors in one cache line (or pair of them)
struct Share {
    next: AtomicUsize,
    end: usize,
}

impl Claims {
    pub(super) fn new(total: usize, threads: usize, grain: usize) -> Claims {
        let grain = grain.max(1);
        let runs = total.div_ceil(grain);
        let cut = |i: usize| (runs * i / threads * grain).min(total);
        let share = |i| Share { next: AtomicUsize::new(cut(i)), end: cut(i + 1) };
        Claims { shares: (0..threads).map(share).collect(), grain }
    }

    /// Gives each claimed run of pieces to `work`.
    pub(super) fn each(&self, thread: usize, mut work: impl FnMut(std::ops::Range<usize>)) {
        let n = self.shares.len();
        for i in 0..n {
            let share = &self.shares[(thread + i) % n];
            while share.next.load(Relaxed) < share.end {
                let start = share.next.fetch_add(self.grain, Relaxed);
                if start >= share.end {
                    break;
                }
                work(start..share.end.min(start + self.grain));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_piece_is_done_once() {
        for threads in 1..5 {
            let pool = Pool::new(threads).unwrap();
            for total in (0..40).chain([1000]) {
                for grain in [1, 3, 64] {
                    let counts: Vec<AtomicUsize> =
                        (0..total).map(|_| AtomicUsize::new(0)).collect();
                    let claims = Claims::new(total, pool.threads(), grain);
                    pool.run(&|thread| {
                        claims.each(thread, |run| {
                            for i in run {
                                counts[i].fetch_add(1, Relaxed);
                            }
                        });
                    });
                    assert!(counts.iter().all(|c| c.load(Relaxed) == 1));
                }
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_leaves_the_pool_usable() {
        let pool = Pool::new(3).unwrap();
        let seen = AtomicUsize::new(0);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(&|_| panic!("on purpose"));
        }));
        assert!(result.is_err());
        pool.run(&|thread| {
            seen.fetch_add(usize::from(thread == 0), SeqCst);
        });
        assert_eq!(seen.load(SeqCst), 1);
    }

    #[test]
    fn sleeping_workers_wake() {
        let pool = Pool::new(2).unwrap();
        for _ in 0..3 {
            std::thread::sleep(std::time::Duration::from_millis(5));
            let both = AtomicUsize::new(0);
            pool.run(&|_| {
                both.fetch_add(1, SeqCst);
                // Stay inside until the other has come: it must.
                while both.load(SeqCst) < 2 {
                    std::hint::spin_loop();
                }
            });
        }
    }
}
