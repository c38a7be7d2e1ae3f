"""Models that several tests share. Loading one takes milliseconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ferrule import LLM


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    """tales-4m in int4."""
    with LLM("tales-4m", quantization="int4", progress=False) as model:
        yield model


@pytest.fixture(scope="session", params=["tales-4m", "tales-1m"])
def exact(request: pytest.FixtureRequest) -> Iterator[LLM]:
    """Each embedded model in f32: stored weights, f32 arithmetic, f32 keys and values."""
    with LLM(request.param, quantization="none", kv_cache_dtype="f32", progress=False) as model:
        yield model
