//! Between this crate's types and Python's: errors, news, logits processors. Never decides.

use super::driver;
use crate::engine::{FinishReason, LogitsProcessor, TokenLogprobs};
use crate::sample::Logprob;
use crate::{Error, Result};
use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use std::sync::{Arc, Mutex, PoisonError};

/// Runs `f` with the interpreter; not at all while the interpreter shuts down.
pub(super) fn attached<R>(f: impl FnOnce(Python<'_>) -> R) -> Option<R> {
    Python::try_attach(f)
}

/// The Python exception for `error`: `ferrule.errors` has a class for each variant.
pub(super) fn exception(py: Python<'_>, error: &Error) -> PyErr {
    build(py, error).unwrap_or_else(|error| error)
}

fn build(py: Python<'_>, error: &Error) -> PyResult<PyErr> {
    let fields = PyDict::new(py);
    let class = match error {
        Error::ModelNotFound(_) => "ModelNotFoundError",
        Error::Format { file, .. } => {
            fields.set_item("file", file.display().to_string())?;
            "ModelFormatError"
        }
        Error::Unsupported(_) => "UnsupportedModelError",
        Error::Tokenizer(_) => "TokenizerError",
        Error::ChatTemplate(_) => "ChatTemplateError",
        Error::ContextLength { prompt_tokens, max_tokens, context_length } => {
            fields.set_item("prompt_tokens", prompt_tokens)?;
            fields.set_item("max_tokens", max_tokens)?;
            fields.set_item("context_length", context_length)?;
            "ContextLengthError"
        }
        Error::InvalidParameter { field, value, .. } => {
            fields.set_item("field", field)?;
            fields.set_item("value", value)?;
            "InvalidParameterError"
        }
        Error::OutOfMemory { requested, available, .. } => {
            fields.set_item("requested", requested)?;
            fields.set_item("available", available)?;
            "OutOfMemoryError"
        }
        Error::Io { path, .. } => {
            fields.set_item("file", path.display().to_string())?;
            "FileAccessError"
        }
        Error::QueueFull { queued, limit } => {
            fields.set_item("queued", queued)?;
            fields.set_item("limit", limit)?;
            "QueueFullError"
        }
        Error::CudaUnavailable(_) => "CudaUnavailableError",
        Error::Device(_) => "DeviceError",
        Error::Closed => "EngineClosedError",
        Error::Interrupted => "FerruleError",
        Error::Numeric(_) => "NumericError",
        Error::Processor(_) => "LogitsProcessorError",
        Error::Internal(_) => "InternalError",
    };
    let class = py.import("ferrule.errors")?.getattr(class)?;
    Ok(PyErr::from_value(class.call((error.to_string(),), Some(&fields))?))
}

/// A whole number from Python as a count.
pub(super) fn count(field: &'static str, value: i64) -> Result<usize> {
    usize::try_from(value).map_err(|_| Error::parameter(field, value, "at least 0"))
}

/// The same, and not 0.
pub(super) fn some(field: &'static str, value: i64) -> Result<usize> {
    match usize::try_from(value) {
        Ok(n @ 1..) => Ok(n),
        _ => Err(Error::parameter(field, value, "at least 1")),
    }
}

/// (id, ln p, rank) of a token, and of the likeliest ones.
pub(super) type PyLogprobs = ((u32, f32, u32), Vec<(u32, f32, u32)>);

fn logprobs(entry: &TokenLogprobs) -> PyLogprobs {
    let plain = |l: &Logprob| (l.id, l.logprob, l.rank);
    (plain(&entry.token), entry.top.iter().map(plain).collect())
}

/// What a request has said since it was last asked.
#[pyclass(frozen, get_all, module = "ferrule._core")]
pub(super) struct News {
    text: String,
    token_ids: Vec<u32>,
    logprobs: Option<Vec<PyLogprobs>>,
    done: Option<Py<Done>>,
}

impl News {
    pub(super) fn new(
        py: Python<'_>,
        news: driver::News,
        with_logprobs: bool,
        vocab: usize,
    ) -> PyResult<News> {
        Ok(News {
            text: news.text,
            token_ids: news.token_ids,
            logprobs: with_logprobs.then(|| news.logprobs.iter().map(logprobs).collect()),
            done: news.done.map(|done| Done::new(py, done, vocab)).transpose()?,
        })
    }
}

/// How an answer ended.
#[pyclass(frozen, get_all, module = "ferrule._core")]
pub(super) struct Done {
    finish_reason: &'static str,
    stop_match: Option<String>,
    prompt_tokens: usize,
    cached_tokens: usize,
    completion_tokens: usize,
    prompt_logprobs: Option<Vec<Option<PyLogprobs>>>,
    prompt_logits: Option<Py<PyArray2<f32>>>,
    queue_s: f64,
    token_times_s: Vec<f64>,
    total_s: f64,
}

impl Done {
    fn new(py: Python<'_>, done: driver::Done, vocab: usize) -> PyResult<Py<Done>> {
        let rows = |flat: Vec<f32>| {
            py.import("numpy")?; // the crate of that name panics where it can't be
            let shape = [flat.len() / vocab, vocab];
            PyResult::Ok(PyArray1::from_vec(py, flat).reshape(shape)?.unbind())
        };
        let prompt = |entries: Vec<Option<TokenLogprobs>>| {
            entries.iter().map(|entry| entry.as_ref().map(logprobs)).collect()
        };
        let value = Done {
            finish_reason: match done.reason {
                FinishReason::Stop => "stop",
                FinishReason::Length => "length",
                FinishReason::Cancelled => "cancelled",
            },
            stop_match: done.stop_match,
            prompt_tokens: done.prompt_tokens,
            cached_tokens: done.cached_tokens,
            completion_tokens: done.completion_tokens,
            prompt_logprobs: done.prompt_logprobs.map(prompt),
            prompt_logits: done.prompt_logits.map(rows).transpose()?,
            queue_s: done.queued.as_secs_f64(),
            token_times_s: done.token_times.iter().map(|time| time.as_secs_f64()).collect(),
            total_s: done.total.as_secs_f64(),
        };
        Py::new(py, value)
    }
}

/// A Python function as a logits processor.
pub(super) struct Processor {
    pub(super) function: Py<PyAny>,
    /// Where what it raises is kept for the caller of `generate`.
    pub(super) raised: Arc<Mutex<Option<PyErr>>>,
}

impl LogitsProcessor for Processor {
    fn process(&mut self, ids: &[u32], logits: &mut [f32]) -> Result<()> {
        let done = attached(|py| {
            self.call(py, ids, logits).map_err(|error| {
                let text = format!("a logits processor raised {error}");
                *self.raised.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                Error::Processor(text)
            })
        });
        done.unwrap_or(Err(Error::Closed))
    }
}

impl Processor {
    fn call(&self, py: Python<'_>, ids: &[u32], logits: &mut [f32]) -> PyResult<()> {
        py.import("numpy")?; // see above
        let array = PyArray1::from_slice(py, logits);
        let result = self.function.call1(py, (PyList::new(py, ids)?, &array))?.into_bound(py);
        let changed = match result.is_none() {
            true => array.readonly(),
            false => result.extract::<PyReadonlyArray1<'_, f32>>().map_err(|_| {
                let of = |name| Ok(result.getattr(name)?.str()?.to_string());
                let found = match (of("dtype"), of("shape")) {
                    (PyResult::Ok(dtype), Ok(shape)) => format!("{dtype} of shape {shape}"),
                    _ => result.get_type().to_string(),
                };
                let expected = format!("None or an array of {} logits, float32", logits.len());
                PyTypeError::new_err(format!("found {found}, expected {expected}"))
            })?,
        };
        let changed = changed.as_array();
        if changed.len() != logits.len() {
            let text = format!("found {} logits, expected {}", changed.len(), logits.len());
            return Err(PyValueError::new_err(text));
        }
        logits.iter_mut().zip(changed).for_each(|(to, from)| *to = *from);
        Ok(())
    }
}
