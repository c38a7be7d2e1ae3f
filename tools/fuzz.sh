#!/usr/bin/env bash
# Runs every fuzz target for SECONDS (default 60), two at a time: tools/fuzz.sh [SECONDS] [TARGET...]
# With the compiler at hand: coverage comes from LLVM's passes, without a sanitizer. A C++ compiler builds libFuzzer.
# The corpus starts from files of this repository and grows in rust/fuzz/corpus. The formats that are read: safetensors, GGUF,
# config.json with families, quantized and packed weights, the packed cache, tokenizers, templates. There is no file of
# keys and values, so no target for one.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
shift || true
targets=("$@")
if [ ${#targets[@]} = 0 ]; then
    for file in rust/fuzz/fuzz_targets/*.rs; do targets+=("$(basename "$file" .rs)"); done
fi

seed() { # TARGET FILE...: copies, named by their content
    local folder=rust/fuzz/corpus/$1 file
    mkdir -p "$folder"
    shift
    for file in "$@"; do cp "$file" "$folder/$(sha1sum < "$file" | cut -c1-40)"; done
}
header() { # FILE BYTES: the beginning of a large file, in a temporary file
    local out
    out=$(mktemp)
    head -c "$2" "$1" > "$out"
    echo "$out"
}
weights() { # FOLDER: config.json, the header of model.safetensors, and what its data is filled with
    local out length
    out=$(mktemp)
    length=$(od -An -tu8 -N8 "$1/model.safetensors" | tr -d ' ')
    { cat "$1/config.json"; printf '\0'; head -c "$((8 + length))" "$1/model.safetensors" | tail -c +9; printf '\0<'; } > "$out"
    seed weights "$out"
    rm "$out"
}
mapfile -t configs < <(find tests/golden models -name config.json)
mapfile -t weights < <(find tests/golden models -name '*.safetensors' -size -300k)
mapfile -t gguf < <(find tests/golden -name '*.gguf')
mapfile -t tokenizers < <(find tests/golden models -name tokenizer.json -size -100k)
mapfile -t templates < <(find tests/golden -name '*.jinja')
seed config "${configs[@]}"
seed safetensors "${weights[@]}"
for file in "${gguf[@]}"; do seed gguf "$(header "$file" 20000)"; done
seed tokenizer "${tokenizers[@]}"
seed chat "${templates[@]}"

target_dir=${CARGO_TARGET_DIR:-target}/fuzz
export CARGO_TARGET_DIR=$target_dir
RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 -Cdebug-assertions" \
    cargo build --release --target "$(rustc -vV | sed -n 's/host: //p')" --manifest-path rust/fuzz/Cargo.toml
bin=$(dirname "$(find "$target_dir" -path '*release/config' -type f | head -1)")

for file in tests/golden/quant-*/model.safetensors; do weights "$(dirname "$file")"; done
work=$(mktemp -d -p /dev/shm 2> /dev/null || mktemp -d) # in memory where that can be had
trap 'rm -rf "$work"' EXIT
export TMPDIR=$work
for name in qwen3-a gemma3-a phi2-a lfm3-a deepseek-v3-a granite-swa-a; do
    FERRULE_PACK="tests/golden/$name:$work/$name" "$bin/weights" -runs=0 2> "$work/log" || cat "$work/log"
    weights "$work/$name"
done
mkdir -p rust/fuzz/corpus/cache
for choice in 0 1 2 3 4 5 6 7; do printf "\\0$choice<" > "rust/fuzz/corpus/cache/$choice"; done

run() {
    local log
    log=$(mktemp)
    mkdir -p rust/fuzz/artifacts
    if "$bin/$1" "rust/fuzz/corpus/$1" -max_total_time="$seconds" -rss_limit_mb=2048 -timeout=10 \
        -max_len=65536 -artifact_prefix="rust/fuzz/artifacts/$1-" > "$log" 2>&1; then
        echo "$1: $(grep -E '^Done' "$log")"
    else
        tail -40 "$log"
        echo "$1: FAILED; the input is in rust/fuzz/artifacts"
        return 1
    fi
}
export -f run
export bin seconds
printf '%s\n' "${targets[@]}" | xargs -P 2 -I{} bash -c 'run {}'
