//! The thread that owns an engine, and the tickets through which other threads talk to it. Any
//! thread may submit, wait and cancel. Never computes; the only part with a clock.

use super::convert;
use crate::engine::{Engine, Event, FinishReason, Request, RequestId, TokenLogprobs};
use crate::model::Forward;
use crate::{Error, Result};
use pyo3::prelude::*;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How an answer ended, for Python.
pub(super) struct Done {
    pub(super) reason: FinishReason,
    pub(super) stop_match: Option<String>,
    pub(super) prompt_tokens: usize,
    pub(super) cached_tokens: usize,
    pub(super) completion_tokens: usize,
    pub(super) prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
    pub(super) prompt_logits: Option<Vec<f32>>,
    pub(super) queued: Duration,
    pub(super) token_times: Vec<Duration>, // since the call
    pub(super) total: Duration,
}

/// What a request has said since it was last asked.
#[derive(Default)]
pub(super) struct News {
    pub(super) text: String,
    pub(super) token_ids: Vec<u32>,
    pub(super) logprobs: Vec<TokenLogprobs>,
    pub(super) done: Option<Done>,
}

#[derive(Default)]
struct State {
    news: News,
    fresh: bool,    // `news` has something
    notified: bool, // and `notify` was called for it
    over: bool,
    failed: Option<Arc<Error>>,
    started: Option<Instant>,
    token_times: Vec<Duration>,
}

impl State {
    fn take(&mut self, event: Event, now: Instant, submitted: Instant) {
        let since = |time: Instant| time.saturating_duration_since(submitted);
        match event {
            Event::Chunk { text, token_ids, logprobs, .. } => {
                self.token_times.extend(token_ids.iter().map(|_| since(now)));
                self.news.text.push_str(&text);
                self.news.token_ids.extend(token_ids);
                self.news.logprobs.extend(logprobs);
            }
            Event::Done {
                reason,
                stop_match,
                prompt_tokens,
                cached_tokens,
                completion_tokens,
                prompt_logprobs,
                prompt_logits,
                ..
            } => {
                self.news.done = Some(Done {
                    reason,
                    stop_match,
                    prompt_tokens,
                    cached_tokens,
                    completion_tokens,
                    prompt_logprobs,
                    prompt_logits,
                    queued: since(self.started.unwrap_or(now)),
                    token_times: std::mem::take(&mut self.token_times),
                    total: since(now),
                });
                self.over = true;
            }
            Event::Failed { error, .. } => {
                self.failed = Some(Arc::new(error));
                self.over = true;
            }
        }
    }
}

/// One request, seen from the threads that wait for it.
pub(super) struct Ticket {
    state: Mutex<State>,
    changed: Condvar,
    submitted: Instant,
    /// Wake waiting threads at each piece of news, not only at the end.
    stream: bool,
    /// Python function to call when there is news; it must not block.
    notify: Option<Py<PyAny>>,
    /// What a logits processor raised.
    pub(super) raised: Arc<Mutex<Option<PyErr>>>,
}

impl Ticket {
    pub(super) fn new(stream: bool, notify: Option<Py<PyAny>>) -> Ticket {
        Ticket {
            state: Mutex::default(),
            changed: Condvar::new(),
            submitted: Instant::now(),
            stream,
            notify,
            raised: Arc::default(),
        }
    }

    pub(super) fn over(&self) -> bool {
        lock(&self.state).over
    }

    /// Waits at most so long for news: of any kind for a stream, else for the end. An error stays.
    pub(super) fn wait(&self, most: Duration) -> std::result::Result<Option<News>, Arc<Error>> {
        let quiet = |s: &mut State| !(s.over || self.stream && s.fresh);
        let (mut state, _) = self
            .changed
            .wait_timeout_while(lock(&self.state), most, quiet)
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        if quiet(&mut state) {
            return Ok(None);
        }
        (state.fresh, state.notified) = (false, false);
        Ok(Some(std::mem::take(&mut state.news)))
    }

    /// Takes the events of one step; whether `notify` is to be called.
    fn take(&self, events: Vec<Event>, now: Instant) -> bool {
        let mut state = lock(&self.state);
        for event in events {
            state.take(event, now, self.submitted);
        }
        state.fresh = true;
        if state.over || self.stream {
            self.changed.notify_all();
            return self.notify.is_some() && !std::mem::replace(&mut state.notified, true);
        }
        false
    }

    fn fail(&self, error: Error) -> bool {
        self.take(vec![Event::Failed { id: 0, error }], Instant::now())
    }

    fn call_notify(&self, py: Python<'_>) {
        let Some(notify) = &self.notify else { return };
        // Fails when the event loop is closed: then nobody waits any more.
        drop(notify.call0(py));
    }
}

enum Letter {
    Submit(Box<Request>, Arc<Ticket>),
    Cancel(Arc<Ticket>),
}

#[derive(Default)]
struct Mail {
    letters: Vec<Letter>, // in the order of the calls
    closing: bool,
    broken: Option<String>, // what the driver's panic said
}

/// Where other threads leave messages for the driver.
#[derive(Default)]
pub(super) struct Inbox {
    mail: Mutex<Mail>,
    arrived: Condvar,
    interrupt: OnceLock<Arc<AtomicBool>>,
}

impl Inbox {
    pub(super) fn submit(&self, request: Request, ticket: Arc<Ticket>) -> Result<()> {
        let mut mail = lock(&self.mail);
        mail.check()?;
        mail.letters.push(Letter::Submit(Box::new(request), ticket));
        self.arrived.notify_one();
        Ok(())
    }

    /// Errors if nothing can be submitted any more.
    pub(super) fn check(&self) -> Result<()> {
        lock(&self.mail).check()
    }

    pub(super) fn cancel(&self, ticket: &Arc<Ticket>) {
        if !ticket.over() {
            lock(&self.mail).letters.push(Letter::Cancel(ticket.clone()));
            self.wake();
        }
    }

    pub(super) fn close(&self) {
        lock(&self.mail).closing = true;
        self.wake();
    }

    /// Has the driver look at the mail soon: after the message, as the engine asks for it.
    fn wake(&self) {
        if let Some(interrupt) = self.interrupt.get() {
            interrupt.store(true, Ordering::SeqCst);
        }
        self.arrived.notify_one();
    }
}

impl Mail {
    fn check(&self) -> Result<()> {
        match &self.broken {
            Some(what) => Err(Error::Internal(what.clone())),
            None if self.closing => Err(Error::Closed),
            None => Ok(()),
        }
    }
}

/// Runs `engine` until the inbox is closed; then every request is over and the engine is dropped.
pub(super) fn drive<M: Forward>(engine: Engine<M>, inbox: &Inbox) {
    let mut tickets = Vec::new();
    // The engine is dropped by its panic, so nothing sees it in a broken state.
    let end = catch_unwind(AssertUnwindSafe(|| serve(engine, inbox, &mut tickets)));
    let mut mail = lock(&inbox.mail);
    mail.closing = true;
    if let Err(panic) = end {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        mail.broken = Some(text.unwrap_or("panic").to_string());
    }
    tickets.extend(mail.letters.drain(..).filter_map(|letter| match letter {
        Letter::Submit(_, ticket) => Some(ticket),
        Letter::Cancel(_) => None,
    }));
    let error = || mail.check().err().unwrap_or(Error::Closed);
    tickets.retain(|ticket| !ticket.over() && ticket.fail(error()));
    drop(mail);
    notify(&tickets);
}

/// `tickets`: those of all requests that are not over, wherever it ends.
fn serve<M: Forward>(mut engine: Engine<M>, inbox: &Inbox, tickets: &mut Vec<Arc<Ticket>>) {
    let mut running: HashMap<RequestId, Arc<Ticket>> = HashMap::new();
    // The first and only time that it is set.
    let _ = inbox.interrupt.set(engine.interrupt());
    loop {
        let mut mail = lock(&inbox.mail);
        while engine.is_idle() && mail.letters.is_empty() && !mail.closing {
            mail = inbox.arrived.wait(mail).unwrap_or_else(PoisonError::into_inner);
        }
        let letters = std::mem::take(&mut mail.letters);
        let closing = mail.closing;
        drop(mail);

        tickets.retain(|ticket| !ticket.over());
        tickets.extend(letters.iter().filter_map(|letter| match letter {
            Letter::Submit(_, ticket) => Some(ticket.clone()),
            Letter::Cancel(_) => None,
        }));
        let mut told = Vec::new();
        for letter in letters {
            match letter {
                Letter::Submit(request, ticket) => match engine.submit(*request) {
                    Ok(id) => drop(running.insert(id, ticket)),
                    Err(error) => told.extend(ticket.fail(error).then_some(ticket)),
                },
                Letter::Cancel(ticket) => {
                    let found = running.iter().find(|(_, other)| Arc::ptr_eq(&ticket, other));
                    found.map(|(&id, _)| engine.cancel(id));
                }
            }
        }
        if closing {
            running.keys().for_each(|&id| {
                engine.cancel(id);
            });
        }

        let began = Instant::now();
        let events = engine.step();
        let now = Instant::now();
        for (&id, ticket) in &running {
            let mut state = lock(&ticket.state);
            if state.started.is_none() && !engine.is_waiting(id) {
                state.started = Some(began);
            }
        }
        let mut said: HashMap<RequestId, (Vec<Event>, bool)> = HashMap::new();
        for event in events {
            let (id, over) = match event {
                Event::Chunk { id, .. } => (id, false),
                Event::Done { id, .. } | Event::Failed { id, .. } => (id, true),
            };
            let of = said.entry(id).or_default();
            of.0.push(event);
            of.1 |= over;
        }
        // All at once for each, so that the last token and the end come out together.
        for (id, (events, over)) in said {
            let Some(ticket) = running.get(&id) else { continue };
            if ticket.take(events, now) {
                told.push(ticket.clone());
            }
            if over {
                running.remove(&id);
            }
        }
        notify(&told);
        if closing {
            return;
        }
    }
}

/// Once for all of a step, as each attaching waits for the interpreter.
fn notify(tickets: &[Arc<Ticket>]) {
    if !tickets.is_empty() {
        convert::attached(|py| tickets.iter().for_each(|ticket| ticket.call_notify(py)));
    }
}

/// A panic elsewhere leaves these states whole, so a poisoned lock is as good as any.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
