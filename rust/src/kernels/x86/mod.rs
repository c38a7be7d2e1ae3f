//! Kernel sets for x86-64, weakest first: avx2, avx512vnni.

pub(super) mod avx2;
pub(super) mod avx512vnni;
