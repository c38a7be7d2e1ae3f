#!/bin/bash
# The aarch64 wheel in an aarch64 Python under emulation: installed into a clean folder, imported, and used. The
# embedded models must give their golden ids and logits (tests/test_demo_golden.py) and the same bits as the
# package of this machine gives, byte by byte.
# usage: tools/arm/python.sh [PYTHON of this machine that has ferrule, pip, maturin and ziglang]; needs what setup.sh needs
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(realpath -s "${1:-$(command -v python3)}")
work=${CARGO_TARGET_DIR:-target}/arm
mkdir -p "$work"
work=$(realpath "$work")
tools/arm/setup.sh "$work"
root=$work/python

# A tree with Debian's arm64 Python, made by unpacking packages: nothing is run in it to set it up.
if [ ! -e "$root/usr/bin/python3" ]; then
    apt=$(mktemp -d)
    tools/apt.sh "$apt" deb arm64 bookworm
    mkdir -p "$root.new/usr"/{lib,bin,sbin}
    APT_CONFIG=$apt/apt.conf apt-get install -qq -y --download-only -o Debug::NoLocking=1 \
        python3 libpython3-stdlib libc6 libgcc-s1 libstdc++6 >/dev/null
    for folder in lib bin sbin; do ln -sfn usr/$folder "$root.new/$folder"; done
    for package in "$apt"/cache/archives/*.deb; do
        dpkg-deb --fsys-tarfile "$package" | tar -x -C "$root.new" --keep-directory-symlink \
            --exclude=./usr/share/doc --exclude=./usr/share/man --exclude=./usr/share/locale
    done
    rm -r "$apt"
    mv "$root.new" "$root"
fi

rm -rf "$work/wheels" "$work/site"
WHEELS=$work/wheels tools/wheels.sh aarch64-unknown-linux-gnu
"$python" -m pip install --quiet --target "$work/site" --python-version 3.11 --only-binary=:all: \
    --platform manylinux2014_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_28_aarch64 \
    numpy pytest "$work"/wheels/ferrule-*.whl

here=$(mktemp -d)
mkdir "$here/golden"
cp tests/test_demo_golden.py tests/conftest.py tools/same_bits.py "$here/"
cp tests/golden/demo.json "$here/golden/"
(cd "$here" && "$python" same_bits.py --logits > native)
for cpu in cortex-a72:neon cortex-a76:dotprod; do
    export QEMU_CPU=${cpu%:*} QEMU_LD_PREFIX=$root PYTHONPATH=$work/site
    emulated=(qemu-aarch64 "$root/usr/bin/python3")
    (cd "$here" && "${emulated[@]}" same_bits.py --logits "${cpu#*:}" > emulated)
    cmp "$here/native" "$here/emulated"
    echo "$cpu: the same bits"
    (cd "$here" && "${emulated[@]}" -m pytest -q -p no:cacheprovider --rootdir "$here" test_demo_golden.py)
done
# The command line, too: one story.
(cd "$here" && "${emulated[@]}" -m ferrule run "Tell me a story about a fox and a lantern." --max-tokens 40)
rm -r "$here"
