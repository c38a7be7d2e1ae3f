//! What the CUDA kernels take at most. A build without CUDA has it, too: what a model has is compared with it before a device
//! is looked for. Never touches one.

/// Dimensions of a head, and of a value of latent attention.
pub const HEAD_DIM: usize = 512;
/// Dimensions of a key of latent attention.
pub const LATENT_KEY: usize = 576;
/// Experts of a layer.
pub const EXPERTS: usize = 1024;
/// Experts that a position uses.
pub const CHOSEN: usize = 32;
/// Rows of a head's state.
pub const STATE_ROWS: usize = 256;
