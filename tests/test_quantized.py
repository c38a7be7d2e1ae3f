"""Quantized safetensors through the Python face: every format gives the tokens of its reference."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from ferrule import LLM, SamplingParams, UnsupportedModelError

OWN = Path(__file__).parent / "golden"
SHARED = os.environ.get("FERRULE_SHARED")
GOLDENS = Path(SHARED) / "goldens" if SHARED else OWN
# Some goldens have a penalty in generation_config.json.
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, repetition_penalty=1.0)
NAMES = sorted(path.name for path in GOLDENS.glob("quant-*"))


def load_file(path: Path) -> dict[str, npt.NDArray[np.float32 | np.int32]]:
    """The tensors of a file of F32 and I32."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    types = {"F32": np.float32, "I32": np.int32}
    return {
        name: np.frombuffer(
            data[8 + length :][slice(*tensor["data_offsets"])], types[tensor["dtype"]]
        ).reshape(tensor["shape"])
        for name, tensor in json.loads(data[8 : 8 + length]).items()
        if name != "__metadata__"
    }


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_those_of_the_reference(name: str) -> None:
    golden = load_file(GOLDENS / name / "golden.safetensors")
    with LLM(GOLDENS / name, quantization="none", kv_cache_dtype="f32", progress=False) as llm:
        for prompt in ("p7", "p33"):
            ids = golden[f"{prompt}.ids"].tolist()
            logits = llm.logits(ids)[golden[f"{prompt}.positions"]]
            assert np.abs(logits - golden[f"{prompt}.logits"]).max() < 3e-4
            answer = llm.generate(ids, GREEDY)
            assert list(answer.token_ids) == golden[f"{prompt}.greedy"].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_loaded_as_it_comes(name: str) -> None:
    """Without any option; what greedy answers begin with is the reference's where it is sure."""
    golden = load_file(GOLDENS / name / "golden.safetensors")
    with LLM(GOLDENS / name, progress=False) as llm:
        ids = golden["p33.ids"].tolist()
        answer = llm.generate(ids, GREEDY)
    sure = golden["p33.greedy_margins"] > 1.0
    length = int(np.argmin(sure)) if not sure.all() else len(sure)
    assert list(answer.token_ids)[:length] == golden["p33.greedy"].tolist()[:length]


def test_info_names_the_quantization() -> None:
    name = "quant-gptq-int4-g32-actorder-sym-a"
    command = [sys.executable, "-m", "ferrule", "info", str(OWN / name), "--json"]
    facts = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert facts["model"]["stored_quantization"] == "gptq: int4, groups of 32"


def test_a_field_that_is_not_understood(tmp_path: Path) -> None:
    source = OWN / "quant-ct-w4a16-g32-asym-a"
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["transform_config"] = {"config_groups": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=r"quantization_config\.transform_config"):
        LLM(tmp_path, progress=False)
