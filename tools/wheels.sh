#!/bin/bash
# Builds the wheels for Linux by cross compilation with zig's linker (pip: maturin, ziglang, auditwheel), on x86-64
# Debian, and checks each: its tag by auditwheel (musl: what it links), its size, and that it is abi3 for Python 3.10. Std for the targets
# comes from std.sh. Wheels lie in WHEELS (default target/wheels).
# usage: tools/wheels.sh [TARGET...]; all of those below by default
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- x86_64-unknown-linux-gnu aarch64-unknown-linux-gnu x86_64-unknown-linux-musl \
    aarch64-unknown-linux-musl armv7-unknown-linux-gnueabihf
out=${WHEELS:-target/wheels}
work=${CARGO_TARGET_DIR:-target}/arm
sysroot=$(tools/std.sh "$work" "$@")
most=20000000
for target in "$@"; do
    case $target in
        *gnu*) policy=manylinux2014 ;;
        *musl*) policy=musllinux_1_2 ;;
    esac
    flags="--sysroot $sysroot"
    [[ $target == *musl* ]] && flags+=" -C target-feature=-crt-static"
    name=CARGO_TARGET_$(tr 'a-z-' 'A-Z_' <<< "$target")_RUSTFLAGS
    env "$name=$flags" maturin build --release --zig --compatibility $policy --target "$target" --out "$out"
    wheel=$(ls -t "$out"/ferrule-*.whl | head -1)
    case $wheel in
        *cp310-abi3-$policy*.whl | *cp310-abi3-manylinux_2_17*.whl) ;;
        *) echo "wheels.sh: $wheel: expected cp310-abi3 and $policy" >&2; exit 1 ;;
    esac
    size=$(stat -c %s "$wheel")
    [ "$size" -lt $most ] || { echo "wheels.sh: $wheel has $size bytes, expected less than $most" >&2; exit 1; }
    if [[ $target == *musl* ]]; then
        # maturin has audited it. auditwheel looks for libc.musl-ARCH.so.1; zig writes libc.so, which musl's loader
        # takes for itself whatever the file is called. Nothing else may be needed.
        needed=$(unzip -p "$wheel" ferrule/_core.abi3.so > "$out/so" && readelf -d "$out/so" | grep NEEDED)
        [[ $needed == *"[libc.so]" && $(wc -l <<< "$needed") = 1 ]] || { echo "$needed" >&2; exit 1; }
        rm "$out/so"
    else
        # The tag that auditwheel finds must be the one in the name, or one that asks for less.
        auditwheel show "$wheel" > "$out/audit"
        grep -Eq '"manylinux_2_(5|12|17)_' "$out/audit" || { cat "$out/audit" >&2; exit 1; }
        rm "$out/audit"
    fi
    echo "$wheel: $size bytes"
done
