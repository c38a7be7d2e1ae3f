"""A kernel set asks for every instruction set that its functions are compiled for.

A CPU that has some of them and not others (AVX-512 without VNNI) must get a weaker set, not a
refused instruction; no emulator at hand has AVX-512, so this is read off the source. Which set a
CPU gets, from what the sets ask for, is tested in rust/src/kernels/tests/choice.rs.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

KERNELS = Path(__file__).parent.parent / "rust" / "src" / "kernels"
# What having one instruction set says about another (rustc_target; CPUs with one have the other).
IMPLIES = {
    "avx2": {"sse", "sse2", "avx"},
    "fma": {"avx"},
    "avx512f": {"avx2", "fma", "f16c"},
    "avx512bw": {"avx512f"},
    "dotprod": {"neon"},
    "i8mm": {"neon"},
}


def detected(path: Path) -> set[str]:
    """What the set in this file asks the CPU for, and what follows from it."""
    needs = re.search(r"^    needs: &\[(.*)\]", path.read_text(encoding="utf-8"), re.M)
    found = set(re.findall(r'"([\w.-]+)"', needs[1] if needs else ""))
    while more := {new for name in found for new in IMPLIES.get(name, ())} - found:
        found |= more
    return found


def compiled(path: Path) -> set[str]:
    """What the functions in this file are compiled for."""
    text = path.read_text(encoding="utf-8")
    lists = re.findall(r'target_feature\(enable = "([^"]+)"\)', text)
    lists += re.findall(r'instantiate!\([^)]*?"([^"]+)"', text)
    return {name for names in lists for name in names.split(",")}


SETS = sorted(
    path
    for path in [*(KERNELS / "x86").glob("*.rs"), *(KERNELS / "arm").glob("*.rs")]
    if re.search(r"^    needs: &", path.read_text(encoding="utf-8"), re.M)
)


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_a_set_asks_for_what_it_uses(path: Path) -> None:
    assert compiled(path)
    assert compiled(path) <= detected(path)


def test_there_are_these_sets() -> None:
    names = {path.stem for path in SETS}
    assert names >= {"avx2", "avxvnni", "avx512vnni", "amx", "neon", "dotprod", "i8mm"}


def test_shared_kernels_belong_to_a_set_that_asks_for_them() -> None:
    """Files without a set have `gemm_SET`, named after it; a file 512 is of avx512vnni."""
    pattern = r'target_feature\(enable = "([^"]+)"\)\]\s*(?:#\[.*\]\s*)*(?:pub\S* )?unsafe fn (\w+)'
    sets = {path.stem: path for path in SETS}
    checked = 0
    for path in [*(KERNELS / "x86").glob("*.rs"), *(KERNELS / "arm").glob("*.rs")]:
        if path in SETS:
            continue
        for features, name in re.findall(pattern, path.read_text(encoding="utf-8")):
            kernels = sets.get(name.removeprefix("gemm_"))
            if path.stem.endswith("512"):
                kernels = sets["avx512vnni"]
            if kernels:
                assert set(features.split(",")) <= detected(kernels), (path.name, name)
                checked += 1
    assert checked > 4
