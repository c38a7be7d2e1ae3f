"""Memory: mapped weights are not held, what a model takes is known before, limits are errors."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import ferrule

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


def test_weights_that_cannot_be_kept_are_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with ferrule.LLM(folder, weight_cache=tmp_path / "file" / "cache", progress=False) as llm:
        (note,) = llm.info.notes
    assert re.match(
        r"the packed weights \(\d+ MB\) could not be kept in .*file/cache: the next", note
    )
    with ferrule.LLM(folder, weight_cache=False, progress=False) as llm:
        assert llm.info.notes == []


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


# Prints what a model was planned to take and what it took beyond what Python and ferrule had.
MEASURE = """
import json, random, re, sys, ferrule
def held():
    return 1024 * int(re.search(r"RssAnon:\\s*(\\d+)", open("/proc/self/status").read())[1])
with ferrule.LLM("tales-1m", threads=1, progress=False) as llm:
    llm.generate("a", max_tokens=1)
before = held()
plan = ferrule._core.describe(sys.argv[1], quantization=sys.argv[2], kv_cache_dtype="f16",
    context_length=1024, weight_cache=False, family=None)
with ferrule.LLM(sys.argv[1], quantization=sys.argv[2], weight_cache=False, context_length=1024,
                 max_batch=1, threads=2, progress=False) as llm:
    prompt = [random.randrange(2, 1000) for _ in range(1000)]
    llm.generate(prompt, max_tokens=8, ignore_eos=True)
    planned = sum(plan["weight_bytes"].values()) + plan["working_bytes"] + llm.info.kv_cache_bytes
    print(json.dumps([planned, held() - before]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
@pytest.mark.parametrize("quantization", ["int4", "none"])
def test_a_model_takes_what_was_planned(folder: Path, quantization: str) -> None:
    command = [sys.executable, "-c", MEASURE, str(folder), quantization]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    planned, taken = json.loads(done.stdout)
    assert taken <= planned < 1.5 * taken


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup of one's own that may limit memory; only root can make one."""
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    lines = Path("/proc/self/cgroup")
    own = lines.read_text(encoding="utf-8").splitlines() if lines.exists() else []
    top = next((v1 / line.split(":")[2].lstrip("/") for line in own if ":memory:" in line), None)
    folder = (top if top and top.is_dir() else v1 if v1.is_dir() else v2) / f"ferrule-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("no cgroup can be made here")
    try:
        if not any((folder / f"memory.{name}").exists() for name in ("limit_in_bytes", "max")):
            pytest.skip("this cgroup does not limit memory")
        yield folder
    finally:
        folder.rmdir()


def test_a_limit_is_an_error_with_a_remedy_and_not_the_end(folder: Path, cgroup: Path) -> None:
    limit = cgroup / "memory.limit_in_bytes"
    (limit if limit.exists() else cgroup / "memory.max").write_text(str(160 << 20))

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        words = ["run", "--raw", str(folder), "a", "--max-tokens", "3", "--ignore-eos", *more]
        code = (
            f"open({str(cgroup / 'cgroup.procs')!r}, 'w').write('0')\n"
            f"from ferrule.cli import main\nraise SystemExit(main({words!r}))"
        )
        command = [sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    stored = run("-q", "none", "--no-weight-cache")  # 143 MB of weights, 36 MB to work in
    assert stored.returncode == 1, stored
    assert "int4" in stored.stderr
    assert "weight_cache" in stored.stderr
    assert run("-q", "int4", "--no-weight-cache").returncode == 0
    # 4 kB of keys and values for each of 4 layers and position: 655 MB.
    asked = run("-q", "int4", "--no-weight-cache", "-c", "40000")
    assert asked.returncode == 1, asked
    assert "context_length" in asked.stderr
    assert "int8" in asked.stderr
