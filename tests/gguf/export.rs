//! Models written as GGUF files: what is read from them is what was written.

use super::models::{Session, options};
use super::tokenizers::goldens;
use super::{Folder, message};
use ferrule::Error;
use ferrule::chat::ChatTemplate;
use ferrule::file::{Checkpoint, Dtype, gguf, read_json};
use ferrule::model::export::{self, Export, export};
use ferrule::model::{Forward, LoadOptions, Quantization, Wanted, Written, load};
use ferrule::tokenizer::Tokenizer;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// All golden models but GGUF files.
fn originals() -> Vec<PathBuf> {
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")];
    folders.extend(std::env::var_os("FERRULE_SHARED").map(|s| Path::new(&s).join("goldens")));
    let inside = folders.iter().flat_map(|folder| std::fs::read_dir(folder).unwrap());
    let mut all: Vec<_> = inside.map(|entry| entry.unwrap().path()).collect();
    let there = |path: &Path, name: &str| path.join(name).exists();
    all.retain(|path| there(path, "config.json") && there(path, "golden.safetensors"));
    all.retain(|path| !path.file_name().unwrap().to_string_lossy().starts_with("gguf-"));
    all.sort();
    assert!(all.len() > 10);
    all
}

/// Models that GGUF has no words for, with a part of the error that says so.
const UNSAID: &[(&str, &str)] = &[
    ("gemma2-a", "`scale: "),
    ("gemma2-b", "`scale: "),
    ("gemma3n-a", "clip"),
    ("glm4-a", "for the text \"\""),
    ("glm4-moe-a", "for the text \"\""),
    ("granite-swa-a", "`rope: "),
    ("lfm3-a", "attn_after"),
    ("minicpm3-a", "logit_scale"),
    ("mistral-a", "for the text \" \""),
    ("pythia-b", "act: GeluTanh"),
    ("quant-gptq-int4-g128-actorder-asym-a", "for the text \" \""),
    ("qwen25-swa-a", "window"),
    ("qwen3-moe-b", "ffn: Dense"),
    ("qwen35-a", "tiled"),
];

fn write_as(
    folder: &Path,
    out: &Path,
    format: Dtype,
    rules: &[(&str, &str)],
) -> ferrule::Result<Written> {
    let rule =
        |(pattern, format): &(&str, &str)| ((*pattern).to_owned(), export::named(format).unwrap());
    let how = Export {
        format,
        rules: rules.iter().map(rule).collect(),
        load: LoadOptions { threads: Some(2), ..LoadOptions::default() },
    };
    let tokens = |architecture: &str, vocab| {
        let mut items = ferrule::tokenizer::to_gguf(folder, architecture, vocab)?;
        items.extend(ferrule::chat::to_gguf(folder)?);
        Ok(items)
    };
    export(folder, out, how, &tokens, &AtomicBool::new(false), &|_, _, _| {})
}

fn write(folder: &Path, out: &Path, format: &str) -> ferrule::Result<Written> {
    write_as(folder, out, export::named(format).unwrap(), &[])
}

fn logits(path: &Path) -> Vec<f32> {
    let model = load(path, options(Quantization::None)).unwrap();
    let tokens: Vec<u32> = (0..40).map(|i| (i * i + 3) % model.vocab() as u32).collect();
    Session::new(&model).feed(&tokens, Wanted::All)
}

/// The same logits, bit for bit; where rows of queries and keys take another order the sums of their products have one,
/// too. The same ids of texts. Or an error, and no file.
#[test]
fn what_is_written_is_the_model() {
    let folder = Folder::new();
    let golden = goldens()[0].join("golden.json");
    let golden = read_json(&golden, 1 << 30).unwrap().unwrap();
    let texts = golden["tokenizer"]["texts"].as_array().unwrap().iter();
    let texts: Vec<&str> = texts.map(|item| item["text"].as_str().unwrap()).collect();
    let (mut exact, mut turned, mut tokens) = (0, 0, 0);
    for original in originals() {
        let name = original.file_name().unwrap().to_string_lossy().into_owned();
        let out = folder.0.join("model.gguf");
        let unsaid = UNSAID.iter().find(|(known, _)| *known == name);
        let written = write(&original, &out, "f32");
        if let Some((_, expected)) = unsaid {
            let found = message(written);
            assert!(found.contains(expected) && found.contains("GGUF"), "{name}: {found}");
            assert_eq!(std::fs::read_dir(&folder.0).unwrap().count(), 0, "{name}");
            continue;
        }
        written.unwrap_or_else(|e| panic!("{name}: {e}"));
        let (a, b) = (logits(&original), logits(&out));
        assert_eq!(a.len(), b.len(), "{name}");
        let worst = a.iter().zip(&b).fold(0f32, |w, (a, b)| w.max((a - b).abs()));
        let model = |path: &Path| load(path, options(Quantization::None)).unwrap().spec;
        let turns = |spec: &ferrule::model::spec::Spec| {
            format!("{spec:?}").contains("rope_interleaved: true")
        };
        if turns(&model(&original)) == turns(&model(&out)) {
            assert_eq!(worst, 0.0, "{name}");
            exact += 1;
        } else {
            assert!(worst < 3e-5, "{name}: {worst}");
            turned += 1;
        }
        if original.join("tokenizer.json").exists() {
            let [a, b] = [&original, &out].map(|path| Tokenizer::open(path).unwrap());
            for text in &texts {
                for (add, parse) in [(true, true), (false, false)] {
                    let [a, b] = [&a, &b].map(|t| t.encode(text, add, parse).unwrap());
                    assert_eq!(a, b, "{name}: {text:?}");
                    tokens += a.len();
                }
            }
        }
        std::fs::remove_file(&out).unwrap();
    }
    println!("{exact} with the same bits, {turned} with rows in another order");
    assert!(exact > 5 && turned > 0 && tokens > 10_000);
}

/// Tensors of each type hold what the type's own encoder makes of the original's numbers, and the model runs near it.
#[test]
fn each_type_is_read_as_it_was_made() {
    let folder = Folder::new();
    let original = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tales-1m");
    let plain = folder.0.join("plain.gguf");
    write(&original, &plain, "f32").unwrap();
    let (plain, expected) = (Checkpoint::open(&plain).unwrap(), logits(&original));
    let power: f32 = expected.iter().map(|x| x * x).sum();
    for (format, file_type) in export::TYPES {
        let out = folder.0.join(format!("{}.gguf", format.name()));
        let written = write_as(&original, &out, format, &[]).unwrap();
        let file = Checkpoint::open(&out).unwrap();
        let said = file.metadata().unwrap().get("general.file_type").unwrap().as_u64();
        assert_eq!(said, Some(file_type.into()));
        assert_eq!(written.bytes, std::fs::metadata(&out).unwrap().len());
        let mut seen = false;
        for name in plain.names() {
            let (from, to) = (plain.tensor(name).unwrap(), file.tensor(name).unwrap());
            let numbers: Vec<f32> =
                from.bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            let Some(blocks) = to.dtype.blocks() else { continue };
            seen = true;
            let mut bytes = vec![0; to.bytes.len()];
            assert!(blocks.encode(&numbers, &mut bytes));
            assert!(bytes == to.bytes, "{name} {}", blocks.name());
        }
        assert_eq!(seen, format.blocks().is_some());
        let off: f32 = logits(&out).iter().zip(&expected).map(|(a, b)| (a - b).powi(2)).sum();
        println!(
            "{}: {:.3} bits, {:.5}",
            format.name(),
            written.bits_per_weight,
            (off / power).sqrt()
        );
        assert!((off / power).sqrt() < 0.2, "{}", format.name());
    }
}

/// A GGUF file written again says what it said; tensors of the type that is asked for stay byte for byte.
#[test]
fn gguf_to_gguf() {
    let folder = Folder::new();
    let original =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gguf/llama-a/model-Q4_K_M.gguf");
    for format in ["f32", "q4_k", "q8_0"] {
        let out = folder.0.join(format!("{format}.gguf"));
        write(&original, &out, format).unwrap();
        let (a, b) = (Checkpoint::open(&original).unwrap(), Checkpoint::open(&out).unwrap());
        let own =
            |key: &str| key.starts_with("general.file_type") || key.starts_with("general.quant");
        for (item, value) in a.metadata().unwrap().iter().filter(|(item, _)| !own(&item.key)) {
            assert_eq!(b.metadata().unwrap().get(&item.key), Some(value), "{}", item.key);
        }
        let same =
            a.names().filter(|name| a.tensor(name).unwrap().bytes == b.tensor(name).unwrap().bytes);
        assert!(same.count() > 2, "norms at least");
        if format == "f32" {
            assert_eq!(logits(&original), logits(&out));
        }
    }
}

#[test]
fn rules_and_fallbacks() {
    let folder = Folder::new();
    let original = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/qwen25-a"); // rows of 64 and 112
    let out = folder.0.join("m.gguf");
    let q4 = export::named("Q4_0").unwrap();
    write_as(&original, &out, q4, &[("*.mlp.up_proj.weight", "bf16"), ("token_embd*", "q8_0")])
        .unwrap();
    let file = Checkpoint::open(&out).unwrap();
    let kind = |name: &str| file.tensor(name).unwrap().dtype.name();
    assert_eq!(kind("blk.0.ffn_up.weight"), "BF16");
    assert_eq!(kind("token_embd.weight"), "Q8_0");
    assert_eq!(kind("blk.0.attn_q.weight"), "Q4_0");
    assert_eq!(kind("blk.0.ffn_down.weight"), "F16"); // 112 is no multiple of 32
    assert_eq!(kind("blk.0.attn_norm.weight"), "F32");
    let error = write_as(&original, &folder.0.join("n.gguf"), q4, &[("nothing*", "f16")]);
    assert!(message(error).contains("\"nothing*\""));
    assert!(message(write(&original, &out, "q8_0")).contains("a path where nothing is"));
}

/// Nothing is left of a file that was not finished.
#[test]
fn an_interrupted_file_is_gone() {
    let folder = Folder::new();
    let original = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/qwen3-a");
    let stop = AtomicBool::new(false);
    let how = Export {
        format: Dtype::F32,
        rules: Vec::new(),
        load: LoadOptions { threads: Some(1), ..LoadOptions::default() },
    };
    let progress = |_: &str, done: u64, _: u64| {
        assert!(std::fs::read_dir(&folder.0).unwrap().count() == 1);
        if done > 0 {
            stop.store(true, Ordering::Relaxed);
        }
    };
    let out = folder.0.join("m.gguf");
    let result = export(&original, &out, how, &|_, _| Ok(Vec::new()), &stop, &progress);
    assert!(matches!(result, Err(Error::Interrupted)));
    assert_eq!(std::fs::read_dir(&folder.0).unwrap().count(), 0);
}

/// Templates and special tokens of a chat model are there.
#[test]
fn the_shipped_model_is_whole() {
    let folder = Folder::new();
    let original = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tales-4m");
    let out = folder.0.join("m.gguf");
    write(&original, &out, "q8_0").unwrap();
    let bytes = std::fs::read(&out).unwrap();
    let header = gguf::parse(&bytes).unwrap();
    assert_eq!(header.version, 3);
    assert!(header.tensors.iter().all(|t| t.range.start % 32 == 0));
    let [a, b] = [&original, &out].map(|path| Tokenizer::open(path).unwrap());
    assert_eq!((a.bos(), a.eos()), (b.bos(), b.eos()));
    let template = |path| ChatTemplate::open(path).unwrap().is_some();
    assert_eq!(template(&original), template(&out));
}
