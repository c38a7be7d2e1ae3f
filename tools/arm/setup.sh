#!/bin/bash
# Makes `cargo --target aarch64-unknown-linux-gnu` work on an x86-64 Debian 12, as root: cross gcc and
# qemu from apt, and the standard library (../std.sh). Everything but the apt packages lies under WORK. Never
# touches the toolchain.
# usage: setup.sh WORK; then source WORK/env.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
target=aarch64-unknown-linux-gnu
mkdir -p "$1"
work=$(realpath "$1")

if ! command -v aarch64-linux-gnu-gcc qemu-aarch64 >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -yqq --no-install-recommends \
        gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user >/dev/null
fi

sysroot=$(tools/std.sh "$work" $target)

cat > "$work/env.sh" <<END
export CARGO_BUILD_TARGET=$target
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS="--sysroot $sysroot"
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER=qemu-aarch64
export QEMU_LD_PREFIX=/usr/aarch64-linux-gnu
END
