#!/bin/bash
# Makes `cargo --target aarch64-unknown-linux-gnu` work on an x86-64 Debian 12, as root: cross gcc and
# qemu from apt, and the standard library, which is built from Debian's rust-src package where rustup
# offers no target. Everything but the apt packages lies under WORK. Never touches the toolchain.
# usage: setup.sh WORK; then source WORK/env.sh
set -euo pipefail
target=aarch64-unknown-linux-gnu
mkdir -p "$1"
work=$(realpath "$1")

if ! command -v aarch64-linux-gnu-gcc qemu-aarch64 >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -yqq --no-install-recommends \
        gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user >/dev/null
fi

real=$(rustc --print sysroot)
sysroot=$real
if [ ! -d "$real/lib/rustlib/$target" ]; then
    version=$(rustc -vV | sed -n 's/^release: //p')
    # Named by the version: a cached folder of an older compiler is not taken for this one's.
    sysroot=$work/sysroot-$version
    std=$sysroot/lib/rustlib/$target/lib
    if ! ls "$std"/libstd-*.rlib >/dev/null 2>&1; then
        # An apt of its own for suites that the machine does not use, from the machine's mirror.
        apt=$work/apt
        mirror=$(awk '/^URIs:/ { print $2; exit }' /etc/apt/sources.list.d/debian.sources)
        mkdir -p "$apt"/{parts,state/lists/partial,cache/archives/partial}
        : > "$apt/status"
        cat > "$apt/debian.sources" <<END
Types: deb
URIs: $mirror
Suites: trixie-backports sid
Components: main
Architectures: amd64
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
END
        cat > "$apt/apt.conf" <<END
Dir::Etc::parts "$apt/parts";
Dir::Etc::preferencesparts "$apt/parts";
Dir::Etc::sourcelist "$apt/debian.sources";
Dir::Etc::sourceparts "-";
Dir::State "$apt/state";
Dir::State::status "$apt/status";
Dir::Cache "$apt/cache";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Check-Valid-Until "false";
END
        export APT_CONFIG=$apt/apt.conf
        apt-get update -qq
        package=$(apt-cache madison rust-src |
            awk -v v="$version+" 'index($3, v) == 1 { print $3; exit }')
        [ -n "$package" ] || { echo "setup.sh: no rust-src $version in Debian" >&2; exit 1; }
        (cd "$apt" && rm -f ./*.deb && apt-get download -qq "rust-src=$package")
        unset APT_CONFIG
        dpkg-deb --fsys-tarfile "$apt"/rust-src_*.deb |
            tar -x -C "$work" --wildcards './usr/src/*/library/*'
        source=$work/usr/src/rustc-$version

        # A sysroot that adds the source to the toolchain's own, and a compiler that uses it.
        mkdir -p "$sysroot/lib/rustlib/src"
        ln -sfn "$real/lib/rustlib/x86_64-unknown-linux-gnu" "$sysroot/lib/rustlib/"
        ln -sfn "$source" "$sysroot/lib/rustlib/src/rust"
        printf '#!/bin/sh\nexec %s/bin/rustc --sysroot %s "$@"\n' "$real" "$sysroot" > "$work/rustc"
        chmod +x "$work/rustc"

        # A crate without dependencies, so that the only registry is the folder of std's own crates.
        # RUSTC_BOOTSTRAP allows -Zbuild-std here and nowhere else.
        mkdir -p "$work/std/src" "$work/std/.cargo"
        cat > "$work/std/Cargo.toml" <<END
[package]
name = "ferrule-std"
version = "0.0.0"
edition = "2024"
[workspace]
END
        echo '#![no_std]' > "$work/std/src/lib.rs"
        cat > "$work/std/.cargo/config.toml" <<END
[source.crates-io]
replace-with = "vendored"
[source.vendored]
directory = "$source/library/vendor"
END
        (
            cd "$work/std"
            # Bitcode, because the release profile has thin LTO.
            RUSTFLAGS="-C embed-bitcode=yes" RUSTC=$work/rustc RUSTC_BOOTSTRAP=1 \
                CARGO_HOME=$work/std/home CARGO_TARGET_DIR=target \
                "$real/bin/cargo" build -q --offline --release --target $target \
                -Zbuild-std=std,panic_abort,test
        )
        mkdir -p "$std"
        cp "$work/std/target/$target/release/deps/"*.rlib "$std/"
        rm -r "$std"/libferrule_std-*.rlib "$work/std" "$work/usr" "$apt" "$sysroot/lib/rustlib/src"
    fi
fi

cat > "$work/env.sh" <<END
export CARGO_BUILD_TARGET=$target
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS="--sysroot $sysroot"
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER=qemu-aarch64
export QEMU_LD_PREFIX=/usr/aarch64-linux-gnu
END
