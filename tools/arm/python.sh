#!/bin/bash
# ARM wheels in a Python of their own kind under emulation: installed into a clean folder, imported, and used. The
# embedded models must give their golden ids and logits (tests/test_demo_golden.py) and the same bits as the package
# of this machine gives, byte by byte.
#   aarch64  manylinux, Debian's Python, on a Cortex-A72 and a Cortex-A76
#   armv7    the same with 32 bits and Debian's numpy (PyPI has none), on a Cortex-A7
#   musl     musllinux for aarch64, a Python that is built first (../cpython.sh), on a Cortex-A72
# usage: tools/arm/python.sh [KIND...], by default all; the first python3 of PATH has ferrule, pip, maturin, ziglang;
# needs what setup.sh needs. WHEELS may be a folder with built wheels.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || set -- aarch64 armv7 musl
python=$(realpath -s "$(command -v python3)")
work=${CARGO_TARGET_DIR:-target}/arm
mkdir -p "$work"
work=$(realpath "$work")
tools/arm/setup.sh "$work"

here=$(mktemp -d)
mkdir "$here/golden"
cp tests/test_demo_golden.py tests/conftest.py tools/same_bits.py "$here/"
cp tests/golden/demo.json "$here/golden/"
(cd "$here" && "$python" same_bits.py --logits > native)
for kind in "$@"; do
    options=(--only-binary=:all:)
    unset QEMU_LD_PREFIX
    case $kind in
        aarch64)
            target=aarch64-unknown-linux-gnu cpus=(cortex-a72:neon cortex-a76:dotprod) version=3.11
            wheel='*manylinux_2_17_aarch64*' platforms=(manylinux2014 manylinux_2_27 manylinux_2_28)
            tools/tree.sh "$work/python" arm64
            export QEMU_LD_PREFIX=$work/python
            emulated=(qemu-aarch64 "$work/python/usr/bin/python3")
            packages=(numpy pytest)
            ;;
        armv7)
            target=armv7-unknown-linux-gnueabihf cpus=(cortex-a7:scalar) version=3.11
            wheel='*manylinux_2_17_armv7l*' platforms=(manylinux2014)
            tools/tree.sh "$work/python-armv7" armhf python3-numpy python3-pytest
            # Which library serves numpy is a link that the packages' scripts would make.
            for name in blas lapack; do
                ln -sf $name/lib$name.so.3 "$work/python-armv7/usr/lib/arm-linux-gnueabihf/"
            done
            export QEMU_LD_PREFIX=$work/python-armv7
            emulated=(qemu-arm "$work/python-armv7/usr/bin/python3")
            packages=() options+=(--no-deps)
            ;;
        musl)
            target=aarch64-unknown-linux-musl cpus=(cortex-a72:neon) version=3.13
            wheel='*musllinux_1_2_aarch64*' platforms=(musllinux_1_2)
            emulated=(qemu-aarch64 "$(tools/cpython.sh "$work" musl-aarch64)/bin/python3")
            packages=(numpy pytest)
            ;;
        *) echo "python.sh: $kind: expected aarch64, armv7 or musl" >&2; exit 1 ;;
    esac
    folder=${WHEELS:-$work/wheels}
    # shellcheck disable=SC2086  # a pattern
    [ -n "${WHEELS:-}" ] || { rm -f "$folder"/$wheel.whl; WHEELS=$folder tools/wheels.sh $target; }
    for platform in "${platforms[@]}"; do options+=(--platform "${platform}_${target%%-*}"); done
    options=("${options[@]/%_armv7/_armv7l}")
    rm -rf "$work/site-$kind"
    # shellcheck disable=SC2086
    "$python" -m pip install --quiet --target "$work/site-$kind" --python-version $version "${options[@]}" \
        "${packages[@]}" "$folder"/$wheel.whl
    for cpu in "${cpus[@]}"; do
        export QEMU_CPU=${cpu%:*} PYTHONPATH=$work/site-$kind
        (cd "$here" && "${emulated[@]}" same_bits.py --logits "${cpu#*:}" > emulated)
        cmp "$here/native" "$here/emulated"
        echo "$kind, $cpu: the same bits"
        (cd "$here" && "${emulated[@]}" -m pytest -q -p no:cacheprovider --rootdir "$here" test_demo_golden.py)
    done
    # The command line, too: one story.
    (cd "$here" && "${emulated[@]}" -m ferrule run "Tell me a story about a fox and a lantern." --max-tokens 40)
    unset PYTHONPATH
done
rm -r "$here"
