//! The CUDA back end without a device: the driver that is missing, a stub or too old; and the whole of it, from the
//! launch code to the kernels' sources, on a driver library that runs them on the CPU (`emulator.cpp`). Every result
//! must have the CPU back end's bits. What only a device can tell (speed, NVIDIA's compiler, the memory model) is not
//! tested here.
//!
//! A process has one driver, so each case is a process of its own: an ignored test of this file, started with the
//! library path that it needs.

#![cfg(all(feature = "cuda", target_os = "linux"))]

mod draw;
mod engine;
#[path = "../goldens/mod.rs"]
mod goldens;
mod grouped;
mod layers;
mod models;
mod ops;

use ferrule::backend::cuda::{Unavailable, probe};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// The C++ compiler for the machine that this runs on, which may be an emulated one: `CXX`, or g++.
fn compiler() -> String {
    std::env::var("CXX").unwrap_or_else(|_| "g++".to_owned())
}

/// Compiles C++ sources to a library; `None` without a compiler.
fn library(name: &str, sources: &[(PathBuf, Vec<String>)]) -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&folder).unwrap();
    let start = |(source, more): &(PathBuf, Vec<String>)| {
        let object = folder.join(source.file_name().unwrap()).with_extension("o");
        let unit = format!("-DUNIT={}", source.file_stem().unwrap().to_string_lossy());
        let mut command = Command::new(compiler());
        let flags = "-std=c++17 -O2 -fPIC -ffp-contract=off -fno-math-errno -U_FORTIFY_SOURCE \
                     -Wno-unknown-pragmas";
        command.args(flags.split_whitespace());
        if cfg!(target_arch = "x86_64") {
            command.args(["-mfma", "-mf16c"]);
        }
        command.args(more).args([&unit, "-x", "c++", "-c"]).arg(source).arg("-o").arg(&object);
        Some((command.spawn().ok()?, object))
    };
    let jobs: Vec<_> = sources.iter().map(start).collect::<Option<_>>()?;
    let mut link = Command::new(compiler());
    link.args(["-shared", "-Wl,-soname,libcuda.so.1", "-o"]).arg(folder.join("libcuda.so.1"));
    for (mut job, object) in jobs {
        assert!(job.wait().unwrap().success());
        link.arg(object);
    }
    assert!(link.status().unwrap().success());
    Some(folder)
}

/// Folder of the emulator; `None` (and a line that says so) without a C++ compiler.
fn emulator() -> Option<&'static Path> {
    static BUILT: OnceLock<Option<PathBuf>> = OnceLock::new();
    let build = || {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let (kernels, here) = (root.join("rust/src/backend/cuda/kernels"), root.join("tests/cuda"));
        let header = format!("{}/emulator.h", here.display());
        let mut sources: Vec<_> = std::fs::read_dir(&kernels)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
            .map(|path| (path, vec!["-include".to_owned(), header.clone()]))
            .collect();
        sources.push((here.join("emulator.cpp"), Vec::new()));
        let built = library("emulator", &sources);
        if built.is_none() {
            println!("skipped: no {} to build the emulated driver with", compiler());
        }
        built
    };
    BUILT.get_or_init(build).as_deref()
}

/// Runs an ignored test of this file in a process of its own, by the emulator `FERRULE_RUNNER` if that is set.
fn run(case: &str, folder: &Path, environment: &[(&str, &str)]) -> Output {
    let this = std::env::current_exe().unwrap();
    let mut command = match std::env::var("FERRULE_RUNNER") {
        Ok(emulator) => {
            let mut command = Command::new(emulator);
            command.arg(this);
            command
        }
        Err(_) => Command::new(this),
    };
    command.args(["--ignored", "--exact", case, "--nocapture", "--test-threads=1"]);
    command.env("LD_LIBRARY_PATH", folder).envs(environment.iter().copied());
    command.output().unwrap()
}

/// The same; it must pass. What it printed; `None` without a compiler.
fn passes(case: &str, environment: &[(&str, &str)]) -> Option<String> {
    let folder = emulator()?;
    let output = run(case, folder, environment);
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.contains("1 passed"), "{case}: {out}\n{err}");
    print!("{out}");
    Some(out.into_owned())
}

/// What `probe` says with the library in `folder`; there must be no panic and nothing on standard error.
fn probed(folder: &Path, environment: &[(&str, &str)]) -> String {
    let output = run("says_what_it_finds", folder, environment);
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && err.is_empty(), "{out}\n{err}");
    let line = out.lines().find_map(|line| line.split_once("found: "));
    line.unwrap_or_else(|| panic!("{out}")).1.to_owned()
}

#[test]
#[ignore = "a process of its own: see `probed`"]
fn says_what_it_finds() {
    println!("found: {:?}", probe());
    assert_eq!(probe().is_ok(), probe().is_ok(), "the second time, too");
    if let Err(why) = probe() {
        let loaded = ferrule::backend::cpu::Cpu::new(1, None)
            .and_then(|cpu| ferrule::backend::cuda::Cuda::new(None, cpu));
        let error = loaded.err().unwrap();
        assert!(
            matches!(&error, ferrule::Error::CudaUnavailable(what) if *what == why.to_string())
        );
        if *why == Unavailable::NoDriverLibrary {
            assert!(error.to_string().contains("install the driver"));
        }
    }
}

#[test]
fn no_driver_a_stub_or_an_old_one_is_said_and_never_panics() {
    let nothing = Path::new(env!("CARGO_TARGET_TMPDIR")).join("nothing");
    std::fs::create_dir_all(&nothing).unwrap();
    let bare = probed(&nothing, &[]);
    // This machine may have a driver.
    assert!(bare == "Err(NoDriverLibrary)" || bare.starts_with("Ok("), "{bare}");
    let Some(folder) = emulator() else { return };
    let cases = [
        ("FAKE_INIT", "100", "Err(NoDevice)"),
        ("FAKE_INIT", "34", "Err(StubLibrary)"),
        ("FAKE_INIT", "999", "Err(InitFailed(999))"),
        ("FAKE_VERSION", "11080", "Err(DriverTooOld(11080))"),
        ("FAKE_CAPABILITY", "75", "Err(ArchUnsupported(\"Emulated device\", (7, 5)))"),
    ];
    for (name, value, expected) in cases {
        assert_eq!(probed(folder, &[(name, value)]), expected);
    }
    assert!(probed(folder, &[]).starts_with("Ok(DriverInfo { version: 12020"));
    // A library with one function only, as an old driver lacks some.
    let source = Path::new(env!("CARGO_TARGET_TMPDIR")).join("lacks.cpp");
    std::fs::write(&source, "extern \"C\" int cuInit(unsigned) { return 0; }").unwrap();
    let lacks = library("lacks", &[(source, Vec::new())]).unwrap();
    assert_eq!(probed(&lacks, &[]), "Err(Lacks(\"cuDriverGetVersion\"))");
}

#[test]
fn operations_have_the_cpus_bits() {
    let _ = passes("ops::every_operation", &[]);
    let _ = passes("ops::every_operation", &[("FAKE_DOWN", "1")]);
}

#[test]
fn grouped_forms_have_the_cpus_bits() {
    let _ = passes("grouped::every_form", &[]);
    let _ = passes("grouped::every_form", &[("FAKE_DOWN", "1")]);
}

#[test]
fn tokens_are_those_of_the_cpu() {
    let _ = passes("draw::tokens", &[]);
    let _ = passes("draw::tokens", &[("FAKE_DOWN", "1")]);
}

#[test]
fn mixtures_heads_and_states_have_the_cpus_bits() {
    for case in ["layers::mixtures", "layers::heads", "layers::states"] {
        let _ = passes(case, &[]);
        let _ = passes(case, &[("FAKE_DOWN", "1")]);
    }
}

#[test]
fn attention_has_the_cpus_bits() {
    let _ = passes("ops::attention", &[]);
    let _ = passes("ops::attention", &[("FAKE_DOWN", "1")]);
}

#[test]
fn models_have_the_cpus_bits() {
    let _ = passes("models::logits", &[("FAKE_LATE", "1")]);
}

#[test]
fn engines_give_the_cpus_answers() {
    let _ = passes("engine::engines", &[("FAKE_LATE", "1")]);
}

#[test]
fn quantized_models_have_the_cpus_bits() {
    let _ = passes("models::quantized", &[("FAKE_LATE", "1")]);
}

#[test]
fn models_on_two_machines_have_the_cpus_bits() {
    let _ = passes("models::split", &[("FAKE_LATE", "1")]);
}

#[test]
fn graphs_have_the_bits_of_launches() {
    let Some(out) = passes("models::generation_by_graphs", &[]) else { return };
    // When the device is let go, the emulator says what became of it.
    let lines: Vec<_> = out.lines().filter_map(|line| line.strip_prefix("emulator: ")).collect();
    assert_eq!(lines.len(), 3); // models
    for (number, line) in lines.into_iter().enumerate() {
        let numbers: Vec<u64> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
        // As many as steps, and none of them allocates.
        assert!(numbers[0] >= 20 * (number as u64 + 1) && numbers[1..3] == [0, 0], "{line}");
        // The first model needs neither experts nor other types of weights, keys and values.
        assert!(numbers[3] == numbers[4] && (number > 0 || numbers[3] == 7), "{line}");
    }
}

#[test]
fn without_graphs_kernels_are_launched_one_by_one() {
    let Some(out) = passes("models::generation_by_graphs", &[("FAKE_GRAPHS", "2")]) else { return };
    assert!(out.contains("emulator: 0 launches of graphs"), "{out}");
}

#[test]
fn what_cuda_lacks_is_an_error_that_says_so() {
    let _ = passes("models::refused", &[]);
}

#[test]
fn short_memory_and_faults_are_errors() {
    let _ = passes("models::short_of_memory", &[("FAKE_MEMORY", "60000")]);
    let _ = passes("models::faulty", &[("FAKE_FAULT", "200")]);
}
