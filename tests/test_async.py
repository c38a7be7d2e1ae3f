"""The asyncio face: same answers, cancelling, and an event loop that stays free."""

from __future__ import annotations

import asyncio

import pytest

from ferrule import LLM, AsyncStream, ContextLengthError, SamplingParams

STORY = "Once upon a time"
ASK = [{"role": "user", "content": "Hello!"}]


async def test_same_answers(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, seed=4)
    want = llm.generate([STORY, "The"], params, n=2)
    got = await llm.agenerate([STORY, "The"], params, n=2)
    texts = [[answer.text for answer in answers] for answers in want]
    assert [[answer.text for answer in answers] for answers in got] == texts
    assert (await llm.agenerate(STORY, params)).text == want[0][0].text
    assert (await llm.achat(ASK, params)).text == llm.chat(ASK, params).text


async def test_streams(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, seed=4)
    want = llm.generate(STORY, params)
    stream = llm.astream(STORY, params)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.text for chunk in chunks) == want.text
    assert chunks[-1].completion is stream.completion
    assert stream.completion is not None
    assert stream.completion.token_ids == want.token_ids
    chat = [chunk.text async for chunk in llm.astream_chat(ASK, params)]
    assert "".join(chat) == llm.chat(ASK, params).text


async def test_many_at_once(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=10, seed=seed) for seed in range(40)]
    want = [answer.text for answer in (llm.generate(STORY, p) for p in params)]
    got = await asyncio.gather(*(llm.agenerate(STORY, p) for p in params))
    assert [answer.text for answer in got] == want


async def test_cancelled_tasks_cancel_requests() -> None:
    # One place and one in the queue: a request that still ran would raise QueueFullError.
    with LLM("tales-4m", max_batch=1, max_queue=1, progress=False) as llm:
        for _ in range(20):
            task = asyncio.ensure_future(llm.agenerate(STORY, max_tokens=1000, ignore_eos=True))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert (await llm.agenerate(STORY, max_tokens=2)).usage.completion_tokens == 2


async def test_closing_a_stream(llm: LLM) -> None:
    stream = llm.astream(STORY, max_tokens=900, ignore_eos=True)
    assert stream.completion is None
    first = await anext(stream)
    await stream.aclose()
    assert stream.completion is not None
    assert stream.completion.finish_reason == "cancelled"
    assert stream.completion.text.startswith(first.text)
    assert [chunk async for chunk in stream] == []
    async with llm.astream(STORY, max_tokens=900, ignore_eos=True) as stream:
        async for _ in stream:
            break
    assert stream.completion is not None
    unused: AsyncStream = llm.astream(STORY)
    await unused.aclose()


async def test_the_loop_stays_free(llm: LLM) -> None:
    """Other tasks get their turns between tokens: more of them than a blocked loop could give."""
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.ensure_future(count())
    answer = await llm.agenerate(STORY, max_tokens=50, ignore_eos=True)
    other.cancel()
    assert answer.usage.completion_tokens == 50
    assert turns > 10


async def test_errors(llm: LLM) -> None:
    with pytest.raises(ContextLengthError):
        await llm.agenerate(STORY, max_tokens=100_000)
    with pytest.raises(ContextLengthError):
        async for _ in llm.astream(STORY, max_tokens=100_000):
            pass


def test_a_closed_loop_is_no_trouble(llm: LLM) -> None:
    async def leave() -> AsyncStream:
        stream = llm.astream(STORY, max_tokens=900, ignore_eos=True)
        await anext(stream)
        return stream

    stream = asyncio.run(leave())
    assert llm.generate(STORY, max_tokens=4).usage.completion_tokens == 4
    del stream
