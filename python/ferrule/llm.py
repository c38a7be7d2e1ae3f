"""`LLM`: a loaded model, and the calls on it. Never computes: it names, converts and passes on."""

from __future__ import annotations

import itertools
import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from hashlib import blake2b
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, TypeAlias, overload

from . import _core, arguments, hub, tuning
from .cache import cache_dir, default_cache_dir
from .errors import EngineClosedError, InvalidParameterError
from .params import ChatFields, Defaults, Fields, SamplingParams
from .progress import Bar
from .request import AsyncStream, Request, Stream
from .results import Completion, ModelInfo, Progress, Score

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Self, Unpack

    Ids: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]
    Prompt: TypeAlias = str | list[int] | NDArray[np.integer[Any]]
    Prompts: TypeAlias = list[str] | list[list[int]] | list[NDArray[np.integer[Any]]] | list[Prompt]
    Message: TypeAlias = Mapping[str, Any]
    Chat: TypeAlias = list[Message] | list[dict[str, str]] | list[dict[str, Any]]
    Chats: TypeAlias = list[list[dict[str, str]]] | list[list[dict[str, Any]]] | list[Chat]
    Params: TypeAlias = SamplingParams | None
    Answers: TypeAlias = Completion | list[Completion] | list[list[Completion]]

# How weights are kept: bits a weight, as stored, or what is nearest to the file.
Quantization = Literal["auto", "int4", "int5", "int6", "int8", "none"]

_log = logging.getLogger("ferrule")


class _Job(NamedTuple):
    """A request that is ready to be submitted."""

    ids: list[int]
    fields: dict[str, Any]


class LLM:
    """A model, loaded and ready. Usable from any thread; a context manager; `close()` frees it.

    `model` is a folder, a GGUF file (the first, if it is split), an embedded name ("tales-4m",
    "tales-1m"), a hub repository "org/repo", or a GGUF file in one, "org/repo:Q4_K_M". A path that
    exists wins.

    - device: "cpu"; "cuda" or "cuda:0", which raises `CudaUnavailableError` where there is none;
      "auto" = CUDA if there is a device that runs the model, else the CPU (`info` and one line of
      the log say why). Results have the same bits.
    - gpu_layers: layers on the CUDA device, the last ones and the head, the others on the CPU;
      "auto" = as many as its memory holds (`info.gpu_layers`). A number that it does not hold is
      an `OutOfMemoryError`.
    - quantization: "int4", "int5", "int6", "int8" (4.5, 5.375, 6.625, 8.125 bits a weight);
      "none" = the stored weights with f32 arithmetic; "auto" = the bits in the file, or the nearest
      form that takes next to nothing away (models/README.md).
    - threads: "auto" = what `ferrule tune` found, or what the process may use (affinity, cgroup
      quota, kinds of core).
    - context_length: "auto" = the model's, lowered to what memory holds (`info.notes` tell). A
      number that memory does not hold is an `OutOfMemoryError`, before anything is loaded.
    - kv_cache_dtype: of keys and values, "f32", "f16" or "int8".
    - kv_cache_bytes: the most that they may take; "auto" = half of the memory that the weights
      leave free. No more is taken than max_batch full contexts need.
    - max_batch: sequences computed at once; max_queue: requests that may wait.
    - prefix_cache: keep keys and values of earlier prompts for prompts that begin the same.
    - weight_cache: keep packed weights on disk, so that the next load maps them; True = in
      ~/.cache/ferrule, a path = there, False = no.
    - chat_template: Jinja text instead of the model's own.
    - family: a TOML file that describes an architecture this version does not know.
    - revision, offline: of a hub repository; offline=True uses only what was downloaded before.
    - seed: from it and a request's number come the seeds of requests that give none.
    - progress: True = a bar on a terminal; or a function that is called with a `Progress`.

    Results do not depend on threads, on the batch, or on how a prompt was cut.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "tales-4m",
        *,
        device: str = "cpu",
        gpu_layers: int | Literal["auto"] = "auto",
        quantization: Quantization = "auto",
        threads: int | Literal["auto"] = "auto",
        context_length: int | Literal["auto"] = "auto",
        kv_cache_dtype: Literal["f32", "f16", "int8"] = "f16",
        kv_cache_bytes: int | Literal["auto"] = "auto",
        max_batch: int = 16,
        max_queue: int = 256,
        prefix_cache: bool = True,
        weight_cache: bool | str | os.PathLike[str] = True,
        chat_template: str | None = None,
        family: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        offline: bool = False,
        seed: int = 0,
        progress: bool | Callable[[Progress], object] = True,
    ) -> None:
        began = time.monotonic()
        folder = hub.resolve(model, revision=revision, offline=offline, progress=bool(progress))
        defaults = Defaults(folder)
        with Bar(progress) as report:
            self._core = _core.Engine(
                os.fspath(folder),
                device=device,
                gpu_layers=arguments.auto("gpu_layers", gpu_layers),
                quantization=quantization,
                **_cut(arguments.auto("threads", threads)),
                context_length=arguments.auto("context_length", context_length),
                kv_cache_dtype=kv_cache_dtype,
                kv_cache_bytes=arguments.auto("kv_cache_bytes", kv_cache_bytes),
                max_batch=max_batch,
                max_queue=max_queue,
                prefix_cache=prefix_cache,
                cache_dir=cache_dir(weight_cache),
                chat_template=chat_template,
                family=arguments.family(family),
                eos=defaults.eos,
                progress=report,
            )
        # At exit, too: the engine's thread must not outlive the interpreter.
        self._finalizer = weakref.finalize(self, self._core.close)
        self._defaults = defaults
        self._seed = seed
        self._numbers = itertools.count()
        self._window = max_batch + max(0, min(max_batch, max_queue - 1))
        info = self._core.info
        info["notes"] = defaults.notes + info["notes"]
        self.info = ModelInfo(
            name=os.fspath(model),
            path=str(folder),
            load_s=time.monotonic() - began,
            defaults=defaults.sources,
            **info,
        )
        self.device = self.info.device
        if self.info.device_because:
            _log.info("on the CPU: %s", self.info.device_because)
        _log.info("loaded %s", self.info)
        for note in self.info.notes:
            _log.info("%s: %s", self.info.name, note)

    # Text to text. One prompt gives one answer, a list of prompts a list: one batch, in order.

    @overload
    def generate(
        self, prompts: Prompt, params: Params = None, *, n: None = None, **fields: Unpack[Fields]
    ) -> Completion: ...
    @overload
    def generate(
        self, prompts: Prompts, params: Params = None, *, n: None = None, **fields: Unpack[Fields]
    ) -> list[Completion]: ...
    @overload
    def generate(
        self, prompts: Prompt, params: Params = None, *, n: int, **fields: Unpack[Fields]
    ) -> list[Completion]: ...
    @overload
    def generate(
        self, prompts: Prompts, params: Params = None, *, n: int, **fields: Unpack[Fields]
    ) -> list[list[Completion]]: ...
    def generate(
        self,
        prompts: Prompt | Prompts,
        params: Params = None,
        *,
        n: int | None = None,
        **fields: Unpack[Fields],
    ) -> Answers:
        """Continue a prompt, or each prompt of a list: text, or token ids (list or array).

        Text gets what the tokenizer puts in front (BOS), once; special tokens written in it count
        as such. Ids are taken as they are. With n, n samples of each prompt, as a list; sample i
        of a given seed uses seed + i.
        """
        single, prompts_ = arguments.prompt_list(prompts)
        ids = [self._ids("prompt", prompt) for prompt in prompts_]
        return _shaped(self._all(self._jobs(ids, params, n, fields)), n, single)

    @overload
    async def agenerate(
        self, prompts: Prompt, params: Params = None, *, n: None = None, **fields: Unpack[Fields]
    ) -> Completion: ...
    @overload
    async def agenerate(
        self, prompts: Prompts, params: Params = None, *, n: None = None, **fields: Unpack[Fields]
    ) -> list[Completion]: ...
    @overload
    async def agenerate(
        self, prompts: Prompt, params: Params = None, *, n: int, **fields: Unpack[Fields]
    ) -> list[Completion]: ...
    @overload
    async def agenerate(
        self, prompts: Prompts, params: Params = None, *, n: int, **fields: Unpack[Fields]
    ) -> list[list[Completion]]: ...
    async def agenerate(
        self,
        prompts: Prompt | Prompts,
        params: Params = None,
        *,
        n: int | None = None,
        **fields: Unpack[Fields],
    ) -> Answers:
        """As `generate`; cancelling the task cancels the requests."""
        single, prompts_ = arguments.prompt_list(prompts)
        ids = [self._ids("prompt", prompt) for prompt in prompts_]
        return _shaped(await self._aall(self._jobs(ids, params, n, fields)), n, single)

    def stream(
        self,
        prompt: Prompt,
        params: Params = None,
        **fields: Unpack[Fields],
    ) -> Stream:
        """As `generate` for one prompt, but gives the answer in chunks as it comes."""
        return Stream(self.submit(prompt, params, **fields))

    def astream(
        self,
        prompt: Prompt,
        params: Params = None,
        **fields: Unpack[Fields],
    ) -> AsyncStream:
        """As `stream`, for `async for`. The request is submitted at the first chunk asked for."""
        job = self._job(self._ids("prompt", prompt), params, fields)
        return AsyncStream(lambda: self._asubmit(job, stream=True))

    def submit(
        self,
        prompt: Prompt,
        params: Params = None,
        **fields: Unpack[Fields],
    ) -> Request:
        """Start a request and come back at once. Errors are raised by its `result()`."""
        return self._submit(self._job(self._ids("prompt", prompt), params, fields), stream=True)

    # Chats: the model's own template, then as above.

    @overload
    def chat(
        self, messages: Chat, params: Params = None, *, n: None = None, **fields: Unpack[ChatFields]
    ) -> Completion: ...
    @overload
    def chat(
        self,
        messages: Chats,
        params: Params = None,
        *,
        n: None = None,
        **fields: Unpack[ChatFields],
    ) -> list[Completion]: ...
    @overload
    def chat(
        self, messages: Chat, params: Params = None, *, n: int, **fields: Unpack[ChatFields]
    ) -> list[Completion]: ...
    @overload
    def chat(
        self, messages: Chats, params: Params = None, *, n: int, **fields: Unpack[ChatFields]
    ) -> list[list[Completion]]: ...
    def chat(
        self,
        messages: Chat | Chats,
        params: Params = None,
        *,
        n: int | None = None,
        **fields: Unpack[ChatFields],
    ) -> Answers:
        """Answer a conversation, or each of a list: dicts with "role" and "content".

        Uses the model's own template; a model without one raises `ChatTemplateError`. tools: JSON
        schemas of functions that the model may call; its calls come back as text, and a template
        that has no place for tools raises. chat_template_kwargs: further variables of the template,
        such as {"enable_thinking": False}.
        """
        single, chats = arguments.chat_list(messages)
        ids = [self._chat_ids(chat, fields) for chat in chats]
        return _shaped(self._all(self._jobs(ids, params, n, arguments.sampling(fields))), n, single)

    @overload
    async def achat(
        self, messages: Chat, params: Params = None, *, n: None = None, **fields: Unpack[ChatFields]
    ) -> Completion: ...
    @overload
    async def achat(
        self,
        messages: Chats,
        params: Params = None,
        *,
        n: None = None,
        **fields: Unpack[ChatFields],
    ) -> list[Completion]: ...
    @overload
    async def achat(
        self, messages: Chat, params: Params = None, *, n: int, **fields: Unpack[ChatFields]
    ) -> list[Completion]: ...
    @overload
    async def achat(
        self, messages: Chats, params: Params = None, *, n: int, **fields: Unpack[ChatFields]
    ) -> list[list[Completion]]: ...
    async def achat(
        self,
        messages: Chat | Chats,
        params: Params = None,
        *,
        n: int | None = None,
        **fields: Unpack[ChatFields],
    ) -> Answers:
        """As `chat`; cancelling the task cancels the requests."""
        single, chats = arguments.chat_list(messages)
        ids = [self._chat_ids(chat, fields) for chat in chats]
        return _shaped(
            await self._aall(self._jobs(ids, params, n, arguments.sampling(fields))), n, single
        )

    def stream_chat(
        self,
        messages: Chat,
        params: Params = None,
        **fields: Unpack[ChatFields],
    ) -> Stream:
        """As `chat` for one conversation, but gives the answer in chunks as it comes."""
        job = self._job(self._chat_ids(messages, fields), params, arguments.sampling(fields))
        return Stream(self._submit(job, stream=True))

    def astream_chat(
        self,
        messages: Chat,
        params: Params = None,
        **fields: Unpack[ChatFields],
    ) -> AsyncStream:
        """As `stream_chat`, for `async for`."""
        job = self._job(self._chat_ids(messages, fields), params, arguments.sampling(fields))
        return AsyncStream(lambda: self._asubmit(job, stream=True))

    def apply_chat_template(
        self,
        messages: Chat,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text that the model's template makes of a conversation; see `chat`."""
        # Templates that write the date mean the local one, as in transformers.
        now = int(time.time()) + time.localtime().tm_gmtoff
        return self._core.render_chat(
            arguments.as_json("messages", list(messages)),
            arguments.as_json("tools", list(tools)),
            arguments.as_json("chat_template_kwargs", dict(chat_template_kwargs or {})),
            add_generation_prompt,
            now,
        )

    # Tokens and probabilities.

    def tokenize(
        self, text: str, *, add_special: bool = False, parse_special: bool = False
    ) -> list[int]:
        """Token ids of `text`.

        add_special: with what the tokenizer puts around a text (BOS), once. parse_special:
        special tokens written in the text become their ids, else they are plain text.
        """
        try:
            return self._core.encode(text, add_special, parse_special)
        except UnicodeEncodeError as error:
            raise arguments.surrogate("text", error) from None

    def detokenize(self, ids: Ids) -> str:
        """Text of token ids, special tokens included; invalid UTF-8 becomes U+FFFD."""
        return self._core.decode(arguments.plain_ids("ids", ids), False)

    @overload
    def score(self, pairs: tuple[Prompt, Prompt]) -> Score: ...
    @overload
    def score(self, pairs: list[tuple[Prompt, Prompt]] | list[tuple[str, str]]) -> list[Score]: ...
    def score(self, pairs: Any) -> Score | list[Score]:
        """Log-probability of each continuation after its prompt: (prompt, continuation) pairs.

        Text is tokenized as one, prompt and continuation together; the continuation is what
        follows the prompt's own number of tokens.
        """
        single = isinstance(pairs, tuple)
        starts, jobs = [], []
        for prompt, continuation in [pairs] if single else pairs:
            start = self._ids("prompt", prompt)
            if isinstance(prompt, str) and isinstance(continuation, str):
                ids = self._ids("prompt", prompt + continuation)
            elif isinstance(prompt, str) or isinstance(continuation, str):
                raise InvalidParameterError(
                    "pairs: prompt and continuation must both be text or both be token ids",
                    field="pairs",
                )
            else:
                ids = start + arguments.plain_ids("continuation", continuation)
            if not start or len(ids) <= len(start):
                what = "prompt" if not start else "continuation"
                raise InvalidParameterError(
                    f"pairs: a {what} without tokens: {(prompt, continuation)!r}", field="pairs"
                )
            starts.append(len(start))
            jobs.append(self._prompt_job(ids, prompt_logprobs=0))
        scores = []
        for start_len, done in zip(starts, self._all(jobs), strict=True):
            _whole(done.finish_reason)
            assert done.prompt_logprobs is not None
            tokens = [entry.token for entry in done.prompt_logprobs[start_len:] if entry]
            logprobs = tuple(token.logprob for token in tokens)
            scores.append(Score(sum(logprobs), logprobs, all(t.rank == 1 for t in tokens)))
        return scores[0] if single else scores

    def logits(self, token_ids: Ids) -> NDArray[np.float32]:
        """Logits after each token, float32 [n, vocab_size]. Nothing is added to the ids."""
        job = self._prompt_job(arguments.plain_ids("token_ids", token_ids), prompt_logits=True)
        request = _checked(self._core.submit)(job.ids, **job.fields)
        try:
            news = request.wait(None)
        except BaseException:
            request.cancel()
            raise
        assert news is not None and news.done is not None
        _whole(news.done.finish_reason)
        assert news.done.prompt_logits is not None
        return news.done.prompt_logits

    def close(self) -> None:
        """End running requests as "cancelled" and free the memory. Further calls raise."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an LLM can't be pickled or copied: load the model in the process that uses it"
        )

    def __repr__(self) -> str:
        return f"<LLM {self.info.name} {self.info.quantization} on {self.device}>"

    def _ids(self, name: str, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return arguments.plain_ids(name, prompt)
        try:
            return self._core.encode(prompt, True, True)
        except UnicodeEncodeError as error:
            raise arguments.surrogate(name, error) from None

    def _chat_ids(self, messages: Chat, fields: ChatFields) -> list[int]:
        text = self.apply_chat_template(
            messages,
            tools=fields.get("tools", ()),
            chat_template_kwargs=fields.get("chat_template_kwargs"),
        )
        return self._core.encode(text, True, True)

    def _job(self, ids: list[int], params: Params, fields: Fields, sample: int = 0) -> _Job:
        if not isinstance(params, SamplingParams | None):
            raise TypeError(
                f"params: found {type(params).__name__}, expected SamplingParams; its fields may "
                "also be given as keywords"
            )
        params = replace(params or SamplingParams(), **fields)
        out = self._defaults.fill(params)
        if params.max_tokens is None and out["max_tokens"] is not None:
            # The model's own default gives way to the context; what the caller asks for does not.
            room = self.info.context_length - len(ids)
            out["max_tokens"] = min(out["max_tokens"], room) if room > 0 else None
        number = next(self._numbers)
        if params.seed is None:
            digest = blake2b(f"{self._seed}/{number}".encode(), digest_size=7).digest()
            out["seed"] = int.from_bytes(digest, "little")
        else:
            out["seed"] = params.seed + sample
        return _Job(ids, out)

    def _jobs(
        self,
        prompts: Iterable[list[int]],
        params: Params,
        n: int | None,
        fields: Fields,
    ) -> list[_Job]:
        if n is not None and n < 1:
            raise InvalidParameterError(
                f"n: found {n}, expected at least 1", field="n", value=str(n)
            )
        return [self._job(ids, params, fields, i) for ids in prompts for i in range(n or 1)]

    def _prompt_job(self, ids: list[int], **fields: Any) -> _Job:
        """A request that asks about a prompt and generates nothing."""
        return _Job(ids, {"max_tokens": 0, **fields})

    def _submit(self, job: _Job, stream: bool = False) -> Request:
        core = _checked(self._core.submit)(job.ids, stream=stream, **job.fields)
        return Request(core, job.fields.get("seed", 0))

    def _asubmit(self, job: _Job, stream: bool = False) -> Request:
        import asyncio

        ready = asyncio.Event()
        loop = asyncio.get_running_loop()
        core = _checked(self._core.submit)(
            job.ids,
            stream=stream,
            notify=lambda: loop.call_soon_threadsafe(ready.set),
            **job.fields,
        )
        return Request(core, job.fields.get("seed", 0), ready)

    def _all(self, jobs: Iterable[_Job]) -> list[Completion]:
        """Run all, never more at once than the batch and the queue hold; answers in order."""
        running: deque[Request] = deque()
        answers = []
        try:
            for job in jobs:
                if len(running) == self._window:
                    answers.append(running[0].result())
                    running.popleft()
                running.append(self._submit(job))
            while running:
                answers.append(running[0].result())
                running.popleft()
        except BaseException:
            for request in running:
                request.cancel()
            raise
        return answers

    async def _aall(self, jobs: Iterable[_Job]) -> list[Completion]:
        running: deque[Request] = deque()
        answers = []
        try:
            for job in jobs:
                if len(running) == self._window:
                    answers.append(await running[0]._aresult())
                    running.popleft()
                running.append(self._asubmit(job))
            while running:
                answers.append(await running[0]._aresult())
                running.popleft()
        except BaseException:
            for request in running:
                request.cancel()
            raise
        return answers


def _shaped(answers: list[Completion], n: int | None, single: bool) -> Answers:
    if n is None:
        return answers[0] if single else answers
    return answers if single else [answers[i : i + n] for i in range(0, len(answers), n)]


def _whole(reason: str) -> None:
    """A score of a part of a prompt is no score."""
    if reason == "cancelled":
        raise EngineClosedError("the LLM was closed while this ran")


def _checked(submit: Callable[..., _core.Request]) -> Callable[..., _core.Request]:
    """`submit`, with numbers and texts that the core's types can't hold as our error."""

    def call(*args: Any, **fields: Any) -> _core.Request:
        try:
            return submit(*args, **fields)
        except OverflowError as error:
            raise arguments.too_large(fields) from error
        except UnicodeEncodeError as error:
            raise arguments.surrogate("stop", error) from None

    return call


def _cut(threads: int | None) -> dict[str, Any]:
    """Threads and tiles: what was asked for, or what `ferrule tune` found."""
    found = tuning.load(default_cache_dir()) if threads is None else None
    return {"threads": threads} if found is None else asdict(found)
