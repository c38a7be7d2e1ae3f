#!/bin/bash
# Runs the Rust tests on emulated CPUs that have each aarch64 kernel set as their best one. The first two run the golden
# models with that set alone; the last, which has them all, holds all sets to one another.
# usage: tools/arm/test.sh [whole | arguments of cargo test, by default --lib --test golden]; needs what setup.sh needs
set -euo pipefail
cd "$(dirname "$0")/../.."
work=${CARGO_TARGET_DIR:-target}/arm
tools/arm/setup.sh "$work"
source "$work/env.sh"
[ $# -gt 0 ] || set -- --lib --test golden
if [ "$1" = whole ]; then
    shift
    set -- --lib "$@"
    for file in tests/*.rs tests/*/main.rs; do
        name=${file#tests/} name=${name%/main.rs}
        set -- "$@" --test "${name%.rs}"
    done
    # tests/cuda compiles an emulated driver and starts itself again.
    command -v aarch64-linux-gnu-g++ >/dev/null ||
        DEBIAN_FRONTEND=noninteractive apt-get install -yqq --no-install-recommends g++-aarch64-linux-gnu >/dev/null
    export CXX=aarch64-linux-gnu-g++ FERRULE_RUNNER=qemu-aarch64
fi
# The tests gain nothing from it.
export CARGO_PROFILE_RELEASE_LTO=false
for cpu in cortex-a72:neon cortex-a76:dotprod max:i8mm; do
    export QEMU_CPU=${cpu%:*} FERRULE_EXPECT_ISA=${cpu#*:} FERRULE_ISA=${cpu#*:}
    [ "$QEMU_CPU" != max ] || unset FERRULE_ISA
    echo "$QEMU_CPU: $FERRULE_EXPECT_ISA"
    cargo test --release "$@"
done
