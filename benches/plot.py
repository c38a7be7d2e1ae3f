"""Draw results of compare.py: tokens per second of ferrule and of its best peer, and the bound.

    python benches/plot.py benches/results/DATE-*.json --out benches/results/speed.svg

One row for each test. Each row has its own scale, which ends at the largest of its three numbers;
the bound is that of ferrule's weights (benches/README.md says what it counts).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

LEFT, WIDTH, RIGHT, ROW, BAR = 190, 420, 130, 46, 15
COLOURS = {"ferrule": "#2b6cb0", "peer": "#a0aec0", "bound": "#c53030"}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="JSON files that compare.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows: list[tuple[str, dict[str, Any], dict[str, Any] | None]] = []
    machines = set()
    for path in args.results:
        report = json.loads(path.read_text())
        machine = report["machine"]
        machines.add(f"{machine['cpu']}, {machine['cpus']} CPUs, {report['isa']}")
        # From the command: the name of the model's folder.
        model = Path(report["command"].split()[2]).name
        for own in (row for row in report["rows"] if not row["peer"]):
            same = (own["test"], own["threads"])
            peers = [r for r in report["rows"] if r["peer"] and (r["test"], r["threads"]) == same]
            best = max(peers, key=lambda row: row["median"], default=None)
            threads = f"{own['threads']} thread" + "s" * (own["threads"] > 1)
            rows.append((f"{model} {own['test']}, {threads}", own, best))
    args.out.write_text(draw(rows, sorted(machines)))


def draw(rows: list[tuple[str, dict[str, Any], dict[str, Any] | None]], machines: list[str]) -> str:
    """The picture."""
    width, height = LEFT + WIDTH + RIGHT, 62 + ROW * len(rows)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        text(10, 18, f"Tokens per second; {'; '.join(machines)}", size=12),
        text(10, 36, "ferrule", COLOURS["ferrule"]),
        text(60, 36, "best peer", COLOURS["peer"]),
        text(125, 36, "| bound of memory (tg) or multipliers (pp)", COLOURS["bound"]),
    ]
    for i, (name, own, peer) in enumerate(rows):
        y = 52 + ROW * i
        numbers = [own["median"], own["bound"] or 0, peer["median"] if peer else 0]
        scale = WIDTH / max(numbers)
        out.append(text(LEFT - 8, y + 19, name, anchor="end"))
        for j, (kind, row) in enumerate((("ferrule", own), ("peer", peer))):
            if row is None:
                continue
            top, length = y + j * (BAR + 2), row["median"] * scale
            label = f"{row['median']:.1f}"
            if kind == "peer":
                label += f" {row['engine'].split()[0]}"
            elif peer:
                label += f" ({row['median'] / peer['median']:.2f} x)"
            out.append(
                f'<rect x="{LEFT}" y="{top}" width="{length:.1f}" height="{BAR}" '
                f'fill="{COLOURS[kind]}"/>'
            )
            out.append(text(LEFT + length + 5, top + 11, label))
        if own["bound"]:
            x = LEFT + own["bound"] * scale
            out.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 3}" y2="{y + 2 * BAR + 5}" '
                f'stroke="{COLOURS["bound"]}" stroke-width="2"/>'
            )
    return "\n".join([*out, "</svg>"]) + "\n"


def text(x: float, y: float, what: str, colour: str = "#1a202c", **more: Any) -> str:
    """A line of text."""
    size, anchor = more.get("size", 11), more.get("anchor", "start")
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" '
        f'text-anchor="{anchor}">{escape(what)}</text>'
    )


if __name__ == "__main__":
    main()
