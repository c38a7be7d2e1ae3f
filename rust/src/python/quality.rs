//! `ferrule._core.evaluate`: loads one or two models and measures them on a text.

use super::watch::{Watch, watched};
use super::{KV_DTYPES, QUANTIZATIONS, convert, named, raise};
use crate::backend::cpu::Cpu;
use crate::evaluate::{self as quality, Estimate, Evaluation, QUANTILES, Window};
use crate::model::{self, Forward, LoadOptions, Model};
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Tokens of a chunk where nothing else is said, as in llama.cpp.
const CONTEXT: usize = 512;

/// What is measured.
struct Measured {
    found: Evaluation,
    context: usize,
    /// Of the model and of the reference: quantization, bits per weight.
    models: Vec<(&'static str, f64)>,
    isa: &'static str,
}

/// Measures `model` on `texts`: each a document, or all of them one text cut into chunks.
#[pyfunction]
#[pyo3(signature = (model, texts, *, documents, reference=None, quantization="auto",
    reference_quantization="none", context=None, limit=None, kv_cache_dtype="f16", threads=None,
    cache_dir=None, family=None, progress=None))]
pub(super) fn evaluate<'py>(
    py: Python<'py>,
    model: PathBuf,
    texts: Vec<String>,
    documents: bool,
    reference: Option<PathBuf>,
    quantization: &str,
    reference_quantization: &str,
    context: Option<i64>,
    limit: Option<i64>,
    kv_cache_dtype: &str,
    threads: Option<i64>,
    cache_dir: Option<PathBuf>,
    family: Option<String>,
    progress: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let options = |quantization: &str| {
        Ok(LoadOptions {
            quantization: named("quantization", quantization, &QUANTIZATIONS)?,
            threads: threads.map(|n| convert::count("threads", n)).transpose()?,
            isa: std::env::var("FERRULE_ISA").ok(),
            kv_dtype: named("kv_cache_dtype", kv_cache_dtype, &KV_DTYPES)?,
            cache_dir: cache_dir.clone(),
            family: family.clone(),
            ..LoadOptions::default()
        })
    };
    let prepare = || {
        let count = |field, n: Option<i64>| n.map(|n| convert::count(field, n)).transpose();
        let mut models = vec![(model, options(quantization)?)];
        if let Some(reference) = reference {
            models.push((reference, options(reference_quantization)?));
        }
        let limit = limit.map(|n| convert::some("chunks", n)).transpose()?;
        Ok((models, count("context", context)?, limit))
    };
    let (models, context, limit) = prepare().map_err(raise(py))?;
    let work = move |watch: &Arc<Watch>| measure(models, &texts, documents, context, limit, watch);
    let measured = watched(py, progress, work)?;
    result(py, &measured)
}

fn measure(
    models: Vec<(PathBuf, LoadOptions)>,
    texts: &[String],
    documents: bool,
    context: Option<usize>,
    limit: Option<usize>,
    watch: &Arc<Watch>,
) -> Result<Measured> {
    let ids = models.iter().map(|(path, _)| encode(path, texts, watch));
    let ids = ids.collect::<Result<Vec<_>>>()?;
    if ids.iter().any(|other| *other != ids[0]) {
        let found = "another tokenizer: the two give different tokens of this text";
        return Err(Error::parameter("reference", found, "a model with the same tokenizer"));
    }
    let Some((ids, bos)) = ids.into_iter().next() else { return Err(Error::Closed) };
    let load = |(path, mut options): (PathBuf, LoadOptions)| {
        let watch = watch.clone();
        options.progress = Some(Arc::new(move |done, total| watch.report("loading", done, total)));
        model::load(&path, options)
    };
    let models = models.into_iter().map(load).collect::<Result<Vec<Model<Cpu>>>>()?;
    let most = models.iter().map(Forward::context_length).min().unwrap_or(CONTEXT);
    let context = context.unwrap_or(if documents { most } else { most.min(CONTEXT) });
    if context < 4 || context > most {
        return Err(Error::parameter("context", context, format!("4 to {most}")));
    }
    let windows = if documents {
        ids.into_iter().filter_map(|ids| quality::document(ids, context)).collect()
    } else {
        let ids = ids.concat();
        let chunks = quality::chunks(&ids, context, bos);
        if chunks.is_empty() {
            let found = format!("{} tokens", ids.len());
            let expected = format!("at least one chunk of {context}; or give a smaller context");
            return Err(Error::parameter("text", found, expected));
        }
        chunks
    };
    let windows: Vec<Window> = windows.into_iter().take(limit.unwrap_or(usize::MAX)).collect();
    let (first, threads) = (&models[0], models[0].backend.threads());
    let total = windows.len() as u64;
    watch.report("evaluating", 0, total);
    let mut progress = |done| watch.report("evaluating", done as u64, total);
    let found =
        quality::evaluate(first, models.get(1), &windows, threads, &watch.stop, &mut progress)?;
    let bits = |m: &Model<Cpu>| {
        (m.form(), 8.0 * m.weight_bytes() as f64 / m.spec.parameters().0.max(1) as f64)
    };
    let isa = first.backend.kernels().name();
    Ok(Measured { found, context, models: models.iter().map(bits).collect(), isa })
}

/// Token ids of each text, and the BOS that the tokenizer puts before it.
pub(super) fn encode(
    path: &Path,
    texts: &[String],
    watch: &Watch,
) -> Result<(Vec<Vec<u32>>, Option<u32>)> {
    let tokenizer = Tokenizer::open(path)?;
    let bos = tokenizer.encode("", true, false)?.first().copied();
    let mut all = Vec::new();
    for (i, text) in texts.iter().enumerate() {
        if watch.stop.load(std::sync::atomic::Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        watch.report("tokenizing", i as u64, texts.len() as u64);
        all.push(tokenizer.encode(text, true, false)?);
    }
    Ok((all, bos))
}

/// Keywords of `ferrule.Evaluation`.
fn result<'py>(py: Python<'py>, measured: &Measured) -> PyResult<Bound<'py, PyDict>> {
    let Measured { found, context, models, isa } = measured;
    let dict = PyDict::new(py);
    let estimate = |e: Estimate| (e.value, e.interval.map(|i| i.0), e.interval.map(|i| i.1));
    dict.set_item("tokens", found.tokens)?;
    dict.set_item("contexts", found.contexts)?;
    dict.set_item("context", context)?;
    dict.set_item("isa", isa)?;
    dict.set_item("quantization", models[0].0)?;
    dict.set_item("bits_per_weight", models[0].1)?;
    dict.set_item("perplexity", estimate(found.perplexity))?;
    dict.set_item("accuracy", estimate(found.accuracy))?;
    let Some(distance) = &found.distance else { return Ok(dict) };
    let other = PyDict::new(py);
    other.set_item("quantization", models[1].0)?;
    other.set_item("bits_per_weight", models[1].1)?;
    other.set_item("perplexity", estimate(distance.perplexity))?;
    other.set_item("perplexity_ratio", estimate(distance.ratio))?;
    other.set_item("kl", estimate(distance.kl))?;
    let quantiles = QUANTILES.iter().zip(distance.kl_quantiles).map(|(&q, kl)| (q, kl));
    other.set_item("kl_quantiles", quantiles.collect::<Vec<_>>())?;
    other.set_item("same_top", estimate(distance.same_top))?;
    other.set_item("flips", estimate(distance.flips))?;
    other.set_item("rms_dp", estimate(distance.rms_dp))?;
    dict.set_item("distance", other)?;
    Ok(dict)
}
