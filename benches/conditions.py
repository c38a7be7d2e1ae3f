"""What is left of the speed when a machine is not idle; each engine against itself undisturbed.

    python benches/conditions.py MODEL --gguf q4_0=FILE --llama-bench PATH --out benches/results/X

Conditions: another process busy on one CPU; two and four times as many threads as CPUs; half a
CPU's time (a cgroup quota, which needs root). Rounds go through all conditions and engines in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compare

CPUS = os.cpu_count() or 1
PERIOD_US = 100_000
BUSY = "import os; os.sched_setaffinity(0, {0}); print(flush=True)\nwhile True: pass"


@contextlib.contextmanager
def busy() -> Iterator[list[str]]:
    """Another process computes on CPU 0."""
    other = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE)
    try:
        assert other.stdout
        other.stdout.readline()
        yield []
    finally:
        other.kill()
        other.wait()


@contextlib.contextmanager
def quota() -> Iterator[list[str]]:
    """A cgroup with half a CPU's time (v2, or v1's cpu controller); the command moves into it."""
    root = Path("/sys/fs/cgroup")
    if (root / "cgroup.controllers").exists():
        folder, limits = root / "ferrule-bench", {"cpu.max": f"{PERIOD_US // 2} {PERIOD_US}"}
    else:
        folder = root / "cpu/ferrule-bench"
        limits = {"cpu.cfs_period_us": f"{PERIOD_US}", "cpu.cfs_quota_us": f"{PERIOD_US // 2}"}
    folder.mkdir(exist_ok=True)
    try:
        for name, value in limits.items():
            (folder / name).write_text(value)
        yield ["sh", "-c", f'echo $$ > {folder}/cgroup.procs; exec "$@"', "sh"]
    finally:
        folder.rmdir()


@contextlib.contextmanager
def idle() -> Iterator[list[str]]:
    """Nothing else."""
    yield []


CONDITIONS = {
    "undisturbed": (idle, CPUS),
    "a busy process on CPU 0": (busy, CPUS),
    f"{2 * CPUS} threads on {CPUS} CPUs": (idle, 2 * CPUS),
    f"{4 * CPUS} threads on {CPUS} CPUs": (idle, 4 * CPUS),
    "a quota of half a CPU": (quota, CPUS),
}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    compare.options(parser)
    parser.add_argument("--test", type=compare.Test.parse, default="tg64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.set_defaults(flash="0")
    args = parser.parse_args()
    config = json.loads((args.model / "config.json").read_text())
    contestants = compare.engines(args, config)
    samples: list[dict[str, Any]] = []
    for number in range(-1, args.rounds):  # round -1 warms up
        for name, (condition, threads) in CONDITIONS.items():
            if number < 0 and name != "undisturbed":
                continue
            for engine in contestants[::-1] if number % 2 else contestants:
                with condition() as prefix:
                    under = engine._replace(
                        command=lambda test, n, e=engine, p=prefix: [*p, *e.command(test, n)]
                    )
                    sample = compare.run(under, args.test, threads)
                print(f"{engine.name}, {name}: {sample['tokens_per_s']:.2f}", file=sys.stderr)
                samples.append({"round": number, "condition": name, **sample})
    report = {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "machine": compare.machine(),
        "samples": samples,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report, contestants, args)
    args.out.with_suffix(".md").write_text(text)
    print(text)


def markdown(
    report: dict[str, Any], contestants: list[compare.Engine], args: argparse.Namespace
) -> str:
    """The medians, and their share of the same engine's undisturbed median."""
    names = [engine.name for engine in contestants]
    lines = [
        f"# {args.model.name}, {args.test.name} under bad conditions",
        "",
        f"- machine: {', '.join(f'{k} {v}' for k, v in report['machine'].items())}",
        f"- command: `{report['command']}`",
        f"- tokens per second, median of {args.rounds}; share of the engine's undisturbed speed",
        "",
        "| condition | " + " | ".join(names) + " |",
        "|---|" + "--:|" * len(names),
    ]
    for condition in CONDITIONS:
        cells = []
        for name in names:
            median, whole = (
                statistics.median(
                    s["tokens_per_s"]
                    for s in report["samples"]
                    if s["engine"] == name and s["condition"] == c and s["round"] >= 0
                )
                for c in (condition, "undisturbed")
            )
            cells.append(f"{median:.2f} ({median / whole:.0%})")
        lines.append(f"| {condition} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
