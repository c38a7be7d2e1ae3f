"""`ferrule info`: what this machine and a model offer."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from typing import Any

from .. import __version__, _core
from ..llm import LLM
from . import model_keywords


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    threads, why = _core.threads()
    facts: dict[str, Any] = {
        "version": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu_features": _core.cpu_features(),
        "kernels": _core.kernel_set(),
        "kernels_available": _core.kernel_sets(),
        "threads": threads,
        "threads_because": why,
        "cuda": False,
        "cuda_because": "this build has no CUDA back end",
    }
    if args.model is not None:
        with LLM(args.model, **model_keywords(args)) as llm:
            facts["model"] = dataclasses.asdict(llm.info)
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    model = facts.pop("model", {})
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):<18} {_text(value)}")
    for name, value in model.items():
        print(f"model {name.replace('_', ' '):<18} {_text(value)}")
    return 0


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {item[0]} ({item[1]})" for name, item in value.items())
    return str(value)
