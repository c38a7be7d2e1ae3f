"""Models that several tests share (loading one takes milliseconds); no property test is timed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from ferrule import LLM

# A slow machine is not a wrong answer.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


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
