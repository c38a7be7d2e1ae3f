//! Copies the embedded models to `OUT_DIR`, from where the wheel takes them (pyproject.toml,
//! `include`): they live in `models/`, and belong to `ferrule/models/` in an installation.
//! Does nothing without the `python` feature. Never generates code.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_PYTHON").is_none() {
        return Ok(());
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or(io::ErrorKind::NotFound)?);
    for name in ["tales-4m", "tales-1m"] {
        let from = Path::new("models").join(name);
        println!("cargo:rerun-if-changed={}", from.display());
        let to = out.join(&from);
        fs::create_dir_all(&to)?;
        for file in fs::read_dir(&from)? {
            let file = file?;
            fs::copy(file.path(), to.join(file.file_name()))?;
        }
    }
    Ok(())
}
