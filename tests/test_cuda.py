"""`device=`: without a driver, and on the emulated one of tests/cuda, which runs the kernels."""

from __future__ import annotations

import ctypes.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "rust/src/backend/cuda/kernels"
FLAGS = "-std=c++17 -O2 -fPIC -ffp-contract=off -fno-math-errno -U_FORTIFY_SOURCE -w"
if platform.machine() == "x86_64":
    FLAGS += " -mfma -mf16c"

PROGRAM = """
import json, logging, sys
import ferrule
lines = []
logger = logging.getLogger("ferrule")
logger.setLevel(logging.INFO)
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logger.addHandler(handler)
options = json.loads(sys.argv[1])
try:
    with ferrule.LLM("tales-1m", progress=False, context_length=256, **options) as llm:
        prompts = ["Once upon a time", "The fox said", "A lantern"]
        answers = llm.generate(prompts, max_tokens=8, seed=3, logprobs=2)
        again = llm.generate(prompts[0], max_tokens=8, temperature=0)
        plain = dict(temperature=0.9, top_p=1.0, top_k=0, seed=4, max_tokens=8)
        drawn = llm.generate(prompts, **plain) + llm.generate(prompts, min_p=0.1, **plain)
        drawn += llm.generate(prompts, **plain | dict(top_p=0.8, top_k=30))
        rules = dict(repetition_penalty=1.3, frequency_penalty=0.4, logit_bias={9: 2.0})
        drawn += llm.generate(prompts, min_tokens=4, **plain | rules)
        # One of a batch needs its logits; all of them are then read.
        one = llm.submit(prompts[1], logprobs=1, **plain)
        two = llm.submit(prompts[2], **plain)
        drawn += [one.result(), two.result()]
        found = {
            "device": llm.device,
            "because": llm.info.device_because,
            "isa": llm.info.isa,
            "layers": [llm.info.gpu_layers, llm.info.layers],
            "notes": list(llm.info.notes),
            "kv": llm.info.kv_cache_bytes,
            "texts": [a.text for a in [*answers, again, *drawn]],
            "logprobs": repr([a.logprobs for a in answers]),
        }
except ferrule.FerruleError as error:
    found = {"error": type(error).__name__, "text": str(error)}
print(json.dumps(found | {"lines": lines}))
"""


def run(folder: Path, options: dict[str, Any], **environment: str) -> dict[str, Any]:
    """What the program finds with the library in `folder`."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(options)]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [line for line in done.stdout.splitlines() if line.startswith("{")]
    value: dict[str, Any] = json.loads(found[0])
    return value


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the emulated driver."""
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no g++ to build the emulated driver with")
    folder = tmp_path_factory.mktemp("emulator")
    here = ROOT / "tests/cuda"
    jobs = []
    for source in [*sorted(KERNELS.glob("*.cu")), here / "emulator.cpp"]:
        more = ["-include", here / "emulator.h"] if source.suffix == ".cu" else []
        unit = f"-DUNIT={source.stem}"
        command = [compiler, *FLAGS.split(), *more, unit, "-x", "c++", "-c", source]
        jobs.append(subprocess.Popen([*command, "-o", folder / f"{source.stem}.o"]))
    assert all(job.wait() == 0 for job in jobs)
    objects = sorted(folder.glob("*.o"))
    library = folder / "libcuda.so.1"
    soname = "-Wl,-soname,libcuda.so.1"
    subprocess.run([compiler, "-shared", soname, *objects, "-o", library], check=True)
    return folder


def test_answers_are_those_of_the_cpu(emulator: Path) -> None:
    for more in ({"quantization": "int4", "kv_cache_dtype": "int8"}, {"quantization": "none"}):
        cpu = run(emulator, {"device": "cpu", **more})
        cuda = run(emulator, {"device": "cuda", **more})
        assert (cpu["device"], cuda["device"], cuda["isa"]) == ("cpu", "cuda:0", "sm_80")
        assert cuda["texts"] == cpu["texts"]
        assert cuda["logprobs"] == cpu["logprobs"]
    assert run(emulator, {"device": "auto"})["device"] == "cuda:0"


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"LD_LIBRARY_PATH": "/nowhere"}, "no NVIDIA driver: libcuda.so.1"),
        ({"FAKE_INIT": "100"}, "finds no device"),
        ({"FAKE_INIT": "34"}, "stub"),
        ({"FAKE_VERSION": "11080"}, "has CUDA 11.8, and 12.2 is needed"),
        ({"FAKE_CAPABILITY": "75"}, "compute capability 7.5"),
        ({"FERRULE_DISABLE_CUDA": "1"}, "FERRULE_DISABLE_CUDA=1 is set"),
    ],
)
def test_why_not(emulator: Path, environment: dict[str, str], words: str) -> None:
    if "LD_LIBRARY_PATH" in environment and ctypes.util.find_library("cuda"):
        pytest.skip("this machine has a driver")
    asked = run(emulator, {"device": "cuda"}, **environment)
    assert asked["error"] == "CudaUnavailableError"
    assert words in asked["text"]
    auto = run(emulator, {"device": "auto"}, **environment)
    assert auto["device"] == "cpu"
    assert words in auto["because"]
    assert [line for line in auto["lines"] if words in line and line.startswith("on the CPU")]


def test_short_memory(emulator: Path) -> None:
    found = run(emulator, {"device": "cuda"}, FAKE_MEMORY="100000")
    assert found["error"] == "OutOfMemoryError"
    assert run(emulator, {"device": "auto"}, FAKE_MEMORY="100000")["device"] == "cpu"


RESERVE = 512 << 20  # what a plan leaves free on the device


def test_layers_on_two_machines(emulator: Path) -> None:
    options = {"quantization": "int4", "kv_cache_dtype": "int8"}
    cpu = run(emulator, {"device": "cpu", **options})
    layers = cpu["layers"][1]
    assert cpu["layers"][0] == 0
    for count in range(1, layers + 1):
        found = run(emulator, {"device": "cuda", "gpu_layers": count, **options})
        assert found["layers"] == [count, layers]
        assert found["texts"] == cpu["texts"]
        assert found["logprobs"] == cpu["logprobs"]
        assert bool(found["notes"]) == (count < layers)
    # As many as fit: a little less memory than all of it takes.
    needed = number(run(emulator, {"device": "cuda", **options}, FAKE_MEMORY=str(RESERVE))["text"])
    some = run(emulator, {"device": "auto", **options}, FAKE_MEMORY=str(RESERVE + needed))
    assert (some["device"], some["layers"][0]) == ("cuda:0", 1)
    assert "1 of" in some["notes"][0]
    assert some["texts"] == cpu["texts"]
    # A number that does not fit says which one does; one that is none says the range.
    asked = {"device": "cuda", "gpu_layers": layers, **options}
    found = run(emulator, asked, FAKE_MEMORY=str(RESERVE + needed))
    assert found["error"] == "OutOfMemoryError"
    assert "gpu_layers=1 fits" in found["text"]
    found = run(emulator, {"device": "auto", "gpu_layers": layers + 1, **options})
    assert found["error"] == "InvalidParameterError"
    found = run(emulator, {"device": "cpu", "gpu_layers": 1})
    assert found["error"] == "InvalidParameterError"
    # Keys and values of both sides together get what was allowed.
    found = run(emulator, {"device": "cuda", "gpu_layers": 1, "kv_cache_bytes": 300_000, **options})
    assert 0 < found["kv"] <= 300_000


def test_less_memory_than_the_driver_says(emulator: Path) -> None:
    """What was planned does not go in: fewer layers do, unless their number was asked for."""
    options = {"quantization": "int4", "kv_cache_dtype": "int8"}
    cpu = run(emulator, {"device": "cpu", **options})
    needed = number(run(emulator, {"device": "cuda", **options}, FAKE_MEMORY=str(RESERVE))["text"])
    memory = RESERVE + needed // 3 * 4 + 4096  # three quarters are room for one layer
    short = {"FAKE_MEMORY": str(memory), "FAKE_TAKEN": str(memory - 2_000_000)}
    for device in ("cuda", "auto"):
        found = run(emulator, {"device": device, **options}, **short)
        assert (found["device"], found["layers"][0]) == ("cuda:0", 1)
        assert found["texts"] == cpu["texts"]
    asked = {"gpu_layers": cpu["layers"][1], **options}
    assert run(emulator, {"device": "auto", **asked}, **short)["error"] == "OutOfMemoryError"


def number(text: str) -> int:
    """The bytes that an error says were needed."""
    found = re.search(r"(\d+) bytes asked for", text)
    assert found, text
    return int(found[1])


def test_memory_that_is_the_computers(emulator: Path) -> None:
    options = {"quantization": "int8"}
    cpu = run(emulator, {"device": "cpu", **options})
    found = run(emulator, {"device": "cuda", **options}, FAKE_INTEGRATED="1")
    assert found["layers"][0] == found["layers"][1]
    assert found["texts"] == cpu["texts"]
    # One memory: where all of the model does not fit, a part of it does not help.
    for more in ({}, {"gpu_layers": 1}):
        few = {"FAKE_INTEGRATED": "1", "FAKE_MEMORY": str(RESERVE + 100_000)}
        found = run(emulator, {"device": "cuda", **options, **more}, **few)
        assert found["error"] == "OutOfMemoryError"


def test_plan(emulator: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "ferrule",
        "plan",
        "tales-1m",
        "--device",
        "cuda",
        "-q",
        "int4",
    ]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(emulator)}

    def text(*more: str, **also: str) -> str:
        done = subprocess.run(
            [*command, *more], env={**environment, **also}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "layers on the GPU" in text()
    assert "| 1 of" in text("--gpu-layers", "1")
    assert "not one layer fits" in text(FAKE_MEMORY=str(RESERVE))


def test_timing(emulator: Path) -> None:
    """What benches/gpu.py asks for; the emulated clock always says 1 ms."""
    program = """
from ferrule import _core
print(_core.cuda_time("copy", 4096, 0, 0, 0, 2))
for form in ("int4", "int8", "bf16", "q4_k", "q6_k"):
    print(_core.cuda_time(form, 96, 300, 3, 2, 2)[0], _core.cuda_time(form, 40, 64, 9, 1, 1)[0])
print(_core.cuda_time_attention("int8", [4, 2, 64], 2, 70, 2, 2))
"""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(emulator)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("[", "("))]
    assert lines[0] == "([1000.0, 1000.0], 4096)"
    assert lines[1:6] == ["[500.0, 500.0] [1000.0]"] * 5
    # Two sequences, two pages of 64 positions each, two heads of 64 with a scale, keys and values.
    assert lines[6] == f"([500.0, 500.0], {2 * 2 * 64 * 2 * (64 + 4) * 2})"


def test_random_weights(emulator: Path, tmp_path: Path) -> None:
    """Weights made on the device: the matrices of the file are not read."""
    program = """
import sys
from ferrule import _core
options = dict(device=sys.argv[1], quantization="int4", random=True, context_length=64, max_batch=1)
try:
    engine = _core.Engine(sys.argv[2], **options)
    request = engine.submit([1, 2, 3], max_tokens=4, temperature=0.0, ignore_eos=True)
    while not (news := request.wait(None)) or not news.done:
        pass
    print("tokens", news.done.completion_tokens)
    engine.close()
except Exception as error:
    print("error", error)
"""
    model = str(ROOT / "models/tales-1m")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(emulator)}
    for device, words in (("cuda", "tokens 4"), ("cpu", 'random weights are for device="cuda"')):
        command = [sys.executable, "-c", program, device, model]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert words in done.stdout, done.stdout + done.stderr


def test_doctor(emulator: Path) -> None:
    command = [sys.executable, "-m", "ferrule", "doctor", "--json", "--device", "cuda"]
    found = {}
    for folder in (emulator, emulator / "nothing"):
        environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        text = done.stdout[done.stdout.index("[") :]
        checks = {check["name"]: check for check in json.JSONDecoder().raw_decode(text)[0]}
        found[folder] = checks["kernels on"]
    assert found[emulator]["state"] == "ok"
    assert re.search(r"[1-9]\d+ operations have the CPU's bits", found[emulator]["found"])
    assert found[emulator / "nothing"]["state"] == "problem"


NVML = """
#include <string.h>
static unsigned long long used = 5000000;
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *id, void **device) {
    *device = &used;
    return strcmp(id, "0000:01:00.0") ? 6 : 0;
}
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *mj) {
    *mj = *(unsigned long long *)device += 1000;
    return 0;
}
"""


def test_the_gpu_bench(emulator: Path, tmp_path: Path) -> None:
    """All parts of benches/gpu.py, small; and one that is cut off, which harms no other."""
    source, library = tmp_path / "nvml.c", tmp_path / "libnvidia-ml.so.1"
    source.write_text(NVML)
    subprocess.run(["g++", "-x", "c", "-shared", "-fPIC", source, "-o", library], check=True)
    path = f"{emulator}:{tmp_path}"
    command = [sys.executable, str(ROOT / "benches/gpu.py"), "--small", "--out"]

    def report(name: str, *more: str, **also: str) -> tuple[int, dict[str, Any], str]:
        out = tmp_path / name
        environment = {**os.environ, "LD_LIBRARY_PATH": path, **also}
        done = subprocess.run(
            [*command, str(out), *more], env=environment, capture_output=True, text=True
        )
        found = json.loads(out.with_suffix(".json").read_text())
        return done.returncode, found, out.with_suffix(".md").read_text()

    status, found, text = report("whole")
    parts = found["parts"]
    assert list(parts) == [
        "ops",
        "8b",
        "0.6b",
        "models",
        "products",
        "attention",
        "8b-int8",
        "peers",
    ]
    assert status == 0, text
    assert "Different or failed:\n- nothing\n" in text
    assert parts["ops"]["compared"] > 100
    assert len(parts["models"]["tested"]) == 2
    assert len(parts["products"]["rows"]) == 9
    assert len(parts["attention"]["rows"]) == 4
    for name in ("8b", "0.6b", "8b-int8"):
        rows = parts[name]["rows"]
        tests = ["tg at 0", "tg at 0", "pp70", "energy", "energy", "tg at 70"]
        assert [row["test"] for row in rows] == tests
        assert all(row["tokens_per_s"] > 0 for row in rows)
        assert rows[3]["joules_per_token"] > 0
    word = "reached" if parts["8b"]["rows"][0]["tokens_per_s"] >= 400 else "missed"
    assert f"gate on an H200: tg at 0, batch 1, 400 tokens/s: {word}" in text
    status, found, text = report("faulty", "--only", "0.6b,products", FAKE_FAULT="400")
    assert status == 1
    assert "LAUNCH_FAILED" in text
    assert set(found["parts"]) == {"0.6b", "products"}
    done = subprocess.run(
        [*command, str(tmp_path / "none")],
        env={**os.environ, "LD_LIBRARY_PATH": path, "FAKE_INIT": "100"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.split(":")[0]) == (0, "skipped")
    assert not (tmp_path / "none.json").exists()


def test_a_device_that_fails(emulator: Path) -> None:
    found = run(emulator, {"device": "cuda"}, FAKE_FAULT="50")
    assert found["error"] == "DeviceError"
    assert "load the model again" in found["text"]


def test_importing_touches_no_driver() -> None:
    program = "import ferrule; print('libcuda' in open('/proc/self/maps').read())"
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
