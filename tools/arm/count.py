#!/usr/bin/env python3
"""Counts the multiplying inner loops of the aarch64 kernels.

For each: its instructions, its multiply-accumulates, and the cycles that llvm-mca estimates for it.
Estimates are not measurements.

usage: count.py DISASSEMBLY [FUNCTIONS CPU,...]
DISASSEMBLY is the output of `objdump -d -C --no-show-raw-insn`; count.sh makes one. FUNCTIONS is a
regular expression: those of another library, on these CPUs; count_llama.sh does that.
"""

import re
import subprocess
import sys
from pathlib import Path

OURS = r"kernels::arm::((neon|dotprod|i8mm)::(?:tile|gemm)\w*'*)$"
# Multiply-accumulates of one instruction.
MACS = {"smull": 8, "smull2": 8, "smlal": 8, "smlal2": 8, "sdot": 16, "smmla": 32}
CPUS = {"neon": ["cortex-a72"], "dotprod": ["neoverse-n1"], "i8mm": ["neoverse-n2", "neoverse-v1"]}
MCA = ["llvm-mca-19", "-mtriple=aarch64", "-mattr=+dotprod,+i8mm", "-iterations=200"]


def cycles(code: list[str], cpu: str) -> float:
    """What llvm-mca estimates for one pass through `code`."""
    # A jump inside (to code behind the loop) has no place in a straight block.
    text = "\n".join(line for line in code if not re.match(r"(b|cb|tb|ret)", line)) + "\n"
    command = [*MCA, f"-mcpu={cpu}"]
    out = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    return int(out.stdout.split("Total Cycles:")[1].split()[0]) / 200


def loops(lines: list[tuple[int, str]]) -> list[tuple[list[str], list[str]]]:
    """Bodies of the loops without loops in them, and what the loop around each has besides."""
    at = {address: i for i, (address, _) in enumerate(lines)}
    spans = []
    for i, (_, code) in enumerate(lines):
        jump = re.match(r"(?:b\.\w+|cbn?z|tbn?z)\s.*?\b([0-9a-f]+)\s*<", code)
        if jump and at.get(int(jump[1], 16), i) < i:
            spans.append((at[int(jump[1], 16)], i))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    text = [re.sub(r"\s*(<|//).*", "", code) for _, code in lines]
    found = []
    for a, b in inner:
        around = [(c, d) for c, d in spans if c <= a and b < d]
        c, d = min(around, key=lambda s: s[1] - s[0], default=(a, b))
        found.append((text[a : b + 1], text[c:a] + text[b + 1 : d + 1]))
    return found


def main() -> None:
    """Prints a line for each loop."""
    functions: dict[str, list[tuple[int, str]]] = {}
    name = ""
    for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
        if head := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            name = head[1]
            while name in functions:
                name += "'"
            functions[name] = []
        elif code := re.match(r"\s*([0-9a-f]+):\s+(.*)", line):
            functions[name].append((int(code[1], 16), code[2].strip()))
    for name, lines in sorted(functions.items()):
        found = re.search(OURS if len(sys.argv) == 2 else f"({sys.argv[2]})", name)
        if not found:
            continue
        cpus = CPUS[found[2]] if len(sys.argv) == 2 else sys.argv[3].split(",")
        for body, around in loops(lines):
            ops = [code.split()[0] for code in body]
            macs = sum(
                MACS.get(op, 0)
                for op, code in zip(ops, body, strict=True)
                if op in ("sdot", "smmla") or ".8h" in code.split(",")[0]
            )
            if macs:
                speed = [f"{cpu} {cycles(body, cpu):.1f}" for cpu in cpus]
                print(f"{found[1]:24} {len(ops):4} instructions {macs:5} MAC  {', '.join(speed)}")
                if around:
                    speed = [f"{cpu} {cycles(around, cpu):.1f}" for cpu in cpus]
                    print(f"{'  the loop around it':24} {len(around):4} more, {', '.join(speed)}")


main()
