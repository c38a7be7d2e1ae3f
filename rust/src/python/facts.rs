//! What can be told without an engine: this machine, and what a model is by its headers. Never computes.

use super::{KV_DTYPES, QUANTIZATIONS, device, named, raise};
use crate::backend::cpu::{self, topology};
use crate::chat::ChatTemplate;
use crate::model::{self, GpuLayers, LoadOptions, Wish};
use crate::{file, kernels};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What the model in `folder` is and will take, without loading it: `ferrule info` and `ferrule plan`.
#[pyfunction]
#[pyo3(signature = (folder, *, quantization, kv_cache_dtype, context_length, weight_cache, family, device="cpu",
    gpu_layers=None))]
pub(super) fn describe<'py>(
    py: Python<'py>,
    folder: &str,
    quantization: &str,
    kv_cache_dtype: &str,
    context_length: Option<usize>,
    weight_cache: bool,
    family: Option<String>,
    device: &str,
    gpu_layers: Option<usize>,
) -> PyResult<Bound<'py, PyDict>> {
    let describe = || {
        let options = LoadOptions {
            quantization: named("quantization", quantization, &QUANTIZATIONS)?,
            kv_dtype: named("kv_cache_dtype", kv_cache_dtype, &KV_DTYPES)?,
            family,
            ..LoadOptions::default()
        };
        let found = model::describe(Path::new(folder), &options)?;
        let wish = Wish { cache: weight_cache, context_length, kv_bytes: None, max_batch: 1 };
        let budget = found.budget(&wish, cpu::memory().available);
        let asked = device::Asked {
            folder: Path::new(folder),
            load: &options,
            context_length,
            kv_bytes: None,
            gpu_layers: gpu_layers.map_or(GpuLayers::Auto, GpuLayers::Count),
            again: false,
        };
        let on_gpu = match device {
            "cpu" => None,
            _ => Some(device::planned(device, &asked)?),
        };
        Ok((found, budget, ChatTemplate::open(Path::new(folder))?.is_some(), on_gpu))
    };
    let (found, budget, chat_template, on_gpu) = py.detach(describe).map_err(raise(py))?;
    let context = context_length.map_or(found.context_length, |n| n.min(found.context_length));
    let (kv_bytes_1000, kv_bytes_context) = (found.kv_bytes(1000), found.kv_bytes(context));
    let dict = PyDict::new(py);
    dict.set_item("architecture", found.architecture)?;
    dict.set_item("family", found.family)?;
    dict.set_item("parameters", found.parameters)?;
    dict.set_item("active_parameters", found.active_parameters)?;
    dict.set_item("layers", counts(py, found.layers)?)?;
    dict.set_item("hidden_size", found.hidden)?;
    dict.set_item("vocab_size", found.vocab)?;
    dict.set_item("context_length", found.context_length)?;
    dict.set_item("chat_template", chat_template)?;
    if let Some(quantization) = found.quantization {
        dict.set_item("stored_quantization", quantization)?;
    }
    dict.set_item("stored_bytes", counts(py, found.stored)?)?;
    dict.set_item("weight_bytes", counts(py, found.packed)?)?;
    dict.set_item("kv_cache_dtype", kv_cache_dtype)?;
    dict.set_item("kv_bytes_1000_tokens", kv_bytes_1000)?;
    dict.set_item("kv_bytes_context", kv_bytes_context)?;
    dict.set_item("working_bytes", found.working)?;
    dict.set_item("available_bytes", cpu::memory().available)?;
    dict.set_item("fits", budget.is_ok() || on_gpu.as_ref().is_some_and(|on| on.is_ok()))?;
    if let Some(on_gpu) = on_gpu {
        dict.set_item("device", device)?;
        match on_gpu {
            Ok((count, _)) => dict.set_item("gpu_layers", count)?,
            Err(why) => {
                dict.set_item("gpu_layers", 0)?;
                dict.set_item("gpu_because", why)?;
            }
        }
    }
    match budget {
        Ok(budget) => {
            dict.set_item("weights_mapped", budget.mapped)?;
            dict.set_item("loading_bytes", budget.loading)?;
            dict.set_item("context_length_here", budget.context_length)?;
            dict.set_item("notes", budget.notes)?;
        }
        Err(error) => dict.set_item("notes", [error.to_string()])?,
    }
    Ok(dict)
}

/// Pairs as a dict in their order.
pub(super) fn counts<'py>(
    py: Python<'py>,
    pairs: Vec<(impl IntoPyObject<'py>, impl IntoPyObject<'py>)>,
) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    for (name, count) in pairs {
        dict.set_item(name, count)?;
    }
    Ok(dict)
}

/// Instructions that the kernel sets look for and this CPU has.
#[pyfunction]
pub(super) fn cpu_features() -> Vec<&'static str> {
    kernels::cpu_features()
}

/// The kernel set in use: the best one, or what FERRULE_ISA names.
#[pyfunction]
pub(super) fn kernel_set(py: Python<'_>) -> PyResult<&'static str> {
    let chosen = kernels::choose(std::env::var("FERRULE_ISA").ok().as_deref());
    chosen.map(|set| set.name()).map_err(raise(py))
}

/// Kernel sets that this CPU can run, best first.
#[pyfunction]
pub(super) fn kernel_sets() -> Vec<&'static str> {
    kernels::available().map(|set| set.name()).collect()
}

/// Threads that threads="auto" means now, and why.
#[pyfunction]
pub(super) fn threads() -> (usize, String) {
    let threads = topology::auto();
    (threads.count, threads.why)
}

/// Memory in bytes: all of it, what can be had without swapping, and the least limit of a cgroup.
#[pyfunction]
pub(super) fn memory() -> (u64, u64, Option<u64>) {
    let memory = cpu::memory();
    (memory.total, memory.available, memory.limit)
}

/// Bytes that `threads` threads read from memory in a second: the best of passes over `bytes` bytes in a third of one.
#[pyfunction]
pub(super) fn memory_bandwidth(py: Python<'_>, threads: usize, bytes: usize) -> PyResult<f64> {
    let measure = || {
        let reader = cpu::Reader::new(threads, bytes)?;
        let (began, mut best) = (Instant::now(), Duration::MAX);
        while best == Duration::MAX || began.elapsed() < Duration::from_millis(333) {
            let pass = Instant::now();
            reader.read();
            best = best.min(pass.elapsed());
        }
        Ok(bytes as f64 / best.as_secs_f64())
    };
    py.detach(measure).map_err(raise(py))
}

/// What a file or a folder says about itself, as JSON.
#[pyfunction]
pub(super) fn inspect(py: Python<'_>, path: PathBuf) -> PyResult<String> {
    let report = py.detach(|| file::inspect(&path));
    report.map(|report| report.to_string()).map_err(raise(py))
}

/// The GGUF file that `path` is, or that the folder `path` has for a model.
#[pyfunction]
pub(super) fn gguf_at(py: Python<'_>, path: PathBuf) -> PyResult<Option<PathBuf>> {
    file::gguf_at(&path).map_err(raise(py))
}
