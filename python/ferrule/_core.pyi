"""The Rust core. Private: `ferrule` is the interface, except for the int4/int8 doors below."""

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Done",
    "Engine",
    "News",
    "QMatrix",
    "Request",
    "Trial",
    "cpu_features",
    "cuda_check",
    "cuda_devices",
    "cuda_time",
    "cuda_time_attention",
    "describe",
    "evaluate",
    "export",
    "gguf_at",
    "inspect",
    "kernel_set",
    "kernel_sets",
    "memory",
    "memory_bandwidth",
    "quantize",
    "quantize_int4",
    "quantize_int8",
    "threads",
    "version",
]

version: str

_Logprob = tuple[int, float, int]  # id, ln p, rank
_TokenLogprobs = tuple[_Logprob, list[_Logprob]]

@final
class Engine:
    def __new__(
        cls,
        folder: str,
        *,
        device: str = "cpu",
        gpu_layers: int | None = None,
        quantization: str = "auto",
        threads: int | None = None,
        tile_tokens: int | None = None,
        claim_bytes: int | None = None,
        context_length: int | None = None,
        kv_cache_dtype: str = "f16",
        kv_cache_bytes: int | None = None,
        max_batch: int = 16,
        max_queue: int = 256,
        prefix_cache: bool = True,
        cache_dir: str | None = None,
        chat_template: str | None = None,
        family: str | None = None,
        eos: Sequence[int] = ...,
        random: bool = False,
        progress: Callable[[int, int], object] | None = None,
    ) -> Engine: ...
    @property
    def info(self) -> dict[str, Any]: ...
    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int | None = None,
        min_tokens: int = 0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        typical_p: float = 1.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Sequence[tuple[int, float]] = ...,
        stop: Sequence[str] = ...,
        stop_token_ids: Sequence[int] = ...,
        ignore_eos: bool = False,
        seed: int = 0,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        prompt_logits: bool = False,
        skip_special_tokens: bool = True,
        logits_processors: Sequence[Callable[..., Any]] = ...,
        stream: bool = False,
        notify: Callable[[], object] | None = None,
    ) -> Request: ...
    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]: ...
    def decode(self, ids: Sequence[int], skip_special: bool) -> str: ...
    def render_chat(
        self, messages: str, tools: str, extra: str, add_generation_prompt: bool, now: int
    ) -> str: ...
    def close(self) -> None: ...

@final
class Request:
    def wait(self, timeout: float | None) -> News | None: ...
    def cancel(self) -> None: ...
    def done(self) -> bool: ...

@final
class News:
    @property
    def text(self) -> str: ...
    @property
    def token_ids(self) -> list[int]: ...
    @property
    def logprobs(self) -> list[_TokenLogprobs] | None: ...
    @property
    def done(self) -> Done | None: ...

@final
class Done:
    @property
    def finish_reason(self) -> Literal["stop", "length", "cancelled"]: ...
    @property
    def stop_match(self) -> str | None: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def completion_tokens(self) -> int: ...
    @property
    def prompt_logprobs(self) -> list[_TokenLogprobs | None] | None: ...
    @property
    def prompt_logits(self) -> NDArray[np.float32] | None: ...
    @property
    def queue_s(self) -> float: ...
    @property
    def token_times_s(self) -> list[float]: ...
    @property
    def total_s(self) -> float: ...

@final
class QMatrix:
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def bits_per_weight(self) -> float: ...
    def matmul(self, x: NDArray[np.float32]) -> NDArray[np.float32]: ...
    def dequantize(self) -> NDArray[np.float32]: ...

@final
class Trial:
    def __new__(cls, n: int, k: int) -> Trial: ...
    def seconds(self, m: int, threads: int, tile_tokens: int, claim_bytes: int) -> float: ...

def quantize_int4(
    w: NDArray[np.float32], *, threads: int | None = None, isa: str | None = None
) -> QMatrix: ...
def quantize_int8(
    w: NDArray[np.float32], *, threads: int | None = None, isa: str | None = None
) -> QMatrix: ...
def describe(
    folder: str,
    *,
    quantization: str,
    kv_cache_dtype: str,
    context_length: int | None,
    weight_cache: bool,
    family: str | None,
    device: str = "cpu",
    gpu_layers: int | None = None,
) -> dict[str, Any]: ...
def evaluate(
    model: str | PathLike[str],
    texts: list[str],
    *,
    documents: bool,
    reference: str | PathLike[str] | None = None,
    quantization: str = "auto",
    reference_quantization: str = "none",
    context: int | None = None,
    limit: int | None = None,
    kv_cache_dtype: str = "f16",
    threads: int | None = None,
    cache_dir: str | PathLike[str] | None = None,
    family: str | None = None,
    progress: Callable[[str, int, int], object] | None = None,
) -> dict[str, Any]: ...
def quantize(
    folder: str | PathLike[str],
    out: str | PathLike[str],
    *,
    format: str,
    bits: float | None = None,
    rules: list[tuple[str, str]],
    texts: list[str] = ...,
    documents: bool = False,
    limit: int | None = None,
    threads: int | None = None,
    cache_dir: str | PathLike[str] | None = None,
    family: str | None = None,
    progress: Callable[[str, int, int], object] | None = None,
) -> dict[str, Any]: ...
def export(
    folder: str | PathLike[str],
    out: str | PathLike[str],
    *,
    format: str,
    rules: list[tuple[str, str]],
    sampling: list[tuple[str, float]],
    threads: int | None = None,
    family: str | None = None,
    progress: Callable[[str, int, int], object] | None = None,
) -> dict[str, Any]: ...
def cpu_features() -> list[str]: ...
def gguf_at(path: str | PathLike[str]) -> Path | None: ...
def inspect(path: str | PathLike[str]) -> str: ...
def kernel_set() -> str: ...
def kernel_sets() -> list[str]: ...
def memory() -> tuple[int, int, int | None]: ...
def memory_bandwidth(threads: int, bytes: int) -> float: ...
def threads() -> tuple[int, str]: ...
def cuda_check(device: str) -> tuple[int, list[str]]: ...
def cuda_time(
    form: str, n: int, k: int, tokens: int, sets: int, samples: int
) -> tuple[list[float], int]: ...
def cuda_time_attention(
    kv_cache_dtype: str,
    heads: Sequence[int],
    sequences: int,
    keys: int,
    sets: int,
    samples: int,
) -> tuple[list[float], int]: ...
def cuda_devices() -> tuple[list[tuple[int, str, str, int]], str]: ...
