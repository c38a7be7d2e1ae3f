#!/bin/bash
# The installed package in a virtual machine that boots Debian's kernel and nothing else, for what this machine's own
# kernel or CPU does not have. Emulated, so that no hardware support is asked for: minutes.
#   cgroup      QEMU: limits of memory and CPUs by cgroup v2 (tests/test_memory.py, and what `ferrule doctor` says)
#   skylake-x   Bochs: a CPU with AVX-512 but without VNNI; the set that it gets, and the same text
# usage: tools/x86/boot.sh cgroup|skylake-x WHEEL [PYTHON of this machine that has ferrule]; x86-64 Debian 12, root
set -euo pipefail
cd "$(dirname "$0")/../.."
kind=$1 wheel=$(realpath "$2") python=$(realpath -s "${3:-$(command -v python3)}")
work=${CARGO_TARGET_DIR:-target}/x86
mkdir -p "$work"
work=$(realpath "$work")
case $kind in
    cgroup) packages=(qemu-system-x86 seabios) with=(numpy pytest pluggy iniconfig packaging pygments) ;;
    skylake-x) packages=(bochs bochsbios vgabios isolinux syslinux-common xorriso) with=() ;;
    *) echo "boot.sh: $kind: expected cgroup or skylake-x" >&2; exit 1 ;;
esac
packages+=(cpio)
if ! dpkg-query -W "${packages[@]}" >/dev/null 2>&1; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -yqq --no-install-recommends "${packages[@]}" >/dev/null
fi
tools/tree.sh "$work/guest" amd64 busybox-static
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
kernel=$work/vmlinuz
if [ ! -e "$kernel" ]; then
    image=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image/ { print $2; exit }')
    (cd "$here" && apt-get download -qq "$image" && dpkg-deb -x "$image"_*.deb . && cp boot/vmlinuz-* "$kernel")
fi

"$python" -m pip install --quiet --no-deps --target "$here/ferrule/site" --python-version 3.11 --only-binary=:all: \
    --platform manylinux2014_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_28_x86_64 \
    --platform manylinux_2_34_x86_64 "$wheel" "${with[@]}"
mkdir "$here"/ferrule/{tests,benches}
cp tests/test_memory.py "$here/ferrule/tests/"
cp benches/random_model.py "$here/ferrule/benches/"
cp tools/same_bits.py tools/x86/guest.sh "$here/ferrule/"
cp tools/same_bits.py "$here/"
mkdir -p "$here/ferrule/models"
cp -r models/tales-4m "$here/ferrule/models/"
# Two archives one after the other are one.
(cd "$work/guest" && find . | cpio --quiet -o -H newc | gzip -1) > "$here/initrd"
(cd "$here" && find ferrule | cpio --quiet -o -H newc | gzip -1) >> "$here/initrd"
# Without what makes Linux take AVX from a CPU with an emulator's microcode, and what Bochs 2.7 gives a wrong size for.
line="console=ttyS0 rdinit=/ferrule/guest.sh panic=-1 quiet mitigations=off clearcpuid=xsavec,xsaves -- $kind"

if [ "$kind" = cgroup ]; then
    timeout 1500 qemu-system-x86_64 -cpu max -smp 2 -m 3G -nographic -no-reboot -nic none \
        -kernel "$kernel" -initrd "$here/initrd" -append "$line" | tr -d '\r' > "$here/serial"
else
    mkdir "$here/disk"
    cp "$kernel" "$here/disk/linux"
    cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 "$here/disk/"
    mv "$here/initrd" "$here/disk/initrd"
    printf 'default a\nprompt 0\nlabel a\n kernel /linux\n initrd /initrd\n append %s\n' "$line" > "$here/disk/isolinux.cfg"
    xorriso -as mkisofs -quiet -o "$here/disk.iso" -b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 \
        -boot-info-table "$here/disk" 2>/dev/null
    cat > "$here/bochs" <<END
cpu: model=corei7_skylake_x, count=1, ips=100000000
megs: 1024
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/vgabios/vgabios.bin
ata0-master: type=cdrom, path=$here/disk.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$here/serial
display_library: rfb, options="timeout=0"
clock: sync=none
sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
log: $here/log
panic: action=fatal
END
    # Debian's has its debugger in it, which waits to be told to continue.
    echo c > "$here/continue"
    # Its display is for VNC, and there is no network to reach it by.
    unshare --net timeout 3000 bochs -q -f "$here/bochs" -rc "$here/continue" < /dev/null > "$here/out" 2>&1 ||
        tail -5 "$here/out" >&2
fi
cat "$here/serial"
grep -q '^end 0' "$here/serial" || { echo "boot.sh: $kind failed" >&2; exit 1; }
if [ "$kind" = skylake-x ]; then
    sed -n '/^{/,/^}/p' "$here/serial" | tr -d '\r' > "$here/emulated"
    # Bochs 2.7 rounds f32 to f16 (VCVTPS2PH) otherwise than processors do: the bits of the form of three that has keys
    # and values in f16 differ, and nothing else may.
    (cd "$here" && "$python" same_bits.py) | diff - "$here/emulated" > "$here/difference" || cat "$here/difference"
    if grep '^[<>]' "$here/difference" | grep -qv '"bits":'; then exit 1; fi
    [ "$(grep -c '^>' "$here/difference")" -le 1 ] || exit 1
    echo "skylake-x: the same text, and the same bits but for f16"
fi
