//! The border to Python: converts, lets go of the interpreter, calls, maps the error. The only
//! part of the crate that knows Python. Never computes.

mod convert;
mod device;
mod driver;
mod facts;
mod load;
mod matrix;
mod quality;
mod quantize;
mod watch;

use crate::backend::cpu::Tiles;
use crate::chat::ChatTemplate;
use crate::engine::{self, EngineConfig};
use crate::model::{self, GpuLayers, KvDtype, LoadOptions, Quantization};
use crate::sample::Sampling;
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};
use convert::{Processor, count, exception};
use driver::{Inbox, Ticket};
use load::{Options, load_and_drive};
use pyo3::prelude::*;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a wait goes on before it looks for Ctrl-C.
const SIGNALS: Duration = Duration::from_millis(50);

/// Tokens of prompts computed in one step.
const CHUNK_TOKENS: usize = model::CHUNK;
const QUANTIZATIONS: [(&str, Quantization); 6] = [
    ("auto", Quantization::Auto),
    ("int4", Quantization::Int4),
    ("int5", Quantization::Int5),
    ("int6", Quantization::Int6),
    ("int8", Quantization::Int8),
    ("none", Quantization::None),
];
const KV_DTYPES: [(&str, KvDtype); 3] =
    [("f16", KvDtype::F16), ("int8", KvDtype::Int8), ("f32", KvDtype::F32)];

/// What `Engine.info` tells: keywords of `ferrule.ModelInfo`.
#[derive(Clone, IntoPyObject)]
struct Info {
    architecture: String,
    parameters: u64,
    active_parameters: u64,
    quantization: &'static str,
    weight_bytes: u64,
    layers: usize,
    vocab_size: usize,
    context_length: usize,
    chat_template: bool,
    kv_cache_dtype: &'static str,
    kv_cache_bytes: u64,
    device: String,
    gpu_layers: usize,
    device_because: String,
    isa: String,
    threads: usize,
    notes: Vec<String>,
}

/// A model on its engine, driven by a thread of its own.
#[pyclass(frozen, module = "ferrule._core")]
struct Engine {
    inbox: Arc<Inbox>,
    thread: Mutex<Option<JoinHandle<()>>>,
    tokenizer: Arc<Tokenizer>,
    template: Option<ChatTemplate>,
    info: Info,
    pid: u32,
}

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (folder, *, device="cpu", gpu_layers=None, quantization="auto", threads=None, tile_tokens=None, claim_bytes=None, context_length=None,
        kv_cache_dtype="f16", kv_cache_bytes=None, max_batch=16, max_queue=256, prefix_cache=true, cache_dir=None,
        chat_template=None, family=None, eos=Vec::new(), random=false, progress=None))]
    fn new(
        py: Python<'_>,
        folder: &str,
        device: &str,
        gpu_layers: Option<i64>,
        quantization: &str,
        threads: Option<i64>,
        tile_tokens: Option<usize>,
        claim_bytes: Option<usize>,
        context_length: Option<i64>,
        kv_cache_dtype: &str,
        kv_cache_bytes: Option<u64>,
        max_batch: i64,
        max_queue: i64,
        prefix_cache: bool,
        cache_dir: Option<String>,
        chat_template: Option<String>,
        family: Option<String>,
        eos: Vec<u32>,
        random: bool,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Engine> {
        let bytes = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let options = || {
            let count = |field, value: Option<i64>| value.map(|n| count(field, n)).transpose();
            let bytes = bytes.clone();
            Ok(Options {
                device: device::Wanted::parse(device)?,
                load: LoadOptions {
                    quantization: named("quantization", quantization, &QUANTIZATIONS)?,
                    threads: count("threads", threads)?,
                    tiles: Tiles {
                        tokens: tile_tokens.unwrap_or(Tiles::default().tokens),
                        claim: claim_bytes.unwrap_or(Tiles::default().claim),
                    },
                    isa: std::env::var("FERRULE_ISA").ok(),
                    kv_dtype: named("kv_cache_dtype", kv_cache_dtype, &KV_DTYPES)?,
                    cache_dir: cache_dir.map(PathBuf::from),
                    family,
                    random,
                    progress: Some(Arc::new(move |done, total| {
                        bytes[0].store(done, Ordering::Relaxed);
                        bytes[1].store(total, Ordering::Relaxed);
                    })),
                },
                engine: EngineConfig {
                    max_batch: convert::count("max_batch", max_batch)?,
                    max_queue: convert::count("max_queue", max_queue)?,
                    chunk_tokens: CHUNK_TOKENS,
                    context_length: 0,
                    kv_bytes: 0,
                    prefix_cache,
                },
                kv_bytes: kv_cache_bytes,
                context_length: count("context_length", context_length)?,
                gpu_layers: count("gpu_layers", gpu_layers)?
                    .map_or(GpuLayers::Auto, GpuLayers::Count),
                chat_template,
                eos,
            })
        };
        let options = options().map_err(raise(py))?;
        let folder = folder.to_string();
        let inbox = Arc::new(Inbox::default());
        let (sender, receiver) = mpsc::channel();
        let thread = {
            let inbox = inbox.clone();
            let run = move || load_and_drive(Path::new(&folder), options, &sender, &inbox);
            std::thread::Builder::new()
                .name("ferrule".into())
                .spawn(run)
                .map_err(|error| exception(py, &Error::io("thread", error)))?
        };
        let receiver = Mutex::new(receiver); // a lock, as `detach` asks for what threads may share
        let mut shown = (0, 0);
        let loaded = loop {
            let wait =
                || receiver.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(SIGNALS);
            match py.detach(wait) {
                Ok(loaded) => break loaded.map_err(raise(py))?,
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    let error = Error::Internal("the loading thread panicked".into());
                    return Err(exception(py, &error));
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
            let now = (bytes[0].load(Ordering::Relaxed), bytes[1].load(Ordering::Relaxed));
            let show = || match &progress {
                Some(progress) if now != shown => progress.call1(py, now).map(drop),
                _ => Ok(()),
            };
            // The load can't be stopped, but its thread ends after it.
            py.check_signals().and_then(|()| show()).inspect_err(|_| inbox.close())?;
            shown = now;
        };
        Ok(Engine {
            inbox,
            thread: Mutex::new(Some(thread)),
            tokenizer: loaded.tokenizer,
            template: loaded.template,
            info: loaded.info,
            pid: process::id(),
        })
    }

    /// What was loaded: keywords of `ferrule.ModelInfo`.
    #[getter]
    fn info(&self) -> Info {
        self.info.clone()
    }

    /// Starts a request; its errors come out of `Request.wait`.
    #[pyo3(signature = (prompt, *, max_tokens=None, min_tokens=0, temperature=1.0, top_p=1.0,
        top_k=0, min_p=0.0, typical_p=1.0, repetition_penalty=1.0, presence_penalty=0.0,
        frequency_penalty=0.0, logit_bias=Vec::new(), stop=Vec::new(), stop_token_ids=Vec::new(),
        ignore_eos=false, seed=0, logprobs=None, prompt_logprobs=None, prompt_logits=false,
        skip_special_tokens=true, logits_processors=Vec::new(), stream=false, notify=None))]
    fn submit(
        &self,
        py: Python<'_>,
        prompt: Vec<u32>,
        max_tokens: Option<i64>,
        min_tokens: i64,
        temperature: f32,
        top_p: f32,
        top_k: i64,
        min_p: f32,
        typical_p: f32,
        repetition_penalty: f32,
        presence_penalty: f32,
        frequency_penalty: f32,
        logit_bias: Vec<(u32, f32)>,
        stop: Vec<String>,
        stop_token_ids: Vec<u32>,
        ignore_eos: bool,
        seed: u64,
        logprobs: Option<i64>,
        prompt_logprobs: Option<i64>,
        prompt_logits: bool,
        skip_special_tokens: bool,
        logits_processors: Vec<Py<PyAny>>,
        stream: bool,
        notify: Option<Py<PyAny>>,
    ) -> PyResult<Request> {
        self.check(py)?;
        let ticket = Arc::new(Ticket::new(stream, notify));
        let processors = logits_processors.into_iter().map(|function| {
            let raised = ticket.raised.clone();
            Box::new(Processor { function, raised }) as Box<dyn engine::LogitsProcessor>
        });
        let maybe = |field, value: Option<i64>| value.map(|n| count(field, n)).transpose();
        let build = || {
            Ok(engine::Request {
                prompt,
                max_tokens: maybe("max_tokens", max_tokens)?,
                min_tokens: count("min_tokens", min_tokens)?,
                sampling: Sampling {
                    temperature,
                    top_k: count("top_k", top_k)?,
                    top_p,
                    min_p,
                    typical_p,
                    repetition_penalty,
                    presence_penalty,
                    frequency_penalty,
                    logit_bias,
                    seed,
                },
                stop,
                stop_token_ids,
                ignore_eos,
                skip_special_tokens,
                logprobs: maybe("logprobs", logprobs)?,
                prompt_logprobs: maybe("prompt_logprobs", prompt_logprobs)?,
                prompt_logits,
                processors: processors.collect(),
            })
        };
        build()
            .and_then(|request| self.inbox.submit(request, ticket.clone()))
            .map_err(raise(py))?;
        Ok(Request {
            inbox: self.inbox.clone(),
            ticket,
            logprobs: logprobs.is_some(),
            vocab: self.info.vocab_size,
            pid: self.pid,
        })
    }

    /// Token ids of `text`.
    fn encode(
        &self,
        py: Python<'_>,
        text: &str,
        add_special: bool,
        parse_special: bool,
    ) -> PyResult<Vec<u32>> {
        self.check(py)?;
        py.detach(|| self.tokenizer.encode(text, add_special, parse_special)).map_err(raise(py))
    }

    /// Text of token ids.
    fn decode(&self, py: Python<'_>, ids: Vec<u32>, skip_special: bool) -> PyResult<String> {
        self.check(py)?;
        let vocab = self.info.vocab_size;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
            let error = Error::parameter("ids", id, format!("ids below {vocab} (the vocabulary)"));
            return Err(exception(py, &error));
        }
        py.detach(|| self.tokenizer.decode(&ids, skip_special)).map_err(raise(py))
    }

    /// Text of a conversation, given as JSON; `now`: local time in Unix seconds, for its date.
    fn render_chat(
        &self,
        py: Python<'_>,
        messages: &str,
        tools: &str,
        extra: &str,
        add_generation_prompt: bool,
        now: i64,
    ) -> PyResult<String> {
        self.check(py)?;
        let render = || self.render(messages, tools, extra, add_generation_prompt, now);
        py.detach(render).map_err(raise(py))
    }

    /// Ends all requests and frees the model. Does nothing the second time, or in a forked child.
    fn close(&self, py: Python<'_>) {
        if self.forked() {
            return;
        }
        self.inbox.close();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Its panic was caught and told to the requests.
        py.detach(|| thread.map(|thread| drop(thread.join())));
    }
}

impl Engine {
    fn forked(&self) -> bool {
        process::id() != self.pid
    }

    fn check(&self, py: Python<'_>) -> PyResult<()> {
        match self.forked() {
            true => Err(forked(py)),
            false => self.inbox.check().map_err(raise(py)),
        }
    }

    fn render(
        &self,
        messages: &str,
        tools: &str,
        extra: &str,
        add_generation_prompt: bool,
        now: i64,
    ) -> Result<String> {
        let Some(template) = &self.template else {
            return Err(Error::ChatTemplate(
                "this model has no chat template; give one (chat_template=), or use generate \
                 with a prompt in the model's own format"
                    .into(),
            ));
        };
        let messages = parsed("messages", messages, "a list of messages")?;
        let tools = parsed("tools", tools, "a list of schemas")?;
        let extra: Map<String, Value> = parsed("chat_template_kwargs", extra, "variables")?;
        template.render(&messages, &tools, add_generation_prompt, &extra, Some(now))
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let thread = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if process::id() != self.pid {
            // After a fork the handle names a thread that is not there.
            std::mem::forget(thread);
        } else {
            // Not joined: the thread may need the interpreter, which is busy here.
            self.inbox.close();
        }
    }
}

/// A running request; dropping it cancels it.
#[pyclass(frozen, module = "ferrule._core")]
struct Request {
    inbox: Arc<Inbox>,
    ticket: Arc<Ticket>,
    logprobs: bool,
    vocab: usize,
    pid: u32,
}

#[pymethods]
impl Request {
    /// News, or None if there is none within `timeout` seconds (None = wait for some).
    #[pyo3(signature = (timeout))]
    fn wait(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Option<convert::News>> {
        if process::id() != self.pid {
            return Err(forked(py));
        }
        // A timeout that is no time is none; negative is over.
        let end = timeout
            .and_then(|s| Duration::try_from_secs_f64(s.max(0.0)).ok())
            .and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            let most = left.map_or(SIGNALS, |left| left.min(SIGNALS));
            let news = py.detach(|| self.ticket.wait(most));
            if let Some(news) = news.map_err(|error| self.exception(py, &error))? {
                return convert::News::new(py, news, self.logprobs, self.vocab).map(Some);
            }
            py.check_signals()?;
            if left.is_some_and(|left| left <= most) {
                return Ok(None);
            }
        }
    }

    /// Ends the request soon.
    fn cancel(&self) {
        if process::id() == self.pid {
            self.inbox.cancel(&self.ticket);
        }
    }

    /// Whether it is over.
    fn done(&self) -> bool {
        process::id() != self.pid || self.ticket.over()
    }
}

impl Request {
    fn exception(&self, py: Python<'_>, error: &Error) -> PyErr {
        let exception = exception(py, error);
        let raised = self.ticket.raised.lock().unwrap_or_else(PoisonError::into_inner);
        exception.set_cause(py, raised.as_ref().map(|cause| cause.clone_ref(py)));
        exception
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        self.cancel();
    }
}

fn forked(py: Python<'_>) -> PyErr {
    let class = py.import("ferrule.errors").and_then(|m| m.getattr("EngineClosedError"));
    let text = "this process was forked after the model was loaded, and the engine's threads \
                stayed behind; load the model in the child, or start processes with the 'spawn' \
                method";
    match class.and_then(|class| class.call1((text,))) {
        Ok(value) => PyErr::from_value(value),
        Err(error) => error,
    }
}

fn raise(py: Python<'_>) -> impl Fn(Error) -> PyErr {
    move |error| exception(py, &error)
}

/// JSON text that Python wrote.
fn parsed<T: DeserializeOwned>(field: &'static str, text: &str, expected: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|error| Error::parameter(field, error, expected))
}

/// The value that a name stands for.
fn named<T: Copy>(field: &'static str, name: &str, table: &[(&str, T)]) -> Result<T> {
    let found = table.iter().find(|(known, _)| *known == name).map(|(_, value)| *value);
    found.ok_or_else(|| {
        let names: Vec<_> = table.iter().map(|(known, _)| format!("{known:?}")).collect();
        Error::parameter(field, format!("{name:?}"), names.join(" or "))
    })
}

/// `ferrule._core`.
#[pymodule(gil_used = false)] // every class is frozen, and what changes in it is behind a lock
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("version", env!("CARGO_PKG_VERSION"))?;
    module.add_function(wrap_pyfunction!(facts::kernel_set, module)?)?;
    module.add_function(wrap_pyfunction!(facts::kernel_sets, module)?)?;
    module.add_function(wrap_pyfunction!(facts::threads, module)?)?;
    module.add_function(wrap_pyfunction!(device::cuda_devices, module)?)?;
    module.add_function(wrap_pyfunction!(device::cuda_time, module)?)?;
    module.add_function(wrap_pyfunction!(device::cuda_time_attention, module)?)?;
    module.add_function(wrap_pyfunction!(device::cuda_check, module)?)?;
    module.add_function(wrap_pyfunction!(facts::memory, module)?)?;
    module.add_function(wrap_pyfunction!(facts::memory_bandwidth, module)?)?;
    module.add_function(wrap_pyfunction!(facts::describe, module)?)?;
    module.add_function(wrap_pyfunction!(facts::cpu_features, module)?)?;
    module.add_function(wrap_pyfunction!(facts::gguf_at, module)?)?;
    module.add_function(wrap_pyfunction!(facts::inspect, module)?)?;
    module.add_function(wrap_pyfunction!(matrix::quantize_int4, module)?)?;
    module.add_function(wrap_pyfunction!(matrix::quantize_int8, module)?)?;
    module.add_function(wrap_pyfunction!(quality::evaluate, module)?)?;
    module.add_function(wrap_pyfunction!(quantize::quantize, module)?)?;
    module.add_function(wrap_pyfunction!(quantize::export, module)?)?;
    module.add_class::<matrix::QMatrix>()?;
    module.add_class::<matrix::Trial>()?;
    module.add_class::<Engine>()?;
    module.add_class::<Request>()?;
    module.add_class::<convert::News>()?;
    module.add_class::<convert::Done>()
}
