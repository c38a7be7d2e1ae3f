"""GGUF files through the Python face and the command line."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import ferrule
from ferrule import LLM

GOLDEN = Path(__file__).parent / "golden/gguf"
LLAMA = GOLDEN / "llama-a/model-Q4_K_M.gguf"
MESSAGES = [{"role": "user", "content": "Hi"}]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def with_keys(path: Path, **items: tuple[int, bytes]) -> Path:
    """A copy of the golden model with more keys."""
    data = LLAMA.read_bytes()
    (count,) = struct.unpack("<Q", data[16:24])
    header, aligned = data[24:], len(data)
    new = b"".join(text(key.replace("__", ".")) + struct.pack("<I", kind) + value
                   for key, (kind, value) in items.items())  # fmt: skip
    # The data moves by whole alignments.
    filler = -len(new) % 32
    key = "x" * ((filler - 8 - 4 - 1) % 32 + 32)
    new += text(key) + struct.pack("<IB", 0, 1)
    assert (len(new) + aligned) % 32 == aligned % 32
    path.write_bytes(data[:16] + struct.pack("<Q", count + len(items) + 1) + new + header)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    shutil.copy(LLAMA, folder / "model-Q4_K_M.gguf")
    return folder


def test_a_file_and_a_folder_are_the_same_model(folder: Path) -> None:
    with LLM(LLAMA, progress=False) as llm, LLM(str(folder), progress=False) as other:
        assert llm.info.architecture == "llama"
        assert llm.info.quantization == "grouped"
        assert llm.info.chat_template
        assert llm.info.path == str(LLAMA)
        assert other.info.path == str(folder / LLAMA.name)
        texts = [
            model.generate("def f(x):", max_tokens=20, temperature=0, ignore_eos=True)
            for model in (llm, other)
        ]
        assert texts[0].token_ids == texts[1].token_ids
        assert len(texts[0].token_ids) == 20
        # BOS is put in front, once.
        assert llm.tokenize("a", add_special=True)[0] == 312
        assert (
            llm.tokenize("<|begin_of_text|>a", add_special=True, parse_special=True).count(312) == 1
        )
        assert llm.apply_chat_template(MESSAGES).startswith("<|begin_of_text|>")
        assert llm.chat(MESSAGES, max_tokens=3).usage.completion_tokens <= 3


def test_exact_weights(tmp_path: Path) -> None:
    golden = json.loads((GOLDEN / "llama-a/golden.json").read_text())
    with LLM(LLAMA, quantization="none", weight_cache=tmp_path, progress=False) as llm:
        assert llm.info.quantization == "grouped"  # exactly what the file has
        for item in golden["tokenizer"]["texts"]:
            assert llm.tokenize(item["text"], parse_special=True) == item["ids_no_special"]
            assert llm.detokenize(item["ids"]) == item["decoded_with_special"]


def test_defaults_come_from_the_file(tmp_path: Path) -> None:
    items = {
        "general.sampling.temp": (6, struct.pack("<f", 0.6)),
        "general.sampling.top_k": (5, struct.pack("<i", 20)),
        "general.sampling.penalty_repeat": (8, text("much")),
    }
    path = with_keys(tmp_path / "m.gguf", **items)
    with LLM(path, progress=False) as llm:
        assert llm.info.defaults["temperature"] == (0.6, "general.sampling.temp")
        assert llm.info.defaults["top_k"] == (20, "general.sampling.top_k")
        assert llm.info.defaults["repetition_penalty"] == (1.0, "built in")
        assert llm.info.defaults["top_p"] == (1.0, "built in")


def test_errors_name_the_file_and_the_key(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(LLAMA.read_bytes()[:300_000])
    with pytest.raises(ferrule.ModelFormatError, match=r"m.gguf.*the file is cut short") as caught:
        LLM(path, progress=False)
    assert caught.value.file == str(path)
    with_keys(path, **{"llama.logit_scale": (6, struct.pack("<f", 2.0))})
    with pytest.raises(ferrule.UnsupportedModelError, match=r"m.gguf: metadata: logit_scale: 2.0"):
        LLM(path, progress=False)
    path.write_bytes(LLAMA.read_bytes().replace(b"llama-bpe", b"llama-bpx"))
    with pytest.raises(ferrule.TokenizerError, match=r"tokenizer.ggml.pre.*llama-bpx"):
        LLM(path, progress=False)
    shutil.copy(LLAMA, tmp_path / "n.gguf")
    with pytest.raises(ferrule.ModelFormatError, match=r"2 GGUF models \(m.gguf, n.gguf\)"):
        LLM(tmp_path, progress=False)
    with pytest.raises(ferrule.ModelNotFoundError):
        LLM(tmp_path / "o.gguf", progress=False)


def cli(*args: str | os.PathLike[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ferrule", *args],
        capture_output=True, encoding="utf-8", timeout=120, check=False,
    )  # fmt: skip


def test_inspect() -> None:
    done = cli("inspect", LLAMA)
    assert done.returncode == 0
    assert "model-Q4_K_M.gguf: gguf version 3, 370720 bytes" in done.stdout
    assert "13 tensors, 557856 numbers (6 Q4_K, 4 F32, 3 Q6_K)" in done.stdout
    assert any(
        line.split() == ["llama.block_count", "u32", "1"] for line in done.stdout.split("\n")
    )
    report = json.loads(cli("inspect", "--json", LLAMA).stdout)
    assert [file["format"] for file in report["files"]] == ["gguf"]
    tokens = next(i for i in report["metadata"] if i["key"] == "tokenizer.ggml.tokens")
    assert (tokens["type"], tokens["length"], len(tokens["value"])) == ("list of text", 320, 16)
    tensor = report["tensors"][0]
    assert (tensor["name"], tensor["dtype"], tensor["shape"]) == (
        "token_embd.weight", "Q4_K", [320, 256],
    )  # fmt: skip
    assert LLAMA.read_bytes()[tensor["start"] :][: tensor["bytes"]]


def test_inspect_safetensors() -> None:
    done = cli("inspect", GOLDEN.parent / "llama31-a")
    assert done.returncode == 0
    assert "model-00002-of-00002.safetensors: safetensors" in done.stdout
    assert "21 tensors" in done.stdout
    assert '"pt"' in done.stdout
    report = json.loads(cli("inspect", "--json", GOLDEN / "blocks.safetensors").stdout)
    assert report["metadata"] == []


def test_inspect_is_safe(tmp_path: Path) -> None:
    evil = "\x1b]0;title\x07\x1b[2Jkey\n" + "k" * 300
    path = with_keys(tmp_path / "m.gguf", **{evil: (8, text("\x1b[31m" + "v" * 500))})
    done = cli("inspect", path)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert "\x07" not in done.stdout
    assert "\\u001b[31mvvv" in done.stdout
    assert max(map(len, done.stdout.split("\n"))) < 600
    path.write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 100)
    done = cli("inspect", path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "18446744073709551615 tensors" in done.stderr
    assert "Traceback" not in done.stderr
    assert cli("inspect", tmp_path / "nothing").returncode == 1
    assert cli("inspect").returncode == 2
