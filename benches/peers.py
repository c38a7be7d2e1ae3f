"""Other engines with a Python package, measured by one program: `compare.py --peer` runs it.

    PYTHON benches/peers.py ENGINE MODEL KIND TOKENS DEPTH BATCH THREADS REPETITIONS

PYTHON is the interpreter of an environment that has the engine (and this file needs nothing else);
MODEL is what the engine's own converter made of the Hugging Face folder: README.md has the
commands. Prints tokens per second as a JSON list. Prompts are made of token ids, greedy, ends of
sequence ignored; one untimed run of each kind first. Never checks what an engine says.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

FIRST_ID = 10  # after the special ones of every tokenizer here

# Reads `batch` prompts and generates: the times at which each next token of all was there, of
# which the first is the start.
Run = Callable[[list[list[int]], int], list[float]]


class Peer(NamedTuple):
    """An engine: what it imports, how to get it and a model for it, and how to open one."""

    module: str
    install: str
    weights: str  # the files of its weights
    open: Callable[[str, int], Run]


def openvino(model: str, threads: int) -> Run:
    """OpenVINO GenAI: times are those that it keeps."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    pipe = genai.LLMPipeline(model, "CPU", INFERENCE_NUM_THREADS=threads)

    def run(prompts: list[list[int]], tokens: int) -> list[float]:
        ids = np.array(prompts, np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        config = genai.GenerationConfig(
            max_new_tokens=tokens, ignore_eos=True, do_sample=False, apply_chat_template=False
        )
        metrics = pipe.generate(inputs, config).perf_metrics
        at = [time_ms / 1e3 for time_ms in metrics.raw_metrics.m_new_token_times]
        return [at[0] - metrics.get_ttft().mean / 1e3, *at]

    return run


def onnxruntime(model: str, threads: int) -> Run:
    """ONNX Runtime GenAI."""
    import numpy as np
    import onnxruntime_genai as genai

    config = genai.Config(model)
    options = {"intra_op_num_threads": threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    loaded = genai.Model(config)

    def run(prompts: list[list[int]], tokens: int) -> list[float]:
        params = genai.GeneratorParams(loaded)
        length = len(prompts[0]) + tokens
        params.set_search_options(
            max_length=length, min_length=length, batch_size=len(prompts), do_sample=False
        )
        generator = genai.Generator(loaded, params)
        at = [time.perf_counter()]
        generator.append_tokens(np.array(prompts, np.int32))
        for _ in range(tokens):
            generator.generate_next_token()
            at.append(time.perf_counter())
        return at

    return run


def ctranslate2(model: str, threads: int) -> Run:
    """CTranslate2, int8 weights and activations."""
    import ctranslate2 as ct2

    generator = ct2.Generator(model, compute_type="int8", intra_threads=threads, inter_threads=1)
    names = json.loads((Path(model) / "vocabulary.json").read_text())

    def run(prompts: list[list[int]], tokens: int) -> list[float]:
        at = [time.perf_counter()] + [0.0] * tokens

        def told(result: Any) -> bool:
            at[result.step + 1] = time.perf_counter()
            return False

        generator.generate_batch(
            [[names[i] for i in prompt] for prompt in prompts],
            include_prompt_in_result=False,
            max_length=tokens,
            min_length=tokens,
            callback=told,
        )
        return at

    return run


def transformers(model: str, threads: int) -> Run:
    """Transformers on PyTorch, bf16, eager."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)

    def run(prompts: list[list[int]], tokens: int) -> list[float]:
        ids, state = torch.tensor(prompts), None
        at = [time.perf_counter()]
        with torch.inference_mode():
            for _ in range(tokens):
                out = loaded(ids, past_key_values=state, use_cache=True, logits_to_keep=1)
                ids, state = out.logits[:, -1:].argmax(-1), out.past_key_values
                at.append(time.perf_counter())
        return at

    return run


PEERS = {
    "openvino": Peer(
        "openvino_genai",
        "pip install openvino-genai; optimum-cli export openvino (of optimum-intel[openvino])",
        "openvino_model.bin",
        openvino,
    ),
    "onnxruntime": Peer(
        "onnxruntime_genai",
        "pip install onnxruntime-genai; python -m onnxruntime_genai.models.builder",
        "*.onnx.data",
        onnxruntime,
    ),
    "ctranslate2": Peer(
        "ctranslate2",
        "pip install ctranslate2; ct2-transformers-converter",
        "model.bin",
        ctranslate2,
    ),
    "transformers": Peer(
        "transformers",
        "pip install transformers torch; MODEL is the Hugging Face folder",
        "*.safetensors",
        transformers,
    ),
}


def speeds(
    run: Run, kind: str, tokens: int, depth: int, batch: int, repetitions: int
) -> list[float]:
    """Tokens per second of each repetition: of reading (pp), or of generating after the first."""
    read, made = (tokens, 1) if kind == "pp" else (max(depth, 1), tokens + 1)

    def prompts(number: int, length: int) -> list[list[int]]:
        # No two alike from their first token on: an engine may keep what it has read.
        return [[number + n, *(FIRST_ID + i % 97 for i in range(length - 1))] for n in range(batch)]

    run(prompts(FIRST_ID, min(read, 64)), 3)
    found = []
    for number in range(1, repetitions + 1):
        at = run(prompts(FIRST_ID + number * batch, read), made)
        work, taken = (read, at[1] - at[0]) if kind == "pp" else (tokens, at[-1] - at[1])
        found.append(work * batch / taken)
    return found


def main() -> None:
    """Run the command line."""
    name, model, kind, *numbers = sys.argv[1:]
    tokens, depth, batch, threads, repetitions = map(int, numbers)
    run = PEERS[name].open(model, threads)
    print(json.dumps(speeds(run, kind, tokens, depth, batch, repetitions)))


if __name__ == "__main__":
    main()
