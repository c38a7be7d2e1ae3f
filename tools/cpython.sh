#!/bin/bash
# Builds a CPython that Debian does not have, from Debian's packages: 3.14 without the GIL, or 3.13 with musl (whose
# zlib and libffi are built first, for pip and ctypes). On x86-64 Debian; everything but the apt packages lies under
# WORK. Not optimised: 2 minutes of two CPUs, once.
# CPYTHON_SOURCE may be a source archive of 3.14, for a mirror that lacks what its indices have.
# usage: tools/cpython.sh WORK free-threaded|musl; prints the prefix, which has bin/python3
set -euo pipefail
tools=$(realpath "$(dirname "$0")")
mkdir -p "$1"
work=$(realpath "$1")
kind=$2
prefix=$work/python-$kind
[ -x "$prefix/bin/python3" ] && { echo "$prefix"; exit; }

packages=(gcc make pkg-config)
case $kind in
    free-threaded) packages+=(zlib1g-dev libffi-dev libssl-dev) suites=(testing sid) sources=(python3.14/testing) ;;
    musl) suites=(bookworm trixie) sources=(zlib/trixie libffi/bookworm python3.13/trixie) ;;
    *) echo "cpython.sh: $kind: expected free-threaded or musl" >&2; exit 1 ;;
esac
if ! dpkg-query -W "${packages[@]}" >/dev/null 2>&1; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -yqq --no-install-recommends "${packages[@]}" >/dev/null
fi
build=$(mktemp -d)
# What it says is shown if it fails.
exec 3>&1 4>&2 > "$build/log" 2>&1
trap 'tail -40 "$build/log" >&4' EXIT
cd "$build"
if [ -n "${CPYTHON_SOURCE:-}" ]; then
    cp "$CPYTHON_SOURCE" .
else
    "$tools/apt.sh" apt "deb deb-src" amd64 "${suites[@]}"
    export APT_CONFIG=$build/apt/apt.conf
    apt-get source -qq --download-only "${sources[@]}" ||
        { [ "$kind" = free-threaded ] && apt-get source -qq --download-only python3.14/sid; } ||
        { echo "cpython.sh: the mirror lacks a source that its index has; 3.14's may be given as CPYTHON_SOURCE" && exit 1; }
fi
for file in ./*.tar.?z; do case $file in *.debian.*) ;; *) tar xf "$file" ;; esac; done

options=(--prefix "$prefix" --disable-test-modules CFLAGS=-O1)
if [ "$kind" = musl ]; then
    # Trixie's: libraries of wheels are linked in a way (DT_RELR) that musl knows from 1.2.4 on.
    musl=$work/musl
    apt-get download -qq musl/trixie musl-dev/trixie musl-tools/trixie
    for file in ./*.deb; do dpkg-deb -x "$file" "$musl"; done
    sed "s|/usr/\(lib\|include\)/|$musl&|g; s|/lib/ld-musl|$musl/usr&|" \
        "$musl/usr/lib/x86_64-linux-musl/musl-gcc.specs" > "$musl/specs"
    # Debian's gcc would name its own libc as the one that the compiler is for.
    printf '#!/bin/sh\n[ "$1" = --print-multiarch ] && exit\nexec gcc "$@" -specs %s/specs\n' "$musl" > "$musl/cc"
    chmod +x "$musl/cc"
    export CC=$musl/cc CFLAGS="-O1 -fPIC"
    (cd zlib-* && ./configure --static --prefix="$build/own" && make install)
    # There are no headers of Linux for it, which the static trampolines ask for.
    (cd libffi-* && ./configure --disable-shared --disable-docs --disable-multi-os-directory \
        --disable-exec-static-tramp --prefix="$build/own" && make install)
    export PKG_CONFIG_LIBDIR=$build/own/lib/pkgconfig CPPFLAGS=-I$build/own/include LDFLAGS=-L$build/own/lib
    export ZLIB_LIBS=-lz ZLIB_CFLAGS=" " LIBFFI_LIBS=-lffi LIBFFI_CFLAGS=" "
else
    options+=(--disable-gil)
fi
mv Python-3.* source
mkdir python
cd python
../source/configure "${options[@]}"
make -j"$(nproc)"
# Without compiling the whole library to bytecode.
make install COMPILEALL_OPTS=-l
trap - EXIT
rm -rf "$build"
echo "$prefix" >&3
