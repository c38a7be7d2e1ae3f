"""Runs decoder-only language models on CPUs and small devices.

    from ferrule import LLM
    llm = LLM("tales-4m")
    print(llm.chat([{"role": "user", "content": "Tell me a story about a fox."}]).text)

`LLM` and `SamplingParams` are enough for most uses.
"""

from ._core import version as __version__
from .errors import (
    ChatTemplateError,
    ContextLengthError,
    CudaUnavailableError,
    DeviceError,
    DownloadError,
    EngineClosedError,
    FerruleError,
    FileAccessError,
    InternalError,
    InvalidParameterError,
    LogitsProcessorError,
    ModelFormatError,
    ModelNotFoundError,
    NumericError,
    OutOfMemoryError,
    QueueFullError,
    TokenizerError,
    UnsupportedModelError,
)
from .llm import LLM
from .params import SamplingParams
from .quality import Distance, Estimate, Evaluation, Quantized, evaluate, quantize
from .request import AsyncStream, Request, Stream
from .results import (
    Chunk,
    Completion,
    Logprob,
    ModelInfo,
    Percentiles,
    Progress,
    Score,
    Stats,
    TokenLogprobs,
    Usage,
)

__all__ = [
    "LLM",
    "AsyncStream",
    "ChatTemplateError",
    "Chunk",
    "Completion",
    "ContextLengthError",
    "CudaUnavailableError",
    "DeviceError",
    "Distance",
    "DownloadError",
    "EngineClosedError",
    "Estimate",
    "Evaluation",
    "FerruleError",
    "FileAccessError",
    "InternalError",
    "InvalidParameterError",
    "LogitsProcessorError",
    "Logprob",
    "ModelFormatError",
    "ModelInfo",
    "ModelNotFoundError",
    "NumericError",
    "OutOfMemoryError",
    "Percentiles",
    "Progress",
    "Quantized",
    "QueueFullError",
    "Request",
    "SamplingParams",
    "Score",
    "Stats",
    "Stream",
    "TokenLogprobs",
    "TokenizerError",
    "UnsupportedModelError",
    "Usage",
    "__version__",
    "evaluate",
    "quantize",
]
