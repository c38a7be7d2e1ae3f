"""`ferrule plan`: whether a model fits into this machine's memory. Reads its headers only."""

from __future__ import annotations

import argparse
import json
from typing import Any, get_args

from .. import _core
from ..errors import UnsupportedModelError
from ..llm import Quantization
from .info import described, headers

_COLUMNS = ("quantization", "weights", "keys and values", "rest", "context here", "fits")


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    rows: list[dict[str, Any]] = []
    quantizations = [q for q in get_args(Quantization) if q != "auto"]
    with headers(args) as folder:
        for quantization in [args.quantization] if args.quantization else quantizations:
            try:
                facts = described(folder, args, quantization)
            except UnsupportedModelError:
                if args.quantization:
                    raise
                continue  # a form that this file's weights cannot be kept in
            rows.append({"quantization": quantization, **facts})
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        _print(rows, args.context_length)
    return int(not any(row["fits"] for row in rows))


def _print(rows: list[dict[str, Any]], asked: int | None) -> None:
    total, available, limit = _core.memory()
    print(
        f"memory: {available / 1e9:.1f} GB of {total / 1e9:.1f} GB can be had"
        + (f", the cgroup's limit is {limit / 1e9:.1f} GB" if limit is not None else "")
    )
    if rows:
        made_for = rows[0]["context_length"]
        context = made_for if asked is None or asked >= made_for else f"{asked} of {made_for}"
        print(f"context: {context} tokens, keys and values in {rows[0]['kv_cache_dtype']}")
    on_gpu = any("device" in row for row in rows)
    print("| " + " | ".join((*_COLUMNS, *(["layers on the GPU"] if on_gpu else []))) + " |")
    print("| --- | ---: | ---: | ---: | ---: | --- |" + (" ---: |" if on_gpu else ""))
    for row in rows:
        cells = [
            row["quantization"],
            f"{sum(row['weight_bytes'].values()) / 1e6:,.0f} MB",
            f"{row['kv_bytes_context'] / 1e6:,.0f} MB",
            f"{row['working_bytes'] / 1e6:,.0f} MB",
            str(row.get("context_length_here", "-")),
            ("yes" if not row["notes"] else "with limits") if row["fits"] else "no",
        ]
        if on_gpu:
            cells.append(f"{row['gpu_layers']} of {sum(row['layers'].values())}")
        print("| " + " | ".join(cells) + " |")
    for row in rows:
        if "gpu_because" in row:
            print(f"{row['quantization']}: on the CPU: {row['gpu_because']}")
        for note in row["notes"]:
            print(f"{row['quantization']}: {note}")
