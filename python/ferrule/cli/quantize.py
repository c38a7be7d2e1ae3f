"""`ferrule quantize`: writes a model with its weights quantized."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from ..quality import quantize
from .evaluate import read


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    written = quantize(
        args.model,
        args.out,
        format=args.format,
        bits=args.bits,
        calibrate=None if args.calibrate is None else read("--calibrate", args.calibrate),
        chunks=args.chunks,
        rules=dict(args.rule),
        threads=args.threads,
        family=args.family,
        revision=args.revision,
        offline=args.offline,
        weight_cache=not args.no_weight_cache,
    )
    if written.quantized_before is not None:
        print(
            f"ferrule: note: the source was quantized before ({written.quantized_before}); "
            "its errors stay",
            file=sys.stderr,
        )
    if args.json:
        print(json.dumps(dataclasses.asdict(written), indent=1))
        return 0
    forms = ", ".join(f"{n / 1e6:.1f} MB {form}" for form, n in written.forms.items())
    print(f"{written.path}: {written.bytes / 1e6:.1f} MB")
    print(f"{written.bits_per_weight:.3f} bits a weight ({forms})")
    return 0
