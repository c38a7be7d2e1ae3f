"""Everything that needs a CUDA device, in one command and under 9 minutes.

    python benches/gpu.py [--out gpu] [--minutes 9] [--only ops,products] [--small]

Needs Python, the wheel, and this folder with tests/golden beside it. Writes OUT.json and OUT.md,
anew after each part, so that a run that is cut off leaves what it had. Parts, each a process of
its own, which may fail or hang without harm to the others:

- ops: each operation on the device and on the CPU, bit by bit (`ferrule doctor --device cuda`).
- models: logits and greedy ids of small models of every family that is here, all bits those of the
  CPU; sampled ids; a batch, its rows alone; steps sent launch by launch, then as graphs; layers on
  two machines.
- end to end: tokens per second of models with random weights made on the device, batch 1, 8, 32 at
  depth 0, 1k, 8k, prompts of 512, 2k, 8k; joules per token by NVML, idle watts beside them.
- products, attention: each shape of a layer against the floor, which is the bytes of the matrix
  (of keys and values) over the bandwidth of a copy measured in the same run.
- peers: PyTorch's and transformers' bf16 figures on the same device, if they are there.

Status 1 if something differs or fails. Without a device it says so and writes nothing.

--small: tiny shapes and few models, to try this script itself, as tests/test_cuda.py does on the
emulated driver. Its times mean nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gpu_sizes import FULL, SMALL, Size

import ferrule
from ferrule import LLM, _core

HERE = Path(__file__).resolve().parent
GOLDENS = HERE.parent / "tests" / "golden"
BITS = {"int4": 4.5, "int8": 8.125, "bf16": 16.0, "q4_k": 4.625, "q6_k": 6.625}
# Gates on an H200 (issue): test, batch, tokens per second.
GATES = {
    "llama-3.1-8b": [("tg at 0", 1, 400), ("tg at 0", 32, 6000), ("pp2048", 1, 15000)],
    "qwen3-0.6b": [("tg at 0", 1, 1400)],
}


def main() -> int:
    """Run what there is time for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", help="parts, separated by commas")
    parser.add_argument("--small", action="store_true", help="tiny: tries the script, not a device")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        return run_part(args.part, args.seconds, args.out, SMALL if args.small else FULL)
    began = time.monotonic()
    end = began + 60 * args.minutes - 15
    devices, why = _core.cuda_devices()
    if not devices:
        print(f"skipped: {why}")
        return 0
    only = args.only.split(",") if args.only else list(PARTS)
    if unknown := set(only) - set(PARTS):
        parser.error(f"--only: found {', '.join(sorted(unknown))}, expected {', '.join(PARTS)}")
    report: dict[str, Any] = {
        "ferrule": ferrule.__version__,
        "commit": output("git", "-C", str(HERE), "rev-parse", "HEAD"),
        "command": " ".join(sys.argv),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "devices": devices,
        "driver": output("nvidia-smi", f"--query-gpu={SMI}", "--format=csv,noheader"),
        "parts": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        # The driver keeps translated kernels here: the first part pays for all.
        environment = {**os.environ}
        environment.setdefault("CUDA_CACHE_PATH", folder)
        for name in only:
            left = end - time.monotonic()
            limit = min(PARTS[name][1], left)
            found: Any = "no time for it"
            if left > 10:
                found = part(name, limit, environment, Path(folder), args.small)
            report["parts"][name] = found
            report["seconds"] = round(time.monotonic() - began)
            args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
            args.out.with_suffix(".md").write_text(markdown(report))
            print(f"{name}: done at {report['seconds']} s", file=sys.stderr)
    print(markdown(report))
    return int(bool(trouble(report)))


SMI = "name,driver_version,clocks.sm,clocks.mem,power.limit,pcie.link.gen.current"


def output(*command: str) -> str:
    """What a command prints, or why it does not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return done.stdout.strip() or done.stderr.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"{command[0]}: {error}"


def part(name: str, limit: float, environment: dict[str, str], folder: Path, small: bool) -> Any:
    """What a part found, in a process of its own; if it ended early, what it had until then."""
    out = folder / f"{name}.json"
    command = [sys.executable, __file__, "--part", name, "--seconds", f"{limit - 5:.0f}"]
    began = time.monotonic()
    try:
        done = subprocess.run(
            [*command, *(["--small"] if small else []), "--out", str(out)],
            env=environment, capture_output=True, text=True, timeout=limit,
        )  # fmt: skip
        problem = f"failed: {done.stderr[-1500:]}" if done.returncode else None
    except subprocess.TimeoutExpired:
        problem = f"stopped after {limit:.0f} s"
    found = json.loads(out.read_text()) if out.exists() else {}
    found["seconds"] = round(time.monotonic() - began, 1)
    return found | ({"problem": problem} if problem else {})


def run_part(name: str, seconds: float, out: Path, size: Size) -> int:
    """In the part's process: its findings go into `out`, anew after each."""
    found: dict[str, Any] = {}

    def tell(key: str, value: Any, many: bool = False) -> None:
        if many:
            found.setdefault(key, []).append(value)
        else:
            found[key] = value
        fresh = out.with_suffix(".new")
        fresh.write_text(json.dumps(found))
        fresh.replace(out)

    end = time.monotonic() + seconds
    PARTS[name][0](tell, lambda: time.monotonic() > end, size)
    return 0


Tell = Callable[..., None]
Late = Callable[[], bool]


def ops(tell: Tell, _late: Late, size: Size) -> None:
    """Each operation on the device and on the CPU."""
    began = time.monotonic()
    count, different = _core.cuda_check("cuda")
    tell("compared", count)
    tell("different", different)
    tell("first_s", round(time.monotonic() - began, 2))  # the driver translates the kernels
    if size is SMALL:
        return
    began = time.monotonic()
    _core.cuda_check("cuda")
    tell("second_s", round(time.monotonic() - began, 2))


def models(tell: Tell, late: Late, size: Size) -> None:
    """Small models on the device and on the CPU."""
    names = ["tales-1m", "tales-4m"]
    names += [str(p.parent) for p in sorted(GOLDENS.glob("*/tokenizer.json"))]
    names += [str(p.parent) for p in sorted(GOLDENS.glob("*/*.gguf"))]
    tell("different", [])
    if size.models is not None:
        names = [*names[: size.models], *names[-size.models :]]
    keep = LLM("tales-1m", device="cuda", progress=False)  # and with it the device's kernels
    for name in names:
        short = "/".join(Path(name).parts[-2:])
        quantizations = [("none", "f32"), ("int8", "int8"), ("int4", "f16")]
        if size is SMALL:
            quantizations = quantizations[-1:]
        if any(part.startswith(("quant-", "gguf-")) for part in Path(name).parts):
            quantizations = [("auto", "f16")]
        for quantization, kv in quantizations:
            if late():
                tell("no_time_for", f"{short} {quantization}", many=True)
                continue
            options = {"quantization": quantization, "kv_cache_dtype": kv, "progress": False}
            try:
                different = compared(name, options, size)
            except ferrule.UnsupportedModelError as error:
                tell("not_on_cuda", f"{short} {quantization}: {error}", many=True)
                continue
            except Exception as error:  # the other models are worth having
                different = [f"{type(error).__name__}: {error}"]
            for what in different:
                tell("different", f"{short} {quantization} {kv}: {what}", many=True)
            tell("tested", f"{short} {quantization} {kv}", many=True)
    keep.close()


def compared(name: str, options: dict[str, Any], size: Size) -> list[str]:
    """What of a model differs between the device and the CPU."""
    different = []
    with (
        LLM(name, device="cuda", **options) as cuda,
        LLM(name, device="cpu", **options) as cpu,
    ):
        vocab = min(llm.info.vocab_size for llm in (cpu, cuda))
        ids = [(7 * i * i + 3 * i) % vocab for i in range(size.prompt)]
        want = cpu.logits(ids)
        # Launch by launch; then captured; then replayed.
        for how in ("launches", "a new graph", "the graph again"):
            found = cuda.logits(ids)
            if not np.array_equal(want.view(np.uint32), found.view(np.uint32)):
                different.append(f"logits by {how}, by {float(np.max(np.abs(want - found))):.3g}")
        prompts = [ids[i : i + 20 + 7 * i] for i in range(5)]
        rules: dict[str, Any] = {"max_tokens": size.answer, "ignore_eos": True}
        free = {"temperature": 0.8, "top_k": 0, "top_p": 1.0}
        few = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}
        for what, more in (("greedy", {"temperature": 0.0}), ("sampled", free), ("top-p", few)):
            on = {
                "cpu": cpu.generate(prompts, seed=5, **rules, **more),
                "a batch": cuda.generate(prompts, seed=5, **rules, **more),
                "rows alone": [cuda.generate(p, seed=5, **rules, **more) for p in prompts],
            }
            answers = {where: [a.token_ids for a in found] for where, found in on.items()}
            for where in ("a batch", "rows alone"):
                if answers[where] != answers["cpu"]:
                    different.append(f"{what} ids of {where}")
        layers = cuda.info.layers
    if layers > 1:
        with LLM(name, device="cuda", gpu_layers=layers // 2, **options) as split:
            found = split.logits(ids)
            if not np.array_equal(want.view(np.uint32), found.view(np.uint32)):
                different.append(f"logits of {layers // 2} of {layers} layers on the device")
    return different


def products(tell: Tell, late: Late, size: Size) -> None:
    """Each shape, form and number of tokens: time, GB/s of the matrix, share of the floor."""
    gb_per_s = copied(tell, size)
    for tokens in size.tokens:
        for form, bits in BITS.items():
            for name, (n, k) in size.shapes.items():
                if late():
                    return tell("no_time_for", f"{form} from {tokens} tokens on", many=True)
                if form == "bf16" and tokens > 8:
                    continue
                sets = sets_of(n * k * bits / 8, size)
                times, bytes_ = _core.cuda_time(form, n, k, tokens, sets, size.samples)
                us = statistics.median(times)
                row = {"product": name, "form": form, "tokens": tokens, "us": us}
                row |= {"us_least": min(times), "us_most": max(times)}
                row |= {"gb_per_s": 1e-3 * bytes_ / us, "of_floor": 1e-3 * bytes_ / us / gb_per_s}
                tell("rows", row | {"tera_ops": 2e-6 * n * k * tokens / us}, many=True)
    return None


def copied(tell: Tell, size: Size) -> float:
    """GB/s of a copy, read and written."""
    times, bytes_ = _core.cuda_time("copy", size.copied, 0, 0, 0, size.samples)
    gb_per_s = 2e-3 * bytes_ / statistics.median(times)
    tell("copy_gb_per_s", gb_per_s)
    return gb_per_s


def sets_of(bytes_: float, size: Size) -> int:
    """How many of so many bytes do not fit into the caches."""
    return max(4, min(64, int(size.caches / bytes_)))


def attention(tell: Tell, late: Late, size: Size) -> None:
    """One generated token's attention over what is behind it: time, GB/s of keys and values."""
    gb_per_s = copied(tell, size)
    for name, heads, head_dim in (("8B", 32, 128), ("0.6B", 16, 128)):
        for dtype in ("f16", "int8"):
            for keys, sequences in size.behind:
                if late():
                    return tell("no_time_for", f"{name} {dtype} {keys} x {sequences}", many=True)
                bytes_ = sequences * keys * 2 * 8 * head_dim * (2 if dtype == "f16" else 1)
                sets, shape = sets_of(bytes_, size), [heads, 8, head_dim]
                times, bytes_ = _core.cuda_time_attention(
                    dtype, shape, sequences, keys, sets, size.samples
                )
                us = statistics.median(times)
                row = {"product": f"{name} attention over {keys}", "form": dtype, "us": us}
                row |= {"tokens": sequences, "us_least": min(times), "us_most": max(times)}
                row |= {"gb_per_s": 1e-3 * bytes_ / us, "of_floor": 1e-3 * bytes_ / us / gb_per_s}
                tell(
                    "rows",
                    row | {"tera_ops": 4e-6 * sequences * keys * heads * head_dim / us},
                    True,
                )
    return None


def end_to_end(name: str, quantization: str, tell: Tell, late: Late, size: Size) -> None:
    """Tokens per second and joules of a model whose weights are made on the device."""
    from ferrule import llm as module

    random_model = beside("random_model")

    # The engine has a switch for it; `LLM` has none, as no user should.
    random = functools.partial(_core.Engine, random=True)
    vars(module)["_core"] = types.SimpleNamespace(**{**vars(_core), "Engine": random})
    with tempfile.TemporaryDirectory() as folder:
        config = random_model.SHAPES[name] | size.config
        random_model.write_folder(config, np.zeros(1, np.float32), Path(folder), sparse=True)
        began = time.monotonic()
        options: dict[str, Any] = {"device": "cuda", "quantization": quantization}
        options |= {"max_batch": 32, "context_length": size.context, "progress": False}
        with LLM(folder, weight_cache=False, **options) as llm:
            tell("model", f"{name} {quantization}")
            tell("load_s", time.monotonic() - began)
            tell("weight_bytes", llm.info.weight_bytes)
            tell("kv_cache_bytes", llm.info.kv_cache_bytes)
            tests: list[tuple[Callable[..., dict[str, Any]], tuple[int, ...]]] = []
            tests += [(generated, where) for where in size.generated]
            tests += [(read, (tokens,)) for tokens in size.read]
            tests += [(joules, (batch,)) for batch in (1, 32)]
            tests += [(generated, where) for where in size.deep]
            for test, numbers in tests:
                what = " ".join(map(str, (test.__name__, *numbers)))
                if late():
                    tell("no_time_for", what, many=True)
                    continue
                try:
                    tell("rows", test(llm, size, *numbers), many=True)
                except Exception as error:  # the other rows are worth having
                    tell("failed", f"{what}: {type(error).__name__}: {error}", many=True)


def generated(llm: LLM, size: Size, depth: int, batch: int) -> dict[str, Any]:
    """Tokens per second of generating some in each of some sequences after a warm-up."""
    rng = np.random.default_rng([depth, batch])
    shape = (batch, depth + 8)
    prompts = rng.integers(llm.info.vocab_size, size=shape).tolist()
    rules: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
    llm.generate(prompts, max_tokens=min(8, size.generate), **rules)
    speeds = []
    for _ in range(3):
        began = time.monotonic()
        answers = llm.generate(prompts, max_tokens=size.generate, **rules)
        first = max(a.stats.ttft_s or 0.0 for a in answers)
        speeds.append(batch * (size.generate - 1) / (time.monotonic() - began - first))
    row = {"test": f"tg at {depth}", "batch": batch, "tokens_per_s": statistics.median(speeds)}
    return row | {"all": speeds}


def read(llm: LLM, _size: Size, tokens: int) -> dict[str, Any]:
    """Tokens per second of reading a prompt, none of which was read before."""
    speeds = []
    for i in range(4):
        rng = np.random.default_rng([tokens, i])
        prompt = rng.integers(llm.info.vocab_size, size=tokens).tolist()
        answer = llm.generate(prompt, max_tokens=1, temperature=0, ignore_eos=True)
        assert answer.stats.ttft_s is not None
        speeds.append(tokens / answer.stats.ttft_s)
    median = statistics.median(speeds[1:])  # the first is the warm-up
    return {"test": f"pp{tokens}", "batch": 1, "tokens_per_s": median, "all": speeds}


def joules(llm: LLM, size: Size, batch: int) -> dict[str, Any]:
    """Joules per generated token over some seconds, and the watts before it."""
    row: dict[str, Any] = {"test": "energy", "batch": batch}
    if energy_mj() is None:
        return row | {"joules_per_token": None}
    rng = np.random.default_rng(batch)
    prompts = rng.integers(llm.info.vocab_size, size=(batch, 8)).tolist()
    before, began = energy_mj() or 0, time.monotonic()
    time.sleep(size.window / 2)
    row["idle_w"] = 1e-3 * ((energy_mj() or 0) - before) / (time.monotonic() - began)
    before, began, tokens = energy_mj() or 0, time.monotonic(), 0
    while time.monotonic() - began < size.window:
        llm.generate(prompts, max_tokens=2 * size.generate, temperature=0, ignore_eos=True)
        tokens += 2 * size.generate * batch
    took = time.monotonic() - began
    used = 1e-3 * ((energy_mj() or 0) - before)
    return row | {
        "joules_per_token": used / tokens,
        "w": used / took,
        "tokens_per_s": tokens / took,
    }


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


def peers(tell: Tell, late: Late, size: Size) -> None:
    """PyTorch's bf16 product of one token, and transformers' tokens per second."""
    try:
        import torch  # type: ignore[import-not-found]  # a peer, where it is installed
    except ImportError:
        return tell("none", "no PyTorch")
    tell("torch", torch.__version__)
    for name, (n, k) in size.shapes.items():
        if late():
            return None
        sets = sets_of(2 * n * k, size)
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
        tell("rows", {"product": name, "us": statistics.median(times)}, many=True)
    try:
        import transformers  # type: ignore[import-not-found]  # likewise
    except ImportError:
        return tell("none", "no transformers")
    tell("transformers", importlib.metadata.version("transformers"))
    for name in ("qwen3-0.6b", "llama-3.1-8b"):
        config = transformers.AutoConfig.for_model(**beside("random_model").SHAPES[name])
        with torch.device("cuda"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        ids = torch.randint(1000, (1, 8), device="cuda")
        speeds = []
        for _ in range(3):
            began = time.monotonic()
            model.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False)
            torch.cuda.synchronize()
            speeds.append(64 / (time.monotonic() - began))
        row = {"model": name, "test": "tg64, bf16, eager", "tokens_per_s": max(speeds)}
        tell("models", row, many=True)
        del model
    return None


def beside(name: str) -> types.ModuleType:
    """A module in this folder."""
    if str(HERE) not in sys.path:
        sys.path.append(str(HERE))
    return importlib.import_module(name)


# Each part, and the seconds it may take. The order is that of worth.
PARTS: dict[str, tuple[Callable[[Tell, Late, Size], None], float]] = {
    "ops": (ops, 75),
    "8b": (functools.partial(end_to_end, "llama-3.1-8b", "int4"), 130),
    "0.6b": (functools.partial(end_to_end, "qwen3-0.6b", "int4"), 70),
    "models": (models, 110),
    "products": (products, 80),
    "attention": (attention, 30),
    "8b-int8": (functools.partial(end_to_end, "llama-3.1-8b", "int8"), 50),
    "peers": (peers, 60),
}


def trouble(report: dict[str, Any]) -> list[str]:
    """What differed or failed."""
    lines = []
    for name, found in report["parts"].items():
        if isinstance(found, dict):
            lines += [f"{name}: {what}" for what in found.get("different", [])]
            lines += [f"{name}: {what}" for what in found.get("failed", [])]
            lines += [f"{name}: {found['problem']}"] if "problem" in found else []
    return lines


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = [f"ferrule {report['ferrule']} ({report['commit'][:12]}), {report['driver']}", ""]
    lines += ["Different or failed:", *(f"- {line}" for line in trouble(report) or ["nothing"]), ""]
    for name, found in report["parts"].items():
        if not isinstance(found, dict):
            lines += [f"{name}: {found}", ""]
            continue
        lines += [f"## {name} ({found.get('seconds')} s)", ""]
        if name == "ops" and "compared" in found:
            lines += [f"{found['compared']} operations; {found.get('first_s')} s, then "
                      f"{found.get('second_s')} s", ""]  # fmt: skip
        if name == "models":
            tested, without = found.get("tested", []), found.get("not_on_cuda", [])
            lines += [f"{len(tested)} tested; not on CUDA: {'; '.join(without) or 'none'}", ""]
        if "copy_gb_per_s" in found:
            lines += [f"copy: {found['copy_gb_per_s']:.0f} GB/s (read and written): the floor", ""]
            lines += ["| product | form | tokens | us | GB/s | of floor | Tera-ops |"]
            lines += ["|---|---|" + 5 * "--:|"]
            for r in found.get("rows", []):
                lines.append(
                    f"| {r['product']} | {r['form']} | {r['tokens']} | {r['us']:.1f} | "
                    f"{r['gb_per_s']:.0f} | {r['of_floor']:.0%} | {r['tera_ops']:.1f} |"
                )
        if "load_s" in found:
            size = found.get("weight_bytes", 0) / 1e9
            lines += [f"{found['model']}, {size:.2f} GB, made in {found['load_s']:.1f} s", ""]
            lines += ["| test | batch | tokens/s | J/token | idle W |", "|---|--:|--:|--:|--:|"]
            for r in found.get("rows", []):
                cells = [r["test"], r["batch"]]
                for key, digits in (("tokens_per_s", 0), ("joules_per_token", 3), ("idle_w", 0)):
                    cells.append("" if r.get(key) is None else f"{r[key]:.{digits}f}")
                lines.append("| " + " | ".join(map(str, cells)) + " |")
            lines += ["", *gates(found)]
        if name == "peers":
            lines.append(json.dumps({k: v for k, v in found.items() if k != "seconds"}))
        if "no_time_for" in found:
            lines += ["", f"no time for: {'; '.join(found['no_time_for'])}"]
        lines.append("")
    return "\n".join(lines)


def gates(found: dict[str, Any]) -> list[str]:
    """What an H200 should reach."""
    name, _, quantization = found["model"].partition(" ")
    lines = []
    for test, batch, least in GATES.get(name, []) if quantization == "int4" else []:
        for r in found.get("rows", []):
            if (r["test"], r["batch"]) == (test, batch):
                word = "reached" if r["tokens_per_s"] >= least else "missed"
                lines.append(f"- gate on an H200: {test}, batch {batch}, {least} tokens/s: {word}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
