"""What the system says about its CPU, power and temperature. Reads files; changes nothing.

Every path is below a `root`, so that a test can make a machine up. What a system does not say is
None or missing, never an error.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

# Arm's part numbers of the cores that run these models (MIDR_EL1, Arm Ltd).
_ARM_PARTS = {
    "0xd03": "Cortex-A53",
    "0xd05": "Cortex-A55",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd09": "Cortex-A73",
    "0xd0a": "Cortex-A75",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse N1",
    "0xd40": "Neoverse V1",
    "0xd41": "Cortex-A78",
    "0xd42": "Cortex-A78AE",
    "0xd44": "Cortex-X1",
    "0xd47": "Cortex-A710",
    "0xd49": "Neoverse N2",
    "0xd4f": "Neoverse V2",
}

# `vcgencmd get_throttled` of the Raspberry Pi: bits of what is so now, and 16 bits up of what has
# been so since the start.
_PI_BITS = {
    0: "under-voltage (use the power supply made for this board)",
    1: "frequency capped",
    2: "throttled",
    3: "soft temperature limit (cool the board)",
}


class Clock(NamedTuple):
    """Mean frequency of the CPUs now, and what they could have, in MHz."""

    now: float
    most: float


def text(path: Path) -> str | None:
    """What a file holds, if it can be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return None


def number(path: Path) -> int | None:
    """The whole number that a file holds (0x: hexadecimal), if it does."""
    found = text(path)
    try:
        return None if found is None else int(found, 0)
    except ValueError:
        return None


def board(root: Path = Path("/")) -> str | None:
    """The name of a board, as its device tree has it."""
    return text(root / "proc/device-tree/model")


def cpu(root: Path = Path("/")) -> str:
    """The name of the processor; of several kinds of cores the name and number of each."""
    info = text(root / "proc/cpuinfo") or ""
    name = re.search(r"^model name\s*:\s*(.+)$", info, re.M)
    parts = re.findall(r"^CPU part\s*:\s*(\w+)$", info, re.M)
    if parts:
        counts = {part: parts.count(part) for part in sorted(set(parts), key=parts.index)}
        return ", ".join(f"{n} x {_ARM_PARTS.get(part, part)}" for part, n in counts.items())
    return name[1].strip() if name else platform.processor() or platform.machine()


def clock(root: Path = Path("/")) -> Clock | None:
    """The frequency of the CPUs that this process may use, if the system tells."""
    now, most = [], []
    for folder in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq"):
        if (index := int(folder.parent.name[3:])) not in _allowed(index):
            continue
        current = number(folder / "scaling_cur_freq")
        maximum = number(folder / "cpuinfo_max_freq")
        if current and maximum:
            now.append(current / 1000)
            most.append(maximum / 1000)
    return Clock(sum(now) / len(now), sum(most) / len(most)) if now else None


def _allowed(index: int) -> set[int]:
    try:
        return os.sched_getaffinity(0)
    except (AttributeError, OSError):  # not Linux
        return {index}


def temperature(root: Path = Path("/")) -> float | None:
    """The hottest part that the system measures, in degrees Celsius."""
    zones = (root / "sys/class/thermal").glob("thermal_zone*/temp")
    found = [value / 1000 for value in map(number, zones) if value is not None and value > 0]
    return max(found, default=None)


def power_state(root: Path = Path("/")) -> int | None:
    """The bits of the Raspberry Pi's `get_throttled`."""
    for path in (root / "sys/devices/platform").glob("soc*/soc*firmware/get_throttled"):
        found = text(path)
        if found is not None:
            return int(found, 16) if re.fullmatch(r"(0x)?[0-9a-fA-F]+", found) else None
    command = shutil.which("vcgencmd") if root == Path("/") else None
    if command is None:
        return None
    try:
        done = subprocess.run([command, "get_throttled"], capture_output=True, timeout=5, text=True)
    except (OSError, subprocess.SubprocessError):
        return None
    value = re.search(r"throttled=0x([0-9a-fA-F]+)", done.stdout)
    return int(value[1], 16) if value else None


def power_problems(bits: int, shift: int = 0) -> list[str]:
    """What the bits of `power_state` mean: now, or with shift 16 since the start."""
    return [what for bit, what in _PI_BITS.items() if bits >> (bit + shift) & 1]


class Watch:
    """What slows a machine down between two looks: `Watch()`, work, `seen()`."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._counts = self._count()
        self._clock = clock(root)
        self._hottest = temperature(root)
        self._bits = 0

    def look(self) -> None:
        """Notes how it is now; to be called while the CPU is still busy, or was just now."""
        found = clock(self._root)
        if found and (self._clock is None or found.now < self._clock.now):
            self._clock = found
        heat = temperature(self._root)
        if heat is not None:
            self._hottest = max(heat, self._hottest or heat)
        self._bits |= power_state(self._root) or 0

    def seen(self) -> list[str]:
        """What slowed it down, as sentences; none if nothing is known to have."""
        self.look()
        problems = power_problems(self._bits)
        now = self._count()
        for what in now:
            more = now[what] - self._counts.get(what, now[what])
            if what == "stolen":
                if more > 0.02 * (now["ticks"] - self._counts.get("ticks", 0)):
                    problems.append("the host took CPU time away from this virtual machine")
            elif what != "ticks" and more > 0:
                problems.append(f"{what}: {more}")
        if self._clock and self._clock.now < 0.75 * self._clock.most:
            problems.append(
                f"clocks were at {self._clock.now:.0f} of {self._clock.most:.0f} MHz"
                f"{_because(self._root)}"
            )
        if problems and self._hottest:
            problems.append(f"up to {self._hottest:.0f} degrees Celsius")
        return problems

    def _count(self) -> dict[str, int]:
        """Counters that grow when something slows the machine down."""
        counts = {}
        cpus = self._root / "sys/devices/system/cpu"
        for kind in ("core", "package"):
            files = cpus.glob(f"cpu[0-9]*/thermal_throttle/{kind}_throttle_count")
            found = [value for value in map(number, files) if value is not None]
            if found:
                counts[f"thermal throttling of a {kind}"] = sum(found)
        # Over-current events of a Jetson.
        files = (self._root / "sys/class/hwmon").glob("hwmon*/oc*_event_cnt")
        found = [value for value in map(number, files) if value is not None]
        if found:
            counts["throttling by over-current"] = sum(found)
        status = text(self._root / "proc/self/status") or ""
        swap = re.search(r"^VmSwap:\s*(\d+) kB", status, re.M)
        if swap:
            counts["pages swapped out"] = int(swap[1]) // 4
        stat = re.match(r"cpu ((?: *\d+)+)", text(self._root / "proc/stat") or "")
        if stat:
            ticks = [int(tick) for tick in stat[1].split()]
            counts["ticks"] = sum(ticks[:8])
            counts["stolen"] = ticks[7] if len(ticks) > 7 else 0
        return counts


def governor(root: Path = Path("/")) -> str | None:
    """What chooses the frequency of the first CPU that has a choice."""
    files = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor"))
    return text(files[0]) if files else None


def _because(root: Path) -> str:
    """Why clocks may be down."""
    for device in (root / "sys/class/thermal").glob("cooling_device*"):
        kind = (text(device / "type") or "").lower()
        if ("cpu" in kind or kind == "processor") and number(device / "cur_state"):
            return ", as the system cools the CPU"
    return f" (governor {found})" if (found := governor(root)) else ""
