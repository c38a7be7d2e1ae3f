#!/usr/bin/env python3
"""Makes the PTX beside the kernels, or checks it: `build_kernels.py [--check]`.

Needs the packages of kernel-requirements.txt and nothing of a CUDA installation: NVRTC 12.2
compiles each source to PTX 8.2, the lowest level that covers JetPack 6 and loses nothing up to
Hopper; ptxas assembles it for every architecture and tells what it takes. A spill, a stack frame
or more registers than a kernel may have is an error.

--check writes nothing and fails unless the tree has, bit for bit, what would be written.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent / "kernels"
FLAGS = ["-std=c++17", "-fmad=false"]
# Of a variant: the virtual architecture, and those that ptxas 12.2 and 13.0 assemble it for.
VARIANTS = {"sm80": ("80", ["80", "86", "87", "89", "90", "90a"], ["100", "120"])}
REGISTERS = 65536  # of a multiprocessor, shared by the threads of its blocks
LEAST_THREADS = 512  # what a multiprocessor must be able to hold of any kernel


def nvidia(*names: str) -> Path:
    """The first of some paths below the `nvidia` package."""
    spec = importlib.util.find_spec("nvidia")
    if spec is None or spec.submodule_search_locations is None:
        sys.exit("no NVIDIA packages: pip install --no-deps -r kernel-requirements.txt")
    roots = [Path(root) for root in spec.submodule_search_locations]
    found = [root / name for name in names for root in roots if (root / name).exists()]
    return found[0] if found else sys.exit(f"missing: {names[0]}")


class Nvrtc:
    """The compiler library."""

    def __init__(self) -> None:
        self.lib = ctypes.CDLL(str(nvidia("cuda_nvrtc/lib/libnvrtc.so.12")))
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"

    def text(self, program: ctypes.c_void_p, what: str) -> bytes:
        """The log or the PTX of a program."""
        size = ctypes.c_size_t()
        getattr(self.lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(self.lib, f"nvrtcGet{what}")(program, buffer)
        return buffer.value

    def compile(self, source: Path, arch: str) -> bytes:
        """PTX of a source. The headers go in by name, so that no path gets into the result."""
        headers = sorted(HERE.glob("*.cuh"))
        program = ctypes.c_void_p()
        texts = (ctypes.c_char_p * len(headers))(*[h.read_bytes() for h in headers])
        names = (ctypes.c_char_p * len(headers))(*[h.name.encode() for h in headers])
        made = self.lib.nvrtcCreateProgram(
            ctypes.byref(program),
            source.read_bytes(),
            source.name.encode(),
            len(headers),
            texts,
            names,
        )
        if made != 0:
            sys.exit(f"{source.name}: nvrtcCreateProgram gave {made}")
        options = [o.encode() for o in [f"--gpu-architecture=compute_{arch}", *FLAGS]]
        array = (ctypes.c_char_p * len(options))(*options)
        if self.lib.nvrtcCompileProgram(program, len(options), array) != 0:
            sys.exit(f"{source.name} compute_{arch}:\n{self.text(program, 'ProgramLog').decode()}")
        return self.text(program, "PTX")


def resources(ptxas: Path, ptx: bytes, arch: str) -> dict[str, dict[str, int]]:
    """What each entry of a PTX takes on an architecture."""
    with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", f"-arch=sm_{arch}", file.name, "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"ptxas sm_{arch}: {done.stderr}")
    entries: dict[str, dict[str, int]] = {}
    name, stack, spill = "", 0, 0
    for line in done.stderr.splitlines():
        if found := re.search(r"entry function '(\w+)'", line):
            name = found[1]
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", line):
            stack, spill = int(found[1]), int(found[2])
        elif found := re.search(r"Used (\d+) registers", line):
            smem = re.search(r"(\d+) bytes smem", line)
            entries[name] = {
                "registers": int(found[1]),
                "shared": int(smem[1]) if smem else 0,
                "stack": stack,
                "spill": spill,
            }
    return entries


def threads(ptx: bytes) -> dict[str, int]:
    """Threads of a block of each entry at most."""
    found = re.findall(rb"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)", ptx)
    return {name.decode(): int(count) for name, count in found}


def problems(name: str, ptx: bytes, entry: str, arch: str, use: dict[str, int]) -> list[str]:
    """What an entry must not take."""
    where = f"{name} {entry} sm_{arch}"
    bad = [f"{where}: {use[what]} bytes of {what}" for what in ("stack", "spill") if use[what]]
    count = max(threads(ptx).get(entry, 0), LEAST_THREADS)
    if use["registers"] * count > REGISTERS:
        bad.append(f"{where}: {use['registers']} registers, {REGISTERS // count} allowed")
    if use["shared"] > 48 * 1024:
        bad.append(f"{where}: {use['shared']} bytes of shared memory, 49152 allowed")
    return bad


def main() -> None:
    """Writes or checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    nvrtc = Nvrtc()
    old, new = nvidia("cuda_nvcc/bin/ptxas"), nvidia("cu13/bin/ptxas")
    for tool in (old, new):
        tool.chmod(0o755)
    sha = hashlib.sha256
    headers = sha(b"".join(h.read_bytes() for h in sorted(HERE.glob("*.cuh")))).hexdigest()
    manifest = {"nvrtc": nvrtc.version, "flags": FLAGS, "headers": headers, "files": {}}
    bad, written = [], {}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for source in sorted(HERE.glob("*.cu")):
            first = re.search(r"^// variants: (.+)$", source.read_text(), re.M)
            if first is None:
                sys.exit(f"{source.name}: no line `// variants: ...`")
            for variant in first[1].split():
                arch, here, beyond = VARIANTS[variant]
                ptx = nvrtc.compile(source, arch)
                name = f"{source.stem}.{variant}.ptx"
                written[name] = ptx
                runs = [(a, pool.submit(resources, old, ptx, a)) for a in here]
                runs += [(a, pool.submit(resources, new, ptx, a)) for a in beyond]
                targets = {f"sm_{a}": run.result() for a, run in runs}
                for a, run in runs:
                    for entry, use in run.result().items():
                        bad += problems(name, ptx, entry, a, use)
                manifest["files"][name] = {
                    "source": sha(source.read_bytes()).hexdigest(),
                    "ptx": sha(ptx).hexdigest(),
                    "targets": targets,
                }
    written["manifest.json"] = (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()
    stale = {path.name for path in HERE.glob("*.ptx")} - set(written)
    for name, content in written.items():
        path = HERE / name
        if not check:
            path.write_bytes(content)
        elif not path.exists() or path.read_bytes() != content:
            bad.append(f"{name}: not what its source gives; run build_kernels.py")
    for name in stale:
        bad.append(f"{name}: has no source") if check else (HERE / name).unlink()
    count = len(written) - 1
    print(f"{count} PTX files, NVRTC {nvrtc.version}: {'checked' if check else 'written'}")
    if bad:
        sys.exit("\n".join(bad))


main()
