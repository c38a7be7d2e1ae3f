//! The one error type: what was wrong, where, what was found and what was expected.

use std::fmt;
use std::path::{Path, PathBuf};

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong. Each variant is one Python exception class.
#[derive(Debug)]
pub enum Error {
    /// No file or folder where a model was expected.
    ModelNotFound(String),
    /// A file that breaks its format's rules.
    Format {
        /// The broken file.
        file: PathBuf,
        /// The thing in it, what was found, what was expected.
        what: String,
    },
    /// A well-formed model that asks for something this version does not do.
    Unsupported(String),
    /// A model whose logits are not numbers.
    Numeric(String),
    /// A missing, unknown or broken tokenizer; text or ids it can't take.
    Tokenizer(String),
    /// A missing or failing chat template.
    ChatTemplate(String),
    /// The prompt and the answer do not fit into the context.
    ContextLength {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Tokens asked for, if that was said.
        max_tokens: Option<usize>,
        /// Tokens that fit.
        context_length: usize,
    },
    /// A parameter outside its range.
    InvalidParameter {
        /// Name of the parameter.
        field: &'static str,
        /// What was given.
        value: String,
        /// What is allowed.
        expected: String,
    },
    /// Not enough memory.
    OutOfMemory {
        /// What the memory was for.
        what: String,
        /// Bytes asked for.
        requested: u64,
        /// Bytes that are there.
        available: u64,
    },
    /// CUDA was asked for and can't be had: why, and the remedy.
    CudaUnavailable(String),
    /// A device failed; what lay on it is lost.
    Device(String),
    /// The operating system refused.
    Io {
        /// The file concerned.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// More requests wait than allowed.
    QueueFull {
        /// Requests that wait.
        queued: usize,
        /// The most that may wait.
        limit: usize,
    },
    /// The engine was closed.
    Closed,
    /// The computation was cancelled.
    Interrupted,
    /// A Python logits processor raised; the text of its exception.
    Processor(String),
    /// A defect in this library: the text of a panic.
    Internal(String),
}

impl Error {
    /// A broken file.
    pub fn format(file: impl AsRef<Path>, what: impl Into<String>) -> Error {
        Error::Format { file: file.as_ref().to_path_buf(), what: what.into() }
    }

    /// An I/O error on `path`.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Error {
        Error::Io { path: path.as_ref().to_path_buf(), source }
    }

    /// A parameter outside its range.
    pub fn parameter(
        field: &'static str,
        value: impl fmt::Display,
        expected: impl Into<String>,
    ) -> Error {
        Error::InvalidParameter { field, value: value.to_string(), expected: expected.into() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::ModelNotFound(what) => write!(f, "{what}"),
            Error::Format { file, what } => write!(f, "{}: {what}", file.display()),
            Error::Unsupported(what)
            | Error::Numeric(what)
            | Error::Tokenizer(what)
            | Error::ChatTemplate(what)
            | Error::CudaUnavailable(what)
            | Error::Processor(what) => write!(f, "{what}"),
            Error::ContextLength { prompt_tokens, max_tokens, context_length } => {
                write!(f, "the prompt has {prompt_tokens} tokens")?;
                if let Some(max_tokens) = max_tokens {
                    write!(f, " and max_tokens is {max_tokens}")?;
                } else {
                    write!(f, " and needs room for at least one more")?;
                }
                write!(f, ", but the context holds {context_length} tokens")
            }
            Error::InvalidParameter { field, value, expected } => {
                write!(f, "{field}: found {value}, expected {expected}")
            }
            Error::OutOfMemory { what, requested, available } => {
                write!(f, "{what}: {requested} bytes asked for, {available} available")
            }
            Error::Device(what) => {
                write!(
                    f,
                    "the CUDA device failed: {what}; load the model again, or use device=\"cpu\""
                )
            }
            Error::Io { path, source } => write!(f, "{}: {source}", path.display()),
            Error::QueueFull { queued, limit } => {
                write!(
                    f,
                    "{queued} requests wait, and max_queue is {limit}: wait for answers, give the prompts as one list, \
                     or raise max_queue"
                )
            }
            Error::Closed => write!(f, "the engine is closed"),
            Error::Interrupted => write!(f, "cancelled"),
            Error::Internal(what) => write!(
                f,
                "a defect in ferrule: {what}; the engine is closed, please report this message"
            ),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}
