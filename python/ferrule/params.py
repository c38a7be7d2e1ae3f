"""Sampling parameters, and their defaults from a model's generation_config.json.

Ranges are checked in one place, the Rust core, when a request is submitted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from . import _core
from .errors import ModelFormatError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    LogitsProcessor = Callable[[list[int], NDArray[np.float32]], NDArray[np.float32] | None]
    """f(token_ids, logits): the ids of prompt and answer so far, and logits f32 [vocab], to be
    changed in place (give None) or replaced (give the new array). Costs the GIL and a copy of the
    logits for every token."""
else:
    LogitsProcessor = Callable


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop. Each field is also a keyword of `generate`.

    None means: the model's generation_config.json, else the value in the comment, else none.
    """

    max_tokens: int | None = None  # the rest of the context
    temperature: float | None = None  # 1.0; 0 = greedy, ties to the lowest id
    top_p: float | None = None  # 1.0 = off
    top_k: int | None = None  # 0 = off
    min_p: float | None = None  # 0.0 = off
    typical_p: float | None = None  # 1.0 = off
    repetition_penalty: float | None = None  # 1.0 = off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    seed: int | None = None  # from LLM's seed and the request's number; the one used is reported
    logprobs: int | None = None  # None = none; k = of each token, and of the k likeliest
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    logits_processors: Sequence[LogitsProcessor] | None = None


class Fields(TypedDict, total=False):
    """The fields of `SamplingParams` as keywords."""

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    min_tokens: int
    ignore_eos: bool
    seed: int | None
    logprobs: int | None
    prompt_logprobs: int | None
    skip_special_tokens: bool
    logits_processors: Sequence[LogitsProcessor] | None


class ChatFields(Fields, total=False):
    """The fields of `SamplingParams`, and what a chat template may be told beside the messages."""

    tools: Sequence[Mapping[str, Any]]
    chat_template_kwargs: Mapping[str, Any]


BUILT_IN: dict[str, float | int | None] = {
    "max_tokens": None,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
}
"""Values of fields that neither the request nor the model gives."""

_CONFIG_NAMES = {"max_tokens": "max_new_tokens"}
_CONFIG = "generation_config.json"
# What changes an answer and is not honoured, and the values that mean nothing.
_IGNORED: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "bad_words_ids": ([],),
    "sequence_bias": ({}, []),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "forced_decoder_ids": ([],),
    "exponential_decay_length_penalty": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "guidance_scale": (1,),
    "watermarking_config": ({},),
    "dola_layers": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "stop_strings": ([], ""),
    "top_h": (),
}

_GGUF_NAMES = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_p": "top_p",
    "general.sampling.top_k": "top_k",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


class Defaults:
    """What a model says about generating: values for open fields, and its end tokens."""

    def __init__(self, folder: Path) -> None:
        self.sources: dict[str, tuple[object, str]] = {}
        self.notes: list[str] = []
        if folder.is_file():
            # A GGUF file. The core knows its end tokens.
            self.eos: list[int] = []
            self.sources = {field: (value, "built in") for field, value in BUILT_IN.items()}
            for item in json.loads(_core.inspect(folder))["metadata"]:
                field, value = _GGUF_NAMES.get(item["key"]), item["value"]
                if field and isinstance(value, int | float):
                    # Written as f32: the digits that were meant.
                    value = value if isinstance(value, int) else float(f"{value:.7g}")
                    self.sources[field] = (value, item["key"])
            return
        config = _read(folder / _CONFIG)
        for field, value in BUILT_IN.items():
            name = _CONFIG_NAMES.get(field, field)
            found = config.get(name)
            if found is None:
                self.sources[field] = (value, "built in")
                continue
            whole = field in ("max_tokens", "top_k")
            if isinstance(found, bool) or not isinstance(found, int if whole else (int, float)):
                kind = "a whole number" if whole else "a number"
                raise ModelFormatError(
                    f"{folder / _CONFIG}: {name} is {found!r}, expected {kind}",
                    file=str(folder / _CONFIG),
                )
            self.sources[field] = (found, _CONFIG)
        ignored = [
            name
            for name, nothing in _IGNORED.items()
            if config.get(name) is not None and config[name] not in nothing
        ]
        if ignored:
            self.notes.append(f"{_CONFIG}: not honoured: {', '.join(ignored)}")
        # As in transformers, a model that says `"do_sample": false` is greedy unless asked.
        if config.get("do_sample") is False:
            self.sources["temperature"] = (0.0, f"{_CONFIG} (do_sample is false)")
        self.eos = _eos(config, folder / _CONFIG) or _eos_of_model(folder)

    def of_gguf(self) -> list[tuple[str, float]]:
        """What the model itself says, as keys of a GGUF file."""
        said = {
            name: value for name, (value, source) in self.sources.items() if source != "built in"
        }
        found = ((key, said.get(field)) for key, field in _GGUF_NAMES.items())
        return [(key, value) for key, value in found if isinstance(value, int | float)]

    def fill(self, params: SamplingParams) -> dict[str, Any]:
        """The fields of `params`, open ones filled, as keywords for the core's `submit`."""
        out = {field.name: getattr(params, field.name) for field in fields(params)}
        for field, (value, _) in self.sources.items():
            if out[field] is None:
                out[field] = value
        out["logit_bias"] = list((params.logit_bias or {}).items())
        for token, _ in out["logit_bias"]:
            if not hasattr(token, "__index__"):
                raise TypeError(f"logit_bias: found key {token!r}, expected token ids")
        stop = () if params.stop is None else params.stop
        out["stop"] = [stop] if isinstance(stop, str) else list(stop)
        out["stop_token_ids"] = list(params.stop_token_ids or ())
        out["logits_processors"] = list(params.logits_processors or ())
        return out


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError as error:
        raise ModelFormatError(f"{path}: not UTF-8: {error}", file=str(path)) from None
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ModelFormatError(f"{path}: not JSON: {error}", file=str(path)) from None
    if not isinstance(value, dict):
        raise ModelFormatError(
            f"{path}: found {type(value).__name__}, expected a JSON object", file=str(path)
        )
    return value


def _eos(config: dict[str, Any], path: Path) -> list[int]:
    found = config.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    for value in ids:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ModelFormatError(
                f"{path}: eos_token_id is {found!r}, expected a token id or a list of them",
                file=str(path),
            )
    return ids


def _eos_of_model(folder: Path) -> list[int]:
    path = folder / "config.json"
    config = _read(path)
    nested = config.get("text_config")
    return _eos(config, path) or (_eos(nested, path) if isinstance(nested, dict) else [])
