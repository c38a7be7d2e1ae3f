#!/bin/busybox sh
# What boot.sh runs in the virtual machine, as its first process.
b=/bin/busybox
$b mkdir -p /proc /sys /dev /tmp /root
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev
$b mount -t tmpfs tmp /tmp

# A group in a group: the outer one has the memory's limit, the inner one that of the CPUs.
two_groups() {
    local group=/sys/fs/cgroup/a
    $b mkdir $group && echo "+memory +cpu" > $group/cgroup.subtree_control && $b mkdir $group/b || return
    echo 400000000 > $group/memory.max
    echo "50000 100000" > $group/b/cpu.max
    echo $$ > $group/b/cgroup.procs
    python3 -m ferrule doctor > /tmp/doctor
    $b cat /tmp/doctor
    $b grep -q "1 threads: cgroup quota of 0.50 CPUs" /tmp/doctor && $b grep -q "the cgroup's limit is 0.4 GB" /tmp/doctor
}

exec > /dev/ttyS0 2>&1
export PATH=/usr/bin:/bin:/usr/sbin:/sbin PYTHONPATH=/ferrule/site HOME=/root PYTHONDONTWRITEBYTECODE=1
cd /ferrule || exit
echo "begin"
case $1 in
    skylake-x)
        # What the system sees of it, and that VNNI is not there.
        $b grep -E '^(model name|flags)' /proc/cpuinfo
        python3 same_bits.py avx2
        ;;
    cgroup)
        $b mount -t cgroup2 cgroup2 /sys/fs/cgroup
        echo "+memory +cpu" > /sys/fs/cgroup/cgroup.subtree_control
        python3 -m pytest -q --color=no -p no:cacheprovider tests/test_memory.py -k limit &&
            two_groups
        ;;
esac
echo "end $?"
# What was written has to leave the serial port first.
$b sleep 3
$b poweroff -f
