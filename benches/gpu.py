"""Everything that needs a CUDA device, in one command and under 9 minutes; needs only the wheel.

    python benches/gpu.py [--out gpu] [--minutes 9] [--models llama-3.1-8b,qwen3-0.6b]

Writes OUT.json and OUT.md: the device; correctness (logits of small models, bit for bit those of
the CPU; a batch, its rows alone; generated twice, the second time by graphs); products against the
floor, which is the bytes of the matrix over the bandwidth of a copy measured in the same run;
tokens per second end to end; joules per token by NVML; PyTorch's bf16 product if PyTorch is there.
Models are random. Correctness comes first, and a difference ends the run with status 1. Without a
device it says so and writes nothing. What the time does not suffice for is named in the report.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import ferrule
from ferrule import LLM, _core

HERE = Path(__file__).parent
GOLDENS = HERE.parent / "tests" / "golden"
# [n, k] of the products of a layer, and of the head.
SHAPES = {
    "8B qkv": (6144, 4096),
    "8B o": (4096, 4096),
    "8B gate+up": (28672, 4096),
    "8B down": (4096, 14336),
    "8B head": (128256, 4096),
    "0.6B qkv": (4096, 1024),
    "0.6B gate+up": (6144, 1024),
    "0.6B down": (1024, 3072),
}
CACHES = 4 * 50e6  # bytes of all sets of a matrix at least: several times the L2 of an H200


def main() -> int:
    """Run what there is time for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--models", default="qwen3-0.6b,llama-3.1-8b", help="of random_model.py")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes - 20
    devices, why = _core.cuda_devices()
    if not devices:
        print(f"skipped: {why}")
        return 0
    report: dict[str, Any] = {
        "ferrule": ferrule.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "devices": devices,
        "driver": smi(),
        "skipped": [],
    }
    parts: list[tuple[str, Callable[[], Any]]] = [
        ("correctness", correctness),
        ("copy_gb_per_s", copy),
        ("products", lambda: products(report["copy_gb_per_s"], end)),
        ("torch_bf16_us", peers),
        ("models", lambda: [model(name, end) for name in args.models.split(",")]),
    ]
    status = 0
    for name, part in parts:
        if time.monotonic() > end:
            report["skipped"].append(name)
            continue
        began = time.monotonic()
        try:
            report[name] = part()
        except Exception as error:  # the rest of the report is worth having
            report[name] = f"failed: {type(error).__name__}: {error}"
            status = 1
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
        if name == "correctness" and (status or report[name]["different"]):
            status = 1
            break
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))
    return status


def smi() -> str:
    """Driver, clocks and power limit, as nvidia-smi has them."""
    query = "name,driver_version,clocks.sm,clocks.mem,power.limit,pcie.link.gen.current"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except OSError:
        return "no nvidia-smi"


def correctness() -> dict[str, Any]:
    """Logits of small models on CUDA and on the CPU, all bits; what differs."""
    models: list[str] = ["tales-1m", "tales-4m"]
    models += [str(p.parent) for p in sorted(GOLDENS.glob("*/tokenizer.json"))]
    tested, refused, different = 0, [], []
    for name in models:
        for quantization, kv in (("none", "f32"), ("int8", "int8"), ("int4", "f16")):
            options: dict[str, Any] = {
                "quantization": quantization,
                "kv_cache_dtype": kv,
                "progress": False,
            }
            try:
                cuda = LLM(name, device="cuda", **options)
            except ferrule.UnsupportedModelError:
                refused.append(name)
                break
            cpu = LLM(name, device="cpu", **options)
            with cpu, cuda:
                vocab = min(llm.info.vocab_size for llm in (cpu, cuda))
                ids = [(7 * i * i + 3 * i) % vocab for i in range(150)]
                want = cpu.logits(ids)
                found = [cuda.logits(ids) for _ in range(3)]
                if not all(np.array_equal(want.view(np.uint32), f.view(np.uint32)) for f in found):
                    off = float(np.max(np.abs(want - found[0])))
                    different.append(f"{name} {quantization} {kv}: logits, by {off:.3g}")
                prompts = [ids[i : i + 20 + 7 * i] for i in range(5)]
                rules: dict[str, Any] = {"max_tokens": 40, "temperature": 0, "ignore_eos": True}
                batch = [a.token_ids for a in cuda.generate(prompts, **rules)]
                again = [cuda.generate(p, **rules).token_ids for p in prompts]
                on_cpu = [a.token_ids for a in cpu.generate(prompts, **rules)]
                if not batch == again == on_cpu:
                    different.append(f"{name} {quantization} {kv}: greedy ids")
            tested += 1
    return {"tested": tested, "not_on_cuda": refused, "different": different}


def copy() -> float:
    """Bandwidth of a copy on the device, bytes read and written."""
    times, size = _core.cuda_time("copy", 1 << 30, 0, 0, 0, 20)
    return 2e-3 * size / statistics.median(times)


def products(gb_per_s: float, end: float) -> list[dict[str, Any]]:
    """Each shape, form and number of tokens: time, GB/s of the matrix, share of the floor."""
    rows = []
    for name, (n, k) in SHAPES.items():
        for form in ("int4", "int8", "bf16"):
            for tokens in (1, 2, 4, 8, 16, 32, 64, 512):
                if time.monotonic() > end - 240 or (form == "bf16" and tokens > 8):
                    continue
                size = n * k * {"int4": 4.5, "int8": 8.125, "bf16": 16}[form] / 8
                sets = max(4, min(64, int(CACHES / size)))
                times, bytes_ = _core.cuda_time(form, n, k, tokens, sets, 15)
                us = statistics.median(times)
                rows.append(
                    {
                        "product": name,
                        "form": form,
                        "tokens": tokens,
                        "us": us,
                        "least_us": min(times),
                        "most_us": max(times),
                        "gb_per_s": 1e-3 * bytes_ / us,
                        "of_floor": 1e-3 * bytes_ / us / gb_per_s,
                        "tera_ops": 2e-6 * n * k * tokens / us,
                    }
                )
    return rows


def peers() -> dict[str, float] | str:
    """PyTorch's bf16 product of one token, in microseconds."""
    try:
        import torch  # type: ignore[import-not-found]  # a peer, where it is installed
    except ImportError:
        return "no PyTorch"
    found = {}
    for name, (n, k) in SHAPES.items():
        sets = max(4, min(64, int(CACHES / (2 * n * k))))
        ws = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
        x = torch.randn(1, k, device="cuda", dtype=torch.bfloat16)
        times = []
        for _ in range(10):
            begin, over = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for w in ws:
                torch.nn.functional.linear(x, w)
            over.record()
            torch.cuda.synchronize()
            times.append(1000 * begin.elapsed_time(over) / sets)
        found[name] = statistics.median(times)
    return found


def model(name: str, end: float) -> dict[str, Any]:
    """Tokens per second and joules of a random model in int4."""
    report: dict[str, Any] = {"model": name, "rows": [], "skipped": []}
    with tempfile.TemporaryDirectory() as folder:
        write = [sys.executable, HERE / "random_model.py", name, folder]
        subprocess.run(write, check=True, capture_output=True)
        began = time.monotonic()
        options: dict[str, Any] = {
            "device": "cuda",
            "quantization": "int4",
            "max_batch": 32,
            "progress": False,
        }
        with LLM(folder, weight_cache=False, context_length=10240, **options) as llm:
            report["load_s"] = time.monotonic() - began
            report["weight_bytes"] = llm.info.weight_bytes
            vocab = llm.info.vocab_size
            for depth, batch in ((0, 1), (1024, 1), (8192, 1), (0, 8), (0, 32), (1024, 32)):
                if time.monotonic() > end:
                    report["skipped"].append(f"tg at {depth} x {batch}")
                    continue
                report["rows"].append(generated(llm, vocab, depth, batch))
            for tokens in (512, 2048, 8192):
                if time.monotonic() > end:
                    report["skipped"].append(f"pp{tokens}")
                    continue
                report["rows"].append(read(llm, vocab, tokens))
    return report


def generated(llm: LLM, vocab: int, depth: int, batch: int) -> dict[str, Any]:
    """Tokens per second of generating 128 tokens in each of some sequences after a warm-up."""
    rng = np.random.default_rng(depth + batch)
    prompts = [rng.integers(vocab, size=depth + 8).tolist() for _ in range(batch)]
    rules: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
    llm.generate(prompts, max_tokens=8, **rules)
    speeds, joules = [], []
    for _ in range(3):
        before = energy_mj()
        began = time.monotonic()
        answers = llm.generate(prompts, max_tokens=128, **rules)
        took = time.monotonic() - began
        first = max(a.stats.ttft_s or 0.0 for a in answers)
        speeds.append(batch * 127 / (took - first))
        if before is not None and (after := energy_mj()) is not None and took > 5:
            joules.append(1e-3 * (after - before) / (batch * 128))
    row = {"test": f"tg128 at {depth}", "batch": batch, "tokens_per_s": statistics.median(speeds)}
    return row | {"all": speeds, "joules_per_token": statistics.median(joules) if joules else None}


def read(llm: LLM, vocab: int, tokens: int) -> dict[str, Any]:
    """Tokens per second of reading a prompt."""
    speeds = []
    for i in range(4):
        prompt = np.random.default_rng(i).integers(vocab, size=tokens).tolist()
        answer = llm.generate(prompt, max_tokens=1, temperature=0, ignore_eos=True)
        assert answer.stats.ttft_s is not None
        speeds.append(tokens / answer.stats.ttft_s)
    median = statistics.median(speeds[1:])  # the first is the warm-up
    return {"test": f"pp{tokens}", "batch": 1, "tokens_per_s": median, "all": speeds}


def energy_mj() -> int | None:
    """Millijoules of the first device since the driver was loaded; None without NVML."""
    try:
        cuda, nvml = ctypes.CDLL("libcuda.so.1"), ctypes.CDLL("libnvidia-ml.so.1")
        bus, device, total = ctypes.create_string_buffer(16), ctypes.c_void_p(), ctypes.c_uint64()
        # By bus: the two libraries may count devices differently.
        calls = (
            lambda: nvml.nvmlInit_v2(),
            lambda: cuda.cuDeviceGetPCIBusId(bus, 16, 0),
            lambda: nvml.nvmlDeviceGetHandleByPciBusId_v2(bus, ctypes.byref(device)),
            lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(total)),
        )
        return total.value if all(call() == 0 for call in calls) else None
    except (OSError, AttributeError):
        return None


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = [f"ferrule {report['ferrule']} on {report['driver'] or report['devices']}", ""]
    lines += [f"correctness: {json.dumps(report.get('correctness'))}", ""]
    if isinstance(speed := report.get("copy_gb_per_s"), float):
        lines += [f"copy: {speed:.0f} GB/s (read and written); the floor below", ""]
    if isinstance(rows := report.get("products"), list):
        lines += [
            "| product | form | tokens | us | GB/s | of floor | Tera-ops |",
            "|---|" + 6 * "--:|",
        ]
        for r in rows:
            numbers = (
                f"{r['us']:.1f} | {r['gb_per_s']:.0f} | {r['of_floor']:.0%} | {r['tera_ops']:.1f}"
            )
            lines.append(f"| {r['product']} | {r['form']} | {r['tokens']} | {numbers} |")
        lines.append("")
    lines += [f"PyTorch bf16, one token, us: {json.dumps(report.get('torch_bf16_us'))}", ""]
    models = report.get("models", [])
    for m in models if isinstance(models, list) else []:
        lines += [
            f"{m['model']}, int4, {m['weight_bytes'] / 1e9:.2f} GB, loaded in {m['load_s']:.0f} s",
            "",
        ]
        lines += ["| test | batch | tokens/s | J/token |", "|---|--:|--:|--:|"]
        for r in m["rows"]:
            joules = r.get("joules_per_token")
            text = "" if joules is None else f"{joules:.3f}"
            lines.append(f"| {r['test']} | {r['batch']} | {r['tokens_per_s']:.0f} | {text} |")
        lines += ["", f"no time for: {m['skipped']}", ""]
    failed = [f"{k}: {v}" for k, v in report.items() if str(v).startswith("failed")]
    lines += [*failed, f"no time for: {report['skipped']}", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
