//! Files that were made to do harm: the published attacks on GGUF readers one by one, and random changes.

use super::peak::peak;
use super::write::{Writer, item, list, tensor, text};
use super::{Folder, message, valid};
use ferrule::file::{Checkpoint, gguf};
use proptest::prelude::*;

fn items(items: Vec<Vec<u8>>) -> Vec<u8> {
    Writer { items, ..Writer::default() }.bytes()
}

fn tensors(tensors: Vec<Vec<u8>>, data: usize) -> Vec<u8> {
    Writer { tensors, data: vec![7; data], ..Writer::default() }.bytes()
}

fn one(dims: &[u64], kind: u32, offset: u64, data: usize) -> Vec<u8> {
    tensors(vec![tensor("t", dims, kind, offset)], data)
}

fn aligned(kind: u32, value: &[u8]) -> Vec<u8> {
    let items = vec![item("general.alignment", kind, value)];
    let tensors = vec![tensor("t", &[8], 0, 0)];
    Writer { items, tensors, data: vec![0; 32] }.bytes()
}

#[test]
fn published_attacks_are_errors_that_name_the_place() {
    let w = Writer::default();
    let huge = |n: u64| [&n.to_le_bytes()[..], b"abc"].concat();
    let two = |a: u64, b: u64| tensors(vec![tensor("t", &[8], 0, a), tensor("u", &[8], 0, b)], 96);
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("no file", vec![], "found 0 bytes, expected a GGUF file"),
        ("another file", b"GGML\x03\0\0\0".to_vec(), "found \"GGML\" at its start, expected GGUF"),
        ("version 0", w.with(*b"GGUF", 0, 0, 0), "found GGUF version 0, expected 2 or 3"),
        ("version 1", w.with(*b"GGUF", 1, 0, 0), "found GGUF version 1, expected 2 or 3"),
        ("version 4", w.with(*b"GGUF", 4, 0, 0), "found GGUF version 4"),
        ("big-endian", w.with(*b"GGUF", 3 << 24, 0, 0), "found a big-endian GGUF file"),
        (
            "cut in the header",
            w.bytes()[..13].to_vec(),
            "found 8 bytes announced at 8, expected at most the 5",
        ),
        // Databricks 2024: n_tensors and n_kv were multiplied and allocated (CVE-2024-21836, CVE-2024-23605).
        (
            "n_tensors",
            w.with(*b"GGUF", 3, u64::MAX / 8, 0),
            "found 2305843009213693951 tensors, expected at most 0",
        ),
        ("n_tensors negative", w.with(*b"GGUF", 3, 1 << 63, 0), "tensors, expected at most 0"),
        (
            "n_kv",
            w.with(*b"GGUF", 3, 0, 0x5555_5555_5555_5556),
            "key/value pairs, expected at most 0",
        ),
        (
            "n_kv one too many",
            w.with(*b"GGUF", 3, 0, 1),
            "found 1 key/value pairs, expected at most 0",
        ),
        // A length of 2^64 - 1 plus one for the zero byte was an allocation of nothing (CVE-2024-23496).
        (
            "key length",
            items(vec![[&huge(u64::MAX)[..], &[0; 20]].concat()]),
            "found 18446744073709551615 bytes announced",
        ),
        (
            "text length",
            items(vec![item("k", 8, huge(u64::MAX))]),
            "key \"k\": found 18446744073709551615 bytes",
        ),
        (
            "text length 2^63",
            items(vec![item("k", 8, huge(1 << 63))]),
            "key \"k\": found 9223372036854775808 bytes",
        ),
        (
            "text longer than the file",
            items(vec![item("k", 8, huge(4))]),
            "found 4 bytes announced",
        ),
        // The length of a list times the size of an element wrapped (CVE-2024-21825).
        (
            "list length",
            items(vec![item("k", 9, list(4, 1 << 62, [0; 16]))]),
            "key \"k\": found 4611686018427387904 values, expected at most 4",
        ),
        (
            "list of texts",
            items(vec![item("k", 9, list(8, u64::MAX, [0; 16]))]),
            "found 18446744073709551615 values, expected at most 2",
        ),
        (
            "list of 2^61 f64",
            items(vec![item("k", 9, list(12, 1 << 61, [0; 16]))]),
            "values, expected at most 2",
        ),
        (
            "text in a list",
            items(vec![item("k", 9, list(8, 2, [text("a"), huge(99)].concat()))]),
            "key \"k\": value 1: found 99 bytes announced",
        ),
        (
            "list of lists",
            items(vec![item("k", 9, list(9, 1, list(4, 1, [0; 4])))]),
            "key \"k\": found a list of lists",
        ),
        (
            "kind",
            items(vec![item("k", 13, [0; 8])]),
            "key \"k\": found value type 13, expected 0 to 12",
        ),
        ("kind negative", items(vec![item("k", u32::MAX, [0; 8])]), "found value type 4294967295"),
        (
            "kind in a list",
            items(vec![item("k", 9, list(99, 1, [0; 8]))]),
            "key \"k\": found value type 99",
        ),
        ("bool", items(vec![item("k", 7, [2])]), "key \"k\": found 2, expected a bool"),
        ("no key", items(vec![item("", 0, [2; 9])]), "key 0: found a name of 0 bytes"),
        (
            "long key",
            items(vec![item(&"k".repeat(70_000), 0, [2])]),
            "key 0: found a name of 70000 bytes, expected 1 to 65535",
        ),
        (
            "key not UTF-8",
            items(vec![[&1u64.to_le_bytes()[..], &[0xff, 0, 0, 0, 0, 1]].concat()]),
            "found invalid UTF-8",
        ),
        (
            "text not UTF-8",
            items(vec![item("k", 8, [&1u64.to_le_bytes()[..], &[0xc3]].concat())]),
            "key \"k\": found invalid UTF-8",
        ),
        (
            "key twice",
            items(vec![item("k", 0, [1]), item("k", 0, [2])]),
            "key \"k\" is there twice",
        ),
        // More dimensions than the array for them (CVE-2024-21802; antirez/gguf-tools 25).
        (
            "5 dimensions",
            one(&[1; 5], 0, 0, 32),
            "tensor \"t\": found 5 dimensions, expected at most 4",
        ),
        (
            "2^32 - 1 dimensions",
            tensors(vec![[text("t"), vec![0xff; 64]].concat()], 32),
            "found 4294967295 dimensions",
        ),
        // The product of the dimensions wrapped (zackshen/gguf 15, llama.cpp 18674, GHSA-vgg9-87g3-85w8).
        (
            "dimensions wrap to 1",
            one(&[u64::MAX, u64::MAX], 0, 0, 32),
            "tensor \"t\": dimensions [18446744073709551615, 18446744073709551615] overflow",
        ),
        ("2^42 + 1 rows", one(&[1 << 22, (1 << 42) + 1], 0, 0, 32), "overflow"),
        ("bytes wrap", one(&[1 << 62], 0, 0, 32), "overflow"),
        ("bytes of blocks wrap", one(&[1 << 63, 2], 14, 0, 32), "overflow"),
        ("overflow hidden by a zero", one(&[1 << 40, 1 << 40, 0], 0, 0, 32), "overflow"),
        // Larger in the header than in the file: what lay behind was read out ("Bleeding Llama", CVE-2026-7482).
        (
            "dimensions beyond the file",
            one(&[256, 1 << 20], 0, 0, 64),
            "tensor \"t\": found data up to byte 1073741920 of a file of 160 bytes",
        ),
        (
            "offset beyond the file",
            tensors(vec![tensor("t", &[8], 0, 1 << 40)], 32),
            "tensor \"t\" leaves a gap: found offset 1099511627776",
        ),
        (
            "offset wraps",
            one(&[8], 0, u64::MAX - 31, 32),
            "found offset 18446744073709551584, expected a multiple",
        ),
        (
            "offset not aligned",
            one(&[4], 0, 4, 32),
            "tensor \"t\": found offset 4, expected a multiple of 32",
        ),
        ("overlap", two(0, 0), "tensor \"u\" overlaps the one before: found offset 0, expected 32"),
        ("gap", two(0, 64), "tensor \"u\" leaves a gap: found offset 64, expected 32"),
        // The sum of the tensors' sizes wrapped (CVE-2025-53630).
        (
            "sizes wrap",
            tensors(
                vec![tensor("t", &[(1 << 61) - 1], 0, 0), tensor("u", &[1 << 61], 0, 1 << 63)],
                64,
            ),
            "tensor \"u\": found offset 9223372036854775808, expected a multiple of 32 within the file",
        ),
        (
            "the file is cut short",
            one(&[16], 0, 0, 63),
            "found data up to byte 128 of a file of 127 bytes; the file is cut short",
        ),
        // Types that do not exist or have no block size: a division by zero.
        (
            "type",
            one(&[32], 1000, 0, 32),
            "tensor \"t\": found type 1000, expected the number of F32, F16",
        ),
        ("type negative", one(&[32], u32::MAX, 0, 32), "found type 4294967295"),
        ("type given up", one(&[32], 4, 0, 32), "found type 4, which ggml has given up"),
        (
            "rows that are no blocks",
            one(&[33, 32], 2, 0, 64),
            "tensor \"t\": found rows of 33, expected a multiple of 32 for Q4_0",
        ),
        (
            "tensor twice",
            tensors(vec![tensor("t", &[8], 0, 0), tensor("t", &[8], 0, 32)], 64),
            "tensor \"t\" is there twice",
        ),
        (
            "tensor without a name",
            tensors(vec![tensor("", &[8], 0, 0)], 64),
            "found a name of 0 bytes",
        ),
        (
            "tensor cut",
            w.with(*b"GGUF", 3, 1, 0).into_iter().chain([0; 24]).collect(),
            "tensor 0: found a name of 0 bytes",
        ),
        // GHSA-96jg-mvhq-q7q7, ggml 1516, llama.cpp 26318: the padding wrapped, or the value had another type.
        (
            "alignment 0",
            aligned(4, &[0; 4]),
            "key `general.alignment`: found 0, expected a power of two",
        ),
        ("alignment 3", aligned(4, &[3, 0, 0, 0]), "key `general.alignment`: found 3"),
        (
            "alignment 2^31",
            aligned(4, &[0, 0, 0, 0x80]),
            "found data up to byte 2147483680 of a file of",
        ),
        (
            "alignment 2^63",
            aligned(10, &(1u64 << 63).to_le_bytes()),
            "found data up to byte 9223372036854775840 of a file of 128 bytes",
        ),
        (
            "alignment a text",
            aligned(8, &text("32")),
            "key `general.alignment`: found \"32\", expected a power of two",
        ),
        (
            "alignment a list",
            aligned(9, &list(4, 1, [32, 0, 0, 0])),
            "found a list of 1 u32, expected a power of two",
        ),
        (
            "alignment negative",
            aligned(5, &(-32i32).to_le_bytes()),
            "key `general.alignment`: found -32",
        ),
    ];
    let folder = Folder::new();
    for (attack, bytes, expected) in cases {
        let path = folder.write("m.gguf", &bytes);
        let (peak, opened) = peak(|| Checkpoint::open(&path));
        let found = message(opened);
        assert!(found.contains(expected), "{attack}: expected {expected:?}, found {found:?}");
        assert!(found.contains("m.gguf: ") && found.len() < 1000, "{attack}: {found}");
        assert!(peak < 2 * bytes.len() as isize + (16 << 10), "{attack}: {peak} bytes");
    }
}

#[test]
fn names_in_errors_are_escaped() {
    let found = gguf::parse(&items(vec![item("\x1b[2J\n", 7, [2])])).unwrap_err();
    assert!(found.contains("\\u{1b}[2J\\n") && !found.contains('\x1b'), "{found}");
    let found = gguf::parse(&items(vec![item(&"ä".repeat(900), 7, [2])])).unwrap_err();
    assert!(found.len() < 300, "{found}");
}

/// Many small things cost memory in proportion to the file, and no more of them are read than any model has.
#[test]
fn counts_are_bounded() {
    let many = |n: usize| items((0..n).map(|i| item(&format!("{i:05}"), 0, [1])).collect());
    let bytes = many(65_536);
    let (peak, parsed) = peak(|| gguf::parse(&bytes));
    assert_eq!(parsed.unwrap().items.len(), 65_536);
    assert!(peak < 16 * bytes.len() as isize, "{peak}");
    let found = gguf::parse(&many(65_537)).unwrap_err();
    assert!(found.contains("found 65537 key/value pairs, expected at most 65536"), "{found}");
}

/// One change to a file: kind, where (scaled to the length), with what.
fn mutate(bytes: &mut Vec<u8>, (kind, at, with): (u8, u16, u64)) {
    let at = at as usize * bytes.len() / 65536;
    match kind {
        0 => bytes.truncate(at),
        1 => bytes.insert(at.min(bytes.len()), with as u8),
        2 if bytes.len() >= at + 8 => bytes[at..at + 8].copy_from_slice(&with.to_le_bytes()),
        3 if bytes.len() >= at + 4 => bytes[at..at + 4].copy_from_slice(&with.to_le_bytes()[..4]),
        4 if at < bytes.len() => drop(bytes.remove(at)),
        5 => bytes.extend(std::iter::repeat_n(with as u8, at)),
        6 if at < bytes.len() => bytes[at] = (with % 14) as u8,
        _ if at < bytes.len() => bytes[at] ^= 1 << (with % 8),
        _ => {}
    }
}

fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0u64..300,
        (0u32..64).prop_map(|n| 1 << n),
        (0u64..40).prop_map(|n| u64::MAX - n)
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..Default::default() })]

    /// Neither panic nor hang nor more memory than the file is worth; what opens lies within the file.
    #[test]
    fn mutations_cost_only_an_error(changes in prop::collection::vec((0u8..9, any::<u16>(), number()), 1..4)) {
        let mut bytes = valid().bytes();
        changes.into_iter().for_each(|change| mutate(&mut bytes, change));
        let (peak, parsed) = peak(|| gguf::parse(&bytes));
        prop_assert!(peak < 4 * bytes.len() as isize + (8 << 10), "{peak} bytes for a file of {}", bytes.len());
        let Ok(header) = parsed else { return Ok(()) };
        for entry in &header.tensors {
            let n = entry.shape.iter().product::<usize>();
            let bytes = &bytes[entry.range.clone()];
            prop_assert_eq!(bytes.len(), n / entry.dtype.block() * entry.dtype.size());
        }
        let metadata = gguf::Metadata::new(&header, &bytes);
        prop_assert_eq!(metadata.iter().count(), header.items.len());
        for (_, value) in metadata.iter() {
            if let Some(list) = value.as_list() {
                prop_assert_eq!(list.iter().count(), list.len);
            }
        }
    }
}
