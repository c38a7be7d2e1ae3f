# Every check of this project; CI (.ci/run) runs the default recipe. Python comes from .venv, or from
# the environment that FERRULE_VENV names.

set shell := ["bash", "-euo", "pipefail", "-c"]

venv := env("FERRULE_VENV", justfile_directory() / ".venv")
export PATH := venv / "bin:" + env("PATH")
export VIRTUAL_ENV := venv

# All that CI runs.
all: lint test-rust test-python isa cuda wheel emulated (fuzz "20")

# Formatting, lints and types, nothing changed.
lint:
    cargo fmt --check
    cargo clippy --all-targets -- -D warnings
    cargo clippy --features python -- -D warnings
    ruff format --check .
    ruff check .
    mypy
    python -m mypy.stubtest ferrule._core
    check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
    zizmor --offline --quiet .github/workflows

# Format both languages.
format:
    cargo fmt
    ruff format .
    ruff check --fix .

# Build the extension for the Python tests, in the profile of the Rust tests.
build:
    maturin develop --profile dev --skip-install

test-rust *args:
    cargo test {{ args }}

test-python *args: build
    pytest -W error {{ args }}

# The tests that compute, with each kernel set that this CPU can run. `scalar`, which the others are held to, is slow: it
# gets the models of this repository only.
isa: build
    sets=$(python -c "from ferrule import _core; print(*_core.kernel_sets())"); \
    for isa in $sets; do \
        echo "FERRULE_ISA=$isa"; \
        unset=$(if [ $isa = scalar ]; then echo "-u FERRULE_SHARED"; fi); \
        FERRULE_ISA=$isa cargo test --lib kernels; \
        env $unset FERRULE_ISA=$isa cargo test --test golden; \
        env $unset FERRULE_ISA=$isa pytest -q tests/test_demo_golden.py tests/test_matrix.py; \
    done

# The CUDA kernels, for which no device is needed: the committed PTX is what the sources give, ptxas takes it for every
# architecture without spills, and the crate builds and is checked without the back end. (`cargo test` and pytest run the
# kernels themselves, on an emulated driver.) Linux on x86-64.
cuda:
    #!/usr/bin/env bash
    set -euo pipefail
    if [ "$(uname -sm)" != "Linux x86_64" ]; then echo "skipped: NVIDIA's compiler is for Linux on x86-64"; exit; fi
    python -m venv target/nvidia
    target/nvidia/bin/pip install --quiet --no-deps --require-hashes -r rust/src/backend/cuda/kernel-requirements.txt
    target/nvidia/bin/python rust/src/backend/cuda/build_kernels.py --check
    cargo clippy --no-default-features --features python -- -D warnings

# On a machine with an NVIDIA GPU: correctness, speed against the floor, energy; writes gpu.json and gpu.md. Needs the
# wheel, Python and this folder; says so and does nothing without a device.
gpu *args:
    python benches/gpu.py {{ args }}

# A wheel, installed into a clean environment and used from an empty folder; its size; the sdist's files.
wheel:
    rm -rf target/dist target/clean
    maturin build --release --out target/dist
    maturin sdist --out target/dist
    tar tzf target/dist/ferrule-*.tar.gz > target/dist/files
    grep 'models/tales-4m/model.safetensors$' target/dist/files
    grep 'python/ferrule/_core.pyi$' target/dist/files
    test $(cat target/dist/ferrule-*.whl | wc -c) -lt 20000000
    python -m venv target/clean
    target/clean/bin/pip install --quiet target/dist/ferrule-*.whl
    empty=$(mktemp -d) && cd "$empty" && \
        env -u PYTHONPATH {{ justfile_directory() }}/target/clean/bin/ferrule run "Tell me a story about a fox and a lantern." && \
        {{ justfile_directory() }}/target/clean/bin/ferrule info tales-1m && rmdir "$empty"

# Every fuzz target for so many seconds (60), two at a time; a C++ compiler builds libFuzzer.
fuzz *args:
    if command -v c++ > /dev/null; then tools/fuzz.sh {{ args }}; else echo "not here: libFuzzer needs a C++ compiler"; fi

# The ARM kernel sets under emulation (Debian on x86-64, as root; see tools/arm/README.md); `whole`: all Rust tests.
arm *args:
    tools/arm/test.sh {{ args }}

# The wheel of `just wheel` on emulated x86-64 CPUs without AVX-512, without AVX, without SSE4: the same bits.
emulated:
    if [ "$(id -u)" = 0 ] && [ "$(uname -sm)" = "Linux x86_64" ]; then tools/x86/test.sh; \
    else echo "not here: needs x86-64 Debian and root for QEMU"; fi

# Wheels in a Python of their own kind under emulation (as `arm`): aarch64, armv7, musl (aarch64), or all.
arm-python *kinds: build
    pip install --quiet maturin ziglang auditwheel
    tools/arm/python.sh {{ kinds }}

# A wheel in a virtual machine with what this one may lack: limits by cgroup v2 (`cgroup`), or a CPU with AVX-512 and no
# VNNI (`skylake-x`). x86-64 Debian 12, root; 2 and 10 minutes.
boot kind wheel: build
    tools/x86/boot.sh {{ kind }} {{ wheel }}

# Wheels for Linux (glibc and musl, x86-64 and aarch64; armv7), checked; in target/wheels (x86-64 Debian, root).
wheels *targets:
    pip install --quiet maturin ziglang auditwheel
    tools/wheels.sh {{ targets }}

# The musllinux wheel in a Python with musl, which is built first (x86-64 Debian, root; 6 minutes the first time).
musl: build
    pip install --quiet maturin ziglang auditwheel
    tools/musl.sh

# The tests that matter there in a Python without the GIL: PYTHON, or one that is built first (x86-64 Debian, root).
free-threaded *python:
    tools/free_threaded.sh {{ python }}

# Type-checks what is behind `cfg` for macOS, Windows and 32 bits (x86-64 Debian, root).
check-platforms *targets:
    tools/platforms.sh {{ targets }}
