"""Times a user waits for: loading, first token, prefix cache, gaps between tokens, Python's share.

    python benches/latency.py MODEL --quantization int4

Each load is a process of its own, for its peak memory. README.md, beside this file, has the lines.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from compare import memchr_s

LOAD = """
import resource, sys, time, ferrule
began = time.perf_counter()
llm = ferrule.LLM(sys.argv[1], quantization=sys.argv[2], progress=False)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(time.perf_counter() - began, peak, llm.info.weight_bytes)
"""


def load(args: argparse.Namespace, cache: str) -> tuple[float, float, float]:
    """Seconds, peak bytes, bytes of packed weights."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, args.model, args.quantization],
        env=os.environ | {"XDG_CACHE_HOME": cache},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    seconds, peak, weights = map(float, done.stdout.split())
    return seconds, peak, weights


def p99(ordered: list[float]) -> float:
    """The 99th percentile over the median."""
    return ordered[len(ordered) * 99 // 100] / statistics.median(ordered)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a Hugging Face folder, or the name of an embedded model")
    parser.add_argument("--quantization", default="int4")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--tokens", type=int, default=256, help="tokens generated for the gaps")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found: dict[str, float] = {}

    if Path(args.model).is_dir():
        source = sum(f.stat().st_size for f in Path(args.model).glob("*.safetensors"))
        for file in Path(args.model).glob("*.safetensors"):
            with file.open("rb") as held:  # into the page cache: the disk is not measured
                while held.read(1 << 20):
                    pass
        with tempfile.TemporaryDirectory() as cache:
            seconds, peak, weights = load(args, cache)
            found["first load, s"] = seconds
            found["first load, GB/s of the checkpoint"] = source / seconds / 1e9
            found["first load, peak memory over packed weights"] = peak / weights
            again = [load(args, cache) for _ in range(args.rounds)]
            found["second load, s"] = statistics.median(s for s, _, _ in again)

    import ferrule

    with ferrule.LLM(args.model, quantization=args.quantization, progress=False) as llm:
        rng = random.Random(0)
        fresh, cached = [], []
        for _ in range(args.rounds + 1):
            prompt = [rng.randrange(llm.info.vocab_size) for _ in range(args.prompt)]
            for times in (fresh, cached):
                times.append(llm.generate(prompt, max_tokens=1, temperature=0).stats.ttft_s)
        found[f"first token, {args.prompt} tokens of prompt, s"] = statistics.median(fresh[1:])
        found["first token, the same prompt again, s"] = statistics.median(cached[1:])

        gaps, shares, plain = [], [], []
        threads = llm.info.threads
        for _ in range(args.rounds + 1):
            prompt = [rng.randrange(llm.info.vocab_size) for _ in range(16)]
            times = []
            began = time.perf_counter()
            with llm.stream(prompt, max_tokens=args.tokens, temperature=0, ignore_eos=True) as s:
                for _ in s:
                    times.append(time.perf_counter())
                ended = time.perf_counter()
                stats = s.completion.stats
            shares.append((ended - began - stats.total_s) / args.tokens)
            gaps.append([b - a for a, b in itertools.pairwise(times)])
            # What the machine gives a program that does nothing else but read as many bytes.
            plain.append(memchr_s(threads, llm.info.weight_bytes, args.tokens))
        flat = sorted(gap for each in gaps[1:] for gap in each)
        found["gap between chunks, median, ms"] = statistics.median(flat) * 1e3
        found["gap between chunks, p99 over median"] = p99(flat)
        reads = [s for each in plain for s in each]
        found["plain reads of the weights, p99 over median"] = p99(sorted(reads))
        found["beside the engine (Python), us a token"] = statistics.median(shares[1:]) * 1e6
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        for name, value in found.items():
            print(f"{name:48} {value:10.3f}")


if __name__ == "__main__":
    main()
