"""`ferrule info`: what this machine and a model offer."""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .. import __version__, _core, arguments, hub


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    threads, why = _core.threads()
    devices, without = _core.cuda_devices()
    facts: dict[str, Any] = {
        "version": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu_features": _core.cpu_features(),
        "kernels": _core.kernel_set(),
        "kernels_available": _core.kernel_sets(),
        "threads": threads,
        "threads_because": why,
        "cuda": bool(devices),
        "cuda_because": without or [f"cuda:{n}, {name}, {cc}" for n, name, cc, _ in devices],
    }
    if args.model is not None:
        facts["model"] = _model(args)
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    model = facts.pop("model", {})
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):<20} {_text(value)}")
    for name, value in model.items():
        text = _text(value, _size if "bytes" in name else _plain)
        print(f"model {name.replace('_', ' '):<20} {text}")
    return 0


def _model(args: argparse.Namespace) -> dict[str, Any]:
    """What the model is, and what it will take here, from its headers."""
    with headers(args) as folder:
        facts: dict[str, Any] = {"path": ""} | described(folder, args, args.quantization)
    facts["path"] = str(folder) if folder.exists() else args.model
    layers, on_gpu = sum(facts["layers"].values()), facts.get("gpu_layers", 0)
    on_cpu = f"cpu, {_core.kernel_set()}: {layers - on_gpu} of {layers} layers"
    facts["runs_on"] = f"{args.device}: {on_gpu} layers; {on_cpu}" if on_gpu else on_cpu
    return facts


@contextlib.contextmanager
def headers(args: argparse.Namespace) -> Iterator[Path]:
    """The model's folder or file, for as long as its headers are read."""
    with tempfile.TemporaryDirectory(prefix="ferrule-", ignore_cleanup_errors=True) as into:
        found = hub.headers(args.model, Path(into), revision=args.revision, offline=args.offline)
        yield found


def described(folder: Path, args: argparse.Namespace, quantization: str | None) -> dict[str, Any]:
    """What the headers in `folder` say, with the options of `_model_options`."""
    return _core.describe(
        str(folder),
        quantization=quantization or "auto",
        kv_cache_dtype=args.kv_cache_dtype or "f16",
        context_length=args.context_length,
        weight_cache=not args.no_weight_cache,
        family=arguments.family(args.family),
        device=args.device or "cpu",
        gpu_layers=args.gpu_layers,
    )


def _text(value: object, number: Callable[[object], str] = str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "-"
    if isinstance(value, dict):
        return "; ".join(f"{number(count)} {name}" for name, count in value.items())
    return number(value)


def _plain(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _size(value: object) -> str:
    return f"{value / 1e6:,.1f} MB" if isinstance(value, int) else str(value)
