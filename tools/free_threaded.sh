#!/bin/bash
# The package in a Python without the GIL: built for it (there is no abi3 for such a Python before 3.15), installed into
# a clean environment, and tested; importing it must not turn the GIL on.
# usage: tools/free_threaded.sh [free-threaded PYTHON 3.14 or newer]; built from Debian's source by default (cpython.sh)
set -euo pipefail
cd "$(dirname "$0")/.."
work=${CARGO_TARGET_DIR:-target}/arm
mkdir -p "$work"
work=$(realpath "$work")
interpreter=${1:-$(tools/cpython.sh "$work" free-threaded)/bin/python3}
env=$work/free-threaded
rm -rf "$env" "$work/free-threaded-wheels"
"$interpreter" -m venv "$env"
"$env/bin/python" -c "import sys; assert not sys._is_gil_enabled(), 'this Python has the GIL'"
maturin build --quiet --profile dev --interpreter "$env/bin/python" --compatibility linux \
    --out "$work/free-threaded-wheels"
"$env/bin/pip" install --quiet --only-binary=:all: jinja2 hypothesis pytest pytest-asyncio \
    "$work"/free-threaded-wheels/ferrule-*t-*.whl
"$env/bin/python" -W error -c "
import sys, ferrule, numpy
assert not sys._is_gil_enabled(), 'the import turned the GIL on'
print(sys.version, ferrule._core.__file__)"
"$env/bin/python" -m pytest -q -W error -p no:cacheprovider tests/test_generate.py \
    tests/test_async.py tests/test_demo_golden.py tests/test_errors.py tests/test_params.py \
    tests/test_matrix.py tests/test_threads.py tests/test_hub.py tests/test_cli.py
