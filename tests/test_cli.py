"""The command line, as a user's shell sees it."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import ferrule
from ferrule import cli

STORY = "Tell me a story about a fox and a lantern."


def ferrule_cli(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    options.setdefault("stdin", subprocess.DEVNULL if "input" not in options else None)
    return subprocess.run(
        [sys.executable, "-m", "ferrule", *args],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
        **{name: value for name, value in options.items() if value is not None},
    )


def test_version_and_help() -> None:
    assert ferrule_cli("--version").stdout == f"ferrule {ferrule.__version__}\n"
    text = ferrule_cli("--help").stdout
    assert all(command in text for command in ("run", "bench", "info", "plan", "doctor"))


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["fly"],
        ["run", "--no-such-option"],
        ["run", "tales-1m", "a", "b"],
        ["run", "-m", "tales-1m", "a", "b"],
        ["run", "tales-1m", "-q", "int8", "a", "b"],
        ["doctor", "again"],
        ["run", "--temperature", "hot", "a"],
        ["run", "tales-1m"],
        ["bench", "-p", "x"],
        ["bench", "-p", "-3"],
        ["bench", "-r", "0"],
    ],
)
def test_wrong_usage(args: list[str]) -> None:
    done = ferrule_cli(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["run", "./nowhere/at/all", "a"], "nowhere"),
        (["info", "nowhere"], "nowhere"),
        (["run", "--max-tokens", "5000", "a"], "1024"),
        (["run", "--temperature", "-1", "a"], "temperature"),
        (["run", "--raw", "-s", "be short", "a"], "chat template"),
        (["bench", "tales-1m", "-p", "4096", "-n", "0"], "1024"),
        (["run", "--seed", "-1", "a"], "seed: found -1"),
        (["run", "--family", "/no/such.toml", "a"], "family: /no/such.toml"),
        (["run", "--chat-template", "/no/such.jinja", "a"], "--chat-template: /no/such.jinja"),
        (["plan", "--family", "/no/such.toml", "tales-1m"], "family: /no/such.toml"),
        (["eval", "tales-1m", "--text", "/no/such.txt"], "--text: /no/such.txt"),
        (
            ["quantize", "tales-1m", "-o", "never", "--calibrate", "/no/such.txt"],
            "--calibrate: /no/such.txt",
        ),
    ],
)
def test_errors(args: list[str], text: str) -> None:
    done = ferrule_cli(*args)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("ferrule: ")
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_run_the_embedded_model() -> None:
    done = ferrule_cli("run", STORY, "--seed", "1")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "fox" in done.stdout
    assert done.stdout.endswith("\n")
    assert done.stdout == ferrule_cli("run", "tales-4m", STORY, "--seed", "1").stdout
    assert done.stdout == ferrule_cli("run", "-m", "tales-4m", STORY, "--seed", "1").stdout
    assert done.stdout == ferrule_cli("run", "tales-4m", "--seed", "1", STORY).stdout
    assert done.stdout == ferrule_cli("run", "--seed", "1", input=STORY + "\n").stdout


def test_run_json_and_raw() -> None:
    done = ferrule_cli(
        "run", "tales-1m", "Once upon a time", "--raw", "--temperature", "0", "--max-tokens", "5",
        "--json",
    )  # fmt: skip
    answer = json.loads(done.stdout)
    assert answer["finish_reason"] == "length"
    assert len(answer["token_ids"]) == answer["usage"]["completion_tokens"] == 5
    with ferrule.LLM("tales-1m") as llm:
        want = llm.generate("Once upon a time", max_tokens=5, temperature=0)
    assert answer["text"] == want.text


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("Once upon {{ messages[0].content }}")
    options = ["--temperature", "0", "--max-tokens", "5"]
    own = ferrule_cli("run", "a time", "--chat-template", str(tmp_path / "t.jinja"), *options)
    assert own.stdout == ferrule_cli("run", "--raw", "Once upon a time", *options).stdout


def test_run_options() -> None:
    done = ferrule_cli(
        "run", "tales-1m", STORY, "--stats", "--stop", ".", "-s", "You are brief.", "-q", "int8",
        "--top-k", "5", "--top-p", "0.9", "--min-p", "0.01", "-t", "1", "--kv-cache-dtype", "int8",
        "-c", "512", "--no-weight-cache",
    )  # fmt: skip
    assert done.returncode == 0
    assert "." not in done.stdout
    assert "seed" in done.stderr


@pytest.mark.parametrize("args", [["run"], ["eval", "tales-1m", "--text", "-"]])
def test_piped_bytes_that_are_no_text(args: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ferrule", *args],
        input=b"\xff\xfe",
        capture_output=True,
        check=False,
        env={**os.environ, "LC_ALL": "C"},  # where Python would read anything as text
    )
    assert done.returncode == 1
    assert done.stderr.startswith(b"ferrule: ")
    assert b"UTF-8" in done.stderr


@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="there is no /dev/full, a disk that is always full"
)
@pytest.mark.parametrize("args", [["info"], ["run", "Hi"], ["bench", "-p", "8", "-n", "0"]])
def test_a_full_disk_is_one_line(args: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ferrule", *args],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == b"ferrule: could not write: No space left on device\n"


@pytest.mark.skipif(os.name != "posix", reason="the command is one of a POSIX shell")
@pytest.mark.parametrize(
    ("command", "status", "text"),
    [("info >&-", 1, "standard output is closed"), ("run <&-", 2, "no prompt for the model")],
)
def test_closed_streams(command: str, status: int, text: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -m ferrule {command}'],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (status, 1)
    assert text in done.stderr


def test_an_embedded_model_can_be_inspected() -> None:
    found = json.loads(ferrule_cli("inspect", "tales-1m", "--json").stdout)
    assert found["files"][0]["name"] == "model.safetensors"


def test_bench() -> None:
    args = ["bench", "tales-1m", "-p", "32,64", "-n", "4", "-d", "0,70", "-b", "1,2", "-r", "2"]
    rows = json.loads(ferrule_cli(*args, "--json").stdout)
    tests = [row["test"] for row in rows]
    assert tests[:3] == ["pp32", "pp64", "tg4"]
    assert "tg4 @ d70 x 2" in tests
    assert len(rows) == 12
    for row in rows:
        assert row["params"] == 853_120
        assert len(row["samples"]) == 2
        assert all(isinstance(what, str) for what in row["slowed_by"])
        assert row["tokens_per_s_mean"] > 0
    small = ["bench", "tales-1m", "-p", "16", "-n", "2", "-r", "2", "-t", "1"]
    table = ferrule_cli(*small).stdout.splitlines()
    assert table[0].split(" | ")[1:3] == ["size", "params"]
    assert len(table) == 4
    assert "pp16" in table[2]
    assert "±" in table[3]
    lines = list(csv.DictReader(io.StringIO(ferrule_cli(*small, "-o", "csv").stdout)))
    assert [line["test"] for line in lines] == ["pp16", "tg2"]
    assert lines[0]["threads"] == "1"
    lines = ferrule_cli(*small, "-o", "jsonl").stdout.splitlines()
    assert [json.loads(line)["test"] for line in lines] == ["pp16", "tg2"]


def test_info() -> None:
    facts = json.loads(ferrule_cli("info", "tales-1m", "--json").stdout)
    assert facts["version"] == ferrule.__version__
    assert facts["kernels"] in facts["kernels_available"]
    assert facts["cuda"] is False
    assert facts["threads"] >= 1
    model = facts["model"]
    assert (model["family"], model["parameters"]) == ("llama", 853_120)
    assert model["active_parameters"] == model["parameters"]
    assert model["stored_bytes"] == {"BF16": 2 * model["parameters"]}
    # Keys and values in f16 of pages of 64 positions.
    heads, dim = 2, 32
    assert model["kv_bytes_1000_tokens"] == 1024 * 2 * 2 * heads * dim * sum(
        model["layers"].values()
    )
    forced = {**os.environ, "FERRULE_ISA": "scalar"}
    facts = json.loads(ferrule_cli("info", "tales-1m", "--json", env=forced).stdout)
    assert facts["kernels"] == "scalar"
    assert facts["model"]["runs_on"].startswith("cpu, scalar")
    text = ferrule_cli("info", "tales-1m", "-q", "int4", "--kv-cache-dtype", "int8").stdout
    assert "int4" in text
    text = ferrule_cli("info").stdout
    assert "cuda" in text
    assert "no" in text


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_interrupt() -> None:
    command = [sys.executable, "-m", "ferrule", "run", "--raw", "Once", "--ignore-eos"]
    command += ["--max-tokens", "1000", "-t", "1", "-q", "none"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)  # it has begun to answer
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in stderr


@pytest.mark.skipif(os.name != "posix", reason="the command is one of a POSIX shell")
def test_broken_pipe() -> None:
    code = f'"{sys.executable}" -m ferrule run --raw Once --ignore-eos --max-tokens 900 | head -c 5'
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {code}"], capture_output=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(done.stdout) == 5


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_chat_on_a_terminal(tmp_path: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "ferrule", "run", "--temperature", "0", "--max-tokens", "20"]
    plain = {**os.environ, "TERM": "dumb"}  # no escape sequences
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=plain)
    os.close(theirs)
    seen = b""

    def until(text: bytes, count: int = 1) -> None:
        nonlocal seen
        end = time.monotonic() + 30
        while seen.count(text) < count:
            readable, _, _ = select.select([ours], [], [], max(0, end - time.monotonic()))
            assert readable, seen
            seen += os.read(ours, 4096)

    until(b"> ")
    os.write(ours, b"Hello!\n")
    until(b"\n> ", 2)
    assert b"Hello! " in seen
    os.write(ours, b"/reset\n")
    until(b"\n> ", 3)
    process.send_signal(signal.SIGINT)  # at the prompt: forgets the line, no more
    os.write(ours, b"\n")  # readline may not look before the next key
    until(b"\n> ", 4)
    os.write(ours, b"/exit\n")
    assert process.wait(timeout=60) == 0
    os.close(ours)


def test_import_is_light() -> None:
    code = (
        "import sys, ferrule, ferrule.cli; ferrule.LLM('tales-1m')\n"
        "print([m for m in ('numpy', 'huggingface_hub', 'asyncio') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_commands_in_the_documentation_are_valid() -> None:
    root = Path(__file__).parent.parent
    for page in (root / "README.md", root / "docs/raspberry-pi.md", root / "docs/jetson.md"):
        blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
        lines = [line for line in "".join(blocks).splitlines() if line.startswith("ferrule ")]
        assert lines, page
        for line in lines:
            args, more = cli._parser().parse_known_args(shlex.split(line, comments=True)[1:])
            assert not [word for word in more if word.startswith("-")], line
            assert callable(args.run), line
