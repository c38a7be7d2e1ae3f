#!/bin/bash
# Builds a CPython 3.13 that Debian does not have, from Debian's source package: without the GIL, or with musl (musl-gcc
# from apt; zlib and libffi are built first, for pip and ctypes). On x86-64 Debian; everything but the apt packages lies
# under WORK. Not optimised: 3 to 5 minutes on two CPUs, once.
# usage: tools/cpython.sh WORK free-threaded|musl; prints the prefix, which has bin/python3
set -euo pipefail
tools=$(realpath "$(dirname "$0")")
mkdir -p "$1"
work=$(realpath "$1")
kind=$2
prefix=$work/python-$kind
[ -x "$prefix/bin/python3" ] && { echo "$prefix"; exit; }

case $kind in
    free-threaded) packages=(gcc make zlib1g-dev libffi-dev) sources=(python3.13/trixie) ;;
    musl) packages=(gcc make musl-tools musl-dev) sources=(zlib/trixie libffi/bookworm python3.13/trixie) ;;
    *) echo "cpython.sh: $kind: expected free-threaded or musl" >&2; exit 1 ;;
esac
if ! dpkg-query -W "${packages[@]}" >/dev/null 2>&1; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -yqq --no-install-recommends "${packages[@]}" >/dev/null
fi
build=$(mktemp -d)
"$tools/apt.sh" "$build/apt" deb-src amd64 trixie bookworm
cd "$build"
APT_CONFIG=$build/apt/apt.conf apt-get source -qq --download-only "${sources[@]}" >&2
for file in ./*.orig.tar.*z; do tar xf "$file"; done

# What it says is shown if it fails.
exec 3>&1 4>&2 > "$build/log" 2>&1
trap 'tail -40 "$build/log" >&4' EXIT
options=(--prefix "$prefix" --disable-test-modules CFLAGS=-O1)
if [ "$kind" = musl ]; then
    # Debian's gcc would name its own libc as the one that the compiler is for.
    printf '#!/bin/sh\n[ "$1" = --print-multiarch ] && exit\nexec musl-gcc "$@"\n' > cc
    chmod +x cc
    export CC=$build/cc CFLAGS="-O1 -fPIC"
    (cd zlib-* && ./configure --static --prefix="$build/own" && make install)
    # musl-gcc has no headers of Linux, which the static trampolines ask for.
    (cd libffi-* && ./configure --disable-shared --disable-docs --disable-multi-os-directory \
        --disable-exec-static-tramp --prefix="$build/own" && make install)
    export PKG_CONFIG_LIBDIR=$build/own/lib/pkgconfig CPPFLAGS=-I$build/own/include LDFLAGS=-L$build/own/lib
    export ZLIB_LIBS=-lz ZLIB_CFLAGS=" " LIBFFI_LIBS=-lffi LIBFFI_CFLAGS=" "
else
    options+=(--disable-gil)
fi
mkdir python
cd python
../Python-3.13.*/configure "${options[@]}"
make -j"$(nproc)"
make install COMPILEALL_OPTS=-j0
trap - EXIT
rm -rf "$build"
echo "$prefix" >&3
