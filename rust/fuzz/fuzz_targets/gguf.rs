//! Any bytes as a GGUF file: what parses must lie within the file, and every value can be read; what is a model must
//! run. The data need not be there: a file is also tried with zeros behind it. Start from the models in
//! tests/golden/gguf, cut to their headers. Panics of the `tokenizers` crate are caught, which libFuzzer would count as
//! crashes: its hook is taken away first, and other threads and loading are looked after here.
#![no_main]

use ferrule::chat::ChatTemplate;
use ferrule::file::gguf::{Metadata, parse};
use ferrule::model::{Forward, LoadOptions, Sequence, Wanted, load};
use ferrule::tokenizer::Tokenizer;
use libfuzzer_sys::fuzz_target;
use std::fs;
use std::panic::catch_unwind;
use std::path::PathBuf;
use std::sync::LazyLock;
use std::sync::atomic::AtomicBool;

/// Where TMPDIR says; tools/fuzz.sh has that in memory.
static FILE: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = std::env::temp_dir().join(format!("ferrule-fuzz-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    folder.join("model.gguf")
});
/// Zeros behind.
const BEHIND: usize = 400_000;

fuzz_target!(init: std::panic::set_hook(Box::new(|_| {})), |bytes: &[u8]| {
    if catch_unwind(|| all(bytes)).is_err() {
        std::process::abort(); // a panic would be silent here
    }
});

fn all(bytes: &[u8]) {
    if !bytes.starts_with(b"GGUF") {
        return assert!(parse(bytes).is_err());
    }
    let whole = check(bytes);
    let mut longer = bytes.to_vec();
    longer.resize(bytes.len() + BEHIND, 0);
    if !whole && check(&longer) {
        run(&longer);
    }
}

fn check(bytes: &[u8]) -> bool {
    let Ok(header) = parse(bytes) else { return false };
    for entry in &header.tensors {
        let n = entry.shape.iter().product::<usize>();
        assert_eq!(bytes[entry.range.clone()].len(), n / entry.dtype.block() * entry.dtype.size());
    }
    let metadata = Metadata::new(&header, bytes);
    assert_eq!(metadata.iter().count(), header.items.len());
    for (_, value) in metadata.iter() {
        if let Some(list) = value.as_list() {
            assert_eq!(list.iter().count(), list.len);
        }
    }
    true
}

fn run(bytes: &[u8]) {
    fs::write(&*FILE, bytes).unwrap();
    _ = Tokenizer::open(&FILE);
    _ = ChatTemplate::open(&FILE);
    _ = ferrule::file::inspect(&FILE);
    let Ok(model) = load(&FILE, LoadOptions { threads: Some(1), ..LoadOptions::default() }) else {
        return;
    };
    let Ok(mut sequence) = Sequence::new(&model, 3) else { return };
    sequence.restart(3);
    let tokens: Vec<u32> = (0..3).map(|i| i % model.vocab() as u32).collect();
    if let Ok(logits) = sequence.read(&tokens, Wanted::Last, &AtomicBool::new(false)) {
        assert_eq!(logits.len(), model.vocab());
    }
}
