//! Which set a CPU gets, for CPUs that are not at hand: the choice is a function of their features. Runs no kernel.

use super::super::{ALL, detect, on};

/// CPUs, those of their features that a set may need, and the set that they get. AVX features as Intel's and AMD's
/// manuals and GCC's `-march=` have them; a CPU whose AVX-512 the system does not save has none of it.
#[cfg(target_arch = "x86_64")]
const CPUS: &[(&str, &str, &str)] = &[
    ("Core 2: SSSE3", "", "scalar"),
    ("Nehalem, Atom to Tremont: SSE4.2", "", "scalar"),
    ("Sandy Bridge: AVX", "", "scalar"),
    ("Ivy Bridge: AVX, F16C", "f16c", "scalar"),
    ("Bulldozer, Piledriver: FMA without AVX2", "fma f16c", "scalar"),
    ("Haswell to Comet Lake", "avx2 fma f16c", "avx2"),
    ("Zen 1 to 3", "avx2 fma f16c", "avx2"),
    ("AVX2 without FMA (some virtual machines)", "avx2 f16c", "scalar"),
    ("Knights Landing", "avx2 fma f16c avx512f", "avx2"),
    ("Skylake-X, Skylake-SP", "avx2 fma f16c avx512f avx512bw avx512vl", "avx2"),
    ("Cascade Lake", "avx2 fma f16c avx512f avx512bw avx512vl avx512vnni", "avx512vnni"),
    ("Ice Lake, Zen 4", "avx2 fma f16c avx512f avx512bw avx512vl avx512vnni", "avx512vnni"),
    ("Alder Lake, Sierra Forest", "avx2 fma f16c avxvnni", "avxvnni"),
    ("Zen 5", "avx2 fma f16c avxvnni avx512f avx512bw avx512vl avx512vnni", "avx512vnni"),
    (
        "Sapphire Rapids",
        "avx2 fma f16c avxvnni avx512f avx512bw avx512vl avx512vnni amx-int8",
        "amx",
    ),
    (
        "Sapphire Rapids, tiles not allowed by the system",
        "avx2 fma f16c avxvnni avx512f avx512bw avx512vl avx512vnni",
        "avx512vnni",
    ),
];
/// Features as Arm's manuals of the cores have them.
#[cfg(target_arch = "aarch64")]
const CPUS: &[(&str, &str, &str)] = &[
    ("Cortex-A53, A57, A72 (Raspberry Pi 3, 4; Jetson Nano)", "neon", "neon"),
    (
        "Cortex-A55, A76, A78AE (Raspberry Pi 5, Jetson Orin); Neoverse N1",
        "neon dotprod",
        "dotprod",
    ),
    ("Cortex-A510, A710, X2; Neoverse V1, N2, V2; Apple M2", "neon dotprod i8mm", "i8mm"),
    ("Apple M1", "neon dotprod", "dotprod"),
];
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const CPUS: &[(&str, &str, &str)] = &[("any", "", "scalar")];

#[test]
fn each_cpu_gets_the_best_set_that_it_can_run() {
    for (cpu, features, set) in CPUS {
        let found = on(features.split_whitespace().collect()).next().map(|k| k.name);
        assert_eq!(found, Some(*set), "{cpu}");
    }
}

#[test]
fn every_set_is_the_choice_of_some_cpu_and_needs_what_is_looked_for() {
    let known: Vec<_> = detect().into_iter().map(|(name, _)| name).collect();
    for set in ALL {
        assert!(set.needs.iter().all(|name| known.contains(name)), "{set:?}: {:?}", set.needs);
        let chosen = cfg!(target_arch = "aarch64") && set.name == "scalar"
            || CPUS.iter().any(|(_, _, name)| *name == set.name);
        assert!(chosen, "{set:?}");
    }
}
