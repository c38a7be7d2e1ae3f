//! Long work on a thread of its own, while the caller's thread shows how far it is and looks for Ctrl-C.

use super::SIGNALS;
use super::convert::exception;
use crate::{Error, Result};
use pyo3::prelude::*;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

/// How long interrupted work may take to put its files away before it is left to itself.
const TIDY: Duration = Duration::from_secs(10);

/// What the two threads share.
#[derive(Default)]
pub(super) struct Watch {
    /// Set by Ctrl-C: the work is to end soon.
    pub(super) stop: AtomicBool,
    /// What is being done, how much of it is done, of how much.
    now: Mutex<(&'static str, u64, u64)>,
}

impl Watch {
    pub(super) fn report(&self, what: &'static str, done: u64, total: u64) {
        *self.now.lock().unwrap_or_else(PoisonError::into_inner) = (what, done, total);
    }
}

/// Gives what `work` gives. `progress(what, done, total)` is called now and then.
pub(super) fn watched<T: Send + 'static>(
    py: Python<'_>,
    progress: Option<Py<PyAny>>,
    work: impl FnOnce(&Arc<Watch>) -> Result<T> + Send + 'static,
) -> PyResult<T> {
    let watch = Arc::new(Watch::default());
    let (sender, receiver) = mpsc::channel();
    let run = {
        let watch = watch.clone();
        move || drop(sender.send(work(&watch))) // nobody listens after Ctrl-C
    };
    std::thread::Builder::new()
        .name("ferrule".into())
        .spawn(run)
        .map_err(|error| exception(py, &Error::io("thread", error)))?;
    let receiver = Mutex::new(receiver); // a lock, as `detach` asks for what threads may share
    let wait = |most| {
        let receiver = receiver.lock().unwrap_or_else(PoisonError::into_inner);
        receiver.recv_timeout(most)
    };
    let mut shown = ("", 0, 0);
    loop {
        match py.detach(|| wait(SIGNALS)) {
            Ok(result) => return result.map_err(|error| exception(py, &error)),
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                let error = Error::Internal("a working thread panicked".into());
                return Err(exception(py, &error));
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {}
        }
        let now = *watch.now.lock().unwrap_or_else(PoisonError::into_inner);
        let show = || match &progress {
            Some(progress) if now != shown => progress.call1(py, now).map(drop),
            _ => Ok(()),
        };
        if let Err(error) = py.check_signals().and_then(|()| show()) {
            watch.stop.store(true, Ordering::Relaxed);
            drop(py.detach(|| wait(TIDY)));
            return Err(error);
        }
        shown = now;
    }
}
