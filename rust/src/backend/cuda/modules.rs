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
    "attention": "sm80" >= (8, 0);
    "experts": "sm80" >= (8, 0);
    "few": "sm80" >= (8, 0);
    "gemm": "sm80" >= (8, 0);
    "gemv": "sm80" >= (8, 0);
    "recurrent": "sm80" >= (8, 0);
    "rows": "sm80" >= (8, 0);
    "sample": "sm80" >= (8, 0);
};

impl Module {
    /// The PTX for a device.
    pub(super) fn image(&self, capability: (i32, i32)) -> Option<&'static str> {
        self.images.iter().find(|(least, _)| capability >= *least).map(|(_, image)| *image)
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

/// The context of a device and the kernels in it, shared by everything of this process that runs there: the driver takes
/// seconds to translate them where it cannot keep what it made.
pub(super) struct Modules {
    ordinal: i32,
    pub(super) context: sys::CUcontext,
    pub(super) kernels: HashMap<&'static str, sys::CUfunction>,
}

// SAFETY: contexts and functions are the driver's handles, which any thread may use once it has made the context current.
unsafe impl Send for Modules {}
// SAFETY: as above; nothing changes after `load`.
unsafe impl Sync for Modules {}

impl Modules {
    /// Those of a device, loaded if nobody has them.
    pub(super) fn open(info: &DeviceInfo, version: i32) -> Result<Arc<Modules>> {
        static OPEN: Mutex<Vec<Weak<Modules>>> = Mutex::new(Vec::new());
        let mut open = OPEN.lock().unwrap_or_else(|e| e.into_inner());
        open.retain(|modules| modules.strong_count() > 0);
        let known = open.iter().filter_map(Weak::upgrade).find(|m| m.ordinal == info.ordinal);
        if let Some(known) = known {
            return Ok(known);
        }
        let device = result::device::get(info.ordinal).map_err(failed("device"))?;
        // SAFETY: `device` came from the driver.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(failed("context"))?;
        let mut modules = Modules { ordinal: info.ordinal, context, kernels: HashMap::new() };
        modules.load(info, version)?;
        let modules = Arc::new(modules);
        open.push(Arc::downgrade(&modules));
        Ok(modules)
    }

    fn load(&mut self, info: &DeviceInfo, version: i32) -> Result<()> {
        // SAFETY: `context` was retained.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed("context"))?;
        for module in MODULES {
            let Some(image) = module.image(info.capability) else {
                let why = Unavailable::ArchUnsupported(info.name.clone(), info.capability);
                return Err(Error::CudaUnavailable(why.to_string()));
            };
            let bytes =
                CString::new(image).map_err(|_| Error::Internal("PTX with a zero".into()))?;
            // SAFETY: `bytes` is PTX that ends with a zero, as the driver wants it.
            let loaded = unsafe { result::module::load_data(bytes.as_ptr().cast::<c_void>()) };
            let loaded = loaded.map_err(|error| match error.0 {
                sys::CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
                | sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU => {
                    Error::CudaUnavailable(Unavailable::DriverTooOld(version).to_string())
                }
                _ => {
                    Error::Device(format!("loading the kernels `{}`: {}", module.name, text(error)))
                }
            })?;
            for (name, _) in Module::entries(image) {
                let c_name = CString::new(name).map_err(|_| Error::Internal("a name".into()))?;
                // SAFETY: `loaded` came from the driver, and goes with the context.
                let function = unsafe { result::module::get_function(loaded, c_name) };
                self.kernels.insert(name, function.map_err(failed("kernel"))?);
            }
        }
        Ok(())
    }
}

impl Drop for Modules {
    fn drop(&mut self) {
        // SAFETY: retained by `open`; everything that lay in the context is gone, as it held this.
        let _ = result::device::get(self.ordinal)
            .and_then(|device| unsafe { result::primary_ctx::release(device) });
    }
}
