"""The embedded models against reference outputs: logits, and 64 greedy ids for eight prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ferrule import LLM

GOLDEN: list[dict[str, Any]] = json.loads((Path(__file__).parent / "golden/demo.json").read_text())


def test_ids_of_the_prompts(exact: LLM) -> None:
    for golden in GOLDEN:
        ids = exact.tokenize(golden["prompt"], parse_special=True)
        assert ids == golden["input_ids"]
        # The prompts begin with BOS; asking for it does not double it.
        assert exact.tokenize(golden["prompt"], add_special=True, parse_special=True) == ids


def test_logits(exact: LLM) -> None:
    checked = 0
    for golden in GOLDEN:
        want = golden[exact.info.name].get("logits")
        if want is not None:
            got = exact.logits(golden["input_ids"])
            assert got.dtype == np.float32
            assert got.shape == (len(golden["input_ids"]), exact.info.vocab_size)
            np.testing.assert_allclose(got[-1], np.array(want, np.float32), atol=3e-4, rtol=0)
            checked += 1
    assert checked == 2


def test_greedy_ids_in_one_batch(exact: LLM) -> None:
    prompts = [golden["input_ids"] for golden in GOLDEN]
    answers = exact.generate(prompts, max_tokens=64, temperature=0, ignore_eos=True)
    for golden, answer in zip(GOLDEN, answers, strict=True):
        assert answer.token_ids == golden[exact.info.name]["greedy_ids"]


@pytest.mark.parametrize(
    ("kept", "agreement"), [("int4", 0.85), ("int5", 0.88), ("int6", 0.91), ("int8", 0.95)]
)
def test_quantized_models_agree_with_the_reference(kept: Any, agreement: float) -> None:
    """Not bit for bit: the likeliest next token of most positions stays the likeliest."""
    with LLM("tales-4m", quantization=kept, progress=False) as llm:
        same = total = 0
        for golden in GOLDEN:
            answer = golden["tales-4m"]["greedy_ids"]
            logits = llm.logits(golden["input_ids"] + answer[:-1])
            picks = logits[len(golden["input_ids"]) - 1 :].argmax(axis=1)
            same += int((picks == answer).sum())
            total += len(answer)
    assert same / total > agreement
