//! The embedded kernels: one table, the choice by compute capability, and the kernels that a device has loaded.
//! `build_kernels.py` makes the PTX. Never launches.

use super::device::{failed, text};
use super::probe::{DeviceInfo, Unavailable};
use crate::{Error, Result};
use cudarc::driver::{result, sys};
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, Weak};

/// The kernels of one source.
pub(super) struct Module {
    /// Of the source, `kernels/<name>.cu`.
    pub(super) name: &'static str,
    /// PTX and the least compute capability that runs it, best first.
    images: &'static [((i32, i32), &'static str)],
}

macro_rules! modules {
    ($($name:literal: $($variant:literal >= $capability:expr),*;)*) => {
        &[$(Module {
            name: $name,
            images: &[$(
                ($capability, include_str!(concat!("kernels/", $name, ".", $variant, ".ptx")))
            ),*],
        }),*]
    };
}

/// Every module.
pub(super) static MODULES: &[Module] = modules! {
    "attend_f16": "sm80" >= (8, 0);
    "attend_f32": "sm80" >= (8, 0);
    "attend_i8": "sm80" >= (8, 0);
    "attend_latent": "sm80" >= (8, 0);
    "attention": "sm80" >= (8, 0);
    "experts": "sm80" >= (8, 0);
    "few": "sm80" >= (8, 0);
    "gemm": "sm80" >= (8, 0);
    "gemv": "sm80" >= (8, 0);
    "gemv_float": "sm80" >= (8, 0);
    "gemv_grouped": "sm80" >= (8, 0);
    "recurrent": "sm80" >= (8, 0);
    "rows": "sm80" >= (8, 0);
    "sample": "sm80" >= (8, 0);
};

impl Module {
    /// The PTX for a device.
    pub(super) fn image(&self, capability: (i32, i32)) -> Option<&'static str> {
        self.images.iter().find(|(least, _)| capability >= *least).map(|(_, image)| *image)
    }
    /// The same, or an error.
    fn image_for(&self, info: &DeviceInfo) -> Result<&'static str> {
        self.image(info.capability).ok_or_else(|| {
            let why = Unavailable::ArchUnsupported(info.name.clone(), info.capability);
            Error::CudaUnavailable(why.to_string())
        })
    }
    /// Names of the kernels in a PTX, and the bytes of each one's parameter.
    pub(super) fn entries(image: &str) -> impl Iterator<Item = (&str, usize)> {
        image.split(".entry ").skip(1).filter_map(|rest| {
            let name = rest.split('(').next()?;
            let bytes = rest.split(&format!("{name}_param_0[")).nth(1)?.split(']').next()?;
            Some((name, bytes.parse().ok()?))
        })
    }
}

/// The context of a device and the kernels in it, shared by everything of this process that runs there. A module is loaded
/// when it is first asked for: where the driver cannot keep what it makes of PTX, each takes it some tenths of a second.
pub(super) struct Modules {
    info: DeviceInfo,
    version: i32,
    pub(super) context: sys::CUcontext,
    /// The module of each kernel.
    homes: HashMap<&'static str, &'static Module>,
    loaded: Mutex<Loaded>,
}

#[derive(Default)]
struct Loaded {
    modules: Vec<(&'static str, sys::CUmodule)>,
    kernels: HashMap<&'static str, sys::CUfunction>,
}

// SAFETY: contexts and functions are the driver's handles, which any thread may use once it has made the context current.
unsafe impl Send for Modules {}
// SAFETY: as above; what changes is behind a lock.
unsafe impl Sync for Modules {}

impl Modules {
    /// Those of a device.
    pub(super) fn open(info: &DeviceInfo, version: i32) -> Result<Arc<Modules>> {
        static OPEN: Mutex<Vec<Weak<Modules>>> = Mutex::new(Vec::new());
        let mut open = OPEN.lock().unwrap_or_else(|e| e.into_inner());
        open.retain(|modules| modules.strong_count() > 0);
        let known = open.iter().filter_map(Weak::upgrade).find(|m| m.info.ordinal == info.ordinal);
        if let Some(known) = known {
            return Ok(known);
        }
        let mut homes = HashMap::new();
        for module in MODULES {
            let image = module.image_for(info)?;
            homes.extend(Module::entries(image).map(|(kernel, _)| (kernel, module)));
        }
        let device = result::device::get(info.ordinal).map_err(failed("device"))?;
        // SAFETY: `device` came from the driver.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(failed("context"))?;
        let loaded = Mutex::default();
        let modules = Arc::new(Modules { info: info.clone(), version, context, homes, loaded });
        // Whether the driver takes this PTX at all shows here.
        modules.load(&["rows"])?;
        open.push(Arc::downgrade(&modules));
        Ok(modules)
    }

    /// Loads the modules of these names, unless they are there.
    pub(super) fn load(&self, names: &[&str]) -> Result<()> {
        let mut loaded = self.loaded.lock().unwrap_or_else(|e| e.into_inner());
        let mut asked = MODULES.iter().filter(|module| names.contains(&module.name));
        asked.try_for_each(|module| self.add(module, &mut loaded))
    }

    /// A kernel, its module loaded; `None`: there is none of this name.
    pub(super) fn kernel(&self, name: &str) -> Result<Option<sys::CUfunction>> {
        let mut loaded = self.loaded.lock().unwrap_or_else(|e| e.into_inner());
        if !loaded.kernels.contains_key(name) {
            let Some(home) = self.homes.get(name) else { return Ok(None) };
            self.add(home, &mut loaded)?;
        }
        Ok(loaded.kernels.get(name).copied())
    }

    fn add(&self, module: &'static Module, loaded: &mut Loaded) -> Result<()> {
        if loaded.modules.iter().any(|(name, _)| *name == module.name) {
            return Ok(());
        }
        let image = module.image_for(&self.info)?;
        // SAFETY: `context` was retained.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed("context"))?;
        let bytes = CString::new(image).map_err(|_| Error::Internal("PTX with a zero".into()))?;
        // SAFETY: `bytes` is PTX that ends with a zero, as the driver wants it.
        let made = unsafe { result::module::load_data(bytes.as_ptr().cast::<c_void>()) };
        let made = made.map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
            | sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU => {
                Error::CudaUnavailable(Unavailable::DriverTooOld(self.version).to_string())
            }
            _ => Error::Device(format!("loading the kernels `{}`: {}", module.name, text(error))),
        })?;
        loaded.modules.push((module.name, made));
        for (name, _) in Module::entries(image) {
            let c_name = CString::new(name).map_err(|_| Error::Internal("a name".into()))?;
            // SAFETY: `made` came from the driver, and goes with `self`.
            let function = unsafe { result::module::get_function(made, c_name) };
            loaded.kernels.insert(name, function.map_err(failed("kernel"))?);
        }
        Ok(())
    }
}

impl Drop for Modules {
    fn drop(&mut self) {
        let loaded = self.loaded.get_mut().unwrap_or_else(|e| e.into_inner());
        // SAFETY: what lay in the context is gone, as it held this; the modules and the context are let go once.
        unsafe {
            let _ = result::ctx::set_current(self.context);
            for (_, module) in loaded.modules.drain(..) {
                let _ = result::module::unload(module);
            }
            let _ = result::device::get(self.info.ordinal)
                .and_then(|device| result::primary_ctx::release(device));
        }
    }
}
