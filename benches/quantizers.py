"""`ferrule quantize --calibrate --bits` against llama.cpp's Q4_K_M with an importance matrix.

    python benches/quantizers.py BUILD/bin [--models tales-4m,...] [--out benches/results/NAME]

BUILD/bin holds llama.cpp's llama-imatrix and llama-quantize. Models: the trained ones at hand,
those in models/, and those of the folder that FERRULE_SHARED names. For each, both quantizers read
one calibration text, and the divergence from the unquantized model is measured on another text by
`ferrule.evaluate`, which reads both files: so the arithmetic is the same. ferrule gets the bits of
llama.cpp's file.

Bits: bytes of all tensors times 8 over parameters. KL: mean over tokens of the second halves of
chunks, nats, with its 95 % interval. "rel. to": ferrule's over llama.cpp's. "types": of the
matrices in llama.cpp's file: K-quants need rows of a multiple of 256, others get other types.
Needs numpy and gguf.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf

import ferrule

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("FERRULE_SHARED", "/nowhere")) / "weights"
CHUNKS = 60


def tales() -> tuple[str, str]:
    """Calibration: stories of the training split, of another seed. Text: the held-out ones."""
    sys.path.insert(0, str(ROOT / "models" / "training"))
    from stories import story

    rng = random.Random(77)
    seen = "\n\n\n".join(story(rng, "train")[0] for _ in range(400))
    return seen, (ROOT / "models" / "training" / "heldout_stories.txt").read_text()


def halves(name: str) -> Callable[[], tuple[str, str]]:
    """Every other document of a file for calibration, the rest is the text."""

    def read() -> tuple[str, str]:
        lines = (SHARED / "text" / "tinystories_instruct_val" / name).read_text().splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        return "\n\n".join(texts[::2]), "\n\n".join(texts[1::2])

    return read


MODELS: dict[str, tuple[Path, int, Callable[[], tuple[str, str]]]] = {
    "tales-4m": (ROOT / "models" / "tales-4m", 512, tales),
    "tales-1m": (ROOT / "models" / "tales-1m", 512, tales),
    "stories260K": (SHARED / "stories260K" / "hf", 512, halves("stories.jsonl")),
    "aidreams260K": (SHARED / "aidreams260K" / "hf", 128, halves("stories.jsonl")),
    "ts-instruct-3m-chat": (
        SHARED / "ts-instruct-3m-chat" / "hf_gpt2",
        256,
        halves("chat_docs.jsonl"),
    ),
}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bin", type=Path, help="folder of llama-imatrix and llama-quantize")
    parser.add_argument("--models", help="comma-separated; default: all that are there")
    parser.add_argument("--work", type=Path, help="where files are left, and found again")
    parser.add_argument("-t", "--threads", type=int, default=os.cpu_count(), help="of both")
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    args = parser.parse_args()
    names = args.models.split(",") if args.models else [n for n in MODELS if MODELS[n][0].is_dir()]
    with tempfile.TemporaryDirectory() as place:
        work = args.work or Path(place)
        work.mkdir(parents=True, exist_ok=True)
        rows = []
        for name in names:
            rows += measure(name, args.bin, work, args.threads)
            print(markdown(rows[-2:]), end="", flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        report = {"ferrule": ferrule.__version__, "rows": rows}
        args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(markdown(rows))


def measure(name: str, binaries: Path, work: Path, threads: int) -> list[dict[str, Any]]:
    """The two rows of a model."""
    folder, context, texts = MODELS[name]
    seen, text = texts()
    calibration = work / f"{name}.txt"
    calibration.write_text(seen)
    whole, matrix = work / f"{name}-F32.gguf", work / f"{name}.imatrix.gguf"
    theirs = work / f"{name}-Q4_K_M.gguf"
    run(sys.executable, str(Path(__file__).parent / "to_gguf.py"), str(folder), str(whole), "--f32")
    window = ["-c", str(context), "-b", str(context), "-t", str(threads)]
    read = ["-m", str(whole), "-f", str(calibration), "-o", str(matrix)]
    if not matrix.exists():
        run(str(binaries / "llama-imatrix"), *read, *window)
    quantize = [str(binaries / "llama-quantize"), "--imatrix", str(matrix), str(whole)]
    run(*quantize, str(theirs), "Q4_K_M")
    tensors = gguf.GGUFReader(theirs).tensors
    parameters = sum(int(t.n_elements) for t in tensors)
    size = sum(int(t.n_bytes) for t in tensors)
    types = Counter[str]()
    for t in tensors:
        if len(t.shape) > 1:
            types[t.tensor_type.name] += int(t.n_elements)
    kinds = ", ".join(f"{kind} {n / types.total():.0%}" for kind, n in types.most_common())
    rows = [row(name, "llama.cpp Q4_K_M, imatrix", folder, theirs, context, text)]
    rows[0] |= {"bits": 8 * size / parameters, "types": kinds}

    ours = work / f"{name}-ferrule"
    shutil.rmtree(ours, ignore_errors=True)
    # What is no matrix counts, too: it is stored as in the source.
    source = header(folder / "model.safetensors")
    vectors = sum(sizes(t) for t in source.values() if len(t["shape"]) == 1)
    ferrule.quantize(
        folder,
        ours,
        bits=8 * (size - vectors) / parameters,
        calibrate=seen,
        threads=threads,
        weight_cache=False,
        progress=False,
    )
    stored = header(ours / "model.safetensors")
    forms = Counter[str]()
    for tensor, what in stored.items():
        if ":" in tensor:
            forms[tensor.rpartition(":")[2]] += sizes(what)
    kinds = ", ".join(f"{form} {n / forms.total():.0%}" for form, n in forms.most_common())
    rows.append(row(name, "ferrule --bits", folder, ours, context, text))
    bits = 8 * sum(map(sizes, stored.values())) / parameters
    rows[1] |= {"bits": bits, "types": kinds}
    rows[1]["over"] = rows[1]["kl"] / rows[0]["kl"]
    return rows


def row(name: str, by: str, folder: Path, model: Path, context: int, text: str) -> dict[str, Any]:
    """What is measured on the text."""
    found = ferrule.evaluate(
        model, text, reference=folder, context=context, chunks=CHUNKS, weight_cache=False
    )
    assert found.distance is not None
    kl, top = found.distance.kl, found.distance.same_top
    return {
        "model": name,
        "by": by,
        "tokens": found.tokens,
        "kl": kl.value,
        "kl_low": kl.low,
        "kl_high": kl.high,
        "same_top": top.value,
    }


def header(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file."""
    with path.open("rb") as file:
        entries = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    entries.pop("__metadata__", None)
    return dict(entries)


def sizes(tensor: dict[str, Any]) -> int:
    """Bytes of a tensor."""
    start, end = tensor["data_offsets"]
    return int(end - start)


def run(*command: str) -> None:
    """Run a program; what it printed is shown if it fails."""
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "| model | quantizer | bits a weight | KL | rel. to | same top token | types |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        over = f"{row['over']:.2f}" if "over" in row else ""
        lines.append(
            f"| {row['model']} | {row['by']} | {row['bits']:.3f} "
            f"| {row['kl']:.5f} ({row['kl_low']:.5f} to {row['kl_high']:.5f}) | {over} "
            f"| {row['same_top']:.1%} | {row['types']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
