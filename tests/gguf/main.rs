//! GGUF files: what opens, what must not, and that hostile files cost only an error; blocks against their reference
//! values.

mod export;
#[path = "../folder/mod.rs"]
mod folder;
mod hostile;
mod made;
mod models;
#[path = "../peak/mod.rs"]
mod peak;
mod tokenizers;
mod write;

use ferrule::backend::cpu::Cpu;
use ferrule::backend::{Backend, Form, Part, Parts};
use ferrule::file::{Checkpoint, Dtype, gguf};
use ferrule::kernels::layout::ROWS;
use ferrule::quant::{BLOCK, Blocks, Grouped, Kept};
use folder::Folder;
use std::fs;
use std::path::{Path, PathBuf};
use write::{Writer, list};

fn message<T>(result: ferrule::Result<T>) -> String {
    match result {
        Ok(_) => panic!("no error"),
        Err(e) => e.to_string(),
    }
}

/// Every kind of value; a plain tensor, blocks, an empty one.
fn valid() -> Writer {
    Writer::default()
        .text("general.architecture", "llama")
        .item("u8", 0, [200])
        .item("i8", 1, [200])
        .item("u16", 2, 60_000u16.to_le_bytes())
        .item("i16", 3, (-3i16).to_le_bytes())
        .u32("u32", 4_000_000_000)
        .item("i32", 5, (-5i32).to_le_bytes())
        .item("f32", 6, 0.5f32.to_le_bytes())
        .item("bool", 7, [1])
        .item("u64", 10, u64::MAX.to_le_bytes())
        .item("i64", 11, i64::MIN.to_le_bytes())
        .item("f64", 12, 0.1f64.to_le_bytes())
        .texts("texts", &["", "ab", "Ġc"])
        .item("bools", 9, list(7, 2, [0, 1]))
        .item("floats", 9, list(6, 2, [1.5f32.to_le_bytes(), (-2f32).to_le_bytes()].concat()))
        .item("nothing", 9, list(4, 0, []))
        .tensor("a.weight", &[3, 2], 0, &[1; 24])
        .tensor("b.weight", &[64, 3], 2, &[2; 108])
        .tensor("scalar", &[], 0, &[3; 4])
        .tensor("empty", &[0, 9], 1, &[])
        .tensor("c.weight", &[256], 14, &[4; 210])
}

#[test]
fn reads_values_and_tensors_as_they_were_written() {
    let folder = Folder::new();
    for version in [2, 3] {
        let file = valid();
        let bytes =
            file.with(*b"GGUF", version, file.tensors.len() as u64, file.items.len() as u64);
        let path = folder.write("m.gguf", bytes);
        for checkpoint in [Checkpoint::open(&folder.0).unwrap(), Checkpoint::open(&path).unwrap()] {
            let metadata = checkpoint.metadata().unwrap();
            let number = |key: &str| metadata.get(key).and_then(gguf::Value::as_f64).unwrap();
            assert_eq!(metadata.get("u8").unwrap().as_u64(), Some(200));
            assert_eq!(metadata.get("i8").unwrap(), gguf::Value::Signed(-56));
            assert_eq!(metadata.get("i8").unwrap().as_u64(), None);
            assert_eq!((number("u16"), number("i16")), (60_000.0, -3.0));
            assert_eq!((number("u32"), number("i32")), (4_000_000_000.0, -5.0));
            assert_eq!((number("f32"), number("f64")), (0.5, 0.1));
            assert_eq!(metadata.get("bool").unwrap().as_bool(), Some(true));
            assert_eq!(metadata.get("u64").unwrap().as_u64(), Some(u64::MAX));
            assert_eq!(metadata.get("i64").unwrap(), gguf::Value::Signed(i64::MIN));
            assert!(metadata.get("general").is_none());
            let list = |key: &str| metadata.get(key).unwrap().as_list().unwrap();
            let texts: Vec<_> = list("texts").iter().map(|v| v.as_text().unwrap()).collect();
            assert_eq!(texts, ["", "ab", "Ġc"]);
            let bools: Vec<_> = list("bools").iter().map(|v| v.as_bool().unwrap()).collect();
            assert_eq!(bools, [false, true]);
            let floats: Vec<_> = list("floats").iter().map(|v| v.as_f64().unwrap()).collect();
            assert_eq!(floats, [1.5, -2.0]);
            assert_eq!(list("nothing").iter().count(), 0);
            assert_eq!(metadata.iter().count(), file.items.len());

            let shapes: Vec<_> = checkpoint
                .names()
                .map(|name| {
                    let t = checkpoint.get(name).unwrap();
                    (name, t.dtype, t.shape.to_vec(), t.bytes.len(), t.bytes.first().copied())
                })
                .collect();
            let q4_0 = Dtype::Blocks(Blocks::Q4_0);
            let q6_k = Dtype::Blocks(Blocks::Q6_K);
            let expected = [
                ("a.weight", Dtype::F32, vec![2, 3], 24, Some(1)),
                ("b.weight", q4_0, vec![3, 64], 108, Some(2)),
                ("scalar", Dtype::F32, vec![], 4, Some(3)),
                ("empty", Dtype::F16, vec![9, 0], 0, None),
                ("c.weight", q6_k, vec![256], 210, Some(4)),
            ];
            assert_eq!(shapes, expected);
        }
    }
    // What a file is called does not matter, if it says what it is.
    let blob = folder.write("blob", valid().bytes());
    assert!(Checkpoint::open(&blob).unwrap().metadata().is_some());
}

fn split(number: u16, count: u16, tensors: u32, name: &str) -> Vec<u8> {
    Writer::default()
        .text("general.architecture", "llama")
        .u16("split.no", number)
        .u16("split.count", count)
        .item("split.tensors.count", 5, tensors.to_le_bytes())
        .tensor(name, &[2], 0, &[number as u8; 8])
        .bytes()
}

#[test]
fn opens_all_splits_or_says_which_is_wrong() {
    let folder = Folder::new();
    let first = folder.write("m-Q4-00001-of-00003.gguf", split(0, 3, 3, "a"));
    let second = folder.write("m-Q4-00002-of-00003.gguf", split(1, 3, 3, "b"));
    let found = message(Checkpoint::open(&folder.0));
    assert!(found.contains("00003-of-00003.gguf: split 3 of 3 is not there"), "{found}");
    folder.write("m-Q4-00003-of-00003.gguf", split(2, 3, 3, "c"));
    folder.write("mmproj-m.gguf", "anything");
    for path in [&folder.0, &first, &second] {
        let checkpoint = Checkpoint::open(path).unwrap();
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(checkpoint.get("c").unwrap().bytes, [2; 8]);
    }
    for (bytes, expected) in [
        (split(2, 3, 4, "c"), "`split.tensors.count`: found 4, but the splits have 3"),
        (split(2, 3, 3, "b"), "tensor `b` is also in m-Q4-00002-of-00003.gguf"),
        (split(1, 3, 3, "c"), "key `split.no`: found 1, expected 2"),
        (split(2, 4, 3, "c"), "key `split.count`: found 4, but the file's name says 3"),
        (valid().bytes(), "key `split.count`: found 1, but the file's name says 3"),
    ] {
        folder.write("m-Q4-00003-of-00003.gguf", bytes);
        let found = message(Checkpoint::open(&first));
        assert!(found.contains(expected), "expected {expected:?}, found {found:?}");
    }
    let alone = folder.write("alone.gguf", split(0, 3, 3, "a"));
    assert!(
        message(Checkpoint::open(&alone)).contains("the file's name says 1; a split is called")
    );
    let found = message(Checkpoint::open(&folder.0));
    assert!(
        found.contains("found 2 GGUF models (alone.gguf, m-Q4-00001-of-00003.gguf)"),
        "{found}"
    );
    folder.write("x-00000-of-00000.gguf", valid().bytes());
    assert!(Checkpoint::open(&folder.0.join("x-00000-of-00000.gguf")).is_ok());
}

/// What is packed, and read again, are the weights themselves.
fn kept_as_they_are(blocks: Blocks, how: Grouped, bytes: &[u8], expected: &[f32]) {
    let all = expected.len() / blocks.weights();
    let n = all.min(3);
    let k = all / n * blocks.weights();
    let part = Part { blocks: Some(blocks), ..Part::floats(Form::F32, n, k, bytes) };
    let parts = Parts { parts: vec![part], k, interleaved: false };
    let mat = Cpu::new(1, None).unwrap().pack(Form::Grouped(how), &parts).unwrap().unwrap();
    let mut row = vec![f32::NAN; k];
    for (i, expected) in expected[..n * k].chunks(k).enumerate() {
        mat.unpack_row(i, &mut row);
        // As numbers: a zero has no sign.
        assert!(row == expected, "{} row {i}", blocks.name());
    }
}

/// Two types in one matrix, as files have them for queries and values.
#[test]
fn mixed_blocks_are_kept_as_they_are() {
    let golden = Checkpoint::open(Path::new("tests/golden/gguf/blocks.safetensors")).unwrap();
    let grouped = |blocks: &Blocks| match blocks.kept() {
        Kept::Grouped(how) => Some((*blocks, how)),
        _ => None,
    };
    let all: Vec<_> = Blocks::ALL.iter().filter_map(grouped).collect();
    let bytes = |blocks: Blocks| golden.tensor(&format!("{}.raw", blocks.name())).unwrap().bytes;
    let (mut pairs, n, k) = (0, 2, BLOCK);
    for (a, of_a) in &all {
        for (b, of_b) in &all {
            let Some(how) = of_a.join(*of_b) else { continue };
            let part = |blocks: Blocks| Part {
                blocks: Some(blocks),
                ..Part::floats(Form::F32, n, k, bytes(blocks))
            };
            let parts = Parts { parts: vec![part(*a), part(*b)], k, interleaved: false };
            let cpu = Cpu::new(1, None).unwrap();
            let mat = cpu.pack(Form::Grouped(how), &parts).unwrap().unwrap();
            for (i, blocks) in [a, b].into_iter().enumerate() {
                let mut expected =
                    vec![f32::NAN; bytes(*blocks).len() / blocks.bytes() * blocks.weights()];
                blocks.decode(bytes(*blocks), &mut expected);
                for r in 0..n {
                    let mut row = vec![f32::NAN; k];
                    mat.unpack_row(n * i + r, &mut row);
                    let expected = &expected[r * k..][..k];
                    assert!(row == expected, "{} of {a:?} and {b:?}, row {r}", blocks.name());
                }
            }
            pairs += 1;
        }
    }
    // Q4_0 to Q5_1, and Q2_K to Q6_K.
    assert_eq!(pairs, 4 * 4 + 5 * 5);
}

/// Every type of block, bit by bit what gguf.quants.dequantize gives.
#[test]
fn blocks_equal_their_reference_values() {
    let mut files = vec![PathBuf::from("tests/golden/gguf/blocks.safetensors")];
    match std::env::var_os("FERRULE_SHARED") {
        Some(shared) => {
            files.push(Path::new(&shared).join("goldens/gguf-blocks-a/blocks.safetensors"));
        }
        None => eprintln!("the full set is skipped: FERRULE_SHARED is not set"),
    }
    for file in files {
        let golden = Checkpoint::open(&file).unwrap();
        let mut types = 0;
        for raw in golden.names().filter(|name| name.ends_with(".raw")) {
            let stem = raw.strip_suffix(".raw").unwrap();
            let name = stem.strip_suffix(".quantized").unwrap_or(stem);
            if name == "BF16" {
                continue; // not of blocks
            }
            let blocks = Blocks::ALL.iter().find(|b| b.name() == name).unwrap();
            let expected = golden.tensor(&format!("{stem}.f32")).unwrap();
            let bytes = golden.tensor(raw).unwrap().bytes;
            let mut found = vec![f32::NAN; expected.bytes.len() / 4];
            blocks.decode(bytes, &mut found);
            for (i, (found, expected)) in
                found.iter().zip(expected.bytes.as_chunks::<4>().0).enumerate()
            {
                let expected = f32::from_le_bytes(*expected);
                assert_eq!(
                    found.to_bits(),
                    expected.to_bits(),
                    "{stem} [{i}]: {found}, {expected}"
                );
            }
            if let Kept::Grouped(how) = blocks.kept() {
                kept_as_they_are(*blocks, how, bytes, &found);
            }
            types += usize::from(stem == name);
        }
        assert_eq!(types, Blocks::ALL.len());
    }
}

/// A row of a matrix is whole blocks, and so is a block of the canonical forms.
#[test]
fn block_sizes_divide_what_they_are_read_in() {
    for blocks in Blocks::ALL {
        assert_eq!(ferrule::quant::BLOCK % blocks.weights(), 0, "{}", blocks.name());
    }
}

/// What each type costs: bits of a weight in the file and in memory, and what the form in memory is off, as the root
/// mean square difference over that of the weights. `models/README.md` has this table.
#[test]
fn the_readme_has_the_table_of_types() {
    use ferrule::quant::{BlockQ4, BlockQ8};
    let golden = Checkpoint::open(Path::new("tests/golden/gguf/blocks.safetensors")).unwrap();
    let readme = fs::read_to_string("models/README.md").unwrap();
    let mut table = String::from(
        "| type | bits | kept as | bits | off | off as int4 |\n|---|---|---|---|---|---|\n",
    );
    for blocks in Blocks::ALL {
        let bytes = golden.tensor(&format!("{}.raw", blocks.name())).unwrap().bytes;
        let mut weights = vec![0.0f32; bytes.len() / blocks.bytes() * blocks.weights()];
        blocks.decode(bytes, &mut weights);
        let off = |read: &dyn Fn(usize, &[f32]) -> [f32; BLOCK]| {
            let square = |x: f32| f64::from(x) * f64::from(x);
            let (mut error, mut all) = (0.0, 0.0);
            for (b, w) in weights.chunks(BLOCK).enumerate() {
                error += w.iter().zip(read(b, w)).map(|(w, k)| square(w - k)).sum::<f64>();
                all += w.iter().map(|w| square(*w)).sum::<f64>();
            }
            if error == 0.0 {
                "0".to_owned()
            } else {
                format!("{:.1} %", 100.0 * (error / all).sqrt())
            }
        };
        let int4 = |_: usize, w: &[f32]| BlockQ4::quantize(w).dequantize();
        let int8 = |_: usize, w: &[f32]| BlockQ8::quantize(w).dequantize();
        let exact = |b: usize, _: &[f32]| {
            let bytes = &bytes[b * BLOCK / blocks.weights() * blocks.bytes()..];
            blocks.ternary(&bytes[..blocks.bytes()]).unwrap().dequantize()
        };
        let (form, bits, off, off_int4) = match blocks.kept() {
            Kept::Q8 => ("int8", 8.125, off(&int8), off(&int4)),
            Kept::Q4 => ("int4", 4.5, off(&exact), off(&exact)),
            Kept::Grouped(how) => {
                let form = Form::Grouped(how);
                let bits = (form.row_block_bytes(BLOCK) * 8) as f64 / (ROWS * BLOCK) as f64;
                let kept = |b: usize, _: &[f32]| {
                    let bytes = &bytes[b * BLOCK / blocks.weights() * blocks.bytes()..];
                    let bytes = &bytes[..BLOCK / blocks.weights() * blocks.bytes()];
                    blocks.grouped(bytes).unwrap().dequantize(how)
                };
                // MXFP4 stays whatever is asked for.
                let int4 = if form == Form::MXFP4 { off(&kept) } else { off(&int4) };
                (form.name(), bits, off(&kept), int4)
            }
        };
        let stored = 8.0 * blocks.bytes() as f64 / blocks.weights() as f64;
        let name = blocks.name();
        table += &format!("| {name} | {stored} | {form} | {bits} | {off} | {off_int4} |\n");
    }
    assert!(readme.contains(&table), "models/README.md should have\n{table}");
}
