"""One model, or several, used from many threads at the same time: results are those of one thread.

Also run in a Python without the GIL (tools/free_threaded.sh), where threads run side by side.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ferrule import LLM, EngineClosedError, SamplingParams

PROMPT = "Once upon a time"
THREADS = 8


def at_once(work: Callable[[int], Any]) -> list[Any]:
    """What `work` gives for 0 to 7, all of them started together."""
    barrier = threading.Barrier(THREADS)

    def run(i: int) -> Any:
        barrier.wait(timeout=60)
        return work(i)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


def test_calls_of_every_kind_at_once(llm: LLM) -> None:
    def work(i: int) -> Any:
        params = SamplingParams(max_tokens=12, seed=i, temperature=0.8)
        match i % 4:
            case 0:
                return llm.generate([PROMPT, f"{PROMPT} {i}"], params)[1].token_ids
            case 1:
                return "".join(chunk.text for chunk in llm.stream(PROMPT, params))
            case 2:
                ids = llm.tokenize(PROMPT * 20)
                return llm.detokenize(ids), llm.logits(ids).tobytes()
            case _:
                return llm.chat([{"role": "user", "content": f"{i}"}], params).text

    alone = [work(i) for i in range(THREADS)]
    for _ in range(3):
        assert at_once(work) == alone


def test_models_loaded_and_closed_at_once() -> None:
    def work(_: int) -> str:
        with LLM("tales-1m", quantization="int8", progress=False) as model:
            return model.generate(PROMPT, max_tokens=8, temperature=0).text

    assert len(set(at_once(work))) == 1


def test_a_model_closed_while_others_use_it() -> None:
    """Who comes too late gets an error, never a crash or a wait without end."""
    model = LLM("tales-1m", progress=False)
    want = model.generate(PROMPT, max_tokens=200, temperature=0, ignore_eos=True).text

    def work(i: int) -> str:
        if i == 0:
            model.close()
            return "closed"
        try:
            done = model.generate(PROMPT, max_tokens=200, temperature=0, ignore_eos=True)
        except EngineClosedError:
            return "too late"
        return "whole" if done.text == want else done.finish_reason

    assert set(at_once(work)) <= {"closed", "whole", "cancelled", "too late"}


@pytest.mark.skipif(
    not hasattr(sys, "_is_gil_enabled") or sys._is_gil_enabled(), reason="this Python has the GIL"
)
def test_the_gil_stays_off() -> None:
    assert not sys._is_gil_enabled()
