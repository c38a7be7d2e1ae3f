//! Checkpoints on disk: what opens, what must not, and that hostile files cost only an error.

mod folder;
mod peak;

use ferrule::file::{Checkpoint, Dtype, read_json, safetensors::parse};
use folder::Folder;
use peak::peak;
use proptest::prelude::*;
use std::fs;
use std::path::Path;

fn raw(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn one(dtype: &str, shape: &str, offsets: &str, data: usize) -> Vec<u8> {
    let header =
        format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#);
    raw(&header, &vec![7; data])
}

/// Three tensors and a zero-length one, as the reference library writes them.
fn valid() -> Vec<u8> {
    use safetensors::tensor::{Dtype as D, TensorView, serialize};
    let data: Vec<u8> = (0..=255).collect();
    let view =
        |dtype, shape: &[usize], n| TensorView::new(dtype, shape.to_vec(), &data[..n]).unwrap();
    let tensors = [
        ("model.embed.weight", view(D::F32, &[3, 4], 48)),
        ("model.norm.weight", view(D::BF16, &[5], 10)),
        ("lm_head.weight", view(D::I8, &[2, 2, 2], 8)),
        ("empty", view(D::F16, &[0, 9], 0)),
    ];
    serialize(tensors, Some([("format".to_owned(), "pt".to_owned())].into())).unwrap()
}

fn message(result: ferrule::Result<Checkpoint>) -> String {
    match result {
        Ok(_) => panic!("it opened"),
        Err(e) => e.to_string(),
    }
}

#[test]
fn reads_what_the_reference_wrote() {
    let folder = Folder::new();
    let path = folder.write("model.safetensors", valid());
    for checkpoint in [Checkpoint::open(&folder.0).unwrap(), Checkpoint::open(&path).unwrap()] {
        assert_eq!(checkpoint.bytes(), valid().len() as u64);
        let names: Vec<&str> = checkpoint.names().collect();
        assert_eq!(names.len(), 4);
        let embed = checkpoint.tensor("model.embed.weight").unwrap();
        assert_eq!(
            (embed.dtype, embed.shape, embed.name),
            (Dtype::F32, &[3, 4][..], "model.embed.weight")
        );
        assert_eq!(embed.bytes, (0..48).collect::<Vec<u8>>());
        assert_eq!(
            checkpoint.get("model.norm.weight").unwrap().bytes,
            (0..10).collect::<Vec<u8>>()
        );
        let empty = checkpoint.get("empty").unwrap();
        assert_eq!((empty.shape, empty.bytes.len()), (&[0, 9][..], 0));
        assert!(checkpoint.get("nothing").is_none());
        let e = checkpoint.tensor("model.embed.weights").unwrap_err().to_string();
        assert!(e.contains("no tensor `model.embed.weights`; nearest: model.embed.weight"), "{e}");
    }
}

#[test]
fn every_dtype_has_the_size_and_name_of_the_reference() {
    for dtype in Dtype::ALL {
        let bytes =
            one(dtype.name(), "[3]", &format!("[0,{}]", 3 * dtype.size()), 3 * dtype.size());
        assert_eq!(parse(&bytes).unwrap()[0].dtype, dtype);
        safetensors::SafeTensors::deserialize(&bytes).unwrap();
    }
}

#[test]
fn names_what_is_wrong_in_a_file() {
    let long = raw(&format!(r#"{{"a":{}}}"#, "[".repeat(4000)), &[]);
    let twice = r#"{"dtype":"I8","shape":[0],"data_offsets":[0,0]}"#;
    let twice = raw(&format!(r#"{{"a":{twice},"a":{twice}}}"#), &[]);
    let two = |a: &str, b: &str, data| {
        let entry = |at| format!(r#"{{"dtype":"I8","shape":[4],"data_offsets":{at}}}"#);
        raw(&format!(r#"{{"a":{},"b":{}}}"#, entry(a), entry(b)), &vec![0; data])
    };
    let cases: &[(Vec<u8>, &str)] = &[
        (vec![], "found 0 bytes, expected a safetensors file of at least 8"),
        (vec![1, 0, 0], "found 3 bytes"),
        (u64::MAX.to_le_bytes().to_vec(), "header length: found 18446744073709551615"),
        (100_000_001u64.to_le_bytes().to_vec(), "header length: found 100000001"),
        (99_999_999u64.to_le_bytes().to_vec(), "the header should have 99999999 bytes, but"),
        (raw("\u{1}", &[]), "header: "),
        (raw("[]", &[]), "header: invalid type: sequence, expected a JSON object of tensors"),
        (raw("{} {}", &[]), "header: trailing characters"),
        (long, "header, tensor `a`"),
        ([&3u64.to_le_bytes()[..], b"{\xff}"].concat(), "header: found invalid UTF-8"),
        (
            one("F31", "[1]", "[0,4]", 4),
            "tensor `a`: found dtype \"F31\", expected one of F32, F16",
        ),
        (one("F32", "[1]", "[0,3]", 3), "tensor `a`: found data offsets 0..3, expected 4 bytes"),
        (one("F32", "[2]", "[4,0]", 4), "tensor `a`: found data offsets 4..0"),
        (one("F32", "[-1]", "[0,4]", 4), "header, tensor `a`: invalid value: integer `-1`"),
        (one("F32", "[1.5]", "[0,4]", 4), "header, tensor `a`"),
        (one("F32", "[4294967296,4294967296]", "[0,4]", 4), "overflows"),
        (one("F32", "[4611686018427387904]", "[0,4]", 4), "overflows"),
        (
            one("F32", "[1]", "[0,4]", 3),
            "the tensors take 4 bytes, but 3 bytes follow the header; the file is cut short",
        ),
        (one("F32", "[1]", "[0,4]", 5), "the tensors take 4 bytes, but 5 bytes follow the header"),
        (one("F32", "[1]", "[4,8]", 8), "tensor `a` leaves a gap: found data offset 4, expected 0"),
        (two("[0,4]", "[2,6]", 6), "tensor `b` overlaps the one before"),
        (two("[0,4]", "[0,4]", 4), "tensor `b` overlaps the one before"),
        (two("[0,4]", "[5,9]", 9), "tensor `b` leaves a gap"),
        (
            raw(r#"{"a":{"shape":[1],"data_offsets":[0,4]}}"#, &[0; 4]),
            "tensor `a`: missing field `dtype`",
        ),
        (twice, "tensor `a` is there twice"),
    ];
    let folder = Folder::new();
    for (bytes, expected) in cases {
        let path = folder.write("model.safetensors", bytes);
        let found = message(Checkpoint::open(&path));
        assert!(found.contains(expected), "expected {expected:?}, found {found:?}");
        assert!(found.contains("model.safetensors"), "{found}");
    }
}

fn shards(folder: &Folder, weight_map: &str) -> ferrule::Result<Checkpoint> {
    folder.write("one.safetensors", one("I8", "[4]", "[0,4]", 4));
    let b = r#"{"b":{"dtype":"I8","shape":[2],"data_offsets":[0,2]}}"#;
    folder.write("two.safetensors", raw(b, &[9, 8]));
    folder.write(
        "model.safetensors.index.json",
        format!(r#"{{"metadata":{{}},"weight_map":{weight_map}}}"#),
    );
    Checkpoint::open(&folder.0)
}

#[test]
fn opens_shards_as_the_index_promises() {
    let folder = Folder::new();
    let checkpoint = shards(&folder, r#"{"b":"two.safetensors","a":"one.safetensors"}"#).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(checkpoint.get("b").unwrap().bytes, [9, 8]);
    // A tensor that the index leaves out is still there, as in transformers.
    assert!(shards(&folder, r#"{"a":"one.safetensors"}"#).unwrap().get("b").is_none());

    let outside = folder.0.join("one.safetensors").display().to_string();
    for (weight_map, expected) in [
        (
            r#"{"a":"two.safetensors","b":"two.safetensors"}"#,
            "tensor `a` is not in two.safetensors",
        ),
        (
            r#"{"a":"one.safetensors","b":"one.safetensors","c":"two.safetensors"}"#,
            "tensor `b`: found in two.safetensors, expected in one.safetensors",
        ),
        (r#"{"a":"three.safetensors"}"#, "names three.safetensors, which is not in the folder"),
        (r#"{"a":"../one.safetensors"}"#, "expected the plain name"),
        (r#"{"a":".."}"#, "expected the plain name"),
        (r#"{"a":7}"#, "expected the plain name"),
        (&format!(r#"{{"a":"{outside}"}}"#), "expected the plain name"),
        (r#"[]"#, "expected an object `weight_map`"),
    ] {
        let found = message(shards(&folder, weight_map));
        assert!(found.contains(expected), "expected {expected:?}, found {found:?}");
    }
    folder.write("three.safetensors", one("I8", "[4]", "[0,4]", 4));
    let found = message(shards(&folder, r#"{"a":"one.safetensors","x":"three.safetensors"}"#));
    assert!(found.contains("tensor `a` is also in one.safetensors"), "{found}");
}

#[test]
fn says_what_a_folder_holds_instead() {
    let missing = Checkpoint::open(Path::new("/no/such/folder"));
    assert!(matches!(missing, Err(ferrule::Error::ModelNotFound(_))));
    let folder = Folder::new();
    assert!(message(Checkpoint::open(&folder.0)).ends_with("found nothing"));
    folder.write("pytorch_model.bin", "x");
    let found = message(Checkpoint::open(&folder.0));
    assert!(
        found.contains("found pytorch_model.bin; convert pytorch_model.bin to safetensors (trans"),
        "{found}"
    );
    fs::create_dir(folder.0.join("model.safetensors")).unwrap();
    assert!(message(Checkpoint::open(&folder.0)).contains("expected a regular file"));
}

#[test]
fn reads_json_within_its_limit() {
    let folder = Folder::new();
    let path = folder.write("a.json", r#"{"a": 1}"#);
    assert_eq!(read_json(&path, 8).unwrap().unwrap()["a"], 1);
    assert!(read_json(&path, 7).unwrap_err().to_string().contains("more than 7 bytes"));
    assert!(read_json(&folder.0.join("b.json"), 8).unwrap().is_none());
    folder.write("a.json", "[1,");
    assert!(read_json(&path, 8).unwrap_err().to_string().contains("a.json: JSON: EOF"));
    folder.write("a.json", "[".repeat(100_000));
    assert!(read_json(&path, 1 << 20).is_err());
}

#[test]
fn the_content_key_follows_the_content() {
    let folder = Folder::new();
    let size = 3 << 20;
    let mut bytes = one("I8", &format!("[{size}]"), &format!("[0,{size}]"), size);
    let path = folder.write("model.safetensors", &bytes);
    let time = fs::metadata(&path).unwrap().modified().unwrap();
    let key = || Checkpoint::open(&path).unwrap().content_key();
    let first = key();
    assert_eq!(first, key());
    let file = || fs::File::options().write(true).open(&path).unwrap();
    file().set_modified(time + std::time::Duration::from_secs(1)).unwrap();
    assert_ne!(first, key());
    file().set_modified(time).unwrap();
    assert_eq!(first, key());
    for at in [bytes.len() - size, bytes.len() - 1] {
        bytes[at] ^= 1;
        fs::write(&path, &bytes).unwrap();
        file().set_modified(time).unwrap();
        assert_ne!(first, key());
        bytes[at] ^= 1;
    }
    fs::write(&path, &bytes).unwrap();
    file().set_modified(time).unwrap();
    assert_eq!(first, key());
    let other = folder.0.join("other.safetensors");
    fs::rename(&path, &other).unwrap();
    assert_ne!(first, Checkpoint::open(&other).unwrap().content_key());
}

/// One change to a file: kind, where (scaled to the length), with what.
fn mutate(bytes: &mut Vec<u8>, (kind, at, with): (u8, u16, u64)) {
    let at = at as usize * bytes.len() / 65536;
    match kind {
        0 => bytes.truncate(at),
        1 => bytes.insert(at.min(bytes.len()), with as u8),
        2 if bytes.len() >= 8 => bytes[..8].copy_from_slice(&with.to_le_bytes()),
        3 if bytes.len() >= 8 => bytes[0] = with as u8,
        // A digit, so that shapes and offsets change while the JSON stays well-formed.
        4 => {
            if let Some(digit) = bytes.iter_mut().skip(at).find(|b| b.is_ascii_digit()) {
                *digit = b'0' + (with % 10) as u8;
            }
        }
        5 if at < bytes.len() => drop(bytes.remove(at)),
        6 => bytes.extend(std::iter::repeat_n(with as u8, at)),
        _ if at < bytes.len() => bytes[at] ^= 1 << (with % 8),
        _ => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..Default::default() })]

    /// Neither panic nor more memory than the file is worth; and whatever the reference takes, we take
    /// with the same ranges.
    #[test]
    fn mutations_cost_only_an_error(changes in prop::collection::vec((0u8..9, any::<u16>(), any::<u64>()), 1..4)) {
        let mut bytes = valid();
        changes.into_iter().for_each(|change| mutate(&mut bytes, change));
        let folder = Folder::new();
        let path = folder.write("model.safetensors", &bytes);
        let (peak, opened) = peak(|| Checkpoint::open(&path));
        prop_assert!(peak < bytes.len() as isize + (16 << 10), "{peak} bytes for a file of {}", bytes.len());
        if let Ok(reference) = safetensors::SafeTensors::deserialize(&bytes) {
            let checkpoint = match opened {
                Ok(checkpoint) => checkpoint,
                Err(e) => {
                    // Packed element types, and a name given twice, of which the reference keeps one.
                    let e = e.to_string();
                    prop_assert!(e.contains("found dtype") || e.contains("there twice"), "{}", e);
                    return Ok(());
                }
            };
            for (name, view) in reference.tensors() {
                let ours = checkpoint.tensor(&name).unwrap();
                prop_assert_eq!(view.data(), ours.bytes);
                prop_assert_eq!(view.shape(), ours.shape);
            }
        } else {
            prop_assert!(opened.is_err(), "the reference refuses it");
        }
    }
}

#[test]
fn opens_every_shared_golden() {
    let Some(shared) = std::env::var_os("FERRULE_SHARED") else {
        return eprintln!("skipped: FERRULE_SHARED is not set");
    };
    let mut opened = 0;
    for item in fs::read_dir(Path::new(&shared).join("goldens")).unwrap() {
        let folder = item.unwrap().path();
        if !folder.join("config.json").exists() || folder.to_string_lossy().contains("gguf") {
            continue;
        }
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let golden = read_json(&folder.join("golden.json"), 1 << 30).unwrap().unwrap();
        for (name, facts) in golden["tensors"].as_object().into_iter().flatten() {
            let tensor = checkpoint.tensor(name).unwrap();
            let dtype = match tensor.dtype {
                Dtype::F32 => "float32",
                Dtype::F16 => "float16",
                Dtype::BF16 => "bfloat16",
                Dtype::I8 => "int8",
                Dtype::U8 => "uint8",
                Dtype::I32 => "int32",
                Dtype::I64 => "int64",
                Dtype::Bool => "bool",
                Dtype::F8E4M3 => "float8_e4m3fn",
                other => other.name(),
            };
            assert_eq!(facts, &serde_json::json!([dtype, tensor.shape]), "{name}");
        }
        opened += 1;
    }
    assert!(opened > 50, "{opened} goldens");
}
