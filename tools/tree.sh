#!/bin/bash
# Unpacks Debian 12's Python for another machine, and what else is named, with all that they need: nothing is run in
# it to set it up.
# usage: tools/tree.sh FOLDER ARCH [PACKAGE...]; does nothing if the folder is there
set -euo pipefail
tools=$(realpath "$(dirname "$0")")
root=$1 arch=$2
shift 2
[ ! -e "$root/usr/bin/python3" ] || exit 0
apt=$(mktemp -d)
"$tools/apt.sh" "$apt" deb "$arch" bookworm
rm -rf "$root.new"
mkdir -p "$root.new/usr"/{lib,bin,sbin}
APT_CONFIG=$apt/apt.conf apt-get install -qq -y --download-only -o Debug::NoLocking=1 \
    python3 libpython3-stdlib libc6 libgcc-s1 libstdc++6 "$@" >/dev/null
for folder in lib bin sbin; do ln -sfn usr/$folder "$root.new/$folder"; done
[ "$arch" != amd64 ] || { mkdir "$root.new/usr/lib64" && ln -s usr/lib64 "$root.new/lib64"; }
for package in "$apt"/cache/archives/*.deb; do
    dpkg-deb --fsys-tarfile "$package" | tar -x -C "$root.new" --keep-directory-symlink \
        --exclude=./usr/share/doc --exclude=./usr/share/man --exclude=./usr/share/locale
done
rm -r "$apt"
mv "$root.new" "$root"
