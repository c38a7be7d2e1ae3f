//! Any bytes as the packed cache file of a model: not taken, or a model that runs. A file that has the right first 64
//! bytes and the right length is believed: it is made here, and its name is the hash of all that it depends on. So its
//! matrices may hold anything, and kernels must stay within their memory. Input: 0 and a whole file; or another byte
//! and what the matrices are filled with, again and again.
#![no_main]

use ferrule::model::{Forward, LoadOptions, Quantization, Sequence, Wanted, load};
use libfuzzer_sys::fuzz_target;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::sync::atomic::AtomicBool;

/// Of tests/golden; each with the form that it is packed in.
const MODELS: [(&str, Quantization); 4] = [
    ("qwen3-a", Quantization::Int4),
    ("qwen25-a", Quantization::Int8),
    ("qwen3-a", Quantization::None),
    ("quant-ct-w4a16-g32-asym-a", Quantization::Auto),
];

/// Where TMPDIR says (tools/fuzz.sh has that in memory); one folder for each model, with the one file that it has written.
static FILES: LazyLock<Vec<(PathBuf, Vec<u8>)>> = LazyLock::new(|| {
    let file = |i: usize| {
        let folder = std::env::temp_dir().join(format!("ferrule-fuzz-{}/{i}", std::process::id()));
        open(i, &folder);
        let path = fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
        let bytes = fs::read(&path).unwrap();
        (path, bytes)
    };
    (0..MODELS.len()).map(file).collect()
});

/// Loads a model and runs it.
fn open(i: usize, cache: &Path) {
    let (name, quantization) = MODELS[i];
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name);
    let cache_dir = Some(cache.to_path_buf());
    let options =
        LoadOptions { quantization, cache_dir, threads: Some(1), ..LoadOptions::default() };
    let model = load(&folder, options).unwrap();
    let mut sequence = Sequence::new(&model, 3).unwrap();
    sequence.restart(3);
    let logits = sequence.read(&[1, 2, 3], Wanted::Last, &AtomicBool::new(false)).unwrap();
    assert_eq!(logits.len(), model.vocab());
}

fuzz_target!(|input: &[u8]| {
    let [choice, input @ ..] = input else { return };
    let (path, good) = &FILES[usize::from(choice >> 1) % MODELS.len()];
    if choice & 1 == 0 {
        fs::write(path, input).unwrap();
    } else if !input.is_empty() {
        let rest = good.len() - 64;
        let bytes: Vec<u8> =
            good[..64].iter().chain(input.iter().cycle().take(rest)).copied().collect();
        fs::write(path, bytes).unwrap();
    }
    open(usize::from(choice >> 1) % MODELS.len(), path.parent().unwrap());
});
