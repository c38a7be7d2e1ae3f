//! How many threads to use: affinity, cgroup quota, SMT siblings, big and little cores. Reads the system, changes
//! nothing.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Threads for this process, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Threads {
    /// How many.
    pub count: usize,
    /// The limit that decided, for `ferrule info`.
    pub why: String,
}

/// The number of threads that `threads="auto"` means now: one for each physical core that the process may run on,
/// big cores only where there are big and little ones, and no more than the cgroup's CPU quota (rounded up).
pub fn auto() -> Threads {
    let allowed = allowed_cpus();
    let root = Path::new("/sys/devices/system/cpu");
    let mut threads = physical(root, &allowed);
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    if let Some(quota) = quota(Path::new("/sys/fs/cgroup"), &groups) {
        let limit = (quota.ceil() as usize).max(1);
        if limit < threads.count {
            threads = Threads { count: limit, why: format!("cgroup quota of {quota:.2} CPUs") };
        }
    }
    threads
}

/// The CPUs this process may run on; empty if that is not known.
#[cfg(target_os = "linux")]
fn allowed_cpus() -> Vec<usize> {
    // SAFETY: an all-zero cpu_set_t is a valid empty set; the kernel writes at most the given size into it.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) != 0 {
            return Vec::new(); // more CPUs than cpu_set_t holds
        }
        set
    };
    let all = 0..8 * size_of::<libc::cpu_set_t>();
    // SAFETY: every index is within the set.
    all.filter(|&i| unsafe { libc::CPU_ISSET(i, &set) }).collect()
}

/// The CPUs this process may run on; empty if that is not known.
#[cfg(not(target_os = "linux"))]
fn allowed_cpus() -> Vec<usize> {
    Vec::new()
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Physical cores among `allowed`, big ones only.
fn physical(root: &Path, allowed: &[usize]) -> Threads {
    #[cfg(target_vendor = "apple")]
    for (name, what) in
        [(c"hw.perflevel0.physicalcpu", "performance"), (c"hw.physicalcpu", "physical")]
    {
        if let Some(count) = super::available::sysctl(name).filter(|&n| n > 0) {
            return Threads { count: count as usize, why: format!("{count} {what} cores") };
        }
    }
    if allowed.is_empty() {
        let count = std::thread::available_parallelism().map_or(1, |n| n.get());
        return Threads { count, why: "CPUs the system reports".to_owned() };
    }
    let capacity = |cpu: usize| number(&root.join(format!("cpu{cpu}/cpu_capacity")));
    let most = allowed.iter().filter_map(|&c| capacity(c)).max();
    // Cores with less than half the capacity of the biggest would be waited for.
    let big = |&cpu: &usize| match (most, capacity(cpu)) {
        (Some(most), Some(own)) => 2 * own >= most,
        _ => true,
    };
    let big: Vec<usize> = allowed.iter().copied().filter(big).collect();
    let cores: BTreeSet<String> = big
        .iter()
        .map(|cpu| {
            let siblings = root.join(format!("cpu{cpu}/topology/thread_siblings_list"));
            fs::read_to_string(siblings).unwrap_or_else(|_| cpu.to_string())
        })
        .collect();
    let mut why = format!("{} physical cores of {} allowed CPUs", cores.len(), allowed.len());
    if big.len() < allowed.len() {
        why = format!("{} big cores of {} allowed CPUs", cores.len(), allowed.len());
    }
    Threads { count: cores.len().max(1), why }
}

/// The least CPU quota along the paths of `groups` (as in /proc/self/cgroup), in CPUs: of cgroup v2 and of v1's
/// controller `cpu`.
fn quota(root: &Path, groups: &str) -> Option<f64> {
    let v2 = |folder: &Path| -> Option<f64> {
        let text = fs::read_to_string(folder.join("cpu.max")).ok()?;
        let mut words = text.split_whitespace();
        let (quota, period) =
            (words.next()?.parse::<f64>().ok()?, words.next()?.parse::<f64>().ok()?);
        (period > 0.0).then_some(quota / period)
    };
    let v1 = |folder: &Path| -> Option<f64> {
        let quota = number(&folder.join("cpu.cfs_quota_us"))?; // -1 (none) does not parse
        let period = number(&folder.join("cpu.cfs_period_us")).filter(|&p| p > 0)?;
        Some(quota as f64 / period as f64)
    };
    let mut least: Option<f64> = None;
    for (kind, top) in [("", root.to_path_buf()), ("cpu", root.join("cpu"))] {
        // id:controllers:path; a path that a container does not see leaves the top.
        let own = groups.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            let kinds = parts.next()?;
            kinds.split(',').any(|k| k == kind).then_some(parts.next()).flatten()
        });
        let mut folder = top.join(own.unwrap_or("/").trim_start_matches('/'));
        while folder.starts_with(&top) {
            let found = if kind.is_empty() { v2(&folder) } else { v1(&folder) };
            if let Some(found) = found {
                least = Some(least.map_or(found, |least| least.min(found)));
            }
            if !folder.pop() {
                break;
            }
        }
    }
    least
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn tree(name: &str, files: &[(&str, &str)]) -> std::path::PathBuf {
        let root = std::env::temp_dir().join(format!("ferrule-{name}-{}", std::process::id()));
        for (path, text) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn siblings_count_once_and_little_cores_not_at_all() {
        let root = tree(
            "cores",
            &[
                ("cpu0/topology/thread_siblings_list", "0,4\n"),
                ("cpu4/topology/thread_siblings_list", "0,4\n"),
                ("cpu1/topology/thread_siblings_list", "1\n"),
                ("cpu2/topology/thread_siblings_list", "2\n"),
                ("cpu0/cpu_capacity", "1024\n"),
                ("cpu4/cpu_capacity", "1024\n"),
                ("cpu1/cpu_capacity", "900\n"),
                ("cpu2/cpu_capacity", "400\n"),
            ],
        );
        assert_eq!(physical(&root, &[0, 1, 4]).count, 2);
        assert_eq!(physical(&root, &[0, 1, 2, 4]).count, 2);
        assert_eq!(physical(&root, &[2]).count, 1);
        let why = physical(&root, &[0, 1, 2, 4]).why;
        assert_eq!(why, "2 big cores of 4 allowed CPUs");
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn middle_cores_count_as_big_and_so_do_those_of_unknown_capacity() {
        // Four Cortex-A55 and four Cortex-A76, as an RK3588 says; then little, middle and big ones.
        let cores = |name: &str, capacities: &[&str]| {
            let paths: Vec<_> =
                (0..capacities.len()).map(|i| format!("cpu{i}/cpu_capacity")).collect();
            let files: Vec<_> =
                paths.iter().map(String::as_str).zip(capacities.iter().copied()).collect();
            let root = tree(name, &files);
            let all: Vec<_> = (0..capacities.len()).collect();
            let threads = physical(&root, &all);
            fs::remove_dir_all(root).unwrap();
            threads.count
        };
        assert_eq!(cores("two", &["414", "414", "414", "414", "1024", "1024", "1024", "1024"]), 4);
        assert_eq!(cores("three", &["250", "250", "250", "250", "620", "620", "620", "1024"]), 4);
        assert_eq!(cores("unknown", &["none", "none"]), 2);
    }

    #[test]
    fn the_least_quota_on_the_path_counts() {
        let root = tree(
            "quota",
            &[
                ("a/cpu.max", "150000 100000\n"),
                ("a/b/cpu.max", "max 100000\n"),
                ("cpu.max", "max 1"),
            ],
        );
        assert_eq!(quota(&root, "0::/a/b\n"), Some(1.5));
        assert_eq!(quota(&root, "0::/\n"), None);
        fs::remove_dir_all(root).unwrap();
        let root =
            tree("v1", &[("cpu/cpu.cfs_quota_us", "50000"), ("cpu/cpu.cfs_period_us", "100000")]);
        assert_eq!(quota(&root, ""), Some(0.5));
        fs::remove_dir_all(&root).unwrap();
        let files = [
            ("cpu/docker/1/cpu.cfs_quota_us", "250000"),
            ("cpu/docker/1/cpu.cfs_period_us", "100000"),
            ("cpu/cpu.cfs_quota_us", "-1"),
            ("cpu/cpu.cfs_period_us", "100000"),
        ];
        let root = tree("v1-own", &files);
        assert_eq!(quota(&root, "4:memory:/docker/1\n3:cpu,cpuacct:/docker/1\n0::/\n"), Some(2.5));
        assert_eq!(quota(&root, "3:cpuset:/docker/1\n"), None);
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn there_is_at_least_one_thread() {
        assert!(auto().count >= 1);
    }
}
