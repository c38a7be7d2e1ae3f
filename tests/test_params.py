"""Sampling parameters: any values give an answer or a named error, never a crash."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from ferrule import LLM, InvalidParameterError, SamplingParams
from ferrule.params import Fields
from ferrule.results import Percentiles

floats = st.floats(allow_nan=True, allow_infinity=True)
usual = st.floats(0, 2)
FIELDS = {
    "temperature": floats | usual,
    "top_p": floats | st.floats(0.01, 1),
    "top_k": st.integers(-2, 5000),
    "min_p": floats | st.floats(0, 1),
    "typical_p": floats | st.floats(0.01, 1),
    "repetition_penalty": floats | st.floats(0.1, 3),
    "presence_penalty": floats | usual,
    "frequency_penalty": floats | usual,
    "logit_bias": st.dictionaries(st.integers(0, 3000), floats | usual, max_size=4),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3),
    "stop_token_ids": st.lists(st.integers(0, 3000), max_size=3),
    "min_tokens": st.integers(-1, 12),
    "ignore_eos": st.booleans(),
    "seed": st.integers(-1, 1 << 65),
    "logprobs": st.integers(-1, 30),
    "prompt_logprobs": st.integers(-1, 30),
    "skip_special_tokens": st.booleans(),
}


def test_every_field_is_a_keyword() -> None:
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    assert names == list(Fields.__annotations__)


@settings(max_examples=300)
@given(st.fixed_dictionaries({}, optional=FIELDS))
def test_any_values(llm: LLM, fields: dict[str, Any]) -> None:
    try:
        answer = llm.generate("Once upon a time", SamplingParams(max_tokens=8, **fields))
    except InvalidParameterError:
        return
    assert answer.usage.completion_tokens == len(answer.token_ids) <= 8
    assert answer.finish_reason in ("stop", "length")
    assert (answer.logprobs is not None) == ("logprobs" in fields)
    again = llm.generate("Once upon a time", SamplingParams(max_tokens=8, **fields), n=2)
    if "seed" in fields:
        assert again[0].token_ids == answer.token_ids


@given(st.lists(st.floats(0, 1e6), max_size=300))
def test_percentiles(values: list[float]) -> None:
    p = Percentiles.of(values)
    assert p.n == len(values)
    assert (p.p50 is None) == (not values)
    assert (p.p95 is None) == (len(values) < 20)
    assert (p.p99 is None) == (len(values) < 100)
    known = [v for v in (p.p50, p.p95, p.p99, p.max) if v is not None]
    assert known == sorted(known)
    if values:
        assert p.max == max(values)
