"""`ferrule tune`: find this machine's best settings, and keep them."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from .. import tuning
from ..cache import default_cache_dir


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    cache = default_cache_dir()
    if args.reset:
        tuning.path(cache).unlink(missing_ok=True)
        return 0
    trials = []
    for trial in tuning.search():
        trials.append(trial)
        if not args.json:
            value = getattr(trial.tuning, trial.what)
            mark = "  <- chosen" if trial.chosen else ""
            print(f"{trial.what:<12} {value:>8} {trial.seconds * 1e3:10.3f} ms{mark}", flush=True)
    best = [trial.tuning for trial in trials if trial.chosen][-1]
    file = tuning.save(best, cache)
    if args.json:
        facts = {"tuning": asdict(best), "file": str(file), "machine": tuning.machine()}
        print(json.dumps(facts | {"trials": [asdict(trial) for trial in trials]}, indent=1))
    else:
        print(f"kept in {file}; used where threads are not given", file=sys.stderr)
    return 0
