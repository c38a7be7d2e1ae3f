"""stories260K, a model somebody else trained: its text, token by token. Needs FERRULE_SHARED."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ferrule import LLM

SHARED = os.environ.get("FERRULE_SHARED")


@pytest.mark.skipif(SHARED is None, reason="FERRULE_SHARED is not set")
def test_it_tells_its_stories() -> None:
    assert SHARED is not None
    folder = Path(SHARED) / "weights/stories260K"
    golden = json.loads((folder / "golden.json").read_text())["golden"]
    assert golden
    with LLM(folder / "hf", quantization="none", kv_cache_dtype="f32", progress=False) as llm:
        prompts = [case["input_ids"] for case in golden]
        answers = llm.generate(prompts, max_tokens=64, temperature=0, ignore_eos=True)
        for case, answer in zip(golden, answers, strict=True):
            assert answer.token_ids == case["generated_ids"], case["prompt"]
