"""Generating: text and ids, stops, samples, probabilities, streams, cancelling, threads."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrule import LLM, Completion, InvalidParameterError, SamplingParams, Stream

STORY = "Once upon a time"
ASK = [{"role": "user", "content": "Tell me a story about a fox and a lantern."}]


def same(a: Completion, b: Completion) -> bool:
    """Equal but for the times, and for what was cached."""
    return (a.text, a.token_ids, a.finish_reason, a.stop_match, a.logprobs, a.seed) == (
        b.text,
        b.token_ids,
        b.finish_reason,
        b.stop_match,
        b.logprobs,
        b.seed,
    )


def test_prompts_as_text_ids_and_arrays(llm: LLM) -> None:
    ids = llm.tokenize(STORY, add_special=True)
    params = SamplingParams(max_tokens=12, temperature=0)
    want = llm.generate(STORY, params)
    assert want.usage.prompt_tokens == len(ids)
    assert want.usage.completion_tokens == len(want.token_ids) == 12
    assert want.finish_reason == "length"
    for prompt in (ids, np.array(ids), np.array(ids, np.uint16)):
        assert llm.generate(prompt, params).token_ids == want.token_ids
    batch = llm.generate([STORY, ids, np.array(ids, np.int32)], params)
    assert [answer.token_ids for answer in batch] == [want.token_ids] * 3
    assert llm.generate(np.array([ids, ids]), params)[1].token_ids == want.token_ids
    assert llm.generate([], params) == []


def test_fields_win_over_params(llm: LLM) -> None:
    params = SamplingParams(max_tokens=9, temperature=0)
    assert llm.generate(STORY, params, max_tokens=2).usage.completion_tokens == 2
    with pytest.raises(TypeError, match="max_token"):
        llm.generate(STORY, max_token=2)


def test_defaults_come_from_the_model(llm: LLM) -> None:
    assert llm.info.defaults["temperature"] == (0.7, "generation_config.json")
    assert llm.info.defaults["max_tokens"] == (256, "generation_config.json")
    assert llm.info.defaults["min_p"] == (0.0, "built in")


def test_seeds_repeat(llm: LLM) -> None:
    first = llm.generate(STORY, max_tokens=20, seed=7)
    assert same(first, llm.generate(STORY, max_tokens=20, seed=7))
    other = [llm.generate(STORY, max_tokens=20, seed=seed).text for seed in range(8)]
    assert len(set(other)) > 1
    drawn = llm.generate(STORY, max_tokens=20)
    assert same(drawn, llm.generate(STORY, max_tokens=20, seed=drawn.seed))


def test_a_script_repeats() -> None:
    def script() -> list[str]:
        with LLM("tales-1m", seed=3, progress=False) as llm:
            return [llm.generate(STORY, max_tokens=10).text for _ in range(3)]

    first = script()
    assert first == script()
    assert len(set(first)) > 1


def test_samples(llm: LLM) -> None:
    answers = llm.generate(STORY, n=3, seed=5, max_tokens=8, temperature=1.5)
    assert [answer.seed for answer in answers] == [5, 6, 7]
    again = llm.generate(STORY, seed=6, max_tokens=8, temperature=1.5)
    assert same(answers[1], again)
    nested = llm.generate([STORY, "The"], n=2, max_tokens=2)
    assert [len(answers) for answers in nested] == [2, 2]


def test_batch_threads_and_cache_do_not_matter() -> None:
    params = SamplingParams(max_tokens=24, seed=11, temperature=0.9, logprobs=2)
    prompts = [STORY, "The fox " * 40, "A", STORY + ", a girl called Mia lived"]
    answers = []
    for threads, batch, cache in [(1, 1, False), (2, 4, True), (3, 2, True)]:
        with LLM(
            "tales-4m",
            quantization="int4",
            threads=threads,
            max_batch=batch,
            prefix_cache=cache,
            progress=False,
        ) as llm:
            answers.append(llm.generate(prompts, params))
            answers.append([llm.generate(prompt, params) for prompt in prompts])
    for other in answers[1:]:
        assert all(same(a, b) for a, b in zip(answers[0], other, strict=True))


def test_a_long_list_is_fed_through_a_short_queue() -> None:
    with LLM("tales-1m", max_batch=2, max_queue=1, progress=False) as llm:
        answers = llm.generate([f"{i}" for i in range(20)], max_tokens=1, temperature=0)
        assert [a.usage.completion_tokens for a in answers] == [1] * 20
        for i in (0, 7, 19):
            assert (
                answers[i].token_ids == llm.generate(f"{i}", max_tokens=1, temperature=0).token_ids
            )


def test_prefix_cache_is_counted() -> None:
    with LLM("tales-1m", progress=False) as llm:
        prompt = llm.tokenize("The fox ran. " * 40)
        assert len(prompt) > 128
        assert llm.generate(prompt, max_tokens=1).usage.cached_tokens == 0
        assert llm.generate(prompt, max_tokens=1).usage.cached_tokens >= 128


def test_stop_strings(llm: LLM) -> None:
    whole = llm.generate(STORY, max_tokens=60, temperature=0).text
    stop = whole[10:16]
    cut = whole[: whole.index(stop)]
    answer = llm.generate(STORY, max_tokens=60, temperature=0, stop=["never there", stop])
    assert (answer.text, answer.finish_reason, answer.stop_match) == (cut, "stop", stop)
    assert llm.generate(STORY, max_tokens=60, temperature=0, stop=stop).text == cut
    with llm.stream(STORY, max_tokens=60, temperature=0, stop=stop) as stream:
        assert "".join(chunk.text for chunk in stream) == cut


@settings(max_examples=25)
@given(st.integers(0, 120), st.integers(1, 9), st.integers(0, 3))
def test_any_stop_string(llm: LLM, start: int, length: int, seed: int) -> None:
    """Streamed or not, the answer ends before the first stop string."""
    params = SamplingParams(max_tokens=40, seed=seed)
    whole = llm.generate(STORY, params).text
    stop = whole[start : start + length] or "\n\n\n"
    cut = whole.split(stop)[0]
    stream = llm.stream(STORY, params, stop=stop)
    assert "".join(chunk.text for chunk in stream) == cut
    assert stream.completion is not None
    assert stream.completion.text == cut
    assert stream.completion.stop_match == (stop if stop in whole else None)


def test_stop_ids(llm: LLM) -> None:
    whole = llm.generate(STORY, max_tokens=20, temperature=0)
    end = whole.token_ids[6]
    first = whole.token_ids.index(end)
    answer = llm.generate(STORY, max_tokens=20, temperature=0, stop_token_ids=[end])
    assert answer.finish_reason == "stop"
    assert answer.token_ids == whole.token_ids[: first + 1]
    assert whole.text.startswith(answer.text)


def test_min_tokens_and_eos(llm: LLM) -> None:
    short = llm.chat([{"role": "user", "content": "What is 2 + 3?"}], temperature=0)
    assert short.finish_reason == "stop"
    assert len(short.token_ids) < 12
    longer = llm.chat([{"role": "user", "content": "What is 2 + 3?"}], temperature=0, min_tokens=30)
    assert len(longer.token_ids) >= 30
    ids = llm.chat(
        [{"role": "user", "content": "What is 2 + 3?"}],
        temperature=0,
        ignore_eos=True,
        max_tokens=40,
    ).token_ids
    assert len(ids) == 40
    assert ids[: len(short.token_ids)] == short.token_ids


def test_logit_bias_and_penalties(llm: LLM) -> None:
    assert llm.generate(STORY, max_tokens=3, logit_bias={700: 1000.0}).token_ids == [700] * 3
    answer = llm.generate(
        STORY, max_tokens=3, temperature=0, logit_bias={700: 1000.0}, frequency_penalty=2.0
    )
    assert answer.token_ids[0] == 700
    plain = llm.generate(STORY, max_tokens=40, temperature=0).token_ids
    hard = llm.generate(STORY, max_tokens=40, temperature=0, repetition_penalty=5.0).token_ids
    assert len(set(hard)) > len(set(plain))


@pytest.mark.parametrize(
    "fields", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 0}]
)
def test_settings_that_leave_one_token(llm: LLM, fields: dict[str, float]) -> None:
    want = llm.generate(STORY, max_tokens=12, temperature=0).token_ids
    given = {"temperature": 1.0, **fields}
    assert llm.generate(STORY, max_tokens=12, seed=1, **given).token_ids == want


def test_logprobs(llm: LLM) -> None:
    answer = llm.generate(STORY, max_tokens=6, temperature=0, logprobs=3)
    assert answer.logprobs is not None
    assert [entry.token.token_id for entry in answer.logprobs] == answer.token_ids
    for entry in answer.logprobs:
        assert entry.token.rank == 1
        assert entry.top[0] == entry.token
        assert len(entry.top) == 3
        falling = [item.logprob for item in entry.top]
        assert falling == sorted(falling, reverse=True)
    assert llm.generate(STORY, max_tokens=2).logprobs is None


def test_logprobs_are_those_of_the_logits(llm: LLM) -> None:
    ids = llm.tokenize(STORY + " there was a fox.", add_special=True)
    logits = llm.logits(ids).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    answer = llm.generate(ids, max_tokens=1, prompt_logprobs=1)
    assert answer.prompt_logprobs is not None
    assert len(answer.prompt_logprobs) == len(ids)
    assert answer.prompt_logprobs[0] is None
    for i, entry in enumerate(answer.prompt_logprobs[1:], 1):
        assert entry is not None
        assert entry.token.token_id == ids[i]
        assert entry.token.logprob == pytest.approx(logprobs[i - 1, ids[i]], abs=1e-5)
        assert entry.token.rank == 1 + int((logits[i - 1] > logits[i - 1, ids[i]]).sum())
        assert entry.top[0].token_id == int(logits[i - 1].argmax())


def test_score(llm: LLM) -> None:
    likely = llm.score((STORY, ", there was a"))
    odd = llm.score((STORY, " lantern lantern"))
    assert likely.logprob > odd.logprob
    assert likely.logprob == pytest.approx(sum(likely.token_logprobs))
    assert not odd.is_greedy
    greedy = llm.generate(STORY, max_tokens=5, temperature=0).token_ids
    start = llm.tokenize(STORY, add_special=True)
    assert llm.score((start, greedy)).is_greedy
    assert llm.score([(STORY, ", there was a"), (start, greedy)])[0] == likely


def test_logits_processors(llm: LLM) -> None:
    seen: list[list[int]] = []

    def only(token: int) -> Callable[[list[int], np.ndarray], np.ndarray | None]:
        def replace(ids: list[int], logits: np.ndarray) -> np.ndarray:
            seen.append(ids)
            out = np.full_like(logits, -np.inf)
            out[token] = 0
            return out

        return replace

    def in_place(ids: list[int], logits: np.ndarray) -> None:
        assert logits.shape == (llm.info.vocab_size,)
        assert logits.dtype == np.float32
        logits[100] += 1000

    start = llm.tokenize(STORY, add_special=True)
    answer = llm.generate(STORY, max_tokens=3, logits_processors=[only(50)])
    assert answer.token_ids == [50] * 3
    assert seen == [start, [*start, 50], [*start, 50, 50]]
    assert llm.generate(STORY, max_tokens=2, logits_processors=[in_place]).token_ids == [100] * 2
    both = llm.generate(STORY, max_tokens=2, logits_processors=[in_place, only(7)])
    assert both.token_ids == [7] * 2


def test_chat(llm: LLM) -> None:
    text = llm.apply_chat_template(ASK)
    assert text == f"<|bos|><|user|>{ASK[0]['content']}<|end|><|assistant|>"
    assert not llm.apply_chat_template(ASK, add_generation_prompt=False).endswith("<|assistant|>")
    answer = llm.chat(ASK, temperature=0, max_tokens=30)
    # BOS stands in the template and is not added a second time.
    ids = llm.tokenize(text, parse_special=True)
    assert answer.usage.prompt_tokens == len(ids)
    assert ids.count(ids[0]) == 1
    assert answer.token_ids == llm.generate(ids, temperature=0, max_tokens=30).token_ids
    assert "fox" in answer.text
    two = llm.chat([ASK, [*ASK, {"role": "assistant", "content": "No."}, *ASK]], max_tokens=2)
    assert two[1].usage.prompt_tokens > two[0].usage.prompt_tokens
    stream = llm.stream_chat(ASK, temperature=0, max_tokens=30)
    assert "".join(chunk.text for chunk in stream) == answer.text


def test_user_text_can_be_told_from_special_tokens(llm: LLM) -> None:
    assert llm.tokenize("<|end|>", parse_special=True) == [5]
    plain = llm.tokenize("<|end|>")
    assert len(plain) > 1
    assert llm.detokenize(plain) == "<|end|>"


@settings(max_examples=200)
@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_text_comes_back(llm: LLM, text: str) -> None:
    ids = llm.tokenize(text)
    assert llm.detokenize(ids) == text
    assert llm.detokenize(np.array(ids, np.int64)) == text


@settings(max_examples=50)
@given(st.lists(st.integers(0, 2047), min_size=1, max_size=30), st.integers(0, 1000))
def test_streams_of_any_ids(llm: LLM, forced: list[int], seed: int) -> None:
    """Whatever ids come, also broken UTF-8: joined chunks are the text, whole characters each."""
    left = iter(forced)

    def force(ids: list[int], logits: np.ndarray) -> None:
        logits[:] = -np.inf
        logits[next(left)] = 0

    stream = llm.stream(
        STORY,
        max_tokens=len(forced),
        ignore_eos=True,
        skip_special_tokens=False,
        seed=seed,
        logits_processors=[force],
    )
    text = "".join(chunk.text for chunk in stream)
    assert stream.completion is not None
    assert stream.completion.token_ids == forced
    assert text == stream.completion.text == llm.detokenize(forced)


def test_stream_chunks(llm: LLM) -> None:
    whole = llm.generate(STORY, max_tokens=20, temperature=0, logprobs=1)
    stream = llm.stream(STORY, max_tokens=20, temperature=0, logprobs=1)
    chunks = list(stream)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [i for chunk in chunks for i in chunk.token_ids] == whole.token_ids
    assert [e for chunk in chunks for e in chunk.logprobs or ()] == whole.logprobs
    assert all(chunk.completion is None for chunk in chunks[:-1])
    assert chunks[-1].completion is stream.completion
    assert chunks[-1].finish_reason == "length"
    assert list(stream) == []


def test_stats(llm: LLM) -> None:
    stats = llm.generate(STORY, max_tokens=30, ignore_eos=True).stats
    assert stats.itl_ms.n == 29
    assert stats.itl_ms.p95 is not None
    assert stats.itl_ms.p99 is None
    assert stats.ttft_s is not None
    assert stats.decode_s is not None
    assert 0 <= stats.queue_s <= stats.ttft_s <= stats.total_s
    assert stats.ttft_s + stats.decode_s <= stats.total_s + 1e-9  # sums of seconds are rounded
    assert stats.itl_ms.max is not None
    assert stats.itl_ms.max >= stats.itl_ms.p95 >= (stats.itl_ms.p50 or 0) > 0


# Cancelling. How soon is bounded by what was computed, not by a clock.


def test_closing_a_stream_cancels(llm: LLM) -> None:
    stream = llm.stream(STORY, max_tokens=900, ignore_eos=True)
    text = next(stream).text + next(stream).text
    stream.close()
    done = stream.completion
    assert done is not None
    assert done.finish_reason == "cancelled"
    assert done.text.startswith(text)
    assert done.usage.completion_tokens < 900
    assert list(stream) == []
    stream.close()


def test_a_dropped_stream_cancels() -> None:
    with LLM("tales-4m", max_batch=1, max_queue=1, progress=False) as llm:

        def first(stream: Stream) -> str:
            return next(stream).text

        # Each would fill the only place for a long time if the one before still ran.
        for _ in range(40):
            first(llm.stream(STORY, max_tokens=1000, ignore_eos=True))
            gc.collect()
        for chunk in llm.stream(STORY, max_tokens=1000, ignore_eos=True):
            assert chunk.token_ids
            break


def test_cancel_in_the_prompt(llm: LLM) -> None:
    request = llm.submit([9] * 900, max_tokens=100, ignore_eos=True)
    request.cancel()
    done = request.result()
    assert request.done()
    assert done.finish_reason == "cancelled"
    assert done.usage.completion_tokens < 100


def test_result_with_a_timeout(llm: LLM) -> None:
    request = llm.submit([9] * 800, max_tokens=200, ignore_eos=True)
    with pytest.raises(TimeoutError):
        request.result(timeout=0)
    request.cancel()
    assert request.result(timeout=60).finish_reason == "cancelled"
    assert request.result() is request.result(timeout=0)


def test_close_ends_what_runs() -> None:
    llm = LLM("tales-4m", progress=False)
    requests = [llm.submit(STORY, max_tokens=900, ignore_eos=True) for _ in range(10)]
    next(iter(llm.stream(STORY, ignore_eos=True)))
    llm.close()
    llm.close()
    assert {request.result().finish_reason for request in requests} == {"cancelled"}


def test_many_threads(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=16, seed=seed) for seed in range(24)]
    want = [llm.generate(STORY, p) for p in params]
    barrier = threading.Barrier(8)

    def work(p: SamplingParams) -> Completion:
        if p.seed is not None and p.seed < 8:
            barrier.wait(timeout=60)
        return llm.generate(STORY, p)

    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(work, params))
    assert all(same(a, b) for a, b in zip(want, got, strict=True))


def test_streams_side_by_side(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=12, seed=seed) for seed in range(3)]
    want = [llm.generate(STORY, p).text for p in params]
    streams = [llm.stream(STORY, p) for p in params]
    texts = [""] * 3
    for chunks in itertools.zip_longest(*streams):
        for i, chunk in enumerate(chunks):
            texts[i] += chunk.text if chunk else ""
    assert texts == want


def test_a_template_is_told_tools_and_variables() -> None:
    source = "{{ tools | length if tools else 'none' }} {{ enable_thinking | default('?') }}"
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with LLM("tales-1m", chat_template=source, progress=False) as llm:
        assert llm.apply_chat_template(ASK) == "none ?"
        told = {"tools": [tool], "chat_template_kwargs": {"enable_thinking": False}}
        assert llm.apply_chat_template(ASK, **told) == "1 False"
        plain = llm.generate("1 False", max_tokens=4, temperature=0)
        assert llm.chat(ASK, max_tokens=4, temperature=0, **told).text == plain.text
        streamed = llm.stream_chat(ASK, max_tokens=4, temperature=0, **told)
        assert "".join(chunk.text for chunk in streamed) == plain.text
        with pytest.raises(TypeError, match="wrong"):
            llm.chat(ASK, wrong=1)
        with pytest.raises(InvalidParameterError, match="tools"):
            llm.chat(ASK, tools=[{"x": object()}])
