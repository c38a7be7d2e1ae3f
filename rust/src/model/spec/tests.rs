//! Tests of `Spec` on small configurations.
