"""`ferrule eval` and `ferrule compare`: quality on a text."""

from __future__ import annotations

import argparse
import dataclasses
import json

from .. import arguments
from ..errors import InvalidParameterError
from ..quality import Estimate, Evaluation, evaluate
from . import piped


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    found = evaluate(
        args.model,
        read("--text", args.text),
        reference=args.reference,
        quantization=args.quantization,
        reference_quantization=args.reference_quantization,
        context=args.context,
        chunks=args.chunks,
        kv_cache_dtype=args.kv_cache_dtype,
        threads=args.threads,
        family=args.family,
        revision=args.revision,
        offline=args.offline,
        weight_cache=not args.no_weight_cache,
    )
    if args.json:
        print(json.dumps(_plain(found), indent=1))
    else:
        print("\n".join(_lines(found)))
    return 0


def read(option: str, path: str) -> str | list[str]:
    """The file that an option names as one text, or the documents of a .jsonl file."""
    content = piped(option) if path == "-" else arguments.text_file(option, path)
    if not path.endswith(".jsonl"):
        return content
    documents = []
    # Not `splitlines`: it also cuts at characters that JSON may hold, such as U+2028.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise InvalidParameterError(
                f'{option} {path}, line {number}: expected an object with a string "text"',
                field=option,
            )
        documents.append(text)
    return documents


def _plain(found: Evaluation) -> dict[str, object]:
    def plain(value: object) -> object:
        if isinstance(value, Estimate):
            return value._asdict()
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        return value

    fields = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    if found.distance is not None:
        distance = found.distance
        names = [f.name for f in dataclasses.fields(distance)]
        fields["distance"] = {name: getattr(distance, name) for name in names}
    return {name: plain(value) for name, value in fields.items()}


def _lines(found: Evaluation) -> list[str]:
    about = f"{found.quantization}, {found.bits_per_weight:.3f} bits a weight"
    rows = [
        ("model", f"{found.model} ({about})"),
        ("text", f"{found.tokens} tokens predicted in {found.contexts} contexts"),
        ("perplexity", _number(found.perplexity)),
        ("accuracy", _share(found.accuracy)),
    ]
    other = found.distance
    if other is not None:
        about = f"{other.quantization}, {other.bits_per_weight:.3f} bits a weight"
        quantiles = ", ".join(
            f"{'max' if q == 1 else f'{q:.1%}'} {kl:.6f}" for q, kl in other.kl_quantiles.items()
        )
        rows += [
            ("reference", f"{other.reference} ({about})"),
            ("its perplexity", _number(other.perplexity)),
            ("ratio", _number(other.perplexity_ratio)),
            ("KL divergence", _number(other.kl, 6)),
            ("  quantiles", quantiles),
            ("same top token", _share(other.same_top)),
            ("flips", _share(other.flips)),
            ("RMS of dp", _share(other.rms_dp)),
        ]
    return [f"{name:<16} {text}" for name, text in rows]


def _number(e: Estimate, digits: int = 4) -> str:
    between = "" if e.low is None else f"   95 %: {e.low:.{digits}f} to {e.high:.{digits}f}"
    return f"{e.value:.{digits}f}{between}"


def _share(e: Estimate) -> str:
    between = "" if e.low is None else f"   95 %: {e.low:.3%} to {e.high:.3%}"
    return f"{e.value:.3%}{between}"
