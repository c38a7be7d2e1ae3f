//! Models written as GGUF files: what is read from them is what was written.

use super::Folder;
use super::models::{Session, options};
use ferrule::model::export::{self, Export, export};
use ferrule::model::{Forward, LoadOptions, Quantization, Wanted, Written, load};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

/// All golden models, those that are stored quantized left out.
fn originals() -> Vec<PathBuf> {
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")];
    folders.extend(std::env::var_os("FERRULE_SHARED").map(|s| Path::new(&s).join("goldens")));
    let inside = folders.iter().flat_map(|folder| std::fs::read_dir(folder).unwrap());
    let mut all: Vec<_> = inside.map(|entry| entry.unwrap().path()).collect();
    all.retain(|path| path.join("config.json").exists() && path.join("golden.safetensors").exists());
    all.sort();
    all
}

fn write(folder: &Path, out: &Path, format: &str) -> ferrule::Result<Written> {
    let how = Export {
        format: export::named(format).unwrap(),
        rules: Vec::new(),
        load: LoadOptions { threads: Some(2), ..LoadOptions::default() },
    };
    let tokens = |architecture: &str, vocab| {
        let mut items = ferrule::tokenizer::to_gguf(folder, architecture, vocab)?;
        items.extend(ferrule::chat::to_gguf(folder)?);
        Ok(items)
    };
    export(folder, out, how, &tokens, &AtomicBool::new(false), &|_, _, _| {})
}

fn logits(path: &Path) -> Vec<f32> {
    let model = load(path, options(Quantization::None)).unwrap();
    let tokens: Vec<u32> = (0..40).map(|i| (i * i + 3) % model.vocab() as u32).collect();
    Session::new(&model).feed(&tokens, Wanted::All)
}

#[test]
fn what_is_written_is_the_model() {
    let folder = Folder::new();
    for original in originals() {
        let name = original.file_name().unwrap().to_string_lossy().into_owned();
        let out = folder.0.join(format!("{name}.gguf"));
        match write(&original, &out, "f32") {
            Err(e) => println!("{name}: {e}"),
            Ok(_) => {
                let (a, b) = (logits(&original), logits(&out));
                let worst = a.iter().zip(&b).fold(0f32, |w, (a, b)| w.max((a - b).abs()));
                println!("{name}: {worst:e}");
            }
        }
    }
}
