#!/bin/bash
# Type-checks the crate, with and without Python, for platforms that are not at hand: what is behind `cfg` for macOS,
# Windows, FreeBSD and 32 bits compiles. Says nothing about whether it runs. Std for the targets comes from std.sh.
# usage: tools/platforms.sh [TARGET...]
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- aarch64-apple-darwin x86_64-apple-darwin x86_64-pc-windows-msvc \
    aarch64-pc-windows-msvc armv7-unknown-linux-gnueabihf
sysroot=$(tools/std.sh "${CARGO_TARGET_DIR:-target}/arm" "$@")
# No C or assembly in dependencies (blake3's build script asks for this): there is no compiler for the target.
export CARGO_FEATURE_PURE=1 PYO3_NO_PYTHON=1
for target in "$@"; do
    name=CARGO_TARGET_$(tr 'a-z-' 'A-Z_' <<< "$target")_RUSTFLAGS
    for features in "" python; do
        env "$name=--sysroot $sysroot -D warnings" cargo check --lib --features "$features" --target "$target"
    done
done
