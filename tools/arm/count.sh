#!/bin/bash
# Counts the instructions of the aarch64 kernels' inner loops; needs setup.sh's machine and llvm-19.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=${CARGO_TARGET_DIR:-target}/arm
tools/arm/setup.sh "$work"
source "$work/env.sh"
export CARGO_PROFILE_RELEASE_LTO=false
cargo rustc --release --lib --crate-type rlib -- \
    --emit "obj=$work/ferrule.o" -C codegen-units=1 -C strip=none
aarch64-linux-gnu-objdump -d -C --no-show-raw-insn "$work/ferrule.o" > "$work/ferrule.dis"
python3 tools/arm/count.py "$work/ferrule.dis"
