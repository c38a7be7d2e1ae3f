#!/bin/bash
# The installed package on emulated x86-64 CPUs that lack what the faster kernel sets need: it must not meet a refused
# instruction, must choose the set that the CPU has, and must compute the same bits as on this machine.
# QEMU has no AVX-512; it leaves it out of Skylake-Server, so that this stands for AVX2 again. A CPU with AVX-512 but
# without VNNI: that it gets avx2 is a row of kernels/tests/choice.rs, that no set uses what it does not ask for is
# tests/test_features.py, and that avx2 runs where AVX-512 is refused is Haswell here.
# usage: tools/x86/test.sh [PYTHON that has ferrule, by default target/clean/bin/python]; gets QEMU from apt (root)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(realpath -s "${1:-target/clean/bin/python}")
command -v qemu-x86_64 >/dev/null || {
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -yqq --no-install-recommends qemu-user >/dev/null
}
here=$(mktemp -d)
script=$PWD/tools/same_bits.py
"$python" "$script" > "$here/native"
# SSE2 and SSE3 only; SSE4.2; AVX2; AVX-512 as far as QEMU goes.
for cpu in qemu64:scalar Nehalem:scalar Haswell:avx2 Skylake-Server:avx2; do
    (cd "$here" && qemu-x86_64 -cpu "${cpu%:*}" "$python" "$script" "${cpu#*:}" 2>log > emulated) ||
        { cat "$here/log" >&2; echo "x86/test.sh: $cpu failed" >&2; exit 1; }
    cmp "$here/native" "$here/emulated"
    echo "$cpu: the same bits"
done
rm -r "$here"
