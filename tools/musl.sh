#!/bin/bash
# The musllinux wheel in an environment of its own kind: a Python that is linked with musl (built once, cpython.sh), whose
# pip chooses and installs it with PyPI's musllinux wheels of what it needs. The embedded models must give their golden
# ids and logits, and the same bits as the package of this machine gives, byte by byte. On x86-64 Debian, as root.
# usage: tools/musl.sh [PYTHON of this machine that has ferrule, pip, maturin, ziglang] [WHEEL, built by default]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${1:-$(command -v python3)}")
work=${CARGO_TARGET_DIR:-target}/arm
mkdir -p "$work"
work=$(realpath "$work")
interpreter=$(tools/cpython.sh "$work" musl)/bin/python3
rm -rf "$work/musl-wheels" "$work/musl-env"
if [ $# -gt 1 ]; then
    mkdir "$work/musl-wheels"
    cp "$2" "$work/musl-wheels/"
else
    WHEELS=$work/musl-wheels tools/wheels.sh x86_64-unknown-linux-musl
fi
# That Python has no TLS, so this one's pip downloads.
"$python" -m pip download --quiet --dest "$work/musl-wheels" --only-binary=:all: --python-version 3.13 \
    --platform musllinux_1_2_x86_64 --platform musllinux_1_1_x86_64 pytest "$work"/musl-wheels/ferrule-*.whl
"$interpreter" -m venv "$work/musl-env"
"$work/musl-env/bin/pip" install --quiet --no-index --find-links "$work/musl-wheels" ferrule pytest

here=$(mktemp -d)
mkdir "$here/golden"
cp tests/test_demo_golden.py tests/conftest.py tools/same_bits.py "$here/"
cp tests/golden/demo.json "$here/golden/"
cd "$here"
"$python" same_bits.py --logits > native
"$work/musl-env/bin/python" same_bits.py --logits > musl
cmp native musl
echo "musl: the same bits"
"$work/musl-env/bin/python" -m pytest -q -p no:cacheprovider --rootdir "$here" test_demo_golden.py
"$work/musl-env/bin/ferrule" doctor
"$work/musl-env/bin/ferrule" run "Tell me a story about a fox and a lantern." --max-tokens 40
cd /
rm -r "$here"
