//! Any bytes as a safetensors file: what parses must lie within the file. Start from a corpus of small
//! valid files; random bytes rarely get past the header's length.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(entries) = ferrule::file::safetensors::parse(bytes) else { return };
    let mut end = None;
    for entry in entries {
        assert!(end.is_none_or(|end| end == entry.range.start));
        assert_eq!(
            bytes[entry.range.clone()].len(),
            entry.shape.iter().product::<usize>() * entry.dtype.size()
        );
        end = Some(entry.range.end);
    }
    assert!(end.is_none_or(|end| end == bytes.len()));
});
