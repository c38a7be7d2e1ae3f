"""What comes back from a model: answers, chunks, counts and times. Data only; all frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "cancelled"]


class Logprob(NamedTuple):
    """Natural logarithm of a token's probability under the model, before any sampling setting."""

    token_id: int
    logprob: float
    rank: int
    """1 = the likeliest token of the vocabulary."""


class TokenLogprobs(NamedTuple):
    """A token and the likeliest tokens in its place."""

    token: Logprob
    top: tuple[Logprob, ...]


class Score(NamedTuple):
    """How likely a continuation is, given its prompt."""

    logprob: float
    token_logprobs: tuple[float, ...]
    is_greedy: bool
    """Whether each token is the likeliest one in its place."""


class Progress(NamedTuple):
    """How far a load is."""

    done: int
    """Bytes of weights read, quantized and packed."""
    total: int


@dataclass(frozen=True)
class Usage:
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Tokens of the prompt whose keys and values were in the prefix cache."""


@dataclass(frozen=True)
class Percentiles:
    """Summary of a list of times. A percentile is None where the list is too short for it."""

    n: int
    mean: float | None
    p50: float | None
    p95: float | None
    """None below 20 values."""
    p99: float | None
    """None below 100 values."""
    max: float | None

    @staticmethod
    def of(values: Sequence[float]) -> Percentiles:
        """Summarise `values`; percentiles interpolate linearly, as numpy's do by default."""
        n, ordered = len(values), sorted(values)

        def at(q: float, least: int) -> float | None:
            if n < least:
                return None
            low = int(q * (n - 1))
            high = min(low + 1, n - 1)
            return ordered[low] + (ordered[high] - ordered[low]) * (q * (n - 1) - low)

        return Percentiles(
            n=n,
            mean=sum(ordered) / n if n else None,
            p50=at(0.5, 1),
            p95=at(0.95, 20),
            p99=at(0.99, 100),
            max=ordered[-1] if n else None,
        )


@dataclass(frozen=True)
class Stats:
    """Times of one request, in seconds, measured at the engine."""

    queue_s: float
    """From the call to the first computation for this request."""
    ttft_s: float | None
    """From the call to the first token; None if there is none."""
    prefill_s: float | None
    """Computing the prompt: ttft_s - queue_s."""
    decode_s: float | None
    """From the first token to the last one."""
    total_s: float
    prefill_tps: float | None
    """Tokens of the prompt that were computed (not cached), per second of prefill_s."""
    decode_tps: float | None
    """Tokens after the first one, per second of decode_s."""
    itl_ms: Percentiles
    """Gaps between tokens, in milliseconds."""


@dataclass(frozen=True)
class Completion:
    """An answer."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_match: str | None
    """The stop string, or the text of the end token, that ended it. Not part of `text`."""
    logprobs: list[TokenLogprobs] | None
    prompt_logprobs: list[TokenLogprobs | None] | None
    """One for each token of the prompt; None for the first."""
    usage: Usage
    stats: Stats
    seed: int
    """The seed that was used: given again with the same request, it gives the same answer."""


@dataclass(frozen=True)
class Chunk:
    """New text of a streamed answer. Joined, the chunks' texts are `Completion.text`."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None = None
    """Only on the last chunk."""
    completion: Completion | None = None
    """Only on the last chunk."""


@dataclass(frozen=True)
class ModelInfo:
    """What was loaded, and how it runs."""

    name: str
    path: str
    architecture: str
    parameters: int
    active_parameters: int
    """Those that one token is multiplied by: of a mixture of experts only the chosen ones."""
    quantization: str
    weight_bytes: int
    """Bytes of the weights in memory."""
    layers: int
    vocab_size: int
    context_length: int
    chat_template: bool
    """Whether there is a chat template."""
    kv_cache_dtype: str
    kv_cache_bytes: int
    """The most that keys and values may take."""
    device: str
    """"cpu" or "cuda:0"."""
    gpu_layers: int
    """Layers on the CUDA device."""
    device_because: str
    """Why it is the CPU, if that was not asked for."""
    isa: str
    """The kernel set in use, or the architecture of the CUDA device."""
    threads: int
    notes: Sequence[str]
    """What was lowered to fit into memory, what will be slow, weights that could not be kept on
    disk, what its files ask for in vain."""
    load_s: float
    defaults: Mapping[str, tuple[object, str]]
    """Sampling fields that a request leaves open: the value, and where it comes from."""
