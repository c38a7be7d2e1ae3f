//! GGUF models against reference logits from their dequantized weights, in f32.

use super::tokenizers::{goldens, models, same_ids};
use super::write::{Writer, item, list, tensor, text};
use super::{Folder, message};
use ferrule::backend::cpu::Cpu;
use ferrule::file::Checkpoint;
use ferrule::model::{
    Chunk, Forward, KvDtype, KvGroup, LoadOptions, Model, PAGE, Quantization, Sees, Wanted, load,
};
use std::path::Path;
use std::sync::atomic::AtomicBool;

pub(crate) fn options(quantization: Quantization) -> LoadOptions {
    LoadOptions {
        quantization,
        kv_dtype: KvDtype::F32,
        isa: std::env::var("FERRULE_ISA").ok(),
        threads: Some(2),
        ..LoadOptions::default()
    }
}

struct Golden(Checkpoint);

impl Golden {
    fn open(folder: &Path) -> Golden {
        Golden(Checkpoint::open(&folder.join("golden.safetensors")).unwrap())
    }
    fn ints(&self, name: &str) -> Option<Vec<u32>> {
        let bytes = self.0.get(name)?.bytes;
        Some(bytes.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect())
    }
    fn floats(&self, name: &str) -> Vec<f32> {
        let bytes = self.0.tensor(name).unwrap().bytes;
        bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }
}

/// Runs one sequence.
pub(crate) struct Session<'a> {
    model: &'a Model<Cpu>,
    kv: <Model<Cpu> as Forward>::Kv,
    pages: Vec<Vec<u32>>,
    len: usize,
    long: bool,
}

impl<'a> Session<'a> {
    pub(crate) fn new(model: &'a Model<Cpu>) -> Session<'a> {
        let table = |g: &KvGroup| if g.sees == Sees::State { vec![0, 1] } else { vec![0, 1, 2, 3] };
        let pages: Vec<_> = model.kv_groups().iter().map(table).collect();
        let kv = model.new_kv(&vec![4; pages.len()]).unwrap();
        Session { model, kv, pages, len: 0, long: false }
    }
    pub(crate) fn feed(&mut self, tokens: &[u32], wanted: Wanted) -> Vec<f32> {
        let chunk = Chunk { tokens, start: self.len, long: self.long, pages: &self.pages, wanted };
        self.len += tokens.len();
        assert!(self.len <= 4 * PAGE);
        let logits = self.model.forward(&mut self.kv, &[chunk], &AtomicBool::new(false)).unwrap();
        // States are read from the first and written to the second.
        self.pages.iter_mut().filter(|table| table.len() == 2).for_each(|states| states.swap(0, 1));
        logits
    }
}

fn argmax(logits: &[f32]) -> u32 {
    (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best }) as u32
}

/// The type in a file's name: model-TYPE.gguf.
fn kind(file: &Path) -> String {
    file.file_stem().unwrap().to_str().unwrap().strip_prefix("model-").unwrap().to_owned()
}

#[test]
fn reference_logits_and_greedy_ids() {
    for folder in goldens() {
        let golden = Golden::open(&folder);
        let mut worst = 0f32;
        for file in models(&folder) {
            let kind = kind(&file);
            let model = load(&file, options(Quantization::None)).unwrap();
            let vocab = model.vocab();
            for prompt in ["p1", "p7", "p33", "p130"] {
                let ids = golden.ints(&format!("{prompt}.ids")).unwrap();
                let expected = golden.floats(&format!("{kind}.{prompt}.logits"));
                let rows = expected.len() / vocab; // the last ones
                let mut session = Session::new(&model);
                let logits = session.feed(&ids, Wanted::All);
                let found = &logits[(ids.len() - rows) * vocab..];
                for (i, (f, e)) in found.iter().zip(&expected).enumerate() {
                    let at = format!("{file:?} {prompt} logit {i}: found {f}, expected {e}");
                    assert!((f - e).abs() <= 3e-4, "{at}");
                    worst = worst.max((f - e).abs());
                }
                let Some(greedy) = golden.ints(&format!("{kind}.{prompt}.greedy")) else {
                    continue;
                };
                let mut next = argmax(&logits[(ids.len() - 1) * vocab..]);
                for (step, &expected) in greedy.iter().enumerate() {
                    assert_eq!(next, expected, "{file:?} {prompt} greedy step {step}");
                    next = argmax(&session.feed(&[next], Wanted::Last));
                }
            }
        }
        println!("{}: worst {worst:e}", folder.display());
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// The root mean square difference over that of the expected.
fn relative(found: &[f32], expected: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let error = found.iter().zip(expected).map(|(f, e)| square(f64::from(f - e))).sum::<f64>();
    (error / expected.iter().map(|e| square(f64::from(*e))).sum::<f64>()).sqrt()
}

/// Packed weights: near the reference, and the same bits whatever the chunks, the threads and the kernel set.
#[test]
fn packed_weights_are_near_and_the_same_everywhere() {
    for folder in goldens() {
        let golden = Golden::open(&folder);
        let ids = golden.ints("p130.ids").unwrap();
        for file in models(&folder) {
            let exact = load(&file, options(Quantization::None)).unwrap();
            let expected = Session::new(&exact).feed(&ids, Wanted::All);
            for quantization in [Quantization::Auto, Quantization::Int8, Quantization::Int4] {
                let at = format!("{file:?} {quantization:?}");
                let model = load(&file, options(quantization)).unwrap();
                let whole = Session::new(&model).feed(&ids, Wanted::All);
                let off = relative(&whole, &expected);
                println!("{at}: {off:.4} ({})", model.form());
                assert!(
                    off < if quantization == Quantization::Int4 { 0.6 } else { 0.1 },
                    "{at}: {off}"
                );
                let mut session = Session::new(&model);
                let parts: Vec<f32> =
                    ids.chunks(37).flat_map(|c| session.feed(c, Wanted::All)).collect();
                assert!(bits(&parts) == bits(&whole), "{at}: chunks");
                for set in ferrule::kernels::available() {
                    let isa = Some(set.name().to_owned());
                    let options = LoadOptions { isa, threads: Some(1), ..options(quantization) };
                    let model = load(&file, options).unwrap();
                    let found = Session::new(&model).feed(&ids[..40], Wanted::All);
                    assert!(bits(&found) == bits(&whole[..found.len()]), "{at}: {}", set.name());
                }
            }
        }
    }
}

/// A GGUF file taken apart.
fn parts(bytes: &[u8]) -> Writer {
    let header = ferrule::file::gguf::parse(bytes).unwrap();
    let data = header.tensors[0].range.start;
    let encoded = |name: &str| [&(name.len() as u64).to_le_bytes(), name.as_bytes()].concat();
    let find = |what: &[u8], from: usize| {
        from + bytes[from..].windows(what.len()).position(|w| w == what).unwrap()
    };
    let mut starts = vec![24];
    for item in &header.items[1..] {
        starts.push(find(&encoded(&item.key), starts[starts.len() - 1] + 1));
    }
    starts.push(find(&encoded(&header.tensors[0].name), 24));
    let items = starts.windows(2).map(|at| bytes[at[0]..at[1]].to_vec()).collect();
    let described = |t: &ferrule::file::Entry| {
        let dims: Vec<u64> = t.shape.iter().rev().map(|d| *d as u64).collect();
        let number = t.dtype.blocks().map_or(0, |blocks| blocks.ggml());
        tensor(&t.name, &dims, number, (t.range.start - data) as u64)
    };
    let tensors = header.tensors.iter().map(described).collect();
    Writer { items, tensors, data: bytes[data..].to_vec() }
}

/// Metadata that a loader must not believe (llama.cpp 25821, 26051 and the like).
#[test]
fn absurd_metadata_is_an_error_that_names_the_key() {
    let bytes = std::fs::read("tests/golden/gguf/llama-a/model-Q4_K_M.gguf").unwrap();
    let file = parts(&bytes);
    assert!(file.bytes() == bytes);
    let folder = Folder::new();
    let open = |items: &[Vec<u8>]| {
        let file = Writer { items: items.to_vec(), ..file.clone() };
        let path = folder.write("m.gguf", file.bytes());
        load(&path, options(Quantization::Auto))
    };
    open(&file.items).unwrap();
    let named = |key: &str| {
        file.items.iter().position(|item| item[8..].starts_with(key.as_bytes())).unwrap()
    };
    let u32_item = |key: &str, x: u32| item(key, 4, x.to_le_bytes());
    let f32_item = |key: &str, x: f32| item(key, 6, x.to_le_bytes());
    for (key, changed, expected) in [
        ("llama.block_count", Some(u32_item("llama.block_count", 513)), "no tensor `blk.1."),
        (
            "llama.block_count",
            Some(u32_item("llama.block_count", u32::MAX)),
            "block_count: found 4294967295",
        ),
        ("llama.block_count", Some(u32_item("llama.block_count", 0)), "block_count: found 0"),
        (
            "llama.block_count",
            Some(item("llama.block_count", 8, text("1"))),
            "block_count: found \"1\"",
        ),
        (
            "llama.block_count",
            Some(item("llama.block_count", 5, (-1i32).to_le_bytes())),
            "block_count: found -1",
        ),
        ("llama.block_count", None, "block_count: found nothing"),
        (
            "llama.attention.head_count",
            Some(u32_item("llama.attention.head_count", 0)),
            "head_count: found 0",
        ),
        (
            "llama.attention.head_count",
            Some(u32_item("llama.attention.head_count", 3)),
            "3 heads and 2 key/value heads",
        ),
        (
            "llama.attention.head_count",
            Some(item("llama.attention.head_count", 9, list(4, 2, [4, 0, 0, 0, 5, 0, 0, 0]))),
            "head_count: found [4,5]",
        ),
        (
            "llama.embedding_length",
            Some(u32_item("llama.embedding_length", 1 << 30)),
            "embedding_length: found 1073741824",
        ),
        (
            "llama.embedding_length",
            Some(u32_item("llama.embedding_length", 128)),
            "expected [320, 128]",
        ),
        (
            "llama.attention.key_length",
            Some(u32_item("llama.attention.key_length", 63)),
            "attention.value_length: 64 is not",
        ),
        (
            "llama.attention.value_length",
            Some(u32_item("llama.attention.value_length", 32)),
            "attention.value_length: 32 is not known",
        ),
        ("llama.rope.dimension_count", Some(u32_item("llama.rope.dimension_count", 62)), "rope"),
        (
            "llama.rope.freq_base",
            Some(f32_item("llama.rope.freq_base", f32::NAN)),
            "key `llama.rope.freq_base`: found NaN",
        ),
        (
            "llama.rope.freq_base",
            Some(f32_item("llama.rope.freq_base", 0.0)),
            "rope.freq_base: found 0",
        ),
        ("llama.attention.layer_norm_rms_epsilon", None, "layer_norm_rms_epsilon: found nothing"),
        (
            "llama.vocab_size",
            Some(u32_item("llama.vocab_size", 7)),
            "found shape [320, 256], expected [7, 256]",
        ),
        (
            "general.architecture",
            Some(item("general.architecture", 8, text("llame"))),
            "\"llame\" is not known; the nearest known are llama",
        ),
        ("general.architecture", None, "key `general.architecture`: found nothing"),
        (
            "general.type",
            Some(item("general.type", 8, text("adapter"))),
            "key `general.type`: found \"adapter\"",
        ),
        (
            "general.name",
            Some(u32_item("llama.expert_count", 8)),
            "expert_used_count: found nothing",
        ),
        (
            "llama.attention.head_count_kv",
            Some(item("llama.attention.head_count_kv", 9, list(4, 2, [2, 0, 0, 0, 0, 0, 0, 0]))),
            "layer_types: found 2 entries, expected 1",
        ),
        ("general.name", Some(u32_item("llama.nextn_predict_layers", 2)), "block_count: found 0"),
        (
            "general.name",
            Some(u32_item("llama.nextn_predict_layers", 1 << 20)),
            "block_count: found 0",
        ),
        (
            "general.name",
            Some(f32_item("llama.attn_logit_softcapping", 50.0)),
            "attn_logit_softcapping: 50.0 changes the model",
        ),
        ("general.name", Some(f32_item("llama.logit_scale", 2.0)), "logit_scale: 2.0"),
        (
            "general.name",
            Some(item("llama.rope.scaling.type", 8, text("spiral"))),
            "rope.scaling.type",
        ),
    ] {
        let mut items = file.items.clone();
        match changed {
            Some(changed) => items[named(key)] = changed,
            None => drop(items.remove(named(key))),
        }
        let found = message(open(&items));
        assert!(found.contains(expected), "{key}: expected {expected:?}, found {found:?}");
        assert!(found.contains("m.gguf"), "{key}: {found}");
    }
}

/// Random changes to a model cost only an error, or give a model that runs.
#[test]
fn mutated_models_are_errors_or_run() {
    let bytes = std::fs::read("tests/golden/gguf/llama-a/model-Q4_K_M.gguf").unwrap();
    let header = ferrule::file::gguf::parse(&bytes).unwrap().tensors[0].range.start;
    let folder = Folder::new();
    let mut seed = 1u64;
    let mut below = |n: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % n
    };
    let (mut good, mut bad) = (0, 0);
    for round in 0..400 {
        let mut changed = bytes.clone();
        for _ in 0..1 + below(3) {
            match below(5) {
                0 => changed.truncate(below(changed.len().max(1))),
                1 if changed.len() > header => changed[below(header)] ^= 1 << below(8),
                2 if changed.len() > header => changed[below(header)] = below(14) as u8,
                3 if changed.len() > header => {
                    let at = below(header - 8);
                    changed[at..at + 8].copy_from_slice(&(1u64 << below(64)).to_le_bytes());
                }
                _ if !changed.is_empty() => {
                    let at = below(changed.len());
                    changed[at] ^= 1 << below(8);
                }
                _ => {}
            }
        }
        let path = folder.write("m.gguf", &changed);
        let quantization = [Quantization::None, Quantization::Auto, Quantization::Int4][round % 3];
        // Neither may panic.
        _ = ferrule::tokenizer::Tokenizer::open(&path);
        _ = ferrule::chat::ChatTemplate::open(&path);
        match load(&path, options(quantization)) {
            Ok(model) => {
                let logits = Session::new(&model).feed(&[0, 1, 0], Wanted::Last);
                assert_eq!(logits.len(), model.vocab());
                good += 1;
            }
            Err(e) => {
                assert!(!e.to_string().is_empty());
                bad += 1;
            }
        }
    }
    assert!(
        good > 40 && bad > 100,
        "{good} loaded, {bad} were refused: the mutations miss their mark"
    );
}

/// What no file says: windows of Qwen, Mistral and StarCoder 2 (the last has those of the release), the scale of
/// Gemma's scores and those of MiniCPM, another GELU than that of GPT-NeoX. And what the converter writes as in
/// releases, whatever the checkpoint has: the width of Phi 2, the rotating part of Nemotron's heads, the bases of
/// Granite's layers.
const LOSSY: &[&str] = &[
    "gemma2-a",
    "gemma2-b",
    "gemma3-a",
    "granite-swa-a",
    "minicpm3-a",
    "mistral-a",
    "nemotron-a",
    "phi2-a",
    "pythia-b",
    "qwen25-swa-a",
    "starcoder2-a",
];

/// Golden checkpoints that llama.cpp's converter has made GGUF files of (`tests/golden/make_gguf.py`), in the folder
/// `FERRULE_CONVERTED`: the same logits and ids as the originals; and the same ids of texts, where the converter does
/// not guess the kind of tokenizer from a list of releases.
#[test]
fn converted_models_equal_their_originals() {
    let (Some(converted), Some(shared)) =
        (std::env::var_os("FERRULE_CONVERTED"), std::env::var_os("FERRULE_SHARED"))
    else {
        return eprintln!("skipped: FERRULE_CONVERTED and FERRULE_SHARED are not set");
    };
    let mut failed = Vec::new();
    for file in models(Path::new(&converted)) {
        let name = file.file_stem().unwrap().to_str().unwrap().to_owned();
        let folder = Path::new(&shared).join("goldens").join(&name);
        // Nor does a file say that a space in front of a text is not doubled.
        if name != "mistral-a"
            && let Err(e) = same_ids(&file, &folder)
        {
            failed.push(format!("{name}: {e}"));
        }
        if LOSSY.contains(&&name[..]) {
            assert!(compare(&file, &folder).is_err(), "{name} says all");
            continue;
        }
        match compare(&file, &folder) {
            Ok(worst) => println!("{name}: {worst:.1e}"),
            Err(e) => failed.push(format!("{name}: {e}")),
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// The largest difference of logits, or where they or the ids differ.
fn compare(file: &Path, folder: &Path) -> Result<f32, String> {
    let golden = Golden::open(folder);
    let model = load(file, options(Quantization::None)).map_err(|e| e.to_string())?;
    let vocab = model.vocab();
    let mut worst = 0f32;
    for prompt in ["p1", "p7", "p33", "p130"] {
        let ids = golden.ints(&format!("{prompt}.ids")).unwrap();
        let positions = golden.ints(&format!("{prompt}.positions")).unwrap();
        let expected = golden.floats(&format!("{prompt}.logits"));
        let long = model.long_after().is_some_and(|after| ids.len() > after);
        let mut session = Session { long, ..Session::new(&model) };
        let logits = session.feed(&ids, Wanted::All);
        for (row, &position) in positions.iter().enumerate() {
            let found = &logits[position as usize * vocab..][..vocab];
            for (f, e) in found.iter().zip(&expected[row * vocab..][..vocab]) {
                worst = worst.max((f - e).abs());
            }
        }
        if worst > 3e-4 {
            return Err(format!("{prompt}: logits are off by {worst}"));
        }
        let Some(greedy) = golden.ints(&format!("{prompt}.greedy")) else { continue };
        let mut next = argmax(&logits[(ids.len() - 1) * vocab..]);
        for (step, &expected) in greedy.iter().enumerate() {
            if next != expected {
                return Err(format!("{prompt}: greedy step {step}"));
            }
            next = argmax(&session.feed(&[next], Wanted::Last));
        }
    }
    Ok(worst)
}
