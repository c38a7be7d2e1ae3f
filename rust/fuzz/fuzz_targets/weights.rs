//! A model folder of config.json and model.safetensors, quantized by others or packed by `ferrule quantize`: an error,
//! or a model that runs. Input: config.json, a zero byte, the header of the safetensors file, and after another zero
//! byte what its data is filled with, again and again. Start from the quantized models in tests/golden, and from what
//! `ferrule quantize` makes of others: with FERRULE_PACK=FROM:TO this does that instead.
#![no_main]

use ferrule::model::{
    Forward, LoadOptions, Quantization, Quantize, Rule, Sequence, Wanted, load, quantize,
};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::sync::atomic::AtomicBool;

/// Where TMPDIR says; tools/fuzz.sh has that in memory.
static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let path = std::env::temp_dir().join(format!("ferrule-fuzz-{}", std::process::id()));
    fs::create_dir_all(&path).unwrap();
    path
});
/// The most data.
const MOST: u64 = 1 << 20;

/// In int4 but for the embedding, if that is asked for.
fn pack() {
    let Ok(both) = std::env::var("FERRULE_PACK") else { return };
    let (from, to) = both.split_once(':').unwrap();
    let rule = Rule { pattern: "*embed_tokens*".to_owned(), form: Quantization::Int8 };
    let how = Quantize {
        format: Quantization::Int4,
        bits: None,
        rules: vec![rule],
        calibration: Vec::new(),
        load: LoadOptions { threads: Some(1), ..LoadOptions::default() },
    };
    let stop = AtomicBool::new(false);
    quantize(Path::new(from), Path::new(to), how, &stop, &|_, _, _| {}).unwrap();
    std::process::exit(0);
}

fuzz_target!(init: pack(), |input: &[u8]| {
    let mut parts = input.splitn(3, |b| *b == 0);
    let (Some(config), Some(header)) = (parts.next(), parts.next()) else { return };
    let pattern = parts.next().filter(|p| !p.is_empty()).unwrap_or(&[0x3c]);
    let Ok(Value::Object(tensors)) = serde_json::from_slice(header) else { return };
    let ends = tensors.values().filter_map(|t| t["data_offsets"][1].as_u64());
    let end = ends.max().filter(|end| *end <= MOST).unwrap_or(0) as usize;
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(pattern.iter().cycle().take(end));
    fs::write(FOLDER.join("config.json"), config).unwrap();
    fs::write(FOLDER.join("model.safetensors"), &file).unwrap();
    for quantization in [Quantization::Auto, Quantization::None] {
        let options = LoadOptions { quantization, threads: Some(1), ..LoadOptions::default() };
        let Ok(model) = load(&FOLDER, options) else { continue };
        let Ok(mut sequence) = Sequence::new(&model, 3) else { continue };
        sequence.restart(3);
        let tokens: Vec<u32> = (0..3).map(|i| i % model.vocab() as u32).collect();
        if let Ok(logits) = sequence.read(&tokens, Wanted::Last, &AtomicBool::new(false)) {
            assert_eq!(logits.len(), model.vocab());
        }
    }
});
