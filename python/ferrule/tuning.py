"""What `ferrule tune` found on this machine: read when a model is loaded with `threads="auto"`.

One small JSON file in the cache folder. It holds for the CPU, the kernel set and the CPUs that it
was made with; under other ones it is not used.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from . import _core

_BUDGET_S = 8.0
_GAIN = 1.03
"""A setting replaces the default if it is this much faster; less is noise."""
_WINS = 0.8
"""And if it was faster in this share of the rounds."""


@dataclass(frozen=True)
class Tuning:
    """How work is cut. Changes the speed only, never a result."""

    threads: int
    tile_tokens: int = 512
    """Tokens that meet a part of a matrix together."""
    claim_bytes: int = 128 << 10
    """Bytes of weights a thread takes at once when generating."""


@dataclass(frozen=True)
class Trial:
    """One setting, tried."""

    what: str
    tuning: Tuning
    seconds: float
    """Median of one product."""
    chosen: bool


def path(cache: str | os.PathLike[str]) -> Path:
    """The file in that cache folder."""
    return Path(cache) / "tuning.json"


def machine() -> str:
    """What a tuning holds for."""
    count, why = _core.threads()
    return f"{_cpu()}; {_core.kernel_set()}; {count}: {why}; {_core.version}"


def load(cache: str | os.PathLike[str]) -> Tuning | None:
    """What was found for this machine, if anything was."""
    try:
        held = json.loads(path(cache).read_text(encoding="utf-8"))
        found = Tuning(**held["tuning"]) if held.get("machine") == machine() else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # none, or not ours: the defaults are right
    return found if found and all(isinstance(n, int) for n in asdict(found).values()) else None


def save(tuning: Tuning, cache: str | os.PathLike[str]) -> Path:
    """Write it; whoever reads meanwhile sees the old file or the new one."""
    file = path(cache)
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f"{file.name}.{os.getpid()}")
    text = json.dumps({"machine": machine(), "tuning": asdict(tuning)}, indent=1)
    fresh.write_text(text + "\n", encoding="utf-8")
    fresh.replace(file)
    return file


def search(budget_s: float = _BUDGET_S) -> Iterator[Trial]:
    """Try settings against the default, interleaved; the last trial that is chosen is the result.

    Threads and claims are tried on one token (generating), tiles on many (a prompt).
    """
    cpus = os.cpu_count() or 1
    best = Tuning(_core.threads()[0])
    counts = {*range(1, min(cpus, 8) + 1), cpus, cpus // 2, *(1 << i for i in range(12))}
    few = _core.Trial(131_072, 2048)  # 151 MB: beyond most caches
    many = _core.Trial(2048, 2048)
    steps: list[tuple[str, _core.Trial, int, float, list[Tuning]]] = [
        ("threads", few, 1, 0.5, [Tuning(n) for n in sorted(counts) if 1 <= n <= cpus]),
        ("claim_bytes", few, 1, 0.3, [Tuning(0, claim_bytes=1 << i) for i in range(15, 21)]),
        ("tile_tokens", many, 1024, 0.2, [Tuning(0, tile_tokens=1 << i) for i in range(7, 11)]),
    ]
    for what, matrix, rows, share, settings in steps:
        tried = [best, *(replace(best, **{what: getattr(s, what)}) for s in settings)]
        tried = list(dict.fromkeys(tried))
        times = _race(matrix, rows, tried, budget_s * share)
        medians = [statistics.median(each) for each in times]
        fastest = min(range(len(tried)), key=medians.__getitem__)
        wins = sum(a < b for a, b in zip(times[fastest], times[0], strict=True)) / len(times[0])
        if medians[0] < _GAIN * medians[fastest] or wins < _WINS:
            fastest = 0
        for i, (tuning, seconds) in enumerate(zip(tried, medians, strict=True)):
            yield Trial(what, tuning, seconds, i == fastest)
        best = tried[fastest]


def _race(
    matrix: _core.Trial, rows: int, tried: list[Tuning], budget_s: float
) -> list[list[float]]:
    """Times of each, in rounds, for that long; every second round goes backwards."""
    times: list[list[float]] = [[] for _ in tried]
    end = time.monotonic() + budget_s
    while time.monotonic() < end or len(times[0]) < 3:
        order = range(len(tried))
        for i in order if len(times[0]) % 2 else reversed(order):
            t = tried[i]
            times[i].append(matrix.seconds(rows, t.threads, t.tile_tokens, t.claim_bytes))
    return times


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = {"model name", "CPU part", "Model"}
            found = [line.split(":", 1)[1].strip() for line in file if line.split("\t")[0] in names]
        return ", ".join(dict.fromkeys(found)) or platform.machine()
    except OSError:
        return platform.processor() or platform.machine()
