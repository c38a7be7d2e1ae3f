//! How much memory there is: the system's, and what cgroups (v1 and v2) leave of it. Reads the system, changes nothing.

use std::fs;
use std::path::Path;

/// Memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Of the machine.
    pub total: u64,
    /// What can be had without swapping: the system's, or less if a cgroup leaves less.
    pub available: u64,
    /// The least limit of a cgroup that this process is in, if there is one.
    pub limit: Option<u64>,
}

/// The memory of this machine, now.
pub fn memory() -> Memory {
    // Unknown: as little as a small machine has.
    let unknown = Memory { total: 4 << 30, available: 2 << 30, limit: None };
    read(Path::new("/")).or_else(system).unwrap_or(unknown)
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// What Linux says below `root`.
fn read(root: &Path) -> Option<Memory> {
    let info = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let kib = |name: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    let total = kib("MemTotal:")? * 1024;
    let mut memory = Memory { total, available: kib("MemAvailable:")? * 1024, limit: None };
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let files = root.join("sys/fs/cgroup");
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(kinds), Some(own)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let (top, limits, used, kept) = match kinds {
            "" => (files.clone(), ["memory.max", "memory.high"], "memory.current", ""),
            kinds if kinds.split(',').any(|kind| kind == "memory") => {
                let limits = ["memory.limit_in_bytes", "memory.soft_limit_in_bytes"];
                (files.join("memory"), limits, "memory.usage_in_bytes", "total_")
            }
            _ => continue,
        };
        // In a container the path may be that of the host: then only the top is there.
        let mut folder = top.join(own.trim_start_matches('/'));
        while folder.starts_with(&top) {
            // "max" and v1's enormous number are no limit. Soft limits of v1 are not kept to.
            let limit = number(&folder.join(limits[0])).into_iter();
            let high = number(&folder.join(limits[1])).filter(|_| kinds.is_empty());
            let limit = limit.chain(high).min().filter(|&limit| limit < total);
            if let (Some(limit), Some(used)) = (limit, number(&folder.join(used))) {
                // Pages of files are counted as used, but are given up for others.
                let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
                let files = |list: &str| {
                    let name = format!("{kept}{list}_file ");
                    let line = stat.lines().find_map(|line| line.strip_prefix(&name));
                    line.and_then(|n| n.trim().parse().ok()).unwrap_or(0u64)
                };
                let used = used.saturating_sub(files("active") + files("inactive"));
                memory.available = memory.available.min(limit.saturating_sub(used));
                memory.limit = Some(memory.limit.map_or(limit, |least| least.min(limit)));
            }
            if !folder.pop() {
                break;
            }
        }
    }
    Some(memory)
}

/// A number that macOS tells under a name.
#[cfg(target_vendor = "apple")]
pub(super) fn sysctl(name: &std::ffi::CStr) -> Option<u64> {
    let mut value = 0u64;
    let mut size = size_of_val(&value);
    let to = (&raw mut value).cast();
    // SAFETY: at most `size` bytes are written to `value`; numbers of 4 bytes fill its low half, as the
    // processors are little-endian.
    let status =
        unsafe { libc::sysctlbyname(name.as_ptr(), to, &mut size, std::ptr::null_mut(), 0) };
    (status == 0 && size <= size_of_val(&value)).then_some(value)
}

#[cfg(target_vendor = "apple")]
fn system() -> Option<Memory> {
    let total = sysctl(c"hw.memsize")?;
    // Per cent of the memory that is free or can be freed; what `memory_pressure` prints.
    let level = sysctl(c"kern.memorystatus_level").unwrap_or(50).min(100);
    Some(Memory { total, available: total / 100 * level, limit: None })
}

#[cfg(windows)]
fn system() -> Option<Memory> {
    // MEMORYSTATUSEX of sysinfoapi.h.
    #[repr(C)]
    #[derive(Default)]
    struct Status {
        length: u32,
        load: u32,
        total: u64,
        available: u64,
        others: [u64; 5],
    }
    #[link(name = "kernel32")]
    unsafe extern "system" {
        fn GlobalMemoryStatusEx(status: *mut Status) -> i32;
    }
    let mut status = Status { length: size_of::<Status>() as u32, ..Status::default() };
    // SAFETY: the call fills a structure of the length that it is told.
    let done = unsafe { GlobalMemoryStatusEx(&mut status) } != 0;
    done.then_some(Memory { total: status.total, available: status.available, limit: None })
}

#[cfg(not(any(target_vendor = "apple", windows)))]
fn system() -> Option<Memory> {
    None
}

#[cfg(test)]
mod tests {
    use super::super::topology::tests::tree;
    use super::*;

    const MEMINFO: (&str, &str) =
        ("proc/meminfo", "MemTotal:  8000 kB\nMemFree: 10 kB\nMemAvailable:  6000 kB\n");
    const KB: u64 = 1024;

    fn found(name: &str, files: &[(&str, &str)]) -> Option<Memory> {
        let root = tree(name, files);
        let memory = read(&root);
        fs::remove_dir_all(root).unwrap();
        memory
    }

    #[test]
    fn without_cgroups_the_system_counts() {
        let memory = found("meminfo", &[MEMINFO, ("proc/self/cgroup", "0::/\n")]).unwrap();
        assert_eq!(memory, Memory { total: 8000 * KB, available: 6000 * KB, limit: None });
        assert_eq!(found("no-meminfo", &[("proc/self/cgroup", "0::/\n")]), None);
    }

    #[test]
    fn the_least_limit_of_cgroup_v2_counts_and_file_pages_are_free() {
        let files = [
            MEMINFO,
            ("proc/self/cgroup", "0::/a/b\n"),
            ("sys/fs/cgroup/a/memory.max", "4096000\n"), // 4000 KiB
            ("sys/fs/cgroup/a/memory.current", "3072000"),
            ("sys/fs/cgroup/a/memory.stat", "anon 1\nactive_file 1024000\ninactive_file 512000\n"),
            ("sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("sys/fs/cgroup/a/b/memory.high", "5120000\n"),
            ("sys/fs/cgroup/a/b/memory.current", "1024000\n"),
        ];
        let memory = found("v2", &files).unwrap();
        assert_eq!(memory.available, 2500 * KB);
        assert_eq!(memory.limit, Some(4000 * KB));
    }

    #[test]
    fn cgroup_v1_limits_count_and_its_soft_and_boundless_ones_do_not() {
        let files = [
            MEMINFO,
            ("proc/self/cgroup", "5:devices:/\n4:memory:/a\n0::/\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1024000\n"),
            ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "2048000\n"),
            ("sys/fs/cgroup/memory/a/memory.soft_limit_in_bytes", "1024\n"),
            ("sys/fs/cgroup/memory/a/memory.usage_in_bytes", "1536000\n"),
            ("sys/fs/cgroup/memory/a/memory.stat", "inactive_file 5\ntotal_inactive_file 512000\n"),
        ];
        let memory = found("v1-memory", &files).unwrap();
        assert_eq!(
            memory,
            Memory { total: 8000 * KB, available: 1000 * KB, limit: Some(2000 * KB) }
        );
        // In a container that does not see its own path the top folder has the limit.
        let inside = [
            MEMINFO,
            ("proc/self/cgroup", "4:memory:/docker/123\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "2048000\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1024000\n"),
        ];
        assert_eq!(found("v1-inside", &inside).unwrap().available, 1000 * KB);
    }

    #[test]
    fn this_machine_has_some() {
        let memory = memory();
        assert!(memory.available > 0 && memory.available <= memory.total);
    }
}
