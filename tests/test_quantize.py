"""`ferrule.quantize` and `ferrule quantize`, from Python and from a shell."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from ferrule import (
    LLM,
    InvalidParameterError,
    ModelNotFoundError,
    UnsupportedModelError,
    evaluate,
    quantize,
)

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "models/training/heldout_stories.txt").read_text()
MODEL = "tales-1m"


def cli(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ferrule", *args]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300, check=False)


def test_same_bits_as_the_source(tmp_path: Path) -> None:
    written = quantize(MODEL, tmp_path / "out", format="int4")
    assert written.quantized_before is None
    with LLM(written.path) as copy, LLM(MODEL, quantization="int4") as source:
        ids = source.tokenize(TEXT[:400])
        assert np.array_equal(copy.logits(ids), source.logits(ids))
        assert copy.info.weight_bytes == source.info.weight_bytes == sum(written.forms.values())
        assert copy.chat([{"role": "user", "content": "Hi"}], max_tokens=8, temperature=0).text
    bits = 8 * sum(written.forms.values()) / copy.info.parameters
    assert written.bits_per_weight == pytest.approx(bits)
    assert written.bytes == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_the_packed_layout_is_the_documented_one(tmp_path: Path) -> None:
    """docs/FORMAT.md, read with NumPy alone."""
    quantize(MODEL, tmp_path / "out", format="int4", rules={"*.1.mlp.down_proj*": "int8"})
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    down = "model.layers.{}.mlp.down_proj.weight"
    stored = (ROOT / "models/tales-1m/model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(stored[:8], "little")
    original = json.loads(stored[8:begin])
    for layer, form in ((0, "int4"), (1, "int8")):
        name = down.format(layer)
        entry = header[f"{name}:{form}"]
        assert entry["dtype"] == "U8"
        a, b = entry["data_offsets"]
        assert (start + a) % 64 == 0
        blocks = np.frombuffer(data[start + a : start + b], np.uint8).reshape(entry["shape"])
        d = blocks[:, :64].copy().view(np.float32)[:, :, None]  # [row blocks, 16, 1]
        if form == "int8":
            lines = blocks[:, 64:].view(np.int8).reshape(-1, 64, 16, 4)
            w8 = lines.transpose(0, 2, 1, 3).reshape(-1, 16, 256)
        else:
            sc = blocks[:, 64:128].reshape(-1, 4, 16)
            sc = np.stack([sc & 15, sc >> 4], axis=-1).transpose(0, 2, 1, 3).reshape(-1, 16, 8) + 1
            mn = blocks[:, 128:256].view(np.int8).reshape(-1, 4, 16, 2)
            mn = mn.transpose(0, 2, 1, 3).reshape(-1, 16, 8)
            q = blocks[:, 256:].reshape(-1, 4, 8, 16, 4)  # t, j, r, i
            q = np.stack([q & 15, q >> 4], axis=2)  # t, half, j, r, i
            q = q.transpose(0, 4, 1, 2, 3, 5).reshape(-1, 16, 8, 32).astype(np.int32)
            w8 = (sc[..., None].astype(np.int32) * q - mn[..., None]).reshape(-1, 16, 256)
        found = (d * w8).reshape(-1, 256)
        at = [begin + i for i in original[name]["data_offsets"]]
        raw = np.frombuffer(stored[at[0] : at[1]], np.uint16).astype(np.uint32) << 16
        expected = raw.view(np.float32).reshape(original[name]["shape"])
        error = np.square(found - expected).sum() / np.square(expected).sum()
        assert found.shape == expected.shape
        assert error < (0.0002 if form == "int8" else 0.01)


@pytest.mark.parametrize(("form", "h", "group"), [("int5", 1, 32), ("int6", 2, 16)])
def test_the_packed_layout_of_int5_and_int6(
    tmp_path: Path, form: Literal["int5", "int6"], h: int, group: int
) -> None:
    quantize(MODEL, tmp_path / "out", format=form)
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    name = "model.layers.2.mlp.down_proj.weight"
    entry = header[f"{name}:{form}"]
    a, b = entry["data_offsets"]
    blocks = np.frombuffer(data[start + a : start + b], np.uint8).reshape(entry["shape"])
    d = blocks[:, :32].copy().view(np.float16).astype(np.float32)  # [row blocks, 16]
    end = 64 + 256 // group * 16
    s = blocks[:, 64:end].view(np.int8).reshape(-1, 256 // group, 16)
    lines = blocks[:, end:].reshape(-1, 4, 8 + 2 * h, 16, 4)  # t, line, row, byte
    found = np.zeros((len(blocks), 16, 256), np.float32)
    for t, j, high in itertools.product(range(4), range(8), range(2)):
        q = lines[:, t, j] >> (4 * high) & 15
        beyond = lines[:, t, 8 + j * h // 4] >> (2 * h * (j % (4 // h)) + h * high)
        q = (q | (beyond & (1 << h) - 1) << 4).astype(np.float32) - (8 << h)
        k = 64 * t + (32 * high + 4 * j if group == 32 else 32 * (j // 4) + 4 * (j % 4) + 16 * high)
        found[:, :, k : k + 4] = q * (d * s[:, k // group])[:, :, None]
    stored = (ROOT / "models/tales-1m/model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(stored[:8], "little")
    original = json.loads(stored[8:begin])[name]
    at = [begin + i for i in original["data_offsets"]]
    raw = np.frombuffer(stored[at[0] : at[1]], np.uint16).astype(np.uint32) << 16
    expected = raw.view(np.float32).reshape(original["shape"])
    error = np.square(found.reshape(-1, 256) - expected).sum() / np.square(expected).sum()
    assert error < (0.003 if form == "int5" else 0.0008)


def test_bits(tmp_path: Path) -> None:
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text(TEXT[:12_000])
    more = ["--calibrate", str(text), "--chunks", "3", "--bits", "5.6", "--json"]
    done = cli("quantize", MODEL, "-o", str(out), *more)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 5.3 < found["bits_per_weight"] <= 5.6
    assert len(found["forms"]) > 1
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["format"], config["bits"]) == ("mixed", 5.6)
    with LLM(out) as llm:
        assert llm.generate("Once upon a time", max_tokens=4, temperature=0).text
    done = cli("quantize", MODEL, "-o", str(tmp_path / "b"), "--bits", "5.6")
    assert done.returncode == 1
    assert "bits: found 5.6, expected a calibration text beside it" in done.stderr
    for arguments in (["-f", "int3"], ["--rule", "*=int3"]):
        done = cli("quantize", MODEL, "-o", str(tmp_path / "b"), *arguments)
        assert done.returncode == 2
        assert all(form in done.stderr for form in ("int4", "int5", "int6", "int8", "none"))


def test_calibration_lessens_the_distance(tmp_path: Path) -> None:
    quantize(MODEL, tmp_path / "a", format="int4")
    quantize(MODEL, tmp_path / "b", format="int4", calibrate=TEXT[:40_000], chunks=10)
    kl = []
    for name in ("a", "b"):
        found = evaluate(tmp_path / name, TEXT[50_000:70_000], reference=MODEL)
        assert found.distance is not None
        kl.append(found.distance.kl.value)
    assert kl[1] < 0.75 * kl[0]


def test_errors(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InvalidParameterError, match="calibrate: found too few tokens"):
        quantize(MODEL, out, calibrate="too short")
    with pytest.raises(InvalidParameterError, match="rules: found"):
        quantize(MODEL, out, rules={"*no-such*": "int8"})
    with pytest.raises(InvalidParameterError, match=r"format: found .*int3.*int5.*int6"):
        quantize(MODEL, out, format="int3")
    with pytest.raises(ModelNotFoundError):
        quantize(tmp_path / "nothing", out)
    gguf = next((ROOT / "tests/golden/gguf").rglob("*.gguf"))
    with pytest.raises(UnsupportedModelError, match="is a GGUF file"):
        quantize(gguf, out)
    assert list(tmp_path.iterdir()) == []
    quantize(MODEL, out)
    with pytest.raises(InvalidParameterError, match="expected a path where nothing is"):
        quantize(MODEL, out)
    with pytest.raises(UnsupportedModelError, match='quantization="auto" only'):
        LLM(out, quantization="int8")


def test_command_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    rule = "*embed*=int8"
    done = cli("quantize", MODEL, "-o", str(out), "--rule", rule, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert set(found["forms"]) == {"int4", "int8"}
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["rules"] == [["*embed*", "int8"]]
    done = cli("info", str(out), "--json")
    assert json.loads(done.stdout)["model"]["weight_bytes"] == found["forms"]
    assert cli("quantize", MODEL, "-o", str(out)).returncode == 1
    assert cli("quantize", MODEL).returncode == 2
    assert cli("quantize", MODEL, "-o", "x", "--rule", "int8").returncode == 2


def test_a_source_that_was_quantized_before(tmp_path: Path) -> None:
    golden = ROOT / "tests/golden/quant-gpt-oss-mxfp4-a"
    done = cli("quantize", str(golden), "-o", str(tmp_path / "out"), "-f", "int8")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("ferrule: note: the source was quantized before (mxfp4)")
    done = cli("info", str(tmp_path / "out"), "--json")
    assert {"mxfp4", "int8"} <= set(json.loads(done.stdout)["model"]["weight_bytes"])


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text(TEXT * 20)
    (tmp_path / "place").mkdir()
    out = tmp_path / "place" / "out"
    command = [sys.executable, "-m", "ferrule", "quantize", "tales-4m", "-o", str(out)]
    process = subprocess.Popen([*command, "--calibrate", str(path)], stderr=subprocess.PIPE)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    assert list((tmp_path / "place").iterdir()) == []


def test_gguf_is_the_model(tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    written = quantize(MODEL, out, format="bf16", progress=False)
    assert written.bytes == out.stat().st_size
    assert set(written.forms) == {"BF16"}
    prompt = "Once upon a time"
    chat = [{"role": "user", "content": "Tell me a story."}]
    exact: dict[str, Any] = {"quantization": "none", "kv_cache_dtype": "f32"}
    with LLM(out, **exact) as copy, LLM(MODEL, **exact) as source:
        ids = source.tokenize(prompt)
        assert copy.tokenize(prompt) == ids
        assert np.allclose(copy.logits(ids), source.logits(ids), atol=1e-4)
        greedy = [llm.generate(prompt, max_tokens=24, temperature=0) for llm in (copy, source)]
        assert greedy[0].text == greedy[1].text
        answers = [llm.chat(chat, max_tokens=24, temperature=0) for llm in (copy, source)]
        assert answers[0].text == answers[1].text
        assert answers[0].finish_reason == answers[1].finish_reason
        for field in ("temperature", "top_p"):
            value, key = copy.info.defaults[field]
            assert value == source.info.defaults[field][0]
            assert str(key).startswith("general.sampling.")
    with pytest.raises(InvalidParameterError, match="a path where nothing is"):
        quantize(MODEL, out, format="bf16")
    with pytest.raises(InvalidParameterError, match="q4_k"):
        quantize(MODEL, tmp_path / "n.gguf", format="int4")
    with pytest.raises(InvalidParameterError, match="calibrat"):
        quantize(MODEL, tmp_path / "n.gguf", calibrate=TEXT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf"]


def test_gguf_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    done = cli("quantize", MODEL, "-o", str(out), "-f", "q8_0", "--rule", "*embed*=f16", "--json")
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["forms"]) == {"Q8_0", "F16"}
    shown = cli("inspect", str(out))
    assert "general.architecture" in shown.stdout
    done = cli("quantize", MODEL, "-o", str(tmp_path / "n.gguf"), "-f", "q3_k")
    assert done.returncode == 2
    window = ROOT / "tests/golden/granite-swa-a"
    done = cli("quantize", str(window), "-o", str(tmp_path / "n.gguf"), "-f", "f32")
    assert done.returncode == 1
    assert "GGUF has no words" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf"]


def test_inspect_of_a_packed_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(MODEL, out, format="int8", progress=False)
    done = cli("inspect", str(out))
    assert done.returncode == 0
    assert "model.safetensors: safetensors" in done.stdout
    assert "v_proj.weight:int8" in done.stdout
    name = json.dumps("\x1b[2J\x9b1mevil\n" + "n" * 300)
    header = ('{"__metadata__":{"\\u001b[0m":"\\u009b31m"},' + name).encode()
    header += b':{"dtype":"F32","shape":[0,4294967295],"data_offsets":[0,0]}}'
    evil = tmp_path / "model.safetensors"
    evil.write_bytes(len(header).to_bytes(8, "little") + header)
    done = cli("inspect", str(evil))
    assert done.returncode == 0
    assert not any(c in done.stdout for c in "\x1b\x9b")
    assert max(map(len, done.stdout.split("\n"))) < 600
