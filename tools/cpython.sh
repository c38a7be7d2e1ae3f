#!/bin/bash
# Builds a CPython that Debian does not have, from Debian's packages: 3.14 without the GIL, or 3.13 with musl (whose
# zlib and libffi are built first, for pip and ctypes), for this machine or for aarch64. On x86-64 Debian; everything
# but the apt packages lies under WORK. Not optimised: 2 minutes of two CPUs each, once.
# CPYTHON_SOURCE may be a source archive of 3.14, for a mirror that lacks what its indices have.
# usage: tools/cpython.sh WORK free-threaded|musl|musl-aarch64; prints the prefix, which has bin/python3
set -euo pipefail
tools=$(realpath "$(dirname "$0")")
mkdir -p "$1"
work=$(realpath "$1")
kind=$2
prefix=$work/python-$kind
[ -x "$prefix/bin/python3" ] && { echo "$prefix"; exit; }

packages=(gcc make pkg-config)
case $kind in
    free-threaded) packages+=(zlib1g-dev libffi-dev libssl-dev) suites=(testing sid) ;;
    musl*) suites=(bookworm trixie) sources=(zlib/trixie libffi/bookworm python3.13/trixie) ;;&
    musl) machine=x86_64 arch=amd64 cross=() prefixed="" ;;
    musl-aarch64)
        machine=aarch64 arch=arm64 prefixed=aarch64-linux-gnu- packages+=(gcc-aarch64-linux-gnu)
        # A Python of the same version makes what is made by Python.
        builder=$("$0" "$work" musl)/bin/python3
        cross=(--build=x86_64-linux-gnu --host=aarch64-linux-musl)
        ;;
esac
[ -n "${suites:-}" ] || { echo "cpython.sh: $kind: expected free-threaded, musl or musl-aarch64" >&2; exit 1; }
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
    "$tools/apt.sh" apt "deb deb-src" "${arch:-amd64}" "${suites[@]}"
    export APT_CONFIG=$build/apt/apt.conf
    if [ "$kind" = free-threaded ]; then
        # A mirror may lack a source that its index has.
        apt-get source -qq --download-only python3.14/testing || apt-get source -qq --download-only python3.14/sid || {
            echo "cpython.sh: the mirror has no source of Python 3.14: give CPYTHON_SOURCE=Python-3.14.N.tar.xz (python.org)"
            exit 1
        }
    else
        apt-get source -qq --download-only "${sources[@]}"
    fi
fi
for file in ./*.tar.?z; do case $file in *.debian.*) ;; *) tar xf "$file" ;; esac; done

options=(--prefix "$prefix" --disable-test-modules CFLAGS=-O1)
if [ "$kind" != free-threaded ]; then
    # Trixie's: libraries of wheels are linked in a way (DT_RELR) that musl knows from 1.2.4 on.
    musl=$work/$kind
    apt-get download -qq musl/trixie musl-dev/trixie musl-tools/trixie
    for file in ./*.deb; do dpkg-deb -x "$file" "$musl"; done
    sed -E "s,/usr/(lib|include)/,$musl&,g; s,/lib/ld-musl,$musl/usr&," \
        "$musl/usr/lib/$machine-linux-musl/musl-gcc.specs" > "$musl/specs"
    # Debian's gcc would name its own libc as the one that the compiler is for.
    printf '#!/bin/sh\n[ "$1" = --print-multiarch ] && exit\nexec %sgcc "$@" -specs %s/specs\n' \
        "$prefixed" "$musl" > "$musl/cc"
    chmod +x "$musl/cc"
    export CC=$musl/cc AR=${prefixed}ar RANLIB=${prefixed}ranlib CFLAGS="-O1 -fPIC"
    # Atomics out of line ask for what only glibc has.
    [ -z "$prefixed" ] || CFLAGS+=" -mno-outline-atomics"
    (cd zlib-* && ./configure --static --prefix="$build/own" && make install)
    # There are no headers of Linux for it, which the static trampolines ask for.
    (cd libffi-* && ./configure "${cross[@]}" --disable-shared --disable-docs --disable-multi-os-directory \
        --disable-exec-static-tramp --prefix="$build/own" && make install)
    export PKG_CONFIG_LIBDIR=$build/own/lib/pkgconfig CPPFLAGS=-I$build/own/include LDFLAGS=-L$build/own/lib
    export ZLIB_LIBS=-lz ZLIB_CFLAGS=" " LIBFFI_LIBS=-lffi LIBFFI_CFLAGS=" "
    options+=("${cross[@]}")
    # What configure cannot try, as it runs elsewhere.
    [ -z "$prefixed" ] || options+=(--with-build-python="$builder" --without-ensurepip ac_cv_file__dev_ptmx=yes
        ac_cv_file__dev_ptc=no ac_cv_buggy_getaddrinfo=no ac_cv_libatomic_needed=no)
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
