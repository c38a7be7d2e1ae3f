//! Tokenizers from GGUF metadata against the ids of the tokenizers that they were made from.

use super::write::{Writer, list};
use super::{Folder, message};
use ferrule::file::{Checkpoint, gguf, read_json};
use ferrule::tokenizer::{Decoder, Tokenizer};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

/// Golden folders with GGUF models: those in the repository, and all if `FERRULE_SHARED` is set.
pub(crate) fn goldens() -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> =
        ["llama-a", "llama2-a"].map(|name| Path::new("tests/golden/gguf").join(name)).into();
    match std::env::var_os("FERRULE_SHARED") {
        Some(shared) => all.extend(
            ["gguf-llama-a", "gguf-llama2-a", "gguf-qwen3-a", "gguf-gemma2-a", "gguf-gemma3-a"]
                .map(|name| Path::new(&shared).join("goldens").join(name)),
        ),
        None => eprintln!("the full set is skipped: FERRULE_SHARED is not set"),
    }
    all
}

/// The GGUF files of a folder.
pub(crate) fn models(folder: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(folder).unwrap().map(|item| item.unwrap().path());
    let mut files: Vec<_> = files.filter(|f| f.extension().is_some_and(|e| e == "gguf")).collect();
    files.sort();
    assert!(!files.is_empty(), "{folder:?}");
    files
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn stream(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> String {
    let mut decoder = Decoder::new(skip_special);
    let pieces: String = ids.iter().map(|&id| decoder.push(tokenizer, id).unwrap()).collect();
    pieces + &decoder.finish(tokenizer).unwrap()
}

#[test]
fn ids_and_texts_equal_the_goldens() {
    for folder in goldens() {
        let tokenizer = Tokenizer::open(&models(&folder)[0]).unwrap();
        let golden = read_json(&folder.join("golden.json"), 1 << 30).unwrap().unwrap();
        let texts = golden["tokenizer"]["texts"].as_array().unwrap();
        assert!(texts.len() > 40);
        for item in texts {
            let text = item["text"].as_str().unwrap();
            let at = format!("{}: {text:?}", folder.display());
            let (with, without) = (ids(&item["ids"]), ids(&item["ids_no_special"]));
            assert_eq!(tokenizer.encode(text, false, true).unwrap(), without, "{at}");
            // Where the text itself starts with what is put in front, it is there once.
            let added = with.len() - without.len();
            let doubled = with.ends_with(&without) && without.starts_with(&with[..added]);
            let expected = if doubled { &without } else { &with };
            assert_eq!(&tokenizer.encode(text, true, true).unwrap(), expected, "{at}");
            for (skip, decoded) in [(true, "decoded"), (false, "decoded_with_special")] {
                let decoded = item[decoded].as_str().unwrap();
                assert_eq!(tokenizer.decode(&with, skip).unwrap(), decoded, "{at}");
                assert_eq!(stream(&tokenizer, &with, skip), decoded, "{at}");
            }
        }
        for item in golden["tokenizer"]["chat"].as_array().into_iter().flatten() {
            if let Some(text) = item["text"].as_str() {
                assert_eq!(tokenizer.encode(text, false, true).unwrap(), ids(&item["ids"]), "{text:?}");
            }
        }
        for (id, text) in [tokenizer.bos(), tokenizer.eos()].into_iter().flatten() {
            assert!(tokenizer.is_special(id), "{}: {text}", folder.display());
            let plain = tokenizer.encode(&format!("a {text} b"), false, false).unwrap();
            assert!(!plain.contains(&id), "{}: {text}", folder.display());
        }
    }
}

/// The vocabularies that llama.cpp tests with: texts in .inp, the ids of Hugging Face's tokenizers in .out.
/// `FERRULE_VOCABS`: a folder with more of them.
#[test]
fn real_vocabularies_equal_their_reference_ids() {
    let Some(shared) = std::env::var_os("FERRULE_SHARED") else {
        return eprintln!("skipped: FERRULE_SHARED is not set");
    };
    let unpacked = Folder::new();
    let archive = Path::new(&shared).join("weights/gguf_vocab.tar.xz");
    let mut tar = std::process::Command::new("tar");
    assert!(tar.arg("-xJf").arg(archive).arg("-C").arg(&unpacked.0).status().unwrap().success());
    let mut files = models(&unpacked.0.join("gguf_vocab"));
    assert_eq!(files.len(), 7);
    if let Some(more) = std::env::var_os("FERRULE_VOCABS") {
        files.extend(models(Path::new(&more)));
    }
    for vocab in files {
        let read = |end: &str| fs::read_to_string(format!("{}{end}", vocab.display()));
        let (Ok(texts), Ok(expected)) = (read(".inp"), read(".out")) else { continue };
        let name = vocab.file_stem().unwrap().to_str().unwrap();
        let tokenizer = match Tokenizer::open(&vocab) {
            Ok(tokenizer) => tokenizer,
            Err(e) if name.contains("bert") => {
                assert!(e.to_string().contains("tokenizer.ggml.model"), "{e}");
                continue;
            }
            Err(e) => panic!("{name}: {e}"),
        };
        let texts: Vec<&str> = texts.split("\n__ggml_vocab_test__\n").collect();
        let lines: Vec<&str> = expected.lines().collect();
        assert!(lines.len() >= 46 && texts.len() >= lines.len(), "{name}");
        for (text, line) in texts.iter().zip(lines) {
            // Ids that llama.cpp gave: it leaves out the normal form that Qwen's own tokenizer begins with.
            if name == "ggml-vocab-qwen35" && text.contains(|c| ('\u{300}'..'\u{370}').contains(&c)) {
                continue;
            }
            let expected: Vec<u32> =
                line.split_whitespace().map(|id| id.parse().unwrap()).collect();
            let found = tokenizer.encode(text, false, true).unwrap();
            assert_eq!(found, expected, "{name}: {text:?}");
            let whole = tokenizer.decode(&found, false).unwrap();
            assert_eq!(stream(&tokenizer, &found, false), whole, "{name}: {text:?}");
        }
        println!("{name}: equal");
    }
}
