"""`ferrule inspect`: what a model file says about itself. Reads its header only."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from math import prod
from typing import Any

from .. import _core, hub


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    embedded = args.path in hub.EMBEDDED and not os.path.exists(args.path)
    text = _core.inspect(hub.resolve(args.path) if embedded else args.path)
    if args.json:
        print(text)
        return 0
    report = json.loads(text)
    for file in report["files"]:
        version = "" if file["version"] is None else f" version {file['version']}"
        print(f"{_safe(file['name'])}: {file['format']}{version}, {file['bytes']} bytes")
    _section(f"{len(report['metadata'])} keys", [_item(item) for item in report["metadata"]])
    tensors = report["tensors"]
    numbers = sum(prod(tensor["shape"]) for tensor in tensors)
    kinds = Counter(tensor["dtype"] for tensor in tensors)
    title = f"{len(tensors)} tensors, {numbers} numbers"
    if kinds:
        title += f" ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})"
    _section(title, [_tensor(tensor) for tensor in tensors])
    return 0


def _tensor(tensor: dict[str, Any]) -> tuple[str, ...]:
    shape = " x ".join(map(str, tensor["shape"])) or "-"
    return _safe(tensor["name"]), tensor["dtype"], shape, f"{tensor['bytes']} bytes"


def _section(title: str, rows: list[tuple[str, ...]]) -> None:
    print(f"\n{title}")
    widths = [min(60, max(map(len, column))) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  " + "  ".join(cells).rstrip())


def _item(item: dict[str, Any]) -> tuple[str, ...]:
    value = item["value"]
    if not isinstance(value, list):
        return _safe(item["key"]), item["type"], _value(value)
    shown = [_value(part, 40) for part in value[:4]]
    if item["length"] > len(shown):
        shown.append("...")
    return _safe(item["key"]), item["type"], f"{item['length']}: {', '.join(shown)}"


def _value(value: object, most: int = 160) -> str:
    # JSON escapes what a terminal would obey.
    text = json.dumps(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def _safe(name: str) -> str:
    """A name from a file, escaped where a terminal would obey it or it would be mistaken."""
    text = json.dumps(name)[1:-1]
    return text if len(text) <= 200 else f"{text[:200]}..."
