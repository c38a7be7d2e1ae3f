//! `ferrule` runs decoder-only language models where they are cheapest to run.
//!
//! The straight line from a checkpoint to text:
//!
//! ```text
//! file::Checkpoint (mmap) ---+
//! model::Spec ---------------+-> quant -> backend -> model::Model
//! text -> tokenizer -> engine.step: schedule -> forward -> sample -> tokenizer -> text
//! ```
//!
//! `ARCHITECTURE.md` says what each module may use; `tests/layering.rs` checks it.
//! Only the modules marked below may contain `unsafe`.

#[allow(unsafe_code)]
// cpu: the pool hands disjoint parts of one buffer to several threads; cuda: the driver
pub mod backend;
pub mod chat;
pub mod engine;
pub mod error;
pub mod evaluate;
#[allow(unsafe_code)] // memory maps
pub mod file;
#[allow(unsafe_code)] // SIMD, and the one call into code compiled for a CPU feature
pub mod kernels;
pub mod model;
#[cfg(feature = "python")]
mod python;
pub mod quant;
pub mod sample;
pub mod tokenizer;

pub use error::{Error, Result};
