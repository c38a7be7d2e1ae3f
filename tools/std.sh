#!/bin/bash
# Makes a sysroot that has the standard library for further targets, where rustup offers none: built
# from Debian's rust-src package of the compiler's own version (the first time; 45 MB, a minute for each
# target). Needs Debian and the compiler's `cargo`; everything lies under WORK. Never touches the toolchain.
# usage: std.sh WORK TARGET...; prints the sysroot, to be given to rustc with --sysroot
set -euo pipefail
tools=$(realpath "$(dirname "$0")")
mkdir -p "$1"
work=$(realpath "$1")
shift

real=$(rustc --print sysroot)
host=$(rustc -vV | sed -n 's/^host: //p')
version=$(rustc -vV | sed -n 's/^release: //p')
# Named by the version: a cached folder of an older compiler is not taken for this one's.
sysroot=$work/sysroot-$version
source=$work/usr/src/rustc-$version
mkdir -p "$sysroot/lib/rustlib"
ln -sfn "$real/lib/rustlib/$host" "$sysroot/lib/rustlib/"

get_source() {
    local apt=$work/apt package
    "$tools/apt.sh" "$apt" deb amd64 trixie-backports sid
    export APT_CONFIG=$apt/apt.conf
    package=$(apt-cache madison rust-src |
        awk -v v="$version+" 'index($3, v) == 1 { print $3; exit }')
    [ -n "$package" ] || { echo "std.sh: no rust-src $version in Debian" >&2; exit 1; }
    (cd "$apt" && rm -f ./*.deb && apt-get download -qq "rust-src=$package")
    unset APT_CONFIG
    dpkg-deb --fsys-tarfile "$apt"/rust-src_*.deb |
        tar -x -C "$work" --wildcards './usr/src/*/library/*'
    rm -r "$apt"
}

build() {
    local target=$1 std=$sysroot/lib/rustlib/$1/lib
    [ -d "$source/library" ] || get_source
    # A sysroot that adds the source to the toolchain's own, and a compiler that uses it.
    mkdir -p "$sysroot/lib/rustlib/src"
    ln -sfn "$source" "$sysroot/lib/rustlib/src/rust"
    printf '#!/bin/sh\nexec %s/bin/rustc --sysroot %s "$@"\n' "$real" "$sysroot" > "$work/rustc"
    chmod +x "$work/rustc"

    # A crate without dependencies, so that the only registry is the folder of std's own crates.
    # RUSTC_BOOTSTRAP allows -Zbuild-std here and nowhere else.
    mkdir -p "$work/std/src" "$work/std/.cargo"
    cat > "$work/std/Cargo.toml" <<END2
[package]
name = "ferrule-std"
version = "0.0.0"
edition = "2024"
[workspace]
END2
    echo '#![no_std]' > "$work/std/src/lib.rs"
    cat > "$work/std/.cargo/config.toml" <<END2
[source.crates-io]
replace-with = "vendored"
[source.vendored]
directory = "$source/library/vendor"
END2
    # Bitcode, because the release profile has thin LTO. Wheels for musl link it dynamically.
    local flags="-C embed-bitcode=yes"
    [[ $target == *musl* ]] && flags+=" -C target-feature=-crt-static"
    (
        cd "$work/std"
        env -u CARGO_BUILD_TARGET RUSTFLAGS="$flags" RUSTC="$work/rustc" RUSTC_BOOTSTRAP=1 \
            CARGO_HOME="$work/std/home" CARGO_TARGET_DIR=target \
            "$real/bin/cargo" build -q --offline --release --target "$target" \
            -Zbuild-std=std,panic_abort,test >&2
    )
    mkdir -p "$std"
    cp "$work/std/target/$target/release/deps/"*.rlib "$std/"
    rm -r "$std"/libferrule_std-*.rlib "$work/std"
}

for target in "$@"; do
    [ -d "$real/lib/rustlib/$target" ] && ln -sfn "$real/lib/rustlib/$target" "$sysroot/lib/rustlib/"
    ls "$sysroot/lib/rustlib/$target/lib"/libstd-*.rlib >/dev/null 2>&1 || build "$target"
done
echo "$sysroot"
