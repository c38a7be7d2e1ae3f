#!/bin/bash
# Makes an apt in FOLDER that knows suites of Debian that this machine does not use, from its mirror, and nothing of
# what is installed: for packages to be unpacked. To be used with APT_CONFIG=FOLDER/apt.conf. Never touches the
# machine's own apt.
# usage: tools/apt.sh FOLDER deb|deb-src ARCH SUITE...
set -euo pipefail
mkdir -p "$1"/{parts,state/lists/partial,cache/archives/partial}
apt=$(realpath "$1")
types=$2 arch=$3
shift 3
mirror=$(awk '/^URIs:/ { print $2; exit }' /etc/apt/sources.list.d/debian.sources)
: > "$apt/status"
cat > "$apt/debian.sources" <<END
Types: $types
URIs: $mirror
Suites: $*
Components: main
Architectures: $arch
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
APT::Architecture "$arch";
APT::Architectures { "$arch"; };
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Check-Valid-Until "false";
END
APT_CONFIG=$apt/apt.conf apt-get update -qq
