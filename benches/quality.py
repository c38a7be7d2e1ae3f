"""What quantization costs: perplexity, and distance from the stored weights in f32 arithmetic.

    python benches/quality.py [MODEL ...] [--text FILE] [--out benches/results/quality]

Without MODEL: tales-4m, and stories260K where FERRULE_SHARED names the folder that has it. A
document of the text (they are parted by two empty lines; in .jsonl, one "text" a line) is one
context, cut at the model's length.

Columns: bits per weight (bytes in memory with norms, scales and padding, over parameters);
perplexity; KL, the Kullback-Leibler divergence from quantization="none" in nats, mean and 99th
percentile over tokens; how often the likeliest token is the same.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any, Literal

import ferrule
from ferrule import evaluate

ROOT = Path(__file__).parent.parent
STORIES = ROOT / "models" / "training" / "heldout_stories.txt"
FORMS: tuple[Literal["none", "int8", "int4"], ...] = ("none", "int8", "int4")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--text", type=Path, default=STORIES)
    parser.add_argument("--documents", type=int, metavar="N", help="only the first N")
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    args = parser.parse_args()
    pairs = [(model, args.text) for model in args.models] or [("tales-4m", args.text)]
    shared = os.environ.get("FERRULE_SHARED")
    if shared and not args.models:
        weights = Path(shared) / "weights"
        text = weights / "text" / "tinystories_instruct_val" / "stories.jsonl"
        pairs.append((str(weights / "stories260K" / "hf"), text))
    rows = [row for model, text in pairs for row in measure(model, text, args.documents)]
    report = {"ferrule": ferrule.__version__, "rows": rows}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(markdown(rows))
    print(markdown(rows), end="")


def measure(model: str, text: Path, documents: int | None) -> list[dict[str, Any]]:
    """A row for each form of the model's weights."""
    rows = []
    for form in FORMS:
        found = evaluate(
            model,
            read(text)[:documents],
            reference=model,
            quantization=form,
            weight_cache=False,
        )
        assert found.distance is not None
        rows.append(
            {
                "model": model,
                "text": text.name,
                "tokens": found.tokens,
                "quantization": form,
                "bits_per_weight": found.bits_per_weight,
                "perplexity": found.perplexity.value,
                "kl_mean": found.distance.kl.value,
                "kl_p99": found.distance.kl_quantiles[0.99],
                "same_top": found.distance.same_top.value,
                "isa": found.isa,
            }
        )
    return rows


def read(text: Path) -> list[str]:
    """The documents of a file."""
    content = text.read_text(encoding="utf-8")
    if text.suffix == ".jsonl":
        return [json.loads(line)["text"] for line in content.splitlines()]
    return [part for part in content.split("\n\n\n") if part.strip()]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "| model | text, tokens | quantization | bits per weight | perplexity | KL mean | KL p99 "
        "| same top token |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        name = row["model"].removesuffix("/hf").rsplit("/")[-1]
        lines.append(
            f"| {name} | {row['text']}, {row['tokens']} | {row['quantization']} "
            f"| {row['bits_per_weight']:.2f} | {row['perplexity']:.4f} | {row['kl_mean']:.5f} "
            f"| {row['kl_p99']:.5f} | {row['same_top']:.2%} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
