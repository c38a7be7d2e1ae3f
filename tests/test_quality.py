"""`ferrule.evaluate`, `ferrule eval`, `ferrule compare`: against the same sums by NumPy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ferrule
from ferrule import LLM, InvalidParameterError, evaluate

TEXT = (Path(__file__).parent.parent / "models/training/heldout_stories.txt").read_text()[:6000]
MODEL = "tales-1m"


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def cli(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ferrule", *args]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=False)


def test_chunks_as_llama_cpp() -> None:
    found = evaluate(MODEL, TEXT, reference=MODEL, quantization="int4", context=128)
    with LLM(MODEL, quantization="int4") as llm, LLM(MODEL, quantization="none") as exact:
        ids = llm.tokenize(TEXT, add_special=True)
        loss, kl, right, same = [], [], [], []
        for start in range(0, len(ids) - 127, 128):
            chunk = [0, *ids[start + 1 : start + 128]]  # BOS first
            at = np.arange(64, 127)
            new = np.array(chunk[65:])
            p, q = log_softmax(llm.logits(chunk)[at]), log_softmax(exact.logits(chunk)[at])
            loss.append(-p[np.arange(63), new])
            kl.append((np.exp(q) * (q - p)).sum(axis=1))
            right.append(p.argmax(axis=1) == new)
            same.append(p.argmax(axis=1) == q.argmax(axis=1))
    assert (found.contexts, found.tokens) == (len(loss), 63 * len(loss))
    assert found.perplexity.value == pytest.approx(np.exp(np.mean(loss)), rel=1e-9)
    assert found.accuracy.value == pytest.approx(np.mean(right), rel=1e-9)
    distance = found.distance
    assert distance is not None
    assert distance.kl.value == pytest.approx(np.mean(kl), rel=1e-6)
    assert distance.kl_quantiles[0.99] == pytest.approx(np.quantile(kl, 0.99), rel=1e-5)
    assert distance.same_top.value == pytest.approx(np.mean(same))
    # The interval, from the means of chunks, which all have as many tokens.
    half = 1.959963984540054 * np.std(np.mean(kl, axis=1), ddof=1) / np.sqrt(len(kl))
    assert distance.kl.high == pytest.approx(distance.kl.value + half, rel=1e-6)
    assert found.quantization == "int4"
    assert 4.4 < found.bits_per_weight < 5 < 15.9 < distance.bits_per_weight < 16.1


def test_documents_count_wholly() -> None:
    texts = [part for part in TEXT.split("\n\n\n") if part.strip()][:3]
    found = evaluate(MODEL, texts, context=100)
    with LLM(MODEL) as llm:
        ids = [llm.tokenize(text, add_special=True)[:100] for text in texts]
        losses = [-log_softmax(llm.logits(x)[:-1])[np.arange(len(x) - 1), x[1:]] for x in ids]
    assert found.distance is None
    assert found.tokens == sum(map(len, losses))
    assert found.perplexity.value == pytest.approx(np.exp(np.concatenate(losses).mean()), rel=1e-9)


def test_same_bits_whatever_the_threads() -> None:
    one, two = (evaluate(MODEL, TEXT, context=64, threads=n) for n in (1, 2))
    assert one == two


def test_a_model_has_no_distance_from_itself() -> None:
    found = evaluate(MODEL, TEXT, reference=MODEL, reference_quantization="auto", context=64)
    assert found.distance is not None
    assert found.distance.kl.value == 0
    assert found.distance.perplexity == found.perplexity
    assert (found.distance.same_top.value, found.distance.flips.value) == (1, 0)


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("a few words", {}, "text: found .* tokens, expected at least one chunk of 512"),
        ([], {}, "text: found too few tokens"),
        (["a"], {"context": 1}, "context: found 1, expected 4 to 1024"),
        (TEXT, {"context": 2000}, "context: found 2000, expected 4 to 1024"),
        (TEXT, {"quantization": "int3"}, "quantization: found"),
        (TEXT, {"chunks": 0}, "chunks: found 0, expected at least 1"),
        ("a\ud800", {}, r"text: lone surrogate U\+D800 at position 1"),
    ],
)
def test_what_cannot_be_measured(text: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        evaluate(MODEL, text, **more)


def test_another_tokenizer_is_an_error() -> None:
    shared = os.environ.get("FERRULE_SHARED")
    if not shared:
        pytest.skip("FERRULE_SHARED is not set")
    other = Path(shared) / "weights" / "stories260K" / "hf"
    with pytest.raises(InvalidParameterError, match="reference: found another tokenizer"):
        evaluate(MODEL, TEXT, reference=other)


def test_progress_is_told() -> None:
    seen: list[tuple[str, int, int]] = []
    evaluate("tales-4m", TEXT * 5, context=256, threads=1, progress=lambda *now: seen.append(now))
    assert "evaluating" in {what for what, _, _ in seen}
    assert all(0 <= done <= total for _, done, total in seen)


def test_command_line(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    options = ["--text", str(path), "--context", "128", "--chunks", "3"]
    done = cli("eval", MODEL, "-q", "int4", "--reference", MODEL, *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert [line.split("  ")[0] for line in done.stdout.splitlines()][:4] == [
        "model",
        "text",
        "perplexity",
        "accuracy",
    ]
    done = cli("compare", MODEL, MODEL, "-q", "int4", "-r", "none", "--json", *options)
    found = json.loads(done.stdout)
    same = evaluate(MODEL, TEXT, reference=MODEL, quantization="int4", context=128, chunks=3)
    assert same.distance is not None
    assert found["perplexity"] == same.perplexity._asdict()
    assert found["distance"]["kl"] == same.distance.kl._asdict()
    assert found["distance"]["kl_quantiles"]["0.99"] == same.distance.kl_quantiles[0.99]


def test_command_line_reads_documents(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "One day, a fox went out."}\n\n{"text": "The end."}\n')
    found = json.loads(cli("eval", MODEL, "--text", str(path), "--json").stdout)
    assert found["contexts"] == 2
    # U+2028 ends a line for Python, and not for JSON.
    path.write_text('{"text": "One day,\u2028a fox went out."}\n', encoding="utf-8")
    assert json.loads(cli("eval", MODEL, "--text", str(path), "--json").stdout)["contexts"] == 1
    path.write_text('\n{"text": 3}\n')
    done = cli("eval", MODEL, "--text", str(path))
    assert done.returncode == 1
    assert 'line 2: expected an object with a string "text"' in done.stderr
    assert cli("eval", MODEL, "--text", str(tmp_path / "none")).returncode == 1


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_interrupt_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 200)
    command = [sys.executable, "-m", "ferrule", "eval", "tales-4m", "--text", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - began < 30


def test_names_are_public() -> None:
    assert {"evaluate", "Evaluation", "Distance", "Estimate"} <= set(ferrule.__all__)
