"""A running request, and its answer as a stream. Never starts one: `LLM` does."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING

from . import _core
from .errors import FerruleError
from .results import Chunk, Completion, Logprob, Percentiles, Stats, TokenLogprobs, Usage

if TYPE_CHECKING:
    import asyncio

    from typing_extensions import Self

_log = logging.getLogger("ferrule")


class Request:
    """A submitted request. Dropping the last reference cancels it."""

    def __init__(self, core: _core.Request, seed: int, ready: asyncio.Event | None = None) -> None:
        self.seed = seed
        self._core = core
        self._ready = ready  # set from the engine's thread when there is news
        self._text: list[str] = []
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprobs] | None = None
        self._completion: Completion | None = None
        self._lock = threading.Lock()

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the answer. Raises the request's error, or `TimeoutError` after `timeout` s."""
        end = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            while self._completion is None:
                left = None if end is None else max(0.0, end - time.monotonic())
                if self._take(left) is None and end is not None and time.monotonic() >= end:
                    raise TimeoutError(f"no answer after {timeout} s")
            return self._completion

    def cancel(self) -> None:
        """End the request soon: within one layer of the model, in the prompt too.

        `result()` then gives what there is, with `finish_reason` "cancelled".
        """
        self._core.cancel()

    def done(self) -> bool:
        """Whether `result()` would answer at once."""
        return self._completion is not None or self._core.done()

    def _take(self, timeout: float | None) -> Chunk | None:
        """The news since the last call; waits for some, and gives None after `timeout` s."""
        news = self._core.wait(timeout)
        if news is None:
            return None
        logprobs = None
        self._text.append(news.text)
        self._ids += news.token_ids
        if news.logprobs is not None:
            logprobs = [_token_logprobs(entry) for entry in news.logprobs]
            if self._logprobs is None:
                self._logprobs = []
            self._logprobs += logprobs
        if news.done is not None:
            self._completion = self._complete(news.done)
        reason = self._completion.finish_reason if self._completion else None
        return Chunk(news.text, news.token_ids, logprobs, reason, self._completion)

    def _complete(self, done: _core.Done) -> Completion:
        prompt_logprobs = None
        if done.prompt_logprobs is not None:
            prompt_logprobs = [entry and _token_logprobs(entry) for entry in done.prompt_logprobs]
        return Completion(
            text="".join(self._text),
            token_ids=self._ids,
            finish_reason=done.finish_reason,
            stop_match=done.stop_match,
            logprobs=self._logprobs,
            prompt_logprobs=prompt_logprobs,
            usage=Usage(done.prompt_tokens, done.completion_tokens, done.cached_tokens),
            stats=_stats(done),
            seed=self.seed,
        )

    async def _aresult(self) -> Completion:
        while self._completion is None:
            await self._anext()
        return self._completion

    async def _anext(self) -> Chunk:
        assert self._ready is not None
        while True:
            self._ready.clear()
            chunk = self._take(0)
            if chunk is not None:
                return chunk
            await self._ready.wait()


class Stream(Iterator[Chunk]):
    """Chunks of an answer as they come. Closing or dropping it cancels the request."""

    def __init__(self, request: Request) -> None:
        self._request = request

    @property
    def completion(self) -> Completion | None:
        """The whole answer, once the stream has ended or was closed."""
        return self._request._completion

    def __next__(self) -> Chunk:
        if self.completion is not None:
            raise StopIteration
        try:
            chunk = self._request._take(None)
        except BaseException:
            self._request.cancel()
            raise
        assert chunk is not None
        return chunk

    def close(self) -> None:
        """Cancel the request if it still runs, and wait until it has ended."""
        self._request.cancel()
        try:
            self._request.result()
        except FerruleError:  # it ended, with an error that nobody asked for any more
            _log.debug("a closed stream had failed", exc_info=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncStream(AsyncIterator[Chunk]):
    """As `Stream`, for `async for`. Runs on no executor: the engine posts to the event loop."""

    def __init__(self, start: Callable[[], Request]) -> None:
        self._start = start
        self._request: Request | None = None

    @property
    def completion(self) -> Completion | None:
        """The whole answer, once the stream has ended or was closed."""
        return self._request._completion if self._request else None

    async def __anext__(self) -> Chunk:
        if self.completion is not None:
            raise StopAsyncIteration
        if self._request is None:
            self._request = self._start()
        try:
            return await self._request._anext()
        except BaseException:
            self._request.cancel()
            raise

    async def aclose(self) -> None:
        """Cancel the request if it still runs, and wait until it has ended."""
        if self._request is None:
            return
        self._request.cancel()
        try:
            await self._request._aresult()
        except FerruleError:
            _log.debug("a closed stream had failed", exc_info=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def _token_logprobs(entry: _core._TokenLogprobs) -> TokenLogprobs:
    token, top = entry
    return TokenLogprobs(Logprob(*token), tuple(Logprob(*item) for item in top))


def _stats(done: _core.Done) -> Stats:
    times = done.token_times_s
    ttft = times[0] if times else None
    prefill = None if ttft is None else ttft - done.queue_s
    decode = times[-1] - times[0] if times else None
    computed = done.prompt_tokens - done.cached_tokens
    gaps = [1000 * (after - before) for before, after in itertools.pairwise(times)]
    return Stats(
        queue_s=done.queue_s,
        ttft_s=ttft,
        prefill_s=prefill,
        decode_s=decode,
        total_s=done.total_s,
        prefill_tps=computed / prefill if prefill else None,
        decode_tps=(len(times) - 1) / decode if decode else None,
        itl_ms=Percentiles.of(gaps),
    )
