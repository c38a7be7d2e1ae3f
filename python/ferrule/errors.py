"""Every exception that `ferrule` raises on purpose. Raised from here and from the Rust core.

A message says what was wrong, where, what was found, what was expected and, if there is one, the
remedy. Never raised here: `TypeError` for arguments of a wrong type, which is Python's own.
"""

from __future__ import annotations


class FerruleError(Exception):
    """Base of all errors of this package."""


class ModelNotFoundError(FerruleError, FileNotFoundError):
    """No file, folder or repository where a model was expected."""


class DownloadError(FerruleError, OSError):
    """A model could not be downloaded.

    `url` is what was asked for, `status` the HTTP status if there was an answer.
    """

    def __init__(self, message: str, *, url: str | None = None, status: int | None = None) -> None:
        super().__init__(message)
        self.url = url
        self.status = status


class ModelFormatError(FerruleError, ValueError):
    """A file that breaks its format's rules; `file` names it."""

    def __init__(self, message: str, *, file: str | None = None) -> None:
        super().__init__(message)
        self.file = file


class FileAccessError(FerruleError, OSError):
    """The operating system refused; `file` names what."""

    def __init__(self, message: str, *, file: str | None = None) -> None:
        super().__init__(message)
        self.file = file


class UnsupportedModelError(FerruleError):
    """A well-formed model that asks for something this version does not do."""


class NumericError(FerruleError, ArithmeticError):
    """A model whose logits are not numbers: its weights are damaged, or leave the f32 range."""


class TokenizerError(FerruleError):
    """A missing, unknown or broken tokenizer; text or ids that it can't take."""


class ChatTemplateError(FerruleError):
    """A missing or failing chat template."""


class ContextLengthError(FerruleError, ValueError):
    """The prompt and the answer do not fit into the context."""

    def __init__(
        self,
        message: str,
        *,
        prompt_tokens: int | None = None,
        max_tokens: int | None = None,
        context_length: int | None = None,
    ) -> None:
        super().__init__(message)
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.context_length = context_length


class InvalidParameterError(FerruleError, ValueError):
    """A parameter outside its range; `field` names it, `value` is what was given, as text."""

    def __init__(self, message: str, *, field: str | None = None, value: str | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.value = value


class OutOfMemoryError(FerruleError, MemoryError):
    """Not enough memory; `requested` and `available` are bytes."""

    def __init__(
        self, message: str, *, requested: int | None = None, available: int | None = None
    ) -> None:
        super().__init__(message)
        self.requested = requested
        self.available = available


class CudaUnavailableError(FerruleError, RuntimeError):
    """CUDA was asked for and can't be had; the message says why, and the remedy."""


class DeviceError(FerruleError, RuntimeError):
    """The CUDA device failed, and what lay on it is lost: load the model again."""


class QueueFullError(FerruleError, RuntimeError):
    """More requests wait than `max_queue` allows."""

    def __init__(
        self, message: str, *, queued: int | None = None, limit: int | None = None
    ) -> None:
        super().__init__(message)
        self.queued = queued
        self.limit = limit


class EngineClosedError(FerruleError, RuntimeError):
    """The `LLM` was closed, or this process was forked after it was loaded."""


class LogitsProcessorError(FerruleError):
    """A logits processor raised or gave a wrong result; `__cause__` is its exception."""


class InternalError(FerruleError):
    """A defect in `ferrule` itself. The engine is closed; please report the message."""
