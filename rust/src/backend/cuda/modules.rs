//! The embedded kernels: one table, and the choice by compute capability. `build_kernels.py` makes the PTX.

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
    "gemm": "sm80" >= (8, 0);
    "gemv": "sm80" >= (8, 0);
    "rows": "sm80" >= (8, 0);
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
