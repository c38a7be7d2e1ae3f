"""`ferrule doctor`: whether this machine is in order for running models, and what to do if not.

Each check is a line that is ok, a warning (works, but slower or with less) or a problem (does not
work). Paths are below a `root`, so that a test can make a machine up.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .. import __version__, _core, machine
from ..cache import default_cache_dir
from ..errors import FerruleError

GB = 1e9


class Check(NamedTuple):
    """One line."""

    name: str
    state: Literal["ok", "warning", "problem"]
    found: str
    remedy: str = ""


def main(args: argparse.Namespace) -> int:
    """Run the command: 0 if there is no problem (warnings are none), else 1."""
    checks = []
    for check in itertools.chain(run(), _device(args.device) if args.device else ()):
        checks.append(check)
        if not args.json:
            print(f"{check.state:<8} {check.name:<12} {check.found}", flush=True)
            if check.remedy:
                print(f"{'':<21} -> {check.remedy}", flush=True)
    if args.json:
        print(json.dumps([check._asdict() for check in checks], indent=1))
    return int(any(check.state == "problem" for check in checks))


def run(root: Path = Path("/")) -> Iterator[Check]:
    """All checks, in order."""
    checks: tuple[Callable[[Path], Check], ...] = (
        _versions,
        _cpu,
        _kernels,
        _cores,
        _clocks,
        _memory,
        _swap,
        _bandwidth,
        _huge_pages,
        _cuda,
        _energy,
        _cache,
    )
    for check in checks:
        try:
            yield check(root)
        except Exception as error:  # a check that fails must not hide the others
            name = check.__name__.strip("_").replace("_", " ")
            yield Check(name, "warning", f"could not be checked: {error!r}", "report this")


def _versions(_: Path) -> Check:
    parts = [f"ferrule {__version__}", f"Python {platform.python_version()}"]
    missing = []
    for name in ("numpy", "huggingface_hub"):
        try:
            parts.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    system = " ".join((platform.system(), platform.release(), platform.machine()))
    libc = " ".join(platform.libc_ver()).strip()
    found = ", ".join([*parts, system, *([libc] if libc else [])])
    if missing:
        return Check(
            "versions", "problem", f"{found}; no {', '.join(missing)}",
            f"pip install {' '.join(missing)}",
        )  # fmt: skip
    return Check("versions", "ok", found)


def _cpu(root: Path) -> Check:
    board = machine.board(root)
    features = " ".join(_core.cpu_features()) or "nothing beyond the baseline"
    name = machine.cpu(root)
    return Check("cpu", "ok", f"{f'{board}: ' if board else ''}{name}; has {features}")


def _kernels(_: Path) -> Check:
    forced = os.environ.get("FERRULE_ISA")
    try:
        chosen = _core.kernel_set()
    except FerruleError as error:
        return Check("kernels", "problem", str(error), "unset FERRULE_ISA")
    best = _core.kernel_sets()[0]
    others = f"; this CPU can run {', '.join(_core.kernel_sets())}"
    if forced and chosen != best:
        remedy = f"unset FERRULE_ISA to use {best}"
        return Check("kernels", "warning", f"{chosen}, as FERRULE_ISA says{others}", remedy)
    if chosen == "scalar":
        return Check(
            "kernels", "warning",
            "scalar: right but slow, as this CPU has none of the instructions of the faster sets",
            "use a CPU with AVX2 and FMA (x86-64) or NEON (aarch64 and a 64-bit system)",
        )  # fmt: skip
    return Check("kernels", "ok", f"{chosen}: the best set that this CPU can run{others}")


def _cores(root: Path) -> Check:
    threads, why = _core.threads()
    total = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    found = f"{threads} threads: {why}; {allowed} of {total} CPUs allowed"
    if "quota" in why:
        remedy = (
            "raise the limit, such as docker run --cpus or CPUQuota= of systemd, if that is yours"
        )
        return Check("cores", "warning", found, remedy)
    found += ", no cgroup quota below that"
    if allowed < total:
        remedy = (
            "the affinity (taskset, cpuset) leaves CPUs out; widen it, if that is not on purpose"
        )
        return Check("cores", "warning", found, remedy)
    return Check("cores", "ok", found)


def _clocks(root: Path) -> Check:
    parts = []
    if clock := machine.clock(root):
        parts.append(f"{clock.now:.0f} of {clock.most:.0f} MHz now")
    if governor := machine.governor(root):
        parts.append(f"governor {governor}")
    if (heat := machine.temperature(root)) is not None:
        parts.append(f"{heat:.0f} degrees Celsius")
    bits = machine.power_state(root)
    if bits is not None:
        now, before = machine.power_problems(bits), machine.power_problems(bits, 16)
        if now:
            return Check(
                "clocks", "problem", ", ".join([*parts, f"now: {', '.join(now)}"]),
                "use the board's own power supply and cool the board: it runs slower until then",
            )  # fmt: skip
        if before:
            return Check(
                "clocks", "warning", ", ".join([*parts, f"since the start: {', '.join(before)}"]),
                "a better power supply or cooling; the bits are cleared by a restart",
            )  # fmt: skip
        parts.append("no throttling since the start")
    if governor == "powersave" and clock and not _pstate(root):
        remedy = "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
        return Check("clocks", "warning", ", ".join(parts), remedy)
    return Check("clocks", "ok", ", ".join(parts) or "the system does not tell")


def _pstate(root: Path) -> bool:
    """Whether the processor itself chooses its clocks: "powersave" is then no fixed lowest one."""
    folder = root / "sys/devices/system/cpu"
    drivers = {machine.text(path) for path in folder.glob("cpu0/cpufreq/scaling_driver")}
    return bool(drivers & {"intel_pstate", "amd-pstate-epp"})


def _memory(_: Path) -> Check:
    total, available, limit = _core.memory()
    found = f"{available / GB:.1f} GB of {total / GB:.1f} GB can be had without swapping"
    limited = (
        "no cgroup limits it" if limit is None else f"the cgroup's limit is {limit / GB:.1f} GB"
    )
    found += f", {limited}"
    if available < 0.3 * GB:
        remedy = "end other programs, or raise the cgroup's limit: even a small model may not fit"
        return Check("memory", "problem", found, remedy)
    if available < total / 4 and (limit is None or available < limit / 4):
        return Check("memory", "warning", found, "other programs hold most of it; end some of them")
    return Check("memory", "ok", found)


def _swap(root: Path) -> Check:
    info = machine.text(root / "proc/meminfo") or ""
    sizes = {key: int(kib) * 1024 for key, kib in re.findall(r"^(Swap\w+):\s*(\d+) kB", info, re.M)}
    total, free = sizes.get("SwapTotal"), sizes.get("SwapFree", 0)
    if total is None:
        return Check("swap", "ok", "the system does not tell")
    used = total - free
    found = f"{used / GB:.1f} GB of {total / GB:.1f} GB used; ferrule counts on none of it"
    if total and used > 0.5 * total:
        remedy = "memory is short: end other programs, and run sudo swapoff -a && sudo swapon -a"
        return Check("swap", "warning", found, remedy)
    return Check("swap", "ok", found)


def _bandwidth(root: Path) -> Check:
    threads, _why = _core.threads()
    available = _core.memory()[1]
    size = int(min(256e6, available / 4)) // 64 * 64
    if size < 32e6:
        remedy = "free some memory first"
        return Check("bandwidth", "warning", "too little memory is free to measure it", remedy)
    busy = _busy(root)
    rate = _core.memory_bandwidth(threads, size)
    found = (
        f"{rate / GB:.1f} GB/s read from memory by {threads} threads: a model whose weights take "
        f"1 GB generates at most {rate / GB:.3g} tokens/s"
    )
    if busy is not None:
        found += f"; measured with {busy:.0f} other threads running"
        return Check("bandwidth", "warning", found, "end other programs to see what it can do")
    return Check("bandwidth", "ok", found)


def _busy(root: Path) -> float | None:
    """How many threads want to run, in the mean of the last minute, if that is half of the CPUs."""
    load = re.match(r"[\d.]+", machine.text(root / "proc/loadavg") or "")
    busy = float(load[0]) if load else 0.0
    return busy if busy > (os.cpu_count() or 1) / 2 else None


def _huge_pages(root: Path) -> Check:
    found = machine.text(root / "sys/kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", found or "")
    if chosen is None:
        return Check("huge pages", "ok", "the system does not tell")
    if chosen[1] == "never":
        remedy = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
        return Check("huge pages", "warning", "off: memory is read somewhat more slowly", remedy)
    return Check("huge pages", "ok", f"transparent huge pages: {chosen[1]}")


def _cuda(root: Path) -> Check:
    """The driver and its devices, as the driver's own library tells them to any build."""
    usable, why = _core.cuda_devices()
    unused = f"ferrule runs on the CPU: {why}"
    if usable:
        unused = f"ferrule can use {len(usable)} with device=, and runs on the CPU without"
    cuda = _library("libcuda.so.1", "nvcuda.dll")
    if cuda is None:
        card = next((root / "proc/driver/nvidia/gpus").glob("*"), None)
        if card is None:
            return Check("cuda", "ok", f"no driver and no device; {unused}")
        remedy = "install the driver's user libraries (libcuda.so.1); in a container use --gpus all"
        return Check("cuda", "warning", "a device, but no driver library", remedy)
    number = ctypes.c_int()

    def ask(function: str, *args: Any) -> int:
        status = int(getattr(cuda, function)(*args))
        if status:
            raise OSError(f"{function} gave error {status}")
        return number.value

    try:
        ask("cuInit", 0)
        release = ask("cuDriverGetVersion", ctypes.byref(number))
        devices = []
        for index in range(ask("cuDeviceGetCount", ctypes.byref(number))):
            device = ctypes.c_int()
            ask("cuDeviceGet", ctypes.byref(device), index)
            name, size = ctypes.create_string_buffer(256), ctypes.c_size_t()
            ask("cuDeviceGetName", name, len(name), device)
            ask("cuDeviceTotalMem_v2", ctypes.byref(size), device)
            # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
            major, minor = (
                ask("cuDeviceGetAttribute", ctypes.byref(number), what, device) for what in (75, 76)
            )
            devices.append(
                f"{name.value.decode(errors='replace')} (compute capability {major}.{minor}, "
                f"{size.value / GB:.1f} GB)"
            )
    except (OSError, AttributeError) as error:
        remedy = "see that nvidia-smi works: the driver's module and library must be of one version"
        return Check("cuda", "warning", f"the driver does not work: {error}; {unused}", remedy)
    driver = f"driver for CUDA {release // 1000}.{release % 1000 // 10}"
    return Check("cuda", "ok", f"{driver}, {', '.join(devices) or 'no device'}; {unused}")


def _device(device: str) -> Iterator[Check]:
    """The kernels where they run, against the CPU's."""
    if device == "cpu":
        return
    try:
        count, different = _core.cuda_check(device)
    except FerruleError as error:
        yield Check("kernels on", "problem", f"{device}: {error}", "see the line `cuda`")
        return
    if different:
        some = "; ".join(different[:5])
        yield Check(
            "kernels on", "problem",
            f"{device}: {len(different)} of {count} operations differ from the CPU's: {some}",
            'report this with the line `cuda`, and use device="cpu" until then',
        )  # fmt: skip
    else:
        yield Check("kernels on", "ok", f"{device}: {count} operations have the CPU's bits")


def _library(*names: str) -> ctypes.CDLL | None:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _energy(root: Path) -> Check:
    readable: list[str] = []
    closed: list[str] = []
    for path in sorted((root / "sys/class/powercap").glob("intel-rapl:*/energy_uj")):
        name = machine.text(path.parent / "name") or path.parent.name
        (closed if machine.number(path) is None else readable).append(f"RAPL {name}")
    for path in sorted((root / "sys/class/hwmon").glob("hwmon*/name")):
        if "ina3221" in (machine.text(path) or ""):
            labels = map(machine.text, sorted(path.parent.glob("in*_label")))
            readable.append(f"INA3221 {' '.join(label for label in labels if label)}".strip())
    if "Raspberry Pi 5" in (machine.board(root) or "") and shutil.which("vcgencmd"):
        readable.append("vcgencmd pmic_read_adc")
    if _library("libnvidia-ml.so.1", "nvml.dll"):
        readable.append("NVML")
    if sys.platform == "darwin":
        readable.append("powermetrics (as root)")
    if closed:
        return Check(
            "energy", "warning", f"{', '.join(closed)} cannot be read"
            + (f"; {', '.join(readable)} can" if readable else ""),
            "sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj (it tells other users what "
            "this machine computes, so think first)",
        )  # fmt: skip
    return Check("energy", "ok", ", ".join(readable) or "no source: joules cannot be told here")


def _cache(_: Path) -> Check:
    folder = Path(default_cache_dir())
    packed = list(folder.glob("*.ferrule")) if folder.is_dir() else []
    size = sum(path.stat().st_size for path in packed)
    # The first folder on the way up that is there.
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    found = (
        f"{folder}: {len(packed)} packed models, {size / GB:.1f} GB; {free / GB:.1f} GB are free"
    )
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Check(
            "cache", "warning", f"{folder} cannot be written: weights are packed at each load and "
            "held in memory", "set XDG_CACHE_HOME, or give weight_cache= a folder",
        )  # fmt: skip
    if free < 2 * GB:
        remedy = "free some disk space, or set XDG_CACHE_HOME to a folder on a larger disk"
        if packed:
            remedy += f"; rm {folder}/*.ferrule frees {size / GB:.1f} GB (made again when needed)"
        return Check("cache", "warning", found, remedy)
    return Check("cache", "ok", found)
