//! `ferrule._core.quantize` and `export`: write a model with its weights quantized, packed or as a GGUF file.

use super::quality::encode;
use super::watch::watched;
use super::{QUANTIZATIONS, convert, named, raise};
use crate::file::gguf_writer::Datum;
use crate::model::export::Export;
use crate::model::{self, LoadOptions, Quantize, Rule, Written};
use crate::{Error, Result, chat, evaluate, tokenizer};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::PathBuf;

/// Tokens of a context of calibration text, if the model holds as many.
const CONTEXT: usize = 512;

/// Quantizes the model in `folder` into the new folder `out`.
#[pyfunction]
#[pyo3(signature = (folder, out, *, format, bits=None, rules, texts=Vec::new(), documents=false, limit=None, threads=None,
    cache_dir=None, family=None, progress=None))]
pub(super) fn quantize<'py>(
    py: Python<'py>,
    folder: PathBuf,
    out: PathBuf,
    format: &str,
    bits: Option<f64>,
    rules: Vec<(String, String)>,
    texts: Vec<String>,
    documents: bool,
    limit: Option<i64>,
    threads: Option<i64>,
    cache_dir: Option<PathBuf>,
    family: Option<String>,
    progress: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let prepare = || {
        let rule = |(pattern, form): (String, String)| {
            Ok(Rule { pattern, form: named("rules", &form, &QUANTIZATIONS)? })
        };
        let how = Quantize {
            format: named("format", format, &QUANTIZATIONS)?,
            bits,
            rules: rules.into_iter().map(rule).collect::<Result<_>>()?,
            calibration: Vec::new(),
            load: LoadOptions {
                threads: threads.map(|n| convert::count("threads", n)).transpose()?,
                isa: std::env::var("FERRULE_ISA").ok(),
                cache_dir,
                family,
                ..LoadOptions::default()
            },
        };
        Ok((how, limit.map(|n| convert::some("chunks", n)).transpose()?))
    };
    let (mut how, limit) = prepare().map_err(raise(py))?;
    let written = watched(py, progress, move |watch| {
        if !texts.is_empty() {
            let (ids, bos) = encode(&folder, &texts, watch)?;
            let most = model::describe(&folder, &how.load)?.context_length.min(CONTEXT);
            let windows: Vec<_> = match documents {
                true => ids.into_iter().filter_map(|ids| evaluate::document(ids, most)).collect(),
                false => evaluate::chunks(&ids.concat(), most, bos),
            };
            let limit = limit.unwrap_or(usize::MAX);
            how.calibration = windows.into_iter().take(limit).map(|w| w.tokens).collect();
            if how.calibration.is_empty() {
                let expected = format!("a text of at least {most} tokens");
                return Err(Error::parameter("calibrate", "too few tokens", expected));
            }
        }
        let report = |what, done, total| watch.report(what, done, total);
        model::quantize(&folder, &out, how, &watch.stop, &report)
    })?;
    facts(py, written)
}

/// Writes the model in `folder`, or the GGUF file that it is or has, as the new GGUF file `out`.
#[pyfunction]
#[pyo3(signature = (folder, out, *, format, rules, sampling, threads=None, family=None, progress=None))]
pub(super) fn export<'py>(
    py: Python<'py>,
    folder: PathBuf,
    out: PathBuf,
    format: &str,
    rules: Vec<(String, String)>,
    sampling: Vec<(String, f64)>,
    threads: Option<i64>,
    family: Option<String>,
    progress: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let named = |what: &'static str, name: &str| {
        model::export::named(name).ok_or_else(|| {
            let names = model::export::TYPES.map(|(dtype, _)| dtype.name().to_lowercase());
            let expected = format!("one of {}, for a GGUF file", names.join(", "));
            Error::parameter(what, format!("{name:?}"), expected)
        })
    };
    let prepare = || {
        let rule = |(pattern, form): (String, String)| Ok((pattern, named("rules", &form)?));
        Ok(Export {
            format: named("format", format)?,
            rules: rules.into_iter().map(rule).collect::<Result<_>>()?,
            load: LoadOptions {
                threads: threads.map(|n| convert::count("threads", n)).transpose()?,
                isa: std::env::var("FERRULE_ISA").ok(),
                family,
                ..LoadOptions::default()
            },
        })
    };
    let how = prepare().map_err(raise(py))?;
    let written = watched(py, progress, move |watch| {
        let tokens = |architecture: &str, vocab: usize| {
            let mut items = tokenizer::to_gguf(&folder, architecture, vocab)?;
            items.extend(chat::to_gguf(&folder)?);
            // What a request leaves open. A count is an integer there.
            items.extend(sampling.iter().map(|(key, value)| match key.ends_with("top_k") {
                true => (key.clone(), Datum::U32(*value as u32)),
                false => (key.clone(), Datum::F32(*value as f32)),
            }));
            Ok(items)
        };
        let report = |what, done, total| watch.report(what, done, total);
        model::export::export(&folder, &out, how, &tokens, &watch.stop, &report)
    })?;
    facts(py, written)
}

fn facts(py: Python<'_>, written: Written) -> PyResult<Bound<'_, PyDict>> {
    let Written { bytes, bits_per_weight, forms, source } = written;
    let dict = PyDict::new(py);
    dict.set_item("bytes", bytes)?;
    dict.set_item("bits_per_weight", bits_per_weight)?;
    dict.set_item("forms", super::facts::counts(py, forms)?)?;
    dict.set_item("quantized_before", source)?;
    Ok(dict)
}
