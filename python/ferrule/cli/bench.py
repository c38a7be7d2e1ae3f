"""`ferrule bench`: tokens per second, in the tables of llama.cpp's llama-bench."""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import sys
from typing import Any, Literal

from ..llm import LLM
from ..machine import Watch
from . import model_keywords, tell

_COLUMNS = ("model", "size", "params", "backend", "threads", "test", "t/s")


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.repetitions < 1 or 0 in args.batch:
        print("ferrule bench: -r and -b must be at least 1", file=sys.stderr)
        return 2
    output = "json" if args.json else args.output
    rows: list[dict[str, Any]] = []
    slowed: dict[str, list[str]] = {}
    threads: int | Literal["auto"]
    for threads in args.threads or ["auto"]:
        keywords = model_keywords(args) | {"max_batch": max(args.batch), "threads": threads}
        with LLM(args.model, **keywords) as llm:
            tell(llm)
            for depth in args.depth:
                for batch in args.batch:
                    tests = [("pp", n) for n in args.n_prompt] + [("tg", n) for n in args.n_gen]
                    for kind, tokens in tests:
                        if tokens:
                            rows.append(_measure(llm, kind, tokens, depth, batch, args.repetitions))
                            _print_row(rows, output)
                            for what in rows[-1]["slowed_by"]:
                                slowed.setdefault(what, []).append(rows[-1]["test"])
    if output == "json":
        print(json.dumps(rows, indent=1))
    for what, names in slowed.items():
        print(f"Slowed down, {', '.join(names)}: {what}.", file=sys.stderr)
    if output == "md" and (peak := _peak_rss()):
        print(f"Tokenizing is not included. Peak memory {peak / 2**20:.0f} MiB.", file=sys.stderr)
    return 0


def _measure(
    llm: LLM, kind: str, tokens: int, depth: int, batch: int, repetitions: int
) -> dict[str, Any]:
    rng = random.Random(f"{kind} {tokens} {depth} {batch}")
    vocab = llm.info.vocab_size
    before = [rng.randrange(vocab) for _ in range(depth)]

    def once() -> float:
        prompt_tokens, answer_tokens = (tokens, 1) if kind == "pp" else (1, tokens + 1)
        prompts = [
            before + [rng.randrange(vocab) for _ in range(prompt_tokens)] for _ in range(batch)
        ]
        done = llm.generate(prompts, max_tokens=answer_tokens, temperature=0, ignore_eos=True)
        if kind == "pp":
            # Tokens of `before` come from the prefix cache, all but a part of a page.
            computed = sum(d.usage.prompt_tokens - d.usage.cached_tokens for d in done)
            return computed / max(d.stats.ttft_s or 0.0 for d in done)
        return batch * tokens / max(d.stats.decode_s or 0.0 for d in done)

    once()  # warm-up; puts `before` into the prefix cache
    watch = Watch()
    samples = []
    for _ in range(repetitions):
        samples.append(once())
        watch.look()
    info = llm.info
    return {
        "model": f"{info.name} {info.quantization}",
        "size_bytes": info.weight_bytes,
        "params": info.parameters,
        "backend": f"{info.device} {info.isa}",
        "threads": info.threads,
        "test": f"{kind}{tokens}"
        + (f" @ d{depth}" if depth else "")
        + (f" x {batch}" if batch > 1 else ""),
        "batch": batch,
        "depth": depth,
        "tokens_per_s_mean": statistics.fmean(samples),
        "tokens_per_s_sd": statistics.stdev(samples) if len(samples) > 1 else 0.0,
        "samples": samples,
        "peak_rss_bytes": _peak_rss(),
        "slowed_by": watch.seen(),
        "excludes": "tokenizing",
    }


def _print_row(rows: list[dict[str, Any]], output: str) -> None:
    row = rows[-1]
    if output == "jsonl":
        print(json.dumps(row), flush=True)
    elif output == "csv":
        flat = {name: value for name, value in row.items() if name != "samples"}
        flat["slowed_by"] = "; ".join(row["slowed_by"])
        writer = csv.DictWriter(sys.stdout, flat, lineterminator="\n")
        if len(rows) == 1:
            writer.writeheader()
        writer.writerow(flat)
    elif output == "md":
        if len(rows) == 1:
            print("| " + " | ".join(_COLUMNS) + " |")
            print("| --- | ---: | ---: | --- | ---: | --- | ---: |")
        cells = (
            row["model"],
            f"{row['size_bytes'] / 2**20:.2f} MiB",
            f"{row['params'] / 1e6:.2f} M",
            row["backend"],
            str(row["threads"]),
            row["test"],
            f"{row['tokens_per_s_mean']:.2f} ± {row['tokens_per_s_sd']:.2f}",
        )
        print("| " + " | ".join(cells) + " |", flush=True)


def _peak_rss() -> int | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
