//! Kernel sets for x86-64, weakest first: avx2, avxvnni, avx512vnni, amx.

pub(super) mod amx;
pub(super) mod avx2;
pub(super) mod avx512vnni;
pub(super) mod avxvnni;
mod grouped;
mod grouped512;
#[cfg(all(test, target_os = "linux"))]
pub(super) mod trap;
mod zmm;
