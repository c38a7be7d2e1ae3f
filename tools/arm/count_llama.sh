#!/bin/bash
# Counts llama.cpp's inner loops for the same products as count.sh counts ours; needs llvm-19 and
# g++-aarch64-linux-gnu from apt. Compiles only the two files that hold them.
# usage: count_llama.sh LLAMA.CPP
set -euo pipefail
here=$(realpath "$(dirname "$0")")
cd "$1/ggml"
out=$(mktemp -d)
trap 'rm -r "$out"' EXIT
# The CPU that gcc compiles for, and those that llvm-mca estimates (see README.md).
while read -r cpu estimated; do
    echo "-- $cpu"
    for source in quants.c repack.cpp; do
        compiler=aarch64-linux-gnu-g++
        [ "${source##*.}" = c ] && compiler=aarch64-linux-gnu-gcc
        "$compiler" -O3 -DNDEBUG -D_GNU_SOURCE "-mcpu=$cpu" -Iinclude -Isrc -Isrc/ggml-cpu \
            -c "src/ggml-cpu/arch/arm/$source" -o "$out/$source.o"
    done
    aarch64-linux-gnu-objdump -d -C --no-show-raw-insn "$out"/*.o > "$out/dis"
    python3 "$here/count.py" "$out/dis" '^ggml_(?:vec_dot|gemv|gemm)_q(?:4|8)_0\w*' "$estimated"
done <<END
cortex-a72 cortex-a72
cortex-a76 neoverse-n1
neoverse-n2+nosve+nosve2 neoverse-n2,neoverse-v1
END
