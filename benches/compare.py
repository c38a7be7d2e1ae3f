"""Run engines side by side on one model: rounds of A B C, C B A, ..., each run in its own process.

    python benches/compare.py MODEL --gguf q4_0=FILE --llama-bench PATH --out benches/results/NAME

Engines that are not given or not installed are left out, each with a line that says how to get it.
README.md, beside this file, has the commands behind each published figure and explains the
columns. Needs Linux, and the package gguf where a GGUF file is given. Never decides
whether a figure is good; it leaves out samples that other processes disturbed, and counts them.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import math
import mmap
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from peers import PEERS
from random_model import head_dim, stored

ROOT = Path(__file__).parent.parent
# Of ferrule's forms, scales included.
BITS = {"int4": 4.5, "int5": 5.375, "int6": 6.625, "int8": 8.125}
TESTS = "pp512,tg128,tg128@4096," + ",".join(f"tg32@128x{n}" for n in (1, 2, 4, 8, 16))


class Test(NamedTuple):
    """`tg32@128x4`: generate 32 tokens after 128 others in 4 sequences; `pp`: read a prompt."""

    name: str
    kind: str
    tokens: int
    depth: int
    batch: int | None  # None: one sequence, by the peer's tool for one

    @staticmethod
    def parse(name: str) -> Test:
        """The test of that name."""
        match = re.fullmatch(r"(pp|tg)(\d+)(?:@(\d+))?(?:x(\d+))?", name)
        if not match or (match[1] == "pp" and match[4]):
            raise argparse.ArgumentTypeError(f"found {name}, expected pp512, tg128@4096, tg32x4")
        batch = int(match[4]) if match[4] else None
        return Test(name, match[1], int(match[2]), int(match[3] or 0), batch)


class Engine(NamedTuple):
    """A program with a configuration: how to run a test, and how to read what it prints."""

    name: str
    weight_bytes: float  # read to generate one token
    command: Callable[[Test, int], list[str]]
    samples: Callable[[str, Test], list[float]]  # stdout -> tokens per second
    peer: bool = True
    kv_bits: float = 16  # of a number among the keys and values


# The adapters. Another peer is one more function of this kind, and a line in `engines`.


def ferrule(
    args: argparse.Namespace, config: dict[str, Any], quantization: str, kv: str = "f16"
) -> Engine:
    """`ferrule bench`."""

    def command(test: Test, threads: int) -> list[str]:
        counts = {"pp": (test.tokens, 0), "tg": (0, test.tokens)}[test.kind]
        flags = f"-q {quantization} -p {counts[0]} -n {counts[1]} -d {test.depth}"
        flags += f" -b {test.batch or 1} -t {threads} -r {args.repetitions} --json"
        flags += f" --kv-cache-dtype {kv}"
        return [*shlex.split(args.ferrule), "bench", str(args.model), *flags.split()]

    def samples(stdout: str, _: Test) -> list[float]:
        (row,) = json.loads(stdout)
        found: list[float] = row["samples"]
        return found

    read = sum(n * (bits or BITS[quantization]) / 8 for n, bits in matrices(config))
    name = f"ferrule {quantization}" + (f" kv {kv}" if kv != "f16" else "")
    bits = 16 if kv == "f16" else 8 * (1 + 4 / head_dim(config))  # an f32 for each key and value
    return Engine(name, read, command, samples, peer=False, kv_bits=bits)


def llama_cpp(
    args: argparse.Namespace,
    config: dict[str, Any],
    name: str,
    file: str,
    flash: str,
    kv: str = "f16",
) -> Engine:
    """llama-bench, and llama-batched-bench for tests with a batch."""
    import gguf

    untied = not config["tie_word_embeddings"]
    looked_up = "token_embd.weight" if untied else None  # one row of it is read
    held = gguf.GGUFReader(file).tensors
    read = sum(int(tensor.n_bytes) for tensor in held if tensor.name != looked_up)

    types = "" if kv == "f16" else " -ctk q8_0 -ctv q8_0"

    def command(test: Test, threads: int) -> list[str]:
        if test.batch is None:
            counts = {"pp": (test.tokens, 0), "tg": (0, test.tokens)}[test.kind]
            flags = f"-p {counts[0]} -n {counts[1]} -d {test.depth} -t {threads}"
            flags += f" -r {args.repetitions} -fa {flash}{types} -o json"
            return [args.llama_bench, "-m", file, *flags.split()]
        before = max(test.depth, 1)
        context = test.batch * (-(before + test.tokens + 1) // 256 * -256)
        flags = f"-npp {before} -ntg {test.tokens} -npl {test.batch} -pps -c {context}"
        flags += f" -t {threads} -tb {threads} -fa {flash}{types} --output-format jsonl"
        tool = Path(args.llama_bench).with_name("llama-batched-bench")
        return [str(tool), "-m", file, *flags.split()]

    def samples(stdout: str, test: Test) -> list[float]:
        if test.batch is None:
            (row,) = json.loads(stdout)
            found: list[float] = row["samples_ts"]
            return found
        rows = [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]
        return [row["speed_tg"] for row in rows]

    bits = 8.5 if types else 16
    return Engine(f"llama.cpp {name} -fa {flash}{types}", read, command, samples, kv_bits=bits)


def ik_llama_cpp(args: argparse.Namespace, config: dict[str, Any], name: str, file: str) -> Engine:
    """ik_llama.cpp's programs of the same names; weights are repacked when it loads them."""
    base = llama_cpp(args, config, name, file, "1")

    def command(test: Test, threads: int) -> list[str]:
        if test.batch is None:
            counts = f"-p {test.tokens} -n 0" if test.kind == "pp" else f"-p 0 -n {test.tokens}"
            if test.depth:
                counts = f"-p 0 -n 0 -gp {test.depth},{test.tokens}"
            fixed = f"-t {threads} -fa 1 -rtr 1 -r {args.repetitions} -o json"
            return [args.ik_bench, "-m", file, *counts.split(), *fixed.split()]
        flags = base.command(test, threads)[1:-2]
        tool = Path(args.ik_bench).with_name("llama-batched-bench")
        # Its table goes to the standard error, and to a file here.
        return ["sh", "-c", '"$@" 2>&1 && rm -f llama.log', "sh", str(tool), *flags, "-rtr"]

    def samples(stdout: str, test: Test) -> list[float]:
        if test.batch is None:
            return base.samples(stdout, test)
        cells = [line.split("|") for line in stdout.splitlines() if line.startswith("|")]
        return [float(row[8]) for row in cells if row[1].strip().isdigit()]

    return base._replace(name=f"ik_llama.cpp {name}", command=command, samples=samples)


def by_python(args: argparse.Namespace, name: str, python: str, model: str) -> Engine:
    """An engine of peers.py, run by the interpreter that has it."""
    files = Path(model).glob(PEERS[name].weights)

    def command(test: Test, threads: int) -> list[str]:
        numbers = (test.tokens, test.depth, test.batch or 1, threads, args.repetitions)
        program = Path(__file__).with_name("peers.py")
        return [python, str(program), name, model, test.kind, *map(str, numbers)]

    def samples(stdout: str, _: Test) -> list[float]:
        found: list[float] = json.loads(stdout.splitlines()[-1])
        return found

    return Engine(name, sum(file.stat().st_size for file in files), command, samples)


def engines(args: argparse.Namespace, config: dict[str, Any]) -> list[Engine]:
    """What the command line asks for, as far as it is installed; a line about each of the rest."""
    dtypes = args.kv_cache_dtype.split(",")
    asked = [q for q in args.quantization.split(",") if q]
    found = [ferrule(args, config, q, kv) for q in asked for kv in dtypes]
    left_out = []
    for tool, flag in ((args.llama_bench, "--llama-bench"), (args.ik_bench, "--ik-bench")):
        if not (args.gguf and shutil.which(tool)):
            left_out.append(f"{tool}: build it (README.md), {flag} PATH --gguf NAME=FILE")
    for name, file in args.gguf:
        if shutil.which(args.llama_bench):
            flash = args.flash.split(",") if "f16" in dtypes else []
            found += [llama_cpp(args, config, name, file, f) for f in flash]
            if "int8" in dtypes:  # quantized values need flash attention there
                found.append(llama_cpp(args, config, name, file, "1", "int8"))
        if shutil.which(args.ik_bench):
            found.append(ik_llama_cpp(args, config, name, file))
    placed = {name: place.rpartition(":")[::2] for name, place in args.peer}
    if unknown := placed.keys() - PEERS.keys():
        sys.exit(f"--peer {', '.join(unknown)}: found no such engine, expected {', '.join(PEERS)}")
    for name, peer in PEERS.items():
        python, model = placed.get(name, ("", ""))
        if python and not _output(python, "-c", f"import {peer.module}; print(1)"):
            left_out.append(f"{name}: {python} cannot import {peer.module}: {peer.install}")
        elif python:
            found.append(by_python(args, name, python, model))
        else:
            left_out.append(f"{name}: {peer.install}; --peer {name}=PYTHON:MODEL")
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    return found


def options(parser: argparse.ArgumentParser) -> None:
    """What runs, and where the result goes."""
    parser.add_argument("model", type=Path, help="a Hugging Face folder")
    parser.add_argument("--ferrule", default=f"{sys.executable} -m ferrule", metavar="COMMAND")
    parser.add_argument("--quantization", default="int4", help="of ferrule; several with commas")
    parser.add_argument(
        "--kv-cache-dtype", default="f16", help="f16, int8, or f16,int8: in llama.cpp q8_0"
    )
    parser.add_argument("--llama-bench", default="llama-bench", metavar="PATH")
    parser.add_argument("--gguf", type=_named, action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--ik-bench", default="ik-llama-bench", metavar="PATH")
    parser.add_argument(
        "--peer", type=_named, action="append", default=[], metavar="NAME=PYTHON:MODEL"
    )
    parser.add_argument("--flash", default="1,0", help="llama.cpp's -fa; several with commas")
    parser.add_argument("--repetitions", type=int, default=1, help="in each process")
    parser.add_argument("--out", type=Path, required=True, help="writes OUT.json and OUT.md")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options(parser)
    parser.add_argument(
        "--tests", type=lambda text: list(map(Test.parse, text.split(","))), default=TESTS
    )
    parser.add_argument(
        "--threads", type=lambda text: list(map(int, text.split(","))), default=[1, 2]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bound", type=_numbers, default={}, metavar="1=GB/S,2=GB/S")
    parser.add_argument("--peak", type=_numbers, default={}, metavar="1=TOP/S,2=TOP/S")
    parser.add_argument(
        "--disturbed", type=float, default=0.06, help="share of the CPUs' time that others may take"
    )
    parser.add_argument("--retries", type=int, default=2, help="of a disturbed sample")
    args = parser.parse_args()
    config = json.loads((args.model / "config.json").read_text())
    contestants = engines(args, config)
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "machine": machine(),
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "ferrule": _output(*shlex.split(args.ferrule), "--version"),
        "isa": isa(args),
        "bandwidth": {"method": "given", "gb_per_s": args.bound},
        "peak": {"method": "given", "tops": args.peak},
        "samples": [],
    }
    for engine in contestants:  # fills the caches: packed weights, pages of the files
        run(engine, Test.parse("tg1"), max(args.threads))
    for number in range(args.rounds):
        measure_limits(report, args)
        order = contestants[::-1] if number % 2 else contestants
        for threads in args.threads:
            for test in args.tests:
                for engine in order:
                    for _ in range(args.retries + 1):
                        sample = run(engine, test, threads)
                        sample["clean"] = sample["others"] <= args.disturbed
                        report["samples"].append({"round": number, **sample})
                        print(
                            f"{number} {sample['engine']} {test.name} t{threads}: "
                            f"{sample['tokens_per_s']:.2f} ({sample['others']:.0%} others)",
                            file=sys.stderr,
                        )
                        if sample["clean"]:
                            break
        report["rows"] = rows(report, contestants, args.tests, config)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(markdown(report, args.model.name))
    print(markdown(report, args.model.name))


def run(engine: Engine, test: Test, threads: int) -> dict[str, Any]:
    """One process: its speed, its peak memory, and how much CPU time others took meanwhile."""
    command = engine.command(test, threads)
    began, busy = time.monotonic(), _busy_s()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall, others = time.monotonic() - began, _busy_s() - busy - used.ru_utime - used.ru_stime
        out.seek(0)
        err.seek(0)
        if process.returncode:
            sys.exit(f"{shlex.join(command)}\nended with {process.returncode}:\n{err.read()}")
        speeds = engine.samples(out.read(), test)
    if not speeds:
        sys.exit(f"{shlex.join(command)}\nprinted no result")
    return {
        "engine": engine.name,
        "test": test.name,
        "threads": threads,
        "tokens_per_s": statistics.median(speeds),
        "peak_rss_bytes": used.ru_maxrss * 1024,
        "others": max(0.0, others) / (wall * (os.cpu_count() or 1)),
        "wall_s": round(wall, 2),
        "command": shlex.join(command),
    }


def _busy_s() -> float:
    """Seconds of CPU time used or stolen since the machine started."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


# The bounds.


def matrices(config: dict[str, Any]) -> Iterator[tuple[float, float | None]]:
    """Weights that one token meets in a matrix product, and their bits where these are fixed.

    That is all but norms and untied embeddings; of experts those that a token uses.
    """
    tied = config["tie_word_embeddings"]
    for name, _, shape in stored(config):
        n = math.prod(shape)
        if name.endswith("_blocks"):
            used = config["num_experts_per_tok"] / config["num_local_experts"]
            yield 2 * n * used, 4.25
        elif ".router." in name:
            yield n, 16
        elif name.endswith(".weight") and len(shape) == 2 and (tied or "embed_tokens" not in name):
            yield n, None


def bound(
    engine: Engine, test: Test, config: dict[str, Any], gb_per_s: float | None, tops: float | None
) -> float | None:
    """Tokens per second if nothing but the memory (tg) or the multipliers (pp) took time."""
    layers, dim = config["num_hidden_layers"], head_dim(config)
    if test.kind == "tg":
        if gb_per_s is None:
            return None
        batch, position = test.batch or 1, test.depth + test.tokens / 2
        kv = position * layers * 2 * config["num_key_value_heads"] * dim * engine.kv_bits / 8
        return batch * gb_per_s * 1e9 / (engine.weight_bytes + batch * kv)
    if tops is None:
        return None
    head = config["vocab_size"] * config["hidden_size"]
    product = 2 * (sum(n for n, _ in matrices(config)) - head)
    keys = test.depth + test.tokens / 2
    return tops * 1e12 / (product + 4 * layers * config["num_attention_heads"] * dim * keys)


def measure_limits(report: dict[str, Any], args: argparse.Namespace) -> None:
    """Keep the best reading of the kernel bench for each number of threads; memchr's without it."""
    memory, peak = report["bandwidth"], report["peak"]
    for count in args.threads:
        if not args.bound:
            memory["method"] = "kernels bw"
            found = kernel_bench("bw", "scalar", count, r"([\d.]+) GB/s")
            if not found:
                memory["method"] = "fallback: memchr over 1.5 GB; a tuned loop may read more"
                # In a process of its own: a child's peak memory counts from that of its parent.
                call = f"import compare; print(min(compare.memchr_s({count}, 1_536_000_000, 7)))"
                best = float(_output(sys.executable, "-c", call, cwd=Path(__file__).parent))
                found = [1.536 / best]
            memory["gb_per_s"][count] = max([memory["gb_per_s"].get(count, 0.0), *found])
        if not args.peak and report["isa"]:
            found = kernel_bench("peak", report["isa"], count, r"([\d.]+) GOP/s")
            if found:
                peak["tops"][count] = max(peak["tops"].get(count, 0.0), found[0] / 1e3)
                peak["method"] = f"kernels peak {report['isa']}"


def kernel_bench(what: str, kernels: str, threads: int, pattern: str) -> list[float]:
    """The rates that `benches/kernels` prints; none if it does not run."""
    command = f"cargo bench --bench kernels -- {what} {kernels} {threads}"
    return list(map(float, re.findall(pattern, _output(*command.split(), cwd=ROOT))))


def memchr_s(threads: int, total: int, times: int) -> list[float]:
    """Seconds to read so many bytes: libc's memchr looks for one that is not there, in threads."""
    libc = ctypes.CDLL(None)
    libc.memchr.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    libc.memchr.restype = ctypes.c_void_p
    area = mmap.mmap(-1, total)
    area.madvise(mmap.MADV_HUGEPAGE)
    held = ctypes.c_char.from_buffer(area)
    start, part = ctypes.addressof(held), total // threads
    ctypes.memset(start, 1, total)
    found = []
    for _ in range(times):
        workers = [
            threading.Thread(target=libc.memchr, args=(start + i * part, 0, part))
            for i in range(threads)
        ]
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        found.append(time.perf_counter() - began)
    del held
    area.close()
    return found


# The report.


def rows(
    report: dict[str, Any], contestants: list[Engine], tests: list[Test], config: dict[str, Any]
) -> list[dict[str, Any]]:
    """Median and range of each engine on each test, beside the best peer and the bound."""
    found = []
    for threads in sorted({s["threads"] for s in report["samples"]}):
        for test in tests:
            group = []
            for engine in contestants:
                key = (engine.name, test.name, threads)
                all_ = [
                    s for s in report["samples"] if (s["engine"], s["test"], s["threads"]) == key
                ]
                clean = [s for s in all_ if s["clean"]]
                kept = clean or all_
                speeds = [s["tokens_per_s"] for s in kept]
                limits = (report["bandwidth"]["gb_per_s"], report["peak"]["tops"])
                limit = bound(engine, test, config, *(each.get(threads) for each in limits))
                median = statistics.median(speeds)
                group.append(
                    {
                        "test": test.name,
                        "threads": threads,
                        "engine": engine.name,
                        "peer": engine.peer,
                        "median": median,
                        "min": min(speeds),
                        "max": max(speeds),
                        "samples_clean": len(clean),
                        "samples_all": len(all_),
                        "bound": limit,
                        "of_bound": median / limit if limit else None,
                        "peak_rss_bytes": max(s["peak_rss_bytes"] for s in kept),
                    }
                )
            best = max((row["median"] for row in group if row["peer"]), default=None)
            found += [row | {"of_best_peer": best and row["median"] / best} for row in group]
    return found


def markdown(report: dict[str, Any], model: str) -> str:
    """The report as text."""
    memory, peak = report["bandwidth"], report["peak"]
    speeds = ", ".join(f"{s:.1f} GB/s with {t}" for t, s in memory["gb_per_s"].items())
    peaks = ", ".join(f"{s:.2f} TOP/s with {t}" for t, s in peak["tops"].items())
    lines = [
        f"# {model}, {report['date']}",
        "",
        f"- machine: {', '.join(f'{k} {v}' for k, v in report['machine'].items())}",
        f"- ferrule: {report['ferrule']}, {report['isa'] or 'set unknown'}, {report['commit']}",
        f"- memory, by threads: {speeds} ({memory['method']})",
        f"- multipliers, by threads: {peaks or 'not measured'} ({peak['method']})",
        f"- command: `{report['command']}`",
        "",
        "Tokens per second. The commands of the engines are in the JSON file of the same name.",
        "",
        "| test | threads | engine | median | range | x best peer | bound | % of bound "
        "| peak RSS MB | samples |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in report["rows"]:
        ratio, limit = row["of_best_peer"], row["bound"]
        cells = (
            row["test"],
            row["threads"],
            row["engine"],
            f"{row['median']:.2f}" + ("" if row["samples_clean"] else " (disturbed)"),
            f"{row['min']:.2f} to {row['max']:.2f}",
            f"{ratio:.2f}" if ratio else "",
            f"{limit:.1f}" if limit else "",
            f"{row['of_bound']:.0%}" if limit else "",
            f"{row['peak_rss_bytes'] / 1e6:.0f}",
            f"{row['samples_clean']} of {row['samples_all']}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def machine() -> dict[str, Any]:
    """What ran it."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cpus": os.cpu_count(),
        "memory_gib": round(int(memory[1]) / 2**20, 1) if memory else None,
        "huge_pages": pages.read_text().strip() if pages.exists() else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }


def isa(args: argparse.Namespace) -> str:
    """The kernel set that ferrule chooses here; empty if it does not say."""
    text = _output(*shlex.split(args.ferrule), "info", "--json")
    kernels: str = json.loads(text)["kernels"] if text else ""
    return kernels


def _output(*command: str, cwd: Path | None = None) -> str:
    """What a command prints, or nothing if it fails."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    except OSError:
        return ""
    return "" if done.returncode else done.stdout.strip()


def _named(text: str) -> tuple[str, str]:
    name, _, file = text.partition("=")
    if not file:
        raise argparse.ArgumentTypeError(f"found {text}, expected NAME=FILE")
    return name, file


def _numbers(text: str) -> dict[int, float]:
    pairs = (part.split("=") for part in text.split(","))
    return {int(threads): float(value) for threads, value in pairs}


if __name__ == "__main__":
    main()
