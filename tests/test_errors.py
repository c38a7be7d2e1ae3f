"""Every error class: what raises it, what it is, what it says."""

from __future__ import annotations

import contextlib
import copy as stdlib_copy
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ferrule
from ferrule import LLM, hub

STORY = "Once upon a time"


def copy(tmp_path: Path, **changes: Callable[[dict[str, Any]], object] | None) -> Path:
    """tales-1m with some of its JSON files changed, or (None) left out."""
    folder = tmp_path / "model"
    shutil.copytree(hub.resolve("tales-1m"), folder)
    for name, change in changes.items():
        path = folder / f"{name}.json"
        if change is None:
            path.unlink()
        else:
            value = json.loads(path.read_text())
            change(value)
            path.write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize(
    ("error", "base"),
    [
        (ferrule.ModelNotFoundError, FileNotFoundError),
        (ferrule.DownloadError, OSError),
        (ferrule.FileAccessError, OSError),
        (ferrule.ModelFormatError, ValueError),
        (ferrule.NumericError, ArithmeticError),
        (ferrule.UnsupportedModelError, Exception),
        (ferrule.TokenizerError, Exception),
        (ferrule.ChatTemplateError, Exception),
        (ferrule.ContextLengthError, ValueError),
        (ferrule.InvalidParameterError, ValueError),
        (ferrule.OutOfMemoryError, MemoryError),
        (ferrule.CudaUnavailableError, RuntimeError),
        (ferrule.DeviceError, RuntimeError),
        (ferrule.QueueFullError, RuntimeError),
        (ferrule.EngineClosedError, RuntimeError),
        (ferrule.LogitsProcessorError, Exception),
        (ferrule.InternalError, Exception),
    ],
)
def test_bases(error: type[Exception], base: type[Exception]) -> None:
    assert issubclass(error, ferrule.FerruleError)
    assert issubclass(error, base)
    assert str(pickle.loads(pickle.dumps(error("what")))) == "what"


def test_fields_survive_pickling() -> None:
    error = ferrule.ContextLengthError("long", prompt_tokens=3, max_tokens=None, context_length=2)
    again = pickle.loads(pickle.dumps(error))
    assert (again.prompt_tokens, again.max_tokens, again.context_length) == (3, None, 2)


def test_the_default_of_the_model_gives_way_to_the_context(llm: LLM) -> None:
    ids = [17] * (llm.info.context_length - 5)
    answer = llm.generate(ids, temperature=0, ignore_eos=True)
    assert (len(answer.token_ids), answer.finish_reason) == (5, "length")


def test_context_length(llm: LLM) -> None:
    with pytest.raises(ferrule.ContextLengthError, match="1024") as caught:
        llm.generate([7] * 1024)
    assert caught.value.prompt_tokens == 1024
    assert caught.value.max_tokens is None
    assert caught.value.context_length == 1024
    with pytest.raises(ferrule.ContextLengthError):
        next(llm.stream(STORY, max_tokens=1024))
    assert llm.generate([7] * 1023, max_tokens=1).usage.completion_tokens == 1


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -3}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"typical_p": -1}, "typical_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"min_tokens": 50, "max_tokens": 5}, "min_tokens"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 1 << 40}, "logprobs"),
        ({"prompt_logprobs": 5000}, "prompt_logprobs"),
        ({"logit_bias": {99999: 1.0}}, "logit_bias"),
        ({"stop_token_ids": [99999]}, "stop_token_ids"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["\ud800"]}, "stop"),
    ],
)
def test_parameters(llm: LLM, fields: dict[str, Any], names: str) -> None:
    with pytest.raises(ferrule.InvalidParameterError, match=names) as caught:
        llm.generate(STORY, **fields)
    assert caught.value.field == names
    assert caught.value.value is not None


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": -1},
        {"seed": 1 << 64},
        {"top_k": 1 << 90},
        {"max_tokens": 1 << 63},
        {"stop_token_ids": [-1]},
        {"logit_bias": {1 << 32: 1.0}},
        {"logit_bias": {5: 10**400}},
        {"seed": -1, "presence_penalty": -1, "logit_bias": {5: -1}},
    ],
)
def test_numbers_too_large(llm: LLM, fields: dict[str, Any]) -> None:
    name = next(iter(fields))
    with pytest.raises(ferrule.InvalidParameterError, match=f"{name}: found -?[0-9]+, ") as caught:
        llm.generate(STORY, **fields)
    assert caught.value.field == name


def test_none_is_none(llm: LLM) -> None:
    open_ = ferrule.SamplingParams(
        stop=None, stop_token_ids=None, logits_processors=None, logit_bias=None
    )
    plain = llm.generate(STORY, max_tokens=5, temperature=0)
    assert llm.generate(STORY, open_, max_tokens=5, temperature=0).text == plain.text
    with pytest.raises(TypeError, match="logit_bias: found key '5'"):
        llm.generate(STORY, logit_bias={"5": 1.0})
    with pytest.raises(TypeError, match="params: found dict"):
        llm.generate(STORY, {"max_tokens": 3})


@pytest.mark.parametrize(
    "fields", [{"temperature": "hot"}, {"max_tokens": 2.5}, {"stop": 3}, {"logit_bias": [1]}]
)
def test_wrong_types(llm: LLM, fields: dict[str, Any]) -> None:
    with pytest.raises((TypeError, AttributeError)):
        llm.generate(STORY, **fields)


@pytest.mark.parametrize("prompt", [[-1], [1 << 32], [5000], np.array([3000]), [0, 2048]])
def test_ids_outside_the_vocabulary(llm: LLM, prompt: Any) -> None:
    with pytest.raises(ferrule.InvalidParameterError, match="prompt"):
        llm.generate(prompt, max_tokens=1)


@pytest.mark.parametrize("prompt", [None, 7, b"text", {"a": 1}, [1.5], ["a", None], [["a"]]])
def test_no_prompts(llm: LLM, prompt: Any) -> None:
    with pytest.raises(TypeError):
        llm.generate(prompt, max_tokens=1)


def test_empty_prompts(llm: LLM) -> None:
    with pytest.raises(ferrule.InvalidParameterError, match="at least one token"):
        llm.generate(np.array([], np.int64))
    with pytest.raises(ferrule.InvalidParameterError, match="at least one token"):
        llm.logits([])
    # BOS is a token: an empty text is a prompt here.
    assert llm.generate("", max_tokens=1).usage.prompt_tokens == 1


def test_lone_surrogates(llm: LLM) -> None:
    for call in (llm.generate, llm.tokenize, llm.stream, llm.submit):
        with pytest.raises(ferrule.InvalidParameterError, match=r"U\+D800 at position 2"):
            call("ab\ud800c")
    with pytest.raises(ferrule.InvalidParameterError, match=r"U\+DFFF"):
        llm.chat([{"role": "user", "content": "\udfff"}])


def test_ids_that_are_no_text(llm: LLM) -> None:
    with pytest.raises(ferrule.InvalidParameterError, match="999999"):
        llm.detokenize([999_999])
    with pytest.raises(ferrule.InvalidParameterError):
        llm.detokenize([-5])


@pytest.mark.parametrize(
    "messages",
    ["Hello", {"role": "user"}, [{"role": "user", "content": {1, 2}}], [{"role": float("nan")}]],
)
def test_no_conversations(llm: LLM, messages: Any) -> None:
    with pytest.raises((TypeError, ferrule.InvalidParameterError)):
        llm.chat(messages)


def test_samples_at_least_one(llm: LLM) -> None:
    with pytest.raises(ferrule.InvalidParameterError, match="n: found 0"):
        llm.generate(STORY, n=0)


def test_score_needs_both(llm: LLM) -> None:
    for pair in [("", ""), (STORY, ""), ([], [5]), (STORY, [5])]:
        with pytest.raises(ferrule.InvalidParameterError, match="pairs"):
            llm.score(pair)


def test_logits_processor_errors(llm: LLM) -> None:
    def fails(ids: list[int], logits: Any) -> None:
        raise KeyError("mine")

    with pytest.raises(ferrule.LogitsProcessorError, match="mine") as caught:
        llm.generate(STORY, logits_processors=[fails])
    assert isinstance(caught.value.__cause__, KeyError)
    wrong: list[tuple[Callable[..., Any], type[Exception]]] = [
        (lambda ids, logits: "text", TypeError),
        (lambda ids, logits: logits.astype(np.float64), TypeError),
        (lambda ids, logits: logits[:-1], ValueError),
    ]
    for function, cause in wrong:
        with pytest.raises(ferrule.LogitsProcessorError, match="expected") as caught:
            llm.generate(STORY, logits_processors=[function])
        assert isinstance(caught.value.__cause__, cause)
    with pytest.raises(ferrule.LogitsProcessorError, match=r"found float64 of shape \(2048,\)"):
        llm.generate(STORY, logits_processors=[lambda ids, logits: logits.astype(np.float64)])
    with pytest.raises(ferrule.LogitsProcessorError):
        llm.generate(STORY, logits_processors=[lambda ids, logits: np.full_like(logits, np.nan)])
    with pytest.raises(ferrule.InvalidParameterError, match="no token that is allowed"):
        llm.generate(STORY, logits_processors=[lambda ids, logits: np.full_like(logits, -np.inf)])


def test_queue_full() -> None:
    with LLM("tales-4m", max_batch=1, max_queue=1, progress=False) as llm:
        requests = [llm.submit(STORY, max_tokens=900, ignore_eos=True) for _ in range(5)]
        with pytest.raises(ferrule.QueueFullError, match="max_queue is 1: wait") as caught:
            requests[-1].result()
        assert caught.value.limit == 1
        with pytest.raises(ferrule.QueueFullError):
            requests[-1].result()
        for request in requests:
            request.cancel()


def test_closed() -> None:
    with LLM("tales-1m", progress=False) as llm:
        request = llm.submit(STORY, max_tokens=1)
        request.result()
    for call in (llm.generate, llm.tokenize, llm.stream):
        with pytest.raises(ferrule.EngineClosedError):
            call(STORY)
    with pytest.raises(ferrule.EngineClosedError):
        llm.logits([1])
    with pytest.raises(ferrule.EngineClosedError):
        llm.chat([{"role": "user", "content": "a"}])
    assert request.result().usage.completion_tokens == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forked_children_are_told(llm: LLM) -> None:
    def child(connection: Any) -> None:
        try:
            llm.generate(STORY)
        except ferrule.EngineClosedError as error:
            connection.send(str(error))
        llm.close()
        connection.close()

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    assert ours.poll(60)
    assert "forked" in (text := ours.recv())
    assert "spawn" in text
    process.join()
    assert process.exitcode == 0
    assert llm.generate(STORY, max_tokens=1).usage.completion_tokens == 1


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
@pytest.mark.parametrize("what", ["generate", "logits", "stream", "prompt"])
def test_interrupt(what: str) -> None:
    """Ctrl-C ends a long call, and the engine is free for the next one."""
    with LLM("tales-4m", max_batch=1, max_queue=1, progress=False) as llm:
        main = threading.get_ident()

        def calls() -> None:
            if what == "generate":
                llm.generate([STORY] * 100, max_tokens=1000, ignore_eos=True)
            elif what == "stream":
                for _ in range(100):
                    list(llm.stream(STORY, max_tokens=1000, ignore_eos=True))
            elif what == "logits":
                for _ in range(1000):
                    llm.logits([9] * 1000)
            else:
                for _ in range(1000):
                    llm.generate([9] * 1000, max_tokens=1)

        timer = threading.Timer(0.3, lambda: signal.pthread_kill(main, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            calls()
        timer.join()
        assert llm.generate(STORY, max_tokens=2).usage.completion_tokens == 2


# Folders that are not right.


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(ferrule.ModelNotFoundError, match="tales-4m"):
        LLM("no-such-model")
    with pytest.raises(ferrule.ModelNotFoundError):
        LLM(tmp_path / "nothing")
    with pytest.raises(ferrule.ModelNotFoundError, match=r"config\.json"):
        LLM(tmp_path)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ferrule.TokenizerError, match=r"no tokenizer\.json"):
        LLM(copy(tmp_path, tokenizer=None))


def test_no_chat_template(tmp_path: Path) -> None:
    folder = copy(tmp_path, tokenizer_config=lambda c: c.pop("chat_template"))
    messages = [{"role": "user", "content": "hi"}]
    with LLM(folder, progress=False) as llm:
        assert not llm.info.chat_template
        with pytest.raises(ferrule.ChatTemplateError, match="chat_template="):
            llm.chat(messages)
        assert llm.generate(STORY, max_tokens=1).text
    with LLM(folder, chat_template="{{ messages[0].content }}{{ eos_token }}") as llm:
        assert llm.apply_chat_template(messages) == "hi<|eos|>"


def test_bad_chat_templates(tmp_path: Path) -> None:
    with pytest.raises(ferrule.ChatTemplateError):
        LLM("tales-1m", chat_template="{% if %}")
    template = "{{ raise_exception('no system message') }}"
    llm = LLM("tales-1m", chat_template=template)
    with pytest.raises(ferrule.ChatTemplateError, match="no system message"):
        llm.chat([{"role": "user", "content": "hi"}])


def test_bad_weights(tmp_path: Path) -> None:
    folder = copy(tmp_path)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for data in (b"", whole[:100], whole[:-1], b"\xff" * 16 + whole[16:]):
        weights.write_bytes(data)
        with pytest.raises(ferrule.ModelFormatError, match="safetensors") as caught:
            LLM(folder)
        assert caught.value.file is not None
    weights.unlink()
    with pytest.raises(ferrule.ModelFormatError, match=r"expected model\.safetensors"):
        LLM(folder)


def test_bad_configs(tmp_path: Path) -> None:
    folder = copy(tmp_path, config=lambda c: c.update(hidden_size=1 << 40))
    with pytest.raises(ferrule.FerruleError, match="hidden_size"):
        LLM(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ferrule.ModelFormatError):
        LLM(folder)


def test_unsupported(tmp_path: Path) -> None:
    folder = copy(tmp_path, config=lambda c: c.update(architectures=["NeverHeardOf"]))
    with pytest.raises(ferrule.UnsupportedModelError, match="NeverHeardOf"):
        LLM(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": "hot"},
        {"top_k": 1.5},
        {"max_new_tokens": True},
        {"eos_token_id": "end"},
        {"eos_token_id": [1, -1]},
    ],
)
def test_bad_generation_configs(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = copy(tmp_path, generation_config=lambda c: c.update(change))
    with pytest.raises(ferrule.ModelFormatError, match=next(iter(change))):
        LLM(folder)


def test_an_llm_stays_in_its_process(llm: LLM) -> None:
    for call in (pickle.dumps, stdlib_copy.copy):
        with pytest.raises(TypeError, match="load the model in the process that uses it"):
            call(llm)


def test_what_generation_config_asks_for_in_vain(tmp_path: Path) -> None:
    vain = {"num_beams": 4, "no_repeat_ngram_size": 3}
    nothing = {"num_beam_groups": 1, "penalty_alpha": None, "epsilon_cutoff": 0.0, "min_length": 0}
    folder = copy(tmp_path, generation_config=lambda c: c.update(vain | nothing))
    with LLM(folder, progress=False) as llm:
        (note,) = llm.info.notes
    assert note == "generation_config.json: not honoured: num_beams, no_repeat_ngram_size"


def test_an_end_token_outside_the_vocabulary(tmp_path: Path) -> None:
    folder = copy(tmp_path, generation_config=lambda c: c.update(eos_token_id=[99_999]))
    with pytest.raises(
        ferrule.ModelFormatError, match=r"eos_token_id .* found 99999, .* below 2048"
    ):
        LLM(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_git_lfs_pointers(tmp_path: Path, name: str) -> None:
    folder = copy(tmp_path)
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7745928\n"
    (folder / name).write_text(text)
    with pytest.raises(
        ferrule.ModelFormatError, match=rf"{name}: is a Git LFS pointer.*git lfs pull"
    ):
        LLM(folder)


def test_adapters_are_not_ignored(tmp_path: Path) -> None:
    folder = copy(tmp_path)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(ferrule.UnsupportedModelError, match=r"adapter_config\.json.*some/base"):
        LLM(folder)
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(ferrule.UnsupportedModelError, match="its base model"):
        LLM(folder)


def test_a_file_of_a_folder_is_not_the_model(tmp_path: Path) -> None:
    file = copy(tmp_path) / "model.safetensors"
    with pytest.raises(ferrule.ModelNotFoundError, match="give the folder that it lies in"):
        LLM(file)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ferrule.TokenizerError, match=r"no tokenizer\.json; take it from"):
        LLM(copy(tmp_path, tokenizer=None))


def test_a_family_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ferrule.FileAccessError, match=r"family: .*none\.toml: No such file"):
        LLM(family=tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b"\xff")
    with pytest.raises(ferrule.InvalidParameterError, match=r"family: .*latin\.toml: not UTF-8"):
        LLM(family=tmp_path / "latin.toml")


def test_generation_configs(tmp_path: Path) -> None:
    folder = copy(tmp_path, generation_config=lambda c: c.update(do_sample=False, top_k=3))
    with LLM(folder, progress=False) as llm:
        assert llm.info.defaults["temperature"][0] == 0.0
        assert llm.info.defaults["top_k"] == (3, "generation_config.json")
        greedy = llm.generate(STORY, max_tokens=8)
        assert greedy.text == llm.generate(STORY, max_tokens=8, temperature=0).text
    (folder / "generation_config.json").unlink()
    with LLM(folder, progress=False) as llm:
        assert llm.info.defaults["temperature"] == (1.0, "built in")
        # End tokens come from config.json then.
        answer = llm.chat([{"role": "user", "content": "What is 2 + 3?"}], temperature=0)
        assert answer.finish_reason == "stop"
    for text in ("[]", "{", "\xff"):
        (folder / "generation_config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ferrule.ModelFormatError, match=r"generation_config\.json"):
            LLM(folder)


@pytest.mark.parametrize(
    ("keywords", "field"),
    [
        ({"quantization": "int3"}, "quantization"),
        ({"kv_cache_dtype": "f8"}, "kv_cache_dtype"),
        ({"device": "gpu"}, "device"),
        ({"device": "cuda:x"}, "device"),
        ({"threads": 0}, "threads"),
        ({"threads": 100_000}, "threads"),
        ({"threads": "many"}, "threads"),
        ({"context_length": -5}, "context_length"),
        ({"context_length": 4096}, "context_length"),
        ({"max_batch": 0}, "max_batch"),
        ({"max_queue": -1}, "max_queue"),
    ],
)
def test_bad_options(keywords: dict[str, Any], field: str) -> None:
    with pytest.raises(ferrule.InvalidParameterError, match=field) as caught:
        LLM("tales-1m", progress=False, **keywords)
    assert caught.value.field == field


def test_too_little_memory() -> None:
    with pytest.raises(ferrule.OutOfMemoryError) as caught:
        LLM("tales-1m", kv_cache_bytes=10, progress=False)
    assert caught.value.available == 10
    assert (caught.value.requested or 0) > 10


def test_context_length_is_lowered_to_the_memory() -> None:
    with LLM("tales-1m", kv_cache_bytes=200_000, progress=False) as llm:
        assert llm.info.context_length < 1024
        assert llm.info.kv_cache_bytes <= 200_000
        with pytest.raises(ferrule.FerruleError):
            llm.generate([5] * (llm.info.context_length + 1), max_tokens=1)


def test_progress() -> None:
    seen: list[ferrule.Progress] = []
    with LLM("tales-1m", progress=seen.append):
        pass
    assert all(p.done <= p.total for p in seen)

    def stop(progress: ferrule.Progress) -> None:
        raise ZeroDivisionError

    # Raised only if the load took long enough for a report.
    with contextlib.suppress(ZeroDivisionError):
        LLM("tales-4m", progress=stop).close()


def test_unknown_isa(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import ferrule; ferrule.LLM('tales-1m')"],
        env={**os.environ, "FERRULE_ISA": "z80"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "InvalidParameterError" in run.stderr
    assert "z80" in run.stderr


def test_no_error_at_exit_with_a_running_request() -> None:
    """The engine's thread must not disturb the interpreter's end."""
    code = (
        "from ferrule import LLM\n"
        "llm = LLM('tales-4m', progress=False)\n"
        "stream = llm.stream('Once', max_tokens=900, ignore_eos=True)\n"
        "print(next(stream).text)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert (run.returncode, run.stderr) == (0, "")
