//! Tokenizers against reference ids and texts, whole and streamed.
//! FERRULE_SHARED: the full set of goldens, and real vocabularies with reference ids.

use ferrule::file::read_json;
use ferrule::tokenizer::{Decoder, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

fn golden_folders() -> Vec<PathBuf> {
    let mut parents = vec![PathBuf::from("tests/golden/text")];
    match std::env::var_os("FERRULE_SHARED") {
        Some(shared) => parents.push(Path::new(&shared).join("goldens")),
        None => eprintln!("the full set is skipped: FERRULE_SHARED is not set"),
    }
    let items = parents.iter().flat_map(|parent| fs::read_dir(parent).unwrap());
    let mut folders: Vec<PathBuf> = items.map(|item| item.unwrap().path()).collect();
    folders.retain(|folder| folder.join("tokenizer.json").exists());
    folders.sort();
    assert!(folders.len() >= 7);
    folders
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn stream(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> String {
    let mut decoder = Decoder::new(skip_special);
    let mut text = String::new();
    for &id in ids {
        text += &decoder.push(tokenizer, id).unwrap();
    }
    text + &decoder.finish(tokenizer).unwrap()
}

#[test]
fn ids_and_texts_equal_the_goldens() {
    let mut texts = 0;
    for folder in golden_folders() {
        let tokenizer = Tokenizer::open(&folder).unwrap();
        let golden = read_json(&folder.join("golden.json"), 1 << 30).unwrap().unwrap();
        for item in golden["tokenizer"]["texts"].as_array().into_iter().flatten() {
            let text = item["text"].as_str().unwrap();
            let at = format!("{}: {text:?}", folder.display());
            let (with, without) = (ids(&item["ids"]), ids(&item["ids_no_special"]));
            assert_eq!(tokenizer.encode(text, false, true).unwrap(), without, "{at}");
            // Where the text itself starts with what the post-processor adds, it is there once.
            let added = with.len() - without.len();
            let doubled = with.ends_with(&without) && without.starts_with(&with[..added]);
            let expected = if doubled { &without } else { &with };
            assert_eq!(&tokenizer.encode(text, true, true).unwrap(), expected, "{at}");

            for (skip, decoded) in [(true, "decoded"), (false, "decoded_with_special")] {
                let decoded = item[decoded].as_str().unwrap();
                assert_eq!(tokenizer.decode(&with, skip).unwrap(), decoded, "{at}");
                assert_eq!(stream(&tokenizer, &with, skip), decoded, "{at}");
            }
            texts += 1;
        }
        for item in golden["tokenizer"]["chat"].as_array().into_iter().flatten() {
            if let Some(text) = item["text"].as_str() {
                let expected = ids(&item["ids"]);
                assert_eq!(tokenizer.encode(text, false, true).unwrap(), expected, "{text:?}");
                // The template has written BOS already, so asking for it changes nothing.
                if tokenizer.bos().is_some_and(|(_, bos)| text.starts_with(bos)) {
                    assert_eq!(tokenizer.encode(text, true, true).unwrap(), expected, "{text:?}");
                }
            }
        }
    }
    assert!(texts >= 7 * 43);
}

#[test]
fn special_tokens_are_text_when_not_parsed() {
    for folder in golden_folders() {
        let tokenizer = Tokenizer::open(&folder).unwrap();
        for (id, text) in [tokenizer.bos(), tokenizer.eos()].into_iter().flatten() {
            assert!(tokenizer.is_special(id), "{}: {text}", folder.display());
            assert_eq!(
                (tokenizer.id(text), tokenizer.token(id).as_deref()),
                (Some(id), Some(text))
            );
            let text = format!("a {text} b");
            let parsed = tokenizer.encode(&text, false, true).unwrap();
            assert!(parsed.contains(&id), "{}", folder.display());
            let plain = tokenizer.encode(&text, false, false).unwrap();
            assert!(!plain.iter().any(|&id| tokenizer.is_special(id)), "{}", folder.display());
            // Nothing is lost: the special token's text comes back, even with special tokens skipped.
            assert_eq!(tokenizer.decode(&plain, true).unwrap(), text, "{}", folder.display());
        }
    }
}

#[test]
fn added_tokens_that_are_not_special_parse_always() {
    let mut json: Value =
        serde_json::from_slice(&fs::read("tests/golden/text/qwen3-a/tokenizer.json").unwrap())
            .unwrap();
    let token = json!({"id": 4000, "content": "<tool>", "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": false});
    json["added_tokens"].as_array_mut().unwrap().push(token);
    let tokenizer = Tokenizer::from_json(json.to_string().as_bytes()).unwrap();
    let id = tokenizer.id("<tool>").unwrap();
    assert!(!tokenizer.is_special(id));
    let ids = tokenizer.encode("<tool>", false, false).unwrap();
    assert_eq!(ids, [id]);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "<tool>");
}

#[test]
fn stored_truncation_and_padding_are_ignored() {
    let mut json: Value =
        serde_json::from_slice(&fs::read("tests/golden/text/qwen3-a/tokenizer.json").unwrap())
            .unwrap();
    let plain = Tokenizer::from_json(json.to_string().as_bytes()).unwrap();
    json["truncation"] =
        json!({"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0});
    json["padding"] = json!({"strategy": {"Fixed": 100}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "!"});
    let cut = Tokenizer::from_json(json.to_string().as_bytes()).unwrap();
    let text = "one two three four five six";
    assert_eq!(cut.encode(text, true, true).unwrap(), plain.encode(text, true, true).unwrap());
}

#[test]
fn broken_tokenizers_are_errors() {
    let folder = std::env::temp_dir().join(format!("ferrule-tokenizer-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let open = || match Tokenizer::open(&folder) {
        Err(e @ ferrule::Error::Tokenizer(_)) => e.to_string(),
        Err(e) => panic!("{e:?}"),
        Ok(_) => panic!("it opened"),
    };
    assert!(open().contains("no tokenizer.json; take it from the model"));
    fs::write(folder.join("tokenizer.model"), "x").unwrap();
    assert!(open().contains("found tokenizer.model but no tokenizer.json; convert it"));
    let valid = fs::read_to_string("tests/golden/text/llama2-a/tokenizer.json").unwrap();
    for broken in [
        "",
        "{}",
        "[]",
        "{\"version\":\"2.0\"}",
        &valid[..valid.len() / 2],
        &valid.replace("\"BPE\"", "\"BPX\""),
        // A decoder cut short makes the crate panic.
        "{\"decoder\": {\"type\"",
    ] {
        fs::write(folder.join("tokenizer.json"), broken).unwrap();
        assert!(open().contains("tokenizer.json: "));
    }
    fs::remove_dir_all(&folder).unwrap();

    // This decoder panics on short tokens; the text is an error, not the end of the process.
    let mut json: Value = serde_json::from_str(&valid).unwrap();
    json["decoder"] = json!({"type": "Strip", "content": " ", "start": 0, "stop": 9});
    let tokenizer = Tokenizer::from_json(json.to_string().as_bytes()).unwrap();
    let space = tokenizer.id("▁").unwrap();
    assert!(tokenizer.decode(&[space], true).is_ok());
    json["decoder"]["content"] = json!("▁");
    let tokenizer = Tokenizer::from_json(json.to_string().as_bytes()).unwrap();
    let e = tokenizer.decode(&[space], true).unwrap_err().to_string();
    assert!(e.starts_with("broken tokenizer: "), "{e}");
    assert!(Decoder::new(true).push(&tokenizer, space).is_err());
}

/// Every golden tokenizer, and one for each decoder that no golden has, over the same vocabulary.
fn tokenizers() -> &'static [(String, Tokenizer)] {
    static ALL: OnceLock<Vec<(String, Tokenizer)>> = OnceLock::new();
    ALL.get_or_init(|| {
        let mut all = Vec::new();
        for folder in golden_folders() {
            all.push((folder.display().to_string(), Tokenizer::open(&folder).unwrap()));
        }
        let mut json: Value = serde_json::from_slice(&fs::read("tests/golden/text/llama2-a/tokenizer.json").unwrap()).unwrap();
        let replace = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
        let strip = |start, stop| json!({"type": "Strip", "content": " ", "start": start, "stop": stop});
        let (fuse, bytes) = (json!({"type": "Fuse"}), json!({"type": "ByteFallback"}));
        let many = vec![replace.clone(); 20];
        for decoders in [
            json!([{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}]),
            json!([bytes, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true}]),
            json!([{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": true}]),
            json!([{"type": "WordPiece", "prefix": "▁", "cleanup": true}]),
            json!([{"type": "BPEDecoder", "suffix": "e"}]),
            json!([{"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "▁", "cleanup": true}]),
            json!([replace, bytes, fuse, strip(3, 0)]),
            json!([replace, bytes, strip(1, 0), fuse]),
            json!([replace, [bytes], fuse, strip(1, 1)]),
            json!([bytes, fuse, replace]),
            json!([replace, bytes, fuse, {"type": "BPEDecoder", "suffix": "e"}]),
            json!([fuse, bytes]),
            json!(many),
        ] {
            json["decoder"] = json!({"type": "Sequence", "decoders": decoders});
            if decoders[1].is_array() {
                json["decoder"]["decoders"][1] = json!({"type": "Sequence", "decoders": decoders[1]});
            }
            let tokenizer = Tokenizer::from_json(json.to_string().as_bytes()).unwrap();
            all.push((json["decoder"].to_string(), tokenizer));
        }
        json["decoder"] = Value::Null;
        all.push(("no decoder".into(), Tokenizer::from_json(json.to_string().as_bytes()).unwrap()));
        all
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..Default::default() })]

    /// What is streamed is the decoded text: for any ids, known or not, special or not.
    #[test]
    fn streaming_equals_decoding(ids in prop::collection::vec(0u32..420, 0..60), skip: bool) {
        for (name, tokenizer) in tokenizers() {
            match tokenizer.decode(&ids, skip) {
                Ok(whole) => prop_assert_eq!(&stream(tokenizer, &ids, skip), &whole, "{}", name),
                Err(_) => prop_assert!(name.contains("\"stop\":1"), "{}", name), // panics on empty text
            }
        }
    }

    /// The same over runs of bytes, where characters are unfinished or wrong most of the time.
    #[test]
    fn streaming_equals_decoding_of_bytes(bytes in prop::collection::vec(prop_oneof![any::<u8>(), 0x80u8..0xc0, Just(0xe4), Just(0xf0), Just(0x41)], 0..40)) {
        for (name, tokenizer) in tokenizers() {
            let spelled = |b: &u8| tokenizer.id(&format!("<0x{b:02X}>")).unwrap_or(3 + u32::from(*b));
            let ids: Vec<u32> = bytes.iter().map(spelled).collect();
            if let Ok(whole) = tokenizer.decode(&ids, false) {
                prop_assert_eq!(&stream(tokenizer, &ids, false), &whole, "{}", name);
            }
        }
    }

    /// Text is given out as soon as it is certain: what is held back is short.
    #[test]
    fn streaming_does_not_lag(text in "[a-zäöü你好😀 ]{0,40}") {
        let tokenizer = Tokenizer::open(Path::new("tests/golden/text/llama31-a")).unwrap();
        let ids = tokenizer.encode(&text, false, false).unwrap();
        let mut decoder = Decoder::new(true);
        let mut given = String::new();
        for n in 0..ids.len() {
            given += &decoder.push(&tokenizer, ids[n]).unwrap();
            let whole = tokenizer.decode(&ids[..=n], true).unwrap();
            prop_assert_eq!(whole.trim_end_matches('\u{fffd}'), &given);
        }
        prop_assert_eq!(given, text);
    }

    /// Broken tokenizer files give errors.
    #[test]
    fn mutations_cost_only_an_error(changes in prop::collection::vec((any::<u16>(), any::<u8>()), 1..3), kind in 0usize..3) {
        let name = ["llama2-a", "llama31-a", "phi3-a"][kind];
        let mut bytes = fs::read(format!("tests/golden/text/{name}/tokenizer.json")).unwrap();
        for (at, with) in changes {
            let at = at as usize * bytes.len() / 65536;
            match with % 3 {
                0 => bytes.truncate(at.max(1)),
                1 => bytes[at] = with,
                _ => drop(bytes.remove(at)),
            }
            if bytes.is_empty() { break }
        }
        let Ok(tokenizer) = Tokenizer::from_json(&bytes) else { return Ok(()) };
        if let Ok(ids) = tokenizer.encode("Hello <s> wörld 123", true, true) {
            _ = tokenizer.decode(&ids, false);
        }
    }
}

/// The vocabularies that llama.cpp tests with: texts in .inp, the ids of Hugging Face tokenizers in .out.
#[test]
fn real_vocabularies_equal_their_reference_ids() {
    let Some(shared) = std::env::var_os("FERRULE_SHARED") else {
        return eprintln!("skipped: FERRULE_SHARED is not set");
    };
    let folder = std::env::temp_dir().join(format!("ferrule-vocab-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    for archive in ["tokenizers.tar.xz", "gguf_vocab.tar.xz"] {
        let archive = Path::new(&shared).join("weights").join(archive);
        let mut tar = std::process::Command::new("tar");
        assert!(tar.arg("-xJf").arg(archive).arg("-C").arg(&folder).status().unwrap().success());
    }
    for (name, vocab) in [
        ("llama3.1", "llama-bpe"),
        ("llama2", "llama-spm"),
        ("phi3", "phi-3"),
        ("qwen3", "qwen2"),
        ("deepseek-coder", "deepseek-coder"),
        ("gpt2", "gpt-2"),
        ("gemma4", "gemma-4"),
    ] {
        let tokenizer = Tokenizer::open(&folder.join("tokenizers").join(name)).unwrap();
        let vocab = folder.join(format!("gguf_vocab/ggml-vocab-{vocab}.gguf"));
        let read = |end: &str| fs::read_to_string(format!("{}{end}", vocab.display())).unwrap();
        let (texts, expected) = (read(".inp"), read(".out"));
        let texts: Vec<&str> = texts.split("\n__ggml_vocab_test__\n").collect();
        let lines: Vec<&str> = expected.lines().collect();
        assert!(lines.len() == 46 && texts.len() >= 46, "{name}");
        for (text, line) in texts.iter().zip(lines) {
            let expected: Vec<u32> =
                line.split_whitespace().map(|id| id.parse().unwrap()).collect();
            let found = tokenizer.encode(text, false, true).unwrap();
            assert_eq!(found, expected, "{name}: {text:?}");
            let whole = tokenizer.decode(&found, false).unwrap();
            assert_eq!(stream(&tokenizer, &found, false), whole, "{name}: {text:?}");
        }
    }
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn one_tokenizer_serves_all_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Tokenizer>();
    shared::<Decoder>();
    shared::<ferrule::chat::ChatTemplate>();
    shared::<ferrule::file::Checkpoint>();
}
