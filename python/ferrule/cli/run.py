"""`ferrule run`: one answer, or a chat."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from typing import Any

from .. import arguments
from ..errors import FerruleError, InvalidParameterError
from ..hub import is_model_name
from ..llm import LLM
from ..params import SamplingParams
from ..request import Stream
from ..results import Completion
from . import model_keywords, piped, sampling_keywords, tell


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    try:
        model, prompt = _words(args)
    except ValueError as error:
        print(f"ferrule run: {error}", file=sys.stderr)
        return 2
    chat_on_terminal = prompt is None and sys.stdin is not None and sys.stdin.isatty()
    if prompt is None and not chat_on_terminal:
        prompt = piped("prompt").strip("\n")
        if not prompt:
            print(
                f"ferrule run: no prompt for the model {model!r}: give one, or pipe one in",
                file=sys.stderr,
            )
            return 2
    more: dict[str, Any] = {} if args.threads is None else {"threads": args.threads}
    if args.chat_template is not None:
        more["chat_template"] = arguments.text_file("--chat-template", args.chat_template)
    params = SamplingParams(**sampling_keywords(args))
    with LLM(model, **model_keywords(args), **more) as llm:
        tell(llm)
        if chat_on_terminal:
            return _chat(llm, params, args)
        assert prompt is not None
        if args.raw or not llm.info.chat_template:
            if args.system:
                raise InvalidParameterError(
                    "system: a system message needs a chat template", field="system"
                )
            _show(llm.stream(prompt, params), args)
        else:
            messages = [*_system(args), {"role": "user", "content": prompt}]
            _show(llm.stream_chat(messages, params), args)
    return 0


def _words(args: argparse.Namespace) -> tuple[str, str | None]:
    """The model and the prompt that the arguments mean."""
    words: list[str] = args.words
    if len(words) > (1 if args.model else 2):
        raise ValueError(f"too many arguments: {words[-1]!r}; put the prompt in quotes")
    if args.model:
        return args.model, words[0] if words else None
    if len(words) == 2:
        return words[0], words[1]
    if words and is_model_name(words[0]):
        return words[0], None
    return "tales-4m", words[0] if words else None


def _system(args: argparse.Namespace) -> list[dict[str, str]]:
    return [{"role": "system", "content": args.system}] if args.system else []


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _show(stream: Stream, args: argparse.Namespace) -> Completion:
    """Print an answer as it comes (or as JSON, whole); Ctrl-C cancels it and is passed on."""
    with stream:
        for chunk in stream:
            if not args.json:
                print(chunk.text, end="", flush=True)
        done = stream.completion
    assert done is not None
    if args.json:
        print(json.dumps(dataclasses.asdict(done)))
    elif not done.text.endswith("\n"):
        print()
    if args.stats:
        s = done.stats
        first = "-" if s.ttft_s is None else f"{1000 * s.ttft_s:.1f} ms"
        print(
            f"[prompt {done.usage.prompt_tokens} tokens ({done.usage.cached_tokens} cached), "
            f"{_rate(s.prefill_tps)} t/s · answer {done.usage.completion_tokens} tokens, "
            f"{_rate(s.decode_tps)} t/s · first token {first} · seed {done.seed} · "
            f"{done.finish_reason}]",
            file=sys.stderr,
        )
    return done


def _chat(llm: LLM, params: SamplingParams, args: argparse.Namespace) -> int:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() its line editing
    llm.apply_chat_template([{"role": "user", "content": ""}])  # no template: say so at once
    print(f"{llm.info.name} · /reset forgets, /exit or Ctrl-D leaves, Ctrl-C stops an answer")
    messages = _system(args)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()
            continue
        if text == "/exit":
            return 0
        if text == "/reset":
            messages = _system(args)
        elif text:
            messages.append({"role": "user", "content": text})
            try:
                stream = llm.stream_chat(messages, params)
                try:
                    answer = _show(stream, args).text
                except KeyboardInterrupt:
                    print()
                    stream.close()
                    answer = stream.completion.text if stream.completion else ""
                messages.append({"role": "assistant", "content": answer})
            except FerruleError as error:
                messages.pop()
                print(f"ferrule: {error} (/reset forgets the conversation)", file=sys.stderr)
