"""What the system says about itself, on machines made up of files; `ferrule doctor` and `plan`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ferrule import _core, machine
from ferrule.cli import doctor

CPUS = "sys/devices/system/cpu"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def cpus(*now: int, most: int = 2_400_000, governor: str = "ondemand") -> dict[str, str]:
    files = {}
    for index, frequency in enumerate(now):
        folder = f"{CPUS}/cpu{index}/cpufreq"
        files[f"{folder}/scaling_cur_freq"] = f"{frequency}\n"
        files[f"{folder}/cpuinfo_max_freq"] = f"{most}\n"
        files[f"{folder}/scaling_governor"] = f"{governor}\n"
    return files


PI = {
    "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    "proc/cpuinfo": "".join(f"processor\t: {i}\nCPU part\t: 0xd0b\n\n" for i in range(4)),
    "sys/class/thermal/thermal_zone0/temp": "61200\n",
    "sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled": "0\n",
}
FIRMWARE = next(name for name in PI if name.endswith("get_throttled"))


def test_names_of_processors(tmp_path: Path) -> None:
    write(tmp_path, PI)
    assert machine.board(tmp_path) == "Raspberry Pi 5 Model B Rev 1.0"
    assert machine.cpu(tmp_path) == "4 x Cortex-A76"
    parts = ["0xd05"] * 4 + ["0xd0b"] * 2 + ["0xfff"]
    write(tmp_path, {"proc/cpuinfo": "".join(f"CPU part\t: {part}\n" for part in parts)})
    assert machine.cpu(tmp_path) == "4 x Cortex-A55, 2 x Cortex-A76, 1 x 0xfff"
    write(tmp_path, {"proc/cpuinfo": "model name\t: Some Chip @ 3 GHz\nmodel name\t: Other\n"})
    assert machine.cpu(tmp_path) == "Some Chip @ 3 GHz"
    assert machine.cpu(tmp_path / "nothing")


def test_a_cool_machine_slows_nothing_down(tmp_path: Path) -> None:
    write(tmp_path, PI | cpus(2_400_000))
    assert machine.Watch(tmp_path).seen() == []
    assert machine.Watch(tmp_path / "nothing").seen() == []


def test_what_slows_a_machine_down(tmp_path: Path) -> None:
    throttled = f"{CPUS}/cpu0/thermal_throttle/core_throttle_count"
    over = "sys/class/hwmon/hwmon3/oc1_event_cnt"
    status, stat = "proc/self/status", "proc/stat"
    before = {
        throttled: "5\n",
        over: "0\n",
        status: "Name: x\nVmSwap:\t       0 kB\n",
        stat: "cpu  100 0 100 800 0 0 0 50 0 0\ncpu0 1 2 3\n",
    }
    write(tmp_path, PI | cpus(2_400_000) | before)
    watch = machine.Watch(tmp_path)
    # For a moment only: the frequency and the Pi's state are seen in between.
    cooled = {
        "sys/class/thermal/cooling_device0/type": "cpufreq-cpu0\n",
        "sys/class/thermal/cooling_device0/cur_state": "2\n",
    }
    write(tmp_path, cpus(1_500_000) | {FIRMWARE: "50005\n"} | cooled)
    write(tmp_path, {"sys/class/thermal/thermal_zone0/temp": "84900\n"})
    watch.look()
    after = {
        throttled: "9\n",
        over: "2\n",
        status: "Name: x\nVmSwap:\t    8192 kB\n",
        stat: "cpu  200 0 200 900 0 0 0 250 0 0\ncpu0 1 2 3\n",
    }
    write(tmp_path, cpus(2_400_000) | {FIRMWARE: "50000\n"} | after)
    assert watch.seen() == [
        "under-voltage (use the power supply made for this board)",
        "throttled",
        "thermal throttling of a core: 4",
        "throttling by over-current: 2",
        "pages swapped out: 2048",
        "the host took CPU time away from this virtual machine",
        "clocks were at 1500 of 2400 MHz, as the system cools the CPU",
        "up to 85 degrees Celsius",
    ]


def test_clocks_of_cpus_that_may_not_be_used_do_not_count(tmp_path: Path) -> None:
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("no affinity here")
    mine = min(os.sched_getaffinity(0))
    write(tmp_path, cpus(*([600_000] * mine + [2_000_000])))
    write(tmp_path, {f"{CPUS}/cpu4000/cpufreq/scaling_cur_freq": "1\n"})
    write(tmp_path, {f"{CPUS}/cpu4000/cpufreq/cpuinfo_max_freq": "9000000\n"})
    found = machine.clock(tmp_path)
    assert found is not None
    assert found.most == 2400


def states(root: Path) -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.run(root)}


def test_doctor_on_a_board_in_order(tmp_path: Path) -> None:
    write(tmp_path, PI | cpus(2_400_000))
    write(tmp_path, {"sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n"})
    write(tmp_path, {"proc/meminfo": "SwapTotal: 2000000 kB\nSwapFree: 2000000 kB\n"})
    write(tmp_path, {"proc/loadavg": "0.05 0.10 0.20 1/100 4242\n"})
    found = states(tmp_path)
    assert "Raspberry Pi 5 Model B Rev 1.0: 4 x Cortex-A76" in found["cpu"].found
    assert found["clocks"] == doctor.Check(
        "clocks",
        "ok",
        "2400 of 2400 MHz now, governor ondemand, 61 degrees Celsius, "
        "no throttling since the start",
    )
    assert found["huge pages"].state == found["swap"].state == "ok"
    assert found["versions"].state == "ok"
    assert "GB/s" in found["bandwidth"].found
    assert found["bandwidth"].state == "ok"
    assert all(check.remedy == "" for check in found.values() if check.state == "ok")
    assert all(check.remedy for check in found.values() if check.state != "ok")


def test_doctor_on_a_board_in_trouble(tmp_path: Path) -> None:
    write(tmp_path, PI | cpus(600_000, governor="powersave"))
    write(tmp_path, {"sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n"})
    write(tmp_path, {"proc/meminfo": "SwapTotal: 2000000 kB\nSwapFree: 200000 kB\n"})
    write(tmp_path, {"proc/loadavg": "9999.50 3.00 2.00 1/100 4242\n"})
    found = states(tmp_path)
    assert found["bandwidth"].state == "warning"
    assert "with 10000 other threads running" in found["bandwidth"].found
    assert found["clocks"].state == "warning"
    assert "performance" in found["clocks"].remedy
    assert found["huge pages"].state == "warning"
    assert found["swap"].state == "warning"
    write(tmp_path, {FIRMWARE: "50000\n"})
    assert states(tmp_path)["clocks"].state == "warning"
    write(tmp_path, {FIRMWARE: "50005\n"})
    found = states(tmp_path)
    assert found["clocks"].state == "problem"
    assert "under-voltage" in found["clocks"].found
    # The processor's own choice of clocks is no fault.
    write(tmp_path, {FIRMWARE: "0\n", f"{CPUS}/cpu0/cpufreq/scaling_driver": "intel_pstate\n"})
    assert states(tmp_path)["clocks"].state == "ok"


def test_doctor_on_energy(tmp_path: Path) -> None:
    assert "no source" in states(tmp_path)["energy"].found
    rapl = "sys/class/powercap/intel-rapl:0"
    write(tmp_path, {f"{rapl}/name": "package-0\n", f"{rapl}/energy_uj": "12\n"})
    write(tmp_path, {"sys/class/hwmon/hwmon1/name": "ina3221\n"})
    write(tmp_path, {"sys/class/hwmon/hwmon1/in1_label": "VDD_IN\n"})
    found = states(tmp_path)["energy"]
    assert found.state == "ok"
    assert found.found == "RAPL package-0, INA3221 VDD_IN"
    # What cannot be read: a folder here, a file of root elsewhere.
    (tmp_path / rapl / "energy_uj").unlink()
    (tmp_path / rapl / "energy_uj").mkdir()
    found = states(tmp_path)["energy"]
    assert found.state == "warning"
    assert "chmod" in found.remedy


DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return INIT; }
int cuDriverGetVersion(int *v) { *v = 12080; return 0; }
int cuDeviceGetCount(int *n) { *n = 2; return 0; }
int cuDeviceGet(int *d, int i) { *d = i + 7; return 0; }
int cuDeviceGetName(char *s, int n, int d) { strcpy(s, d == 7 ? "Orin" : "Other"); return 0; }
int cuDeviceTotalMem_v2(size_t *n, int d) { *n = 8000000000; return 0; }
int cuDeviceGetAttribute(int *v, int what, int d) { *v = what == 75 ? 8 : 7; return 0; }
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("cc"), reason="needs a C compiler on Linux"
)
@pytest.mark.parametrize("status", [0, 804])
def test_doctor_asks_the_driver_of_a_gpu(tmp_path: Path, status: int) -> None:
    source = tmp_path / "driver.c"
    source.write_text(DRIVER)
    library = str(tmp_path / "libcuda.so.1")
    subprocess.run(["cc", "-shared", "-fPIC", f"-DINIT={status}", "-o", library, str(source)],
                   check=True)  # fmt: skip
    code = (
        "from ferrule.cli import doctor; from pathlib import Path; print(doctor._cuda(Path('/')))"
    )
    env = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True,
                          check=True)  # fmt: skip
    if status:
        assert "cuInit gave error 804" in done.stdout
        assert "nvidia-smi" in done.stdout
    else:
        assert "state='ok'" in done.stdout
        assert "CUDA 12.8" in done.stdout
        assert "Orin (compute capability 8.7, 8.0 GB), Other (" in done.stdout


def test_a_check_that_fails_hides_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(threads: int, size: int) -> float:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(_core, "memory_bandwidth", broken)
    found = states(tmp_path)
    assert found["bandwidth"].state == "warning"
    assert "on purpose" in found["bandwidth"].found
    assert "cache" in found


def cli(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ferrule", *args], capture_output=True, encoding="utf-8",
        timeout=120, check=False, env={**os.environ, **env},
    )  # fmt: skip


def test_doctor_on_this_machine(tmp_path: Path) -> None:
    done = cli("doctor", "--json", XDG_CACHE_HOME=str(tmp_path))
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert len(checks) == 12
    assert done.returncode == int(any(c["state"] == "problem" for c in checks.values()))
    assert str(tmp_path / "ferrule") in checks["cache"]["found"]
    lines = cli("doctor").stdout.splitlines()
    assert {line.split()[0] for line in lines} <= {"ok", "warning", "problem", "->"}
    forced = cli("doctor", FERRULE_ISA="scalar").stdout
    assert "as FERRULE_ISA says" in forced
    wrong = cli("doctor", FERRULE_ISA="mmx")
    assert wrong.returncode == 1
    assert "unset FERRULE_ISA" in wrong.stdout


def test_doctor_on_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "ferrule").write_text("a file, no folder")
    env = {"XDG_CACHE_HOME": str(tmp_path)}
    checks = json.loads(cli("doctor", "--json", **env).stdout)
    cache = next(check for check in checks if check["name"] == "cache")
    assert cache["state"] == "warning"
    assert "weight_cache" in cache["remedy"]


def test_plan() -> None:
    done = cli("plan", "tales-4m", "--json")
    assert done.returncode == 0
    rows = {row["quantization"]: row for row in json.loads(done.stdout)}
    assert list(rows) == ["int4", "int5", "int6", "int8", "none"]
    weights = [sum(row["weight_bytes"].values()) for row in rows.values()]
    assert weights == sorted(weights)
    assert weights[-1] == pytest.approx(rows["none"]["stored_bytes"]["BF16"], rel=0.01)
    assert all(row["fits"] and row["context_length_here"] == 1024 for row in rows.values())
    table = cli("plan", "tales-4m", "-q", "int8", "-c", "256").stdout.splitlines()
    assert len(table) == 5
    assert table[1] == "context: 256 of 1024 tokens, keys and values in f16"
    assert f"| {rows['int8']['kv_bytes_context'] / 4e6:.0f} MB |" in table[-1]
    assert table[-1].startswith("| int8 | 4 MB")
    assert "| 256 | yes |" in table[-1]
