//! Tokenizers from GGUF metadata against the ids of the tokenizers that they were made from.

use super::write::{Writer, list};
use super::{Folder, message};
use ferrule::file::read_json;
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

/// Whether the tokenizer of a file gives the ids of a golden folder, if it needs no name from the converter.
pub(crate) fn same_ids(file: &Path, folder: &Path) -> Result<(), String> {
    let checkpoint = ferrule::file::Checkpoint::open(file).map_err(|e| e.to_string())?;
    let kind = checkpoint.metadata().and_then(|m| m.get("tokenizer.ggml.model"));
    if kind.and_then(|kind| kind.as_text()) == Some("gpt2") {
        return Ok(());
    }
    let tokenizer = Tokenizer::open(file).map_err(|e| e.to_string())?;
    let golden = read_json(&folder.join("golden.json"), 1 << 30).unwrap().unwrap();
    for item in golden["tokenizer"]["texts"].as_array().unwrap() {
        let text = item["text"].as_str().unwrap();
        let found = tokenizer.encode(text, false, true).map_err(|e| e.to_string())?;
        if found != ids(&item["ids_no_special"]) {
            return Err(format!("{text:?}: {found:?}, expected {}", item["ids_no_special"]));
        }
    }
    Ok(())
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
                assert_eq!(
                    tokenizer.encode(text, false, true).unwrap(),
                    ids(&item["ids"]),
                    "{text:?}"
                );
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
            if name == "ggml-vocab-qwen35" && text.contains(|c| ('\u{300}'..'\u{370}').contains(&c))
            {
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

/// A small tokenizer, byte-level: two letters and what is made of them.
fn small() -> Writer {
    Writer::default()
        .text("general.architecture", "llama")
        .text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", "gpt-2")
        .texts("tokenizer.ggml.tokens", &["a", "b", "ab", "<|im_end|>", "", "<x>", "aba", "<e>"])
        .item("tokenizer.ggml.token_type", 9, list(5, 8, kinds(&[1, 1, 1, 3, 1, 4, 1, 1])))
        .texts("tokenizer.ggml.merges", &["a b", "ab a"])
        .u32("tokenizer.ggml.bos_token_id", 5)
        .u32("tokenizer.ggml.eos_token_id", 7)
}

fn kinds(kinds: &[i32]) -> Vec<u8> {
    kinds.iter().flat_map(|k| k.to_le_bytes()).collect()
}

fn scores(scores: &[f32]) -> Vec<u8> {
    scores.iter().flat_map(|k| k.to_le_bytes()).collect()
}

fn open(file: &Writer) -> ferrule::Result<Tokenizer> {
    let folder = Folder::new();
    Tokenizer::open(&folder.write("m.gguf", file.bytes()))
}

#[test]
fn special_tokens_are_those_of_the_file() {
    let tokenizer = open(&small()).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some((5, "<x>")), Some((7, "<e>"))));
    assert_eq!(tokenizer.ends(), [7, 3]);
    assert_eq!(tokenizer.encode("abaab", true, true).unwrap(), [6, 2]);
    assert_eq!(tokenizer.encode("ab<|im_end|><x>", false, true).unwrap(), [2, 3, 5]);
    assert!(!tokenizer.encode("a<|im_end|>", false, false).unwrap().contains(&3));
    assert_eq!(tokenizer.token(4).unwrap(), "[EMPTY_4]");
    let tokenizer = open(&small().item("tokenizer.ggml.add_bos_token", 7, [1])).unwrap();
    assert_eq!(tokenizer.encode("ab", true, true).unwrap(), [5, 2]);
    let both = small().item("tokenizer.ggml.add_bos_token", 7, [1]).item(
        "tokenizer.ggml.add_eos_token",
        7,
        [1],
    );
    assert_eq!(open(&both).unwrap().encode("ab", true, true).unwrap(), [5, 2, 7]);
    // gpt-oss: the end of a message is not the end of the answer.
    let texts = ["a", "<|end|>", "<|return|>", "<|call|>"];
    let mut harmony = small();
    harmony.items.retain(|item| {
        !["tokens", "token_type", "merges", "bos_token_id", "eos_token_id"]
            .iter()
            .any(|key| item[8..].starts_with(format!("tokenizer.ggml.{key}").as_bytes()))
    });
    let harmony = harmony
        .texts("tokenizer.ggml.tokens", &texts)
        .texts("tokenizer.ggml.merges", &[])
        .u32("tokenizer.ggml.eos_token_id", 2);
    assert_eq!(open(&harmony).unwrap().ends(), [2, 3]);
}

/// Vocabularies that do not fit together (CVE-2025-49847, CVE-2025-52566 and the like).
#[test]
fn broken_vocabularies_are_errors_that_name_the_key() {
    let without = |key: &str| {
        let mut file = small();
        file.items
            .retain(|item| !item[8..].starts_with(format!("tokenizer.ggml.{key}").as_bytes()));
        file
    };
    let spm = |file: Writer| {
        let mut file = file;
        file.items.retain(|item| !item[8..].starts_with(b"tokenizer.ggml.model"));
        file.text("tokenizer.ggml.model", "llama")
    };
    let long = "a".repeat(100_000);
    for (file, expected) in [
        (without("model"), "key `tokenizer.ggml.model`: found \"nothing\", expected \"gpt2\""),
        (without("model").text("tokenizer.ggml.model", "rwkv"), "found \"rwkv\", expected"),
        (
            without("model").u32("tokenizer.ggml.model", 7),
            "`tokenizer.ggml.model`: found 7, expected a text",
        ),
        (without("pre"), "key `tokenizer.ggml.pre`: found nothing, expected the name"),
        (without("pre").text("tokenizer.ggml.pre", "new"), "found \"new\", which is not"),
        (without("tokens"), "key `tokenizer.ggml.tokens`: found nothing, expected a list"),
        (without("tokens").u32("tokenizer.ggml.tokens", 1), "found 1, expected a list"),
        (without("tokens").item("tokenizer.ggml.tokens", 9, list(4, 1, [0; 4])), "expected texts"),
        (
            without("tokens").texts("tokenizer.ggml.tokens", &["a", "b", "a"]),
            "found 8 values, expected 3",
        ),
        (
            without("token").texts("tokenizer.ggml.tokens", &["a", "b", "a"]),
            "key `tokenizer.ggml.merges`: merge 0: found \"a b\", expected two tokens",
        ),
        (
            without("token").texts("tokenizer.ggml.tokens", &["a", "b", "ab", "aba", "a"]),
            "\"a\" is there twice, as 0 and 4",
        ),
        (without("merges"), "key `tokenizer.ggml.merges`: found nothing"),
        (
            without("merges").texts("tokenizer.ggml.merges", &["a b", "aba"]),
            "merge 1: found \"aba\"",
        ),
        (without("merges").texts("tokenizer.ggml.merges", &["b a"]), "merge 0: found \"b a\""),
        (without("merges").texts("tokenizer.ggml.merges", &[""]), "merge 0: found \"\""),
        (
            without("token_type").item("tokenizer.ggml.token_type", 9, list(5, 6, [0; 24])),
            "found 6 values, expected 8",
        ),
        (
            without("token_type").item("tokenizer.ggml.token_type", 9, list(8, 8, [0; 64])),
            "found [text; 8], expected numbers",
        ),
        (
            without("eos").u32("tokenizer.ggml.eos_token_id", 8),
            "`tokenizer.ggml.eos_token_id`: found 8, expected an id below 8",
        ),
        (
            without("eos").item("tokenizer.ggml.eos_token_id", 5, (-1i32).to_le_bytes()),
            "found -1, expected an id below 8",
        ),
        (
            without("bos").item("tokenizer.ggml.add_bos_token", 7, [1]),
            "there is no `tokenizer.ggml.bos_token_id`",
        ),
        (
            small().text("tokenizer.ggml.add_bos_token", "yes"),
            "found \"yes\", expected true or false",
        ),
        (spm(small()), "key `tokenizer.ggml.scores`: found nothing"),
        (
            spm(small()).item("tokenizer.ggml.scores", 9, list(6, 3, [0; 12])),
            "`tokenizer.ggml.scores`: found 3 values, expected 8",
        ),
        (
            spm(without("token").texts("tokenizer.ggml.tokens", &[&long])).item(
                "tokenizer.ggml.scores",
                9,
                list(6, 1, [0; 4]),
            ),
            "found 100000 bytes in very long tokens",
        ),
    ] {
        let found = message(open(&file));
        assert!(found.contains(expected), "expected {expected:?}, found {found:?}");
        assert!(found.contains("m.gguf: "), "{found}");
    }
    // Scores that are no numbers order nothing, but they do no harm.
    let nan = spm(small()).item("tokenizer.ggml.scores", 9, list(6, 8, scores(&[f32::NAN; 8])));
    open(&nan).unwrap();
}

/// A template comes out of the file as it went in, and so do the tokens that it uses.
#[test]
fn chat_templates_come_from_the_file() {
    use ferrule::chat::{ChatTemplate, special_tokens};
    use serde_json::json;
    let messages = json!([{"role": "user", "content": "hi"}]);
    let render = |template: &ChatTemplate, tools: &Value| {
        template.render(&messages, tools, true, &serde_json::Map::new(), None).unwrap()
    };
    let folder = Folder::new();
    let path = folder.write("m.gguf", small().bytes());
    assert!(ChatTemplate::open(&path).unwrap().is_none());
    let source = "{{ bos_token }}|{{ eos_token }}|{{ messages[0].content }}";
    let file = small()
        .text("tokenizer.chat_template", source)
        .text("tokenizer.chat_template.tool_use", "tools");
    folder.write("m.gguf", file.bytes());
    for path in [&path, &folder.0] {
        let template = ChatTemplate::open(path).unwrap().unwrap();
        assert_eq!(render(&template, &Value::Null), "<x>|<e>|hi");
        assert_eq!(render(&template, &json!([{}])), "tools");
        let tokens = json!({"bos_token": "<x>", "eos_token": "<e>"});
        assert_eq!(Value::Object(special_tokens(path).unwrap()), tokens);
    }
    // What lies beside it in the folder comes first.
    folder.write("chat_template.jinja", "beside");
    assert_eq!(render(&ChatTemplate::open(&folder.0).unwrap().unwrap(), &Value::Null), "beside");
    assert_eq!(render(&ChatTemplate::open(&path).unwrap().unwrap(), &Value::Null), "<x>|<e>|hi");
    // CVE-2024-34359: a template in a file reached Python through its objects. Here there are none.
    let attack = "{% for c in ().__class__.__base__.__subclasses__() %}{{ c }}{% endfor %}";
    folder.write("m.gguf", small().text("tokenizer.chat_template", attack).bytes());
    let template = ChatTemplate::open(&path).unwrap().unwrap();
    let rendered = template.render(&messages, &Value::Null, true, &serde_json::Map::new(), None);
    assert!(rendered.is_err() || rendered.unwrap().is_empty());
    folder.write("m.gguf", small().u32("tokenizer.chat_template", 5).bytes());
    assert!(
        message(ChatTemplate::open(&path))
            .contains("m.gguf: key `tokenizer.chat_template`: found 5")
    );
}

/// Every golden model's own template renders the golden conversations.
#[test]
fn golden_templates_render_the_golden_texts() {
    for folder in goldens() {
        let template = ferrule::chat::ChatTemplate::open(&models(&folder)[0]).unwrap().unwrap();
        let golden = read_json(&folder.join("golden.json"), 1 << 30).unwrap().unwrap();
        let chats = golden["tokenizer"]["chat"].as_array().unwrap();
        assert!(!chats.is_empty());
        for chat in chats {
            let prompt = chat["add_generation_prompt"].as_bool().unwrap();
            let messages = &chat["messages"];
            let found =
                template.render(messages, &Value::Null, prompt, &serde_json::Map::new(), Some(0));
            match chat["text"].as_str() {
                Some(text) => assert_eq!(found.unwrap(), text, "{folder:?}"),
                None => assert!(found.is_err(), "{folder:?}"),
            }
        }
    }
}

/// What a converter writes for the tokenizer.json of golden folders, under the name that it has for each kind.
#[test]
fn converted_tokenizers_give_the_same_ids() {
    let Some(shared) = std::env::var_os("FERRULE_SHARED") else {
        return eprintln!("skipped: FERRULE_SHARED is not set");
    };
    for (name, pre) in [
        ("gpt2-a", "gpt-2"),
        ("olmoe-a", "olmo"),
        ("starcoder2-a", "starcoder"),
        ("command-r-a", "command-r"),
        ("llama31-a", "llama-bpe"),
        ("phi4-a", "dbrx"),
        ("glm4-a", "chatglm-bpe"),
        ("qwen3-a", "qwen2"),
        ("qwen35-a", "qwen35"),
        ("phi4-mini-a", "gpt-4o"),
        ("mistral-nemo-a", "tekken"),
        ("deepseek-v3-a", "deepseek-v3"),
    ] {
        let folder = Path::new(&shared).join("goldens").join(name);
        let json = read_json(&folder.join("tokenizer.json"), 1 << 30).unwrap().unwrap();
        let mut tokens: Vec<(u64, &str, i32)> = Vec::new();
        for (text, id) in json["model"]["vocab"].as_object().unwrap() {
            tokens.push((id.as_u64().unwrap(), text, 1));
        }
        for token in json["added_tokens"].as_array().unwrap() {
            let (id, text) = (token["id"].as_u64().unwrap(), token["content"].as_str().unwrap());
            tokens.retain(|(other, ..)| *other != id);
            tokens.push((id, text, if token["special"] == true { 3 } else { 4 }));
        }
        tokens.sort();
        let texts: Vec<&str> = tokens.iter().map(|(_, text, _)| *text).collect();
        let merges: Vec<String> = (json["model"]["merges"].as_array().unwrap().iter())
            .map(|m| {
                m.as_str().map_or_else(
                    || format!("{} {}", m[0].as_str().unwrap(), m[1].as_str().unwrap()),
                    str::to_owned,
                )
            })
            .collect();
        let merges: Vec<&str> = merges.iter().map(String::as_str).collect();
        let token_kinds: Vec<i32> = tokens.iter().map(|(.., kind)| *kind).collect();
        let file = Writer::default()
            .text("general.architecture", "any")
            .text("tokenizer.ggml.model", "gpt2")
            .text("tokenizer.ggml.pre", pre)
            .texts("tokenizer.ggml.tokens", &texts)
            .item("tokenizer.ggml.token_type", 9, list(5, texts.len() as u64, kinds(&token_kinds)))
            .texts("tokenizer.ggml.merges", &merges)
            .item("tokenizer.ggml.add_bos_token", 7, [0]);
        let tokenizer = open(&file).unwrap();
        let golden = read_json(&folder.join("golden.json"), 1 << 30).unwrap().unwrap();
        for item in golden["tokenizer"]["texts"].as_array().unwrap() {
            let text = item["text"].as_str().unwrap();
            let expected = ids(&item["ids_no_special"]);
            assert_eq!(tokenizer.encode(text, false, true).unwrap(), expected, "{name}: {text:?}");
            let decoded = item["decoded"].as_str().unwrap();
            assert_eq!(tokenizer.decode(&ids(&item["ids"]), true).unwrap(), decoded, "{name}");
        }
    }
}

/// Every regex compiles, and cuts without losing anything.
#[test]
fn every_named_pre_tokenizer_keeps_the_text() {
    // The alphabet of bytes, as GPT-2 spells them: printable ones are themselves.
    let spelled = |b: u32| match b {
        33..=126 | 161..=172 | 174..=255 => b,
        0..=32 => 256 + b,
        127..=160 => 289 + b - 127,
        _ => 323,
    };
    let alphabet: Vec<String> =
        (0..256).map(|b| char::from_u32(spelled(b)).unwrap().to_string()).collect();
    let alphabet: Vec<&str> = alphabet.iter().map(String::as_str).collect();
    let text = "It's 1234567 o'clock!! \u{4f60}\u{597d}\u{3042} été\u{301} ПРИВЕТ\r\n\n  \tx  \u{ac00} <sentinel:1> ";
    for name in NAMES.split_whitespace() {
        let mut file = small();
        file.items.retain(|item| !item[8..].starts_with(b"tokenizer.ggml."));
        let file = file
            .text("tokenizer.ggml.model", "gpt2")
            .text("tokenizer.ggml.pre", name)
            .texts("tokenizer.ggml.tokens", &alphabet)
            .texts("tokenizer.ggml.merges", &[]);
        // No BOS in this file; the pre-tokenizers that add one by default say so.
        let tokenizer = match open(&file) {
            Ok(tokenizer) => tokenizer,
            Err(e) => {
                assert!(e.to_string().contains("bos_token_id"), "{name}: {e}");
                open(&file.u32("tokenizer.ggml.bos_token_id", 0)).unwrap()
            }
        };
        let ids = tokenizer.encode(text, false, true).unwrap();
        let nfc = ["mpt", "olmo", "command-r", "qwen2", "qwen35"].contains(&name);
        let expected = if nfc { text.replace("é\u{301}", "\u{1e17}") } else { text.to_owned() };
        let decoded = tokenizer.decode(&ids, false).unwrap();
        assert!(decoded == expected || nfc && decoded.contains("été"), "{name}: {decoded:?}");
        assert!(ids.len() >= text.len() - 2, "{name}");
    }
}

const NAMES: &str = "gpt-2 phi-2 jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum mpt olmo starcoder \
    refact smollm codeshell exaone minerva-7b mellum2 command-r llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral \
    midm-2.0 lfm2 glm4 glm5 dbrx smaug-bpe chatglm-bpe qwen2 deepseek-r1-qwen megrez kormo f2llmv2 stablelm2 hunyuan \
    solar-open grok-2 qwen35 gpt-4o llama4 kanana2 talkie minimax-m2 tiny_aya cohere2moe tekken deepseek-llm \
    deepseek-coder deepseek-v3 hunyuan-dense joyai-llm hy_v4 spark2_5 falcon default bloom poro-chat gpt3-finnish \
    viking minicpm5 bailingmoe bailingmoe2 llada-moe seed-coder kimi-k2 youtu exaone-moe jais-2 superbpe ufakzeka \
    laguna chameleon";
