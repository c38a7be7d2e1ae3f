//! A model: architecture as data (`spec`), weights, the one forward pass, the paged KV cache.

pub mod spec;
