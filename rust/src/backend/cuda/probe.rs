//! Whether CUDA can be had: the driver library, its version, its devices. The only first touch of the driver, so that
//! nothing else meets a missing library. Never panics, never allocates on a device.

use cudarc::driver::{result, sys};
use std::fmt;
use std::sync::OnceLock;

/// The CUDA version of the driver that the embedded PTX (8.2) needs: r535 on desktops, JetPack 6.0.
const NEEDED: i32 = 12020;

/// Why CUDA can't be had.
#[derive(Clone, Debug, PartialEq)]
pub enum Unavailable {
    /// No libcuda.so.1 or nvcuda.dll.
    NoDriverLibrary,
    /// A library that lacks this function.
    Lacks(&'static str),
    /// The library that toolkits have to link against (code 34).
    StubLibrary,
    /// The driver's code.
    InitFailed(u32),
    /// The driver has no device.
    NoDevice,
    /// The driver's CUDA version, as 12020 for 12.2.
    DriverTooOld(i32),
    /// Devices, but none of compute capability 8.0 or later: the first one's name and capability.
    ArchUnsupported(String, (i32, i32)),
}

/// One device.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// Its number for the driver.
    pub ordinal: i32,
    /// As the driver names it.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Bytes.
    pub memory: u64,
    /// Its memory is the computer's (Jetson).
    pub integrated: bool,
}

/// The driver and the devices that kernels run on.
#[derive(Clone, Debug)]
pub struct DriverInfo {
    /// Its CUDA version, as 12020 for 12.2.
    pub version: i32,
    /// Not empty.
    pub devices: Vec<DeviceInfo>,
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let version = |v: i32| format!("{}.{}", v / 1000, v % 1000 / 10);
        match self {
            Unavailable::NoDriverLibrary => write!(
                f,
                "no NVIDIA driver: libcuda.so.1 (nvcuda.dll on Windows) was not found; install the driver, and in a \
                 container start it with the NVIDIA runtime (docker run --gpus all)"
            ),
            Unavailable::Lacks(name) => write!(
                f,
                "the NVIDIA driver library lacks {name}; install driver 535 or later (CUDA {})",
                version(NEEDED)
            ),
            Unavailable::StubLibrary => write!(
                f,
                "the libcuda that was found is a toolkit's stub; take its folder out of LD_LIBRARY_PATH, or install \
                 the NVIDIA driver"
            ),
            Unavailable::InitFailed(code) => write!(
                f,
                "the NVIDIA driver does not start (CUDA error {code}); look at nvidia-smi, and restart the computer \
                 after a driver update"
            ),
            Unavailable::NoDevice => write!(
                f,
                "the NVIDIA driver finds no device; look at nvidia-smi and at CUDA_VISIBLE_DEVICES"
            ),
            Unavailable::DriverTooOld(have) => write!(
                f,
                "the NVIDIA driver has CUDA {}, and {} is needed; install driver 535 or later (JetPack 6.0 or later)",
                version(*have),
                version(NEEDED)
            ),
            Unavailable::ArchUnsupported(name, (major, minor)) => write!(
                f,
                "{name} has compute capability {major}.{minor}, and 8.0 is needed (Ampere or later)"
            ),
        }
    }
}

/// What the driver has. Asked once for the process.
pub fn probe() -> Result<&'static DriverInfo, &'static Unavailable> {
    static FOUND: OnceLock<Result<DriverInfo, Unavailable>> = OnceLock::new();
    FOUND.get_or_init(look).as_ref()
}

/// Every function of the driver that this crate calls: cudarc looks them up when they are first called, and panics if
/// one is missing.
const FUNCTIONS: &[&str] = &[
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDeviceTotalMem_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxSetCurrent",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuEventElapsedTime",
    "cuEventDestroy_v2",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemsetD8Async",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuModuleLoadData",
    "cuModuleGetFunction",
    "cuModuleUnload",
    "cuLaunchKernel",
    "cuGetErrorName",
    "cuGetErrorString",
];

fn look() -> Result<DriverInfo, Unavailable> {
    // SAFETY: loading the driver runs its initializers, which is what it is for.
    if !unsafe { sys::is_culib_present() } {
        return Err(Unavailable::NoDriverLibrary);
    }
    // SAFETY: as above; the library is there, so this does not panic.
    let library = unsafe { sys::culib() };
    for &name in FUNCTIONS {
        // SAFETY: the symbol is only looked for, never called through this type.
        if unsafe { library.get::<*const ()>(name) }.is_err() {
            return Err(Unavailable::Lacks(name));
        }
    }
    let failed = |error: result::DriverError| match error.0 {
        sys::CUresult::CUDA_ERROR_STUB_LIBRARY => Unavailable::StubLibrary,
        sys::CUresult::CUDA_ERROR_NO_DEVICE => Unavailable::NoDevice,
        other => Unavailable::InitFailed(other as u32),
    };
    result::init().map_err(failed)?;
    let mut version = 0;
    // SAFETY: `version` takes the answer.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(failed)?;
    if version < NEEDED {
        return Err(Unavailable::DriverTooOld(version));
    }
    let count = result::device::get_count().map_err(failed)?;
    let devices: Vec<_> = (0..count).map(device).collect::<Result<_, _>>().map_err(failed)?;
    let Some(first) = devices.first() else { return Err(Unavailable::NoDevice) };
    let old = Unavailable::ArchUnsupported(first.name.clone(), first.capability);
    let devices: Vec<_> = devices.into_iter().filter(|d| d.capability >= (8, 0)).collect();
    if devices.is_empty() { Err(old) } else { Ok(DriverInfo { version, devices }) }
}

fn device(ordinal: i32) -> Result<DeviceInfo, result::DriverError> {
    use sys::CUdevice_attribute as A;
    let device = result::device::get(ordinal)?;
    // SAFETY: `device` came from the driver.
    let attribute = |which| unsafe { result::device::get_attribute(device, which) };
    Ok(DeviceInfo {
        ordinal,
        name: result::device::get_name(device)?,
        capability: (
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        // SAFETY: as above.
        memory: unsafe { result::device::total_mem(device) }? as u64,
        integrated: attribute(A::CU_DEVICE_ATTRIBUTE_INTEGRATED)? != 0,
    })
}
