//! Which device a model is loaded onto, and what is said of it. Touches no driver unless CUDA is asked for.

use crate::backend::cpu::Cpu;
#[cfg(feature = "cuda")]
use crate::backend::{Backend, cpu, cuda::Cuda};
#[cfg(feature = "cuda")]
use crate::model::{self, Offload, Planned};
use crate::model::{GpuLayers, LoadOptions};
use crate::{Error, Result};
use pyo3::prelude::*;
use std::path::Path;

/// What `device=` asks for.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Wanted {
    Cpu,
    /// A device of the driver, or the first that kernels run on.
    Cuda(Option<usize>),
    Auto,
}

impl Wanted {
    pub(super) fn parse(name: &str) -> Result<Wanted> {
        match name {
            "cpu" => Ok(Wanted::Cpu),
            "cuda" => Ok(Wanted::Cuda(None)),
            "auto" => Ok(Wanted::Auto),
            _ => match name.strip_prefix("cuda:").map(str::parse) {
                Some(Ok(ordinal)) => Ok(Wanted::Cuda(Some(ordinal))),
                _ => {
                    let expected = "\"cpu\", \"cuda\", \"cuda:0\" or \"auto\"";
                    Err(Error::parameter("device", format!("{name:?}"), expected))
                }
            },
        }
    }

    /// What the model in `folder` is loaded onto.
    pub(super) fn target(self, asked: &Asked<'_>) -> Result<Target> {
        match self {
            Wanted::Cpu if asked.gpu_layers != GpuLayers::Auto => {
                let found = "a number with device=\"cpu\"";
                Err(Error::parameter("gpu_layers", found, "device=\"cuda\" or \"auto\" beside it"))
            }
            Wanted::Cpu => Ok(Target::Cpu(String::new())),
            Wanted::Cuda(ordinal) => available().and_then(|()| on_cuda(ordinal, asked)),
            Wanted::Auto => match available().and_then(|()| on_cuda(None, asked)) {
                Err(error @ Error::InvalidParameter { .. }) => Err(error),
                other => other.or_else(|why| Ok(Target::Cpu(why.to_string()))),
            },
        }
    }
}

/// What a model is loaded onto.
pub(super) enum Target {
    /// Why, if that was not asked for.
    Cpu(String),
    #[cfg(feature = "cuda")]
    Cuda(Box<Cuda>, Planned),
}

/// Whether CUDA can be had.
fn available() -> Result<()> {
    if std::env::var_os("FERRULE_DISABLE_CUDA").is_some_and(|value| value == "1") {
        return Err(Error::CudaUnavailable("FERRULE_DISABLE_CUDA=1 is set; unset it".into()));
    }
    #[cfg(feature = "cuda")]
    return match crate::backend::cuda::probe() {
        Ok(_) => Ok(()),
        Err(why) => Err(Error::CudaUnavailable(why.to_string())),
    };
    #[cfg(not(feature = "cuda"))]
    Err(Error::CudaUnavailable(
        "this build has no CUDA back end; install ferrule from a wheel".into(),
    ))
}

/// What decides how much of a model goes onto a device.
pub(super) struct Asked<'a> {
    pub(super) folder: &'a Path,
    pub(super) load: &'a LoadOptions,
    pub(super) context_length: Option<usize>,
    pub(super) kv_bytes: Option<u64>,
    pub(super) gpu_layers: GpuLayers,
    /// The memory that the device said it had did not do.
    pub(super) again: bool,
}

/// The device, and what goes onto it.
#[cfg(feature = "cuda")]
fn on_cuda(ordinal: Option<usize>, asked: &Asked<'_>) -> Result<Target> {
    let offload = Offload::new(asked.folder, asked.load, asked.context_length, asked.kv_bytes)?;
    let cuda = model::open_cuda(ordinal, asked.load)?;
    let room = room(cuda.memory(), asked.again);
    let plan = offload.plan(asked.gpu_layers, room, cuda.info().integrated)?;
    Ok(Target::Cuda(Box::new(cuda), plan))
}
#[cfg(not(feature = "cuda"))]
fn on_cuda(_: Option<usize>, asked: &Asked<'_>) -> Result<Target> {
    let Asked { folder, load, context_length, kv_bytes, again, .. } = asked;
    let _ = (folder, load, context_length, kv_bytes, again);
    available().map(|()| Target::Cpu(String::new()))
}

/// Bytes of a device's memory that a model may take: some are left for activations and for others.
#[cfg(feature = "cuda")]
fn room((free, total): (u64, u64), again: bool) -> u64 {
    let room = free.saturating_sub((512 << 20).max(total / 20));
    if again { room / 4 * 3 } else { room }
}

/// How many of the layers go onto a CUDA device, and of how many; or why none. For `ferrule plan`.
pub(super) fn planned(
    device: &str,
    asked: &Asked<'_>,
) -> Result<std::result::Result<(usize, usize), String>> {
    Ok(match Wanted::parse(device)?.target(asked) {
        #[cfg(feature = "cuda")]
        Ok(Target::Cuda(_, plan)) => Ok((plan.gpu_layers, plan.layers)),
        Ok(Target::Cpu(why)) => Err(why),
        Err(error) => Err(error.to_string()),
    })
}

/// What a loaded model says of its device.
pub(super) struct Machine {
    pub(super) device: String,
    pub(super) isa: String,
    pub(super) threads: usize,
    /// Bytes that keys and values may take unless that is said; of the CPU the budget says it.
    pub(super) free: u64,
    pub(super) gpu_layers: usize,
    pub(super) notes: Vec<String>,
}

pub(super) fn cpu(cpu: &Cpu) -> Machine {
    Machine {
        device: "cpu".into(),
        isa: cpu.kernels().name().into(),
        threads: cpu.threads(),
        free: 0,
        gpu_layers: 0,
        notes: Vec::new(),
    }
}

#[cfg(feature = "cuda")]
pub(super) fn cuda(cuda: &Cuda, plan: &Planned, again: bool) -> Machine {
    let info = cuda.info();
    let (major, minor) = info.capability;
    let room = room(cuda.memory(), again);
    // Memory that is the computer's is not all for keys and values.
    let room = if info.integrated { room / 2 } else { room };
    let device = format!("cuda:{}", info.ordinal);
    let Planned { gpu_layers, layers, border, held, .. } = *plan;
    let others = if gpu_layers == layers { "the embedding is" } else { "the others are" };
    let note = format!(
        "{gpu_layers} of {layers} layers and the head are on {device}; {others} on the CPU, {:.2} GB of weights",
        held as f64 / 1e9
    );
    Machine {
        isa: format!("sm_{major}{minor}"),
        threads: cuda.packer().threads(),
        free: plan.kv_bytes(room, cpu::memory().available / 2),
        gpu_layers,
        notes: border.map(|_| note).into_iter().collect(),
        device,
    }
}

/// The CUDA devices that kernels run on (ordinal, name, compute capability, bytes), and if there are none why.
#[pyfunction]
pub(super) fn cuda_devices() -> (Vec<(i32, String, String, u64)>, String) {
    if let Err(why) = available() {
        return (Vec::new(), why.to_string());
    }
    #[cfg(feature = "cuda")]
    if let Ok(driver) = crate::backend::cuda::probe() {
        let device = |d: &crate::backend::cuda::DeviceInfo| {
            let capability = format!("{}.{}", d.capability.0, d.capability.1);
            (d.ordinal, d.name.clone(), capability, d.memory)
        };
        return (driver.devices.iter().map(device).collect(), String::new());
    }
    (Vec::new(), String::new())
}

/// How many operations a CUDA device was asked for, and those whose results have not the CPU's bits.
#[pyfunction]
pub(super) fn cuda_check(py: Python<'_>, device: &str) -> PyResult<(usize, Vec<String>)> {
    let check = || {
        let wanted = Wanted::parse(device)?;
        available()?;
        #[cfg(feature = "cuda")]
        if let Wanted::Cuda(ordinal) = wanted {
            return Cuda::new(ordinal, Cpu::new(cpu::topology::auto().count, None)?)?.check();
        }
        let _ = wanted;
        Err(Error::parameter("device", format!("{device:?}"), "\"cuda\" or \"cuda:0\""))
    };
    py.detach(check).map_err(super::raise(py))
}

/// Microseconds of samples of a product on a CUDA device, and the bytes of its matrix; with `form` "copy" of a copy of
/// `n` bytes. For `benches/gpu.py`.
#[pyfunction]
pub(super) fn cuda_time(
    py: Python<'_>,
    form: &str,
    n: usize,
    k: usize,
    tokens: usize,
    sets: usize,
    samples: usize,
) -> PyResult<(Vec<f32>, usize)> {
    #[cfg(feature = "cuda")]
    let time = || {
        available()?;
        let cuda = crate::backend::cuda::Cuda::new(None, Cpu::new(1, None)?)?;
        if form == "copy" {
            return Ok((cuda.time_copy(n, samples)?, n));
        }
        use crate::backend::Form;
        let forms = [Form::Q4, Form::Q8, Form::Bf16, Form::F16, Form::F32];
        let known = match form {
            "q4_k" => Some(Form::Grouped(crate::quant::Grouped::Q4_K)),
            "q6_k" => Some(Form::Grouped(crate::quant::Grouped::Q6_K)),
            _ => forms.into_iter().find(|known| known.name() == form),
        };
        let known =
            known.ok_or_else(|| Error::parameter("form", form, "a form that runs on CUDA"))?;
        if n == 0 || k == 0 || tokens == 0 || sets == 0 {
            return Err(Error::parameter("shape", 0, "at least 1"));
        }
        cuda.time_product(known, [n, k, tokens], sets, samples)
    };
    #[cfg(not(feature = "cuda"))]
    let time = || {
        let _ = (form, n, k, tokens, sets, samples);
        available().map(|()| (Vec::new(), 0))
    };
    py.detach(time).map_err(super::raise(py))
}

/// Microseconds of samples of attention of one token of each of `sequences` with `keys` positions on a CUDA device, and the
/// bytes of keys and values that it reads. For `benches/gpu.py`.
#[pyfunction]
pub(super) fn cuda_time_attention(
    py: Python<'_>,
    kv_cache_dtype: &str,
    heads: [usize; 3],
    sequences: usize,
    keys: usize,
    sets: usize,
    samples: usize,
) -> PyResult<(Vec<f32>, usize)> {
    let time = || {
        let dtype = super::named("kv_cache_dtype", kv_cache_dtype, &super::KV_DTYPES)?;
        available()?;
        if heads.contains(&0) || sequences == 0 || keys == 0 || sets == 0 {
            return Err(Error::parameter("shape", 0, "at least 1"));
        }
        #[cfg(feature = "cuda")]
        return Cuda::new(None, Cpu::new(1, None)?)?.time_attention(
            dtype,
            heads,
            [sequences, keys],
            sets,
            samples,
        );
        #[cfg(not(feature = "cuda"))]
        {
            let _ = (dtype, samples);
            Ok((Vec::new(), 0))
        }
    };
    py.detach(time).map_err(super::raise(py))
}
