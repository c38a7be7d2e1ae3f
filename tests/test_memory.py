"""A model larger than memory runs: its weights are mapped, not held."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parent.parent / "benches" / "random_model.py"

# Loads a model, with 96 MB to spare for what is no mapped file, and prints three tokens.
RUN = """
import re, resource, sys, ferrule
with ferrule.LLM("tales-1m", threads=1, progress=False) as llm:
    llm.generate("a", max_tokens=1)
status = open("/proc/self/status").read()
data = int(re.search(r"VmData:\\s*(\\d+) kB", status)[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (data + (96 << 20), resource.RLIM_INFINITY))
options = {"threads": 1, "context_length": 256, "progress": False}
with ferrule.LLM(sys.argv[1], weight_cache=sys.argv[2] or False, **options) as llm:
    assert llm.info.weight_bytes > 130 << 20
    answer = llm.generate([1, 2, 3], max_tokens=3, temperature=0, ignore_eos=True)
    print(*answer.token_ids)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 million weights."""
    spec = importlib.util.spec_from_file_location("random_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    random_model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(random_model)
    config = random_model.SHAPES["qwen3-0.6b"] | {
        "num_hidden_layers": 4,
        "vocab_size": 8192,
        "eos_token_id": 1,
    }
    block = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(np.float32)
    path = tmp_path_factory.mktemp("model")
    random_model.write_folder(config, block, path)
    (path / "tokenizer_config.json").unlink()  # a chat template needs a large stack for a moment
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts this way on Linux only")
def test_weights_take_no_memory_of_their_own(folder: Path, tmp_path: Path) -> None:
    def run(cache: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", RUN, str(folder), cache]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    packs = run(str(tmp_path))
    assert packs.returncode == 0, packs.stderr
    maps = run(str(tmp_path))
    assert (maps.returncode, maps.stdout) == (0, packs.stdout), maps.stderr
    assert len(maps.stdout.split()) == 3
    # Without the file on disk they have to be held, and the limit is felt.
    held = run("")
    assert held.returncode != 0
    assert "OutOfMemoryError" in held.stderr
