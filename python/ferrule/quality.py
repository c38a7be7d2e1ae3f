"""`evaluate` measures models on a text, `quantize` writes them. Presents; the core computes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from . import _core, arguments, hub
from .cache import cache_dir
from .errors import InvalidParameterError
from .llm import Quantization
from .params import Defaults
from .progress import Steps

# The types of a GGUF file that is written.
GgufType = Literal[
    "q4_k",
    "q4_0",
    "q4_1",
    "iq4_nl",
    "q5_k",
    "q5_0",
    "q5_1",
    "q6_k",
    "q8_0",
    "bf16",
    "f16",
    "f32",
]


class Estimate(NamedTuple):
    """A mean over tokens with the ends of its 95 % confidence interval.

    The interval comes from the spread between contexts (chunks or documents), since tokens of one
    context are not independent; with a single context there is none.
    """

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Distance:
    """How far a model's predictions are from a reference's."""

    reference: str
    quantization: str
    """Of the reference."""
    bits_per_weight: float
    """Of the reference."""
    perplexity: Estimate
    """Of the reference."""
    perplexity_ratio: Estimate
    """The model's over the reference's."""
    kl: Estimate
    """Kullback-Leibler divergence from the reference, in nats a token."""
    kl_quantiles: Mapping[float, float]
    """Quantile -> divergence; 1.0 is the largest of all tokens."""
    same_top: Estimate
    """How often the likeliest token is the reference's."""
    flips: Estimate
    """How often exactly one of the two has the text's token as the likeliest."""
    rms_dp: Estimate
    """Root of the mean square of the difference of the probability of the text's token."""


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text."""

    model: str
    tokens: int
    """Tokens that were predicted."""
    contexts: int
    """Chunks or documents that they stand in."""
    context: int
    """The most tokens of a context."""
    quantization: str
    bits_per_weight: float
    """Bytes of the packed matrices in memory, over parameters."""
    isa: str
    perplexity: Estimate
    accuracy: Estimate
    """How often the text's token is the likeliest."""
    distance: Distance | None
    """From the reference, if there is one."""


def evaluate(
    model: str | os.PathLike[str],
    text: str | Sequence[str],
    *,
    reference: str | os.PathLike[str] | None = None,
    quantization: Quantization = "auto",
    reference_quantization: Quantization = "none",
    context: int | None = None,
    chunks: int | None = None,
    kv_cache_dtype: Literal["f32", "f16", "int8"] = "f16",
    threads: int | None = None,
    family: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    offline: bool = False,
    weight_cache: bool | str | os.PathLike[str] = True,
    progress: bool | Callable[[str, int, int], object] = True,
) -> Evaluation:
    """Measure how well a model predicts a text, and how far it is from a reference.

    - text: one text is cut as llama.cpp does: chunks of `context` tokens (512, or less if the
      model has less), each begun with BOS if the tokenizer has one, and the tokens of the second
      half of each counted. A list of texts is a list of documents: each one context, cut at
      `context` (the model's), all tokens but the first counted.
    - reference: another model, or the same; loaded as `reference_quantization` says ("none": the
      stored weights in f32 arithmetic). Its tokenizer and vocabulary must be the model's.
    - chunks: at most so many chunks or documents.
    - progress: True shows a line on a terminal; a function gets what is done, how far, of how much.

    Ctrl-C ends it. Both models are in memory at once.
    """
    name, other = os.fspath(model), reference and os.fspath(reference)
    resolve = [hub.resolve(m, revision=revision, offline=offline) for m in (name, other) if m]
    with Steps(progress) as show:
        found = _core.evaluate(
            str(resolve[0]),
            arguments.texts("text", text),
            documents=not isinstance(text, str),
            reference=str(resolve[1]) if other else None,
            quantization=quantization,
            reference_quantization=reference_quantization,
            context=context,
            limit=chunks,
            kv_cache_dtype=kv_cache_dtype,
            threads=threads,
            cache_dir=cache_dir(weight_cache),
            family=arguments.family(family),
            progress=show,
        )
    distance = found.pop("distance", None)
    return Evaluation(
        model=name,
        **_estimates(found),
        distance=None if distance is None else _distance(str(other), distance),
    )


@dataclass(frozen=True)
class Quantized:
    """What `quantize` wrote."""

    path: str
    bytes: int
    """Of the weights file."""
    bits_per_weight: float
    forms: Mapping[str, int]
    """Bytes of matrices in each form."""
    quantized_before: str | None
    """How the source was quantized: its errors stay, and new ones are added."""


def quantize(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: Quantization | GgufType | None = None,
    bits: float | None = None,
    calibrate: str | Sequence[str] | None = None,
    chunks: int | None = None,
    rules: Mapping[str, Quantization | GgufType] | None = None,
    threads: int | None = None,
    family: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    offline: bool = False,
    weight_cache: bool | str | os.PathLike[str] = True,
    progress: bool | Callable[[str, int, int], object] = True,
) -> Quantized:
    """Write a model with its weights quantized and packed into the new folder `out`.

    `LLM(out)` maps it. Without `calibrate` its results are those of
    `LLM(model, quantization=format)`, bit for bit.

    - format: "int4" (4.5 bits a weight, the default), "int5" (5.375), "int6" (6.625), "int8"
      (8.125), "none" (as stored, packed).
    - bits: with a calibration, so many bits a weight at most: matrices are int4, and those where
      it lessens the divergence from the unquantized model most get int5, int6 or int8.
    - calibrate: a text like those that the model will see, or a list of documents. The
      unquantized model reads it (at most `chunks` contexts of 512 tokens), and weights are rounded
      for the least error of the products with what they met there.
    - rules: pattern -> format for weights whose name in the checkpoint it fits; `*` stands for any
      text, and the first that fits decides.

    An `out` that ends in .gguf becomes a GGUF file for other programs instead, with the model's
    tokenizer and template in it; `format` and those of `rules` are then types of ggml: "f32",
    "f16", "bf16", "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "iq4_nl". There
    is no calibration. A model that GGUF has no words for is an error.

    Ctrl-C ends it and leaves nothing; `out` is there only when it is whole.
    """
    folder = hub.resolve(model, revision=revision, offline=offline)
    if os.fspath(out).lower().endswith(".gguf"):
        if calibrate is not None or bits is not None:
            name = "bits" if calibrate is None else "calibrate"
            raise InvalidParameterError(f"{name}: GGUF files are made without calibration")
        with Steps(progress) as show:
            found = _core.export(
                folder,
                out,
                format=format or "q4_k",
                rules=list((rules or {}).items()),
                sampling=Defaults(folder).of_gguf(),
                threads=threads,
                family=arguments.family(family),
                progress=show,
            )
        return Quantized(path=os.fspath(out), **found)
    texts = arguments.texts("calibrate", () if calibrate is None else calibrate)
    with Steps(progress) as show:
        found = _core.quantize(
            folder,
            out,
            format=format or "int4",
            bits=bits,
            rules=list((rules or {}).items()),
            texts=texts,
            documents=not isinstance(calibrate, str),
            limit=chunks,
            threads=threads,
            cache_dir=cache_dir(weight_cache),
            family=arguments.family(family),
            progress=show,
        )
    return Quantized(path=os.fspath(out), **found)


def _distance(name: str, found: dict[str, Any]) -> Distance:
    quantiles = dict(found.pop("kl_quantiles"))
    return Distance(reference=name, kl_quantiles=quantiles, **_estimates(found))


def _estimates(found: dict[str, Any]) -> dict[str, Any]:
    return {k: Estimate(*v) if isinstance(v, tuple) else v for k, v in found.items()}
