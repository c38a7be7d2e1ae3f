//! The only file that knows Python.
