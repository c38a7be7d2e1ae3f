//! Any bytes as a GGUF file: what parses must lie within the file, and every value can be read. Start from the models
//! in tests/golden/gguf, cut to their headers.
#![no_main]

use ferrule::file::gguf::{Metadata, parse};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(header) = parse(bytes) else { return };
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
});
