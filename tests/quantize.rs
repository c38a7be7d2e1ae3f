//! Models written by `quantize`: the same bits as their source loaded in that form, for every family; whole or not at
//! all; and errors, never wrong answers, for damaged ones.

use ferrule::Error;
use ferrule::file::Checkpoint;
use ferrule::model::{
    Forward, LoadOptions, Model, Quantization, Quantize, Rule, Sequence, Wanted, Written, load,
    quantize,
};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

type Cpu = ferrule::backend::cpu::Cpu;

/// A folder that is removed at the end of the test.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path =
            std::env::temp_dir().join(format!("ferrule-quantize-{}-{n}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Folder(path)
    }
    /// Names of all that is inside, hidden or not.
    fn names(&self) -> Vec<String> {
        let names = fs::read_dir(&self.0).unwrap();
        names.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn root(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn options(quantization: Quantization) -> LoadOptions {
    let isa = std::env::var("FERRULE_ISA").ok();
    LoadOptions { quantization, threads: Some(2), isa, ..LoadOptions::default() }
}

fn how(format: Quantization) -> Quantize {
    let load = options(Quantization::Auto);
    Quantize { format, bits: None, rules: Vec::new(), calibration: Vec::new(), load }
}

fn write(folder: &Path, out: &Path, how: Quantize) -> ferrule::Result<Written> {
    quantize(folder, out, how, &AtomicBool::new(false), &|_, _, _| {})
}

/// The bits of all logits of a short sequence.
fn bits(model: &Model<Cpu>) -> Vec<u32> {
    let mut sequence = Sequence::new(model, 24).unwrap();
    sequence.restart(24);
    let stop = AtomicBool::new(false);
    let tokens: Vec<u32> = (0..24).map(|i| (i * i + 3) % model.vocab() as u32).collect();
    let mut all = sequence.read(&tokens[..20], Wanted::All, &stop).unwrap();
    all.extend(sequence.read(&tokens[20..], Wanted::All, &stop).unwrap());
    all.iter().map(|x| x.to_bits()).collect()
}

/// Every golden checkpoint in the repository.
fn families() -> Vec<PathBuf> {
    let folders = fs::read_dir(root("tests/golden")).unwrap();
    let folders = folders.map(|entry| entry.unwrap().path());
    let mut folders: Vec<_> =
        folders.filter(|path| path.join("golden.safetensors").exists()).collect();
    folders.sort();
    assert!(folders.len() > 10);
    folders
}

#[test]
fn same_bits_as_the_source_in_that_form() {
    for folder in families() {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let place = Folder::new();
        for format in
            [Quantization::Int4, Quantization::Int5, Quantization::Int6, Quantization::Int8]
        {
            // A checkpoint that mixes types says so with its source, too.
            let Ok(source) = load(&folder, options(format)) else { continue };
            let out = place.0.join(format!("{format:?}"));
            let written = write(&folder, &out, how(format)).unwrap();
            let copy = load(&out, options(Quantization::Auto)).unwrap();
            assert_eq!(bits(&copy), bits(&source), "{name} {format:?}");
            assert_eq!(copy.weight_bytes(), source.weight_bytes(), "{name} {format:?}");
            assert!(written.bytes > copy.weight_bytes(), "{name}");
            assert_eq!(written.forms.iter().map(|(_, n)| n).sum::<u64>(), copy.weight_bytes());
        }
    }
}

#[test]
fn stored_weights_can_be_packed_without_loss() {
    let place = Folder::new();
    let (source, out) = (root("tests/golden/qwen3-a"), place.0.join("out"));
    write(&source, &out, how(Quantization::None)).unwrap();
    let copy = load(&out, options(Quantization::None)).unwrap();
    assert_eq!(bits(&copy), bits(&load(&source, options(Quantization::None)).unwrap()));
}

#[test]
fn rules_choose_the_form_of_some() {
    let place = Folder::new();
    let out = place.0.join("out");
    let rule = |pattern: &str, form| Rule { pattern: pattern.into(), form };
    let rules = vec![
        rule("*.0.mlp.down_proj*", Quantization::None),
        rule("*down_proj*", Quantization::Int8),
    ];
    let mixed = Quantize { rules, ..how(Quantization::Int4) };
    write(&root("models/tales-1m"), &out, mixed).unwrap();
    let checkpoint = Checkpoint::open(&out).unwrap();
    let forms = |part: &str| -> Vec<String> {
        let names = checkpoint.names().filter(|name| name.contains(part));
        let mut forms: Vec<_> =
            names.map(|name| name.rsplit_once(':').unwrap().1.to_owned()).collect();
        forms.sort();
        forms
    };
    assert_eq!(forms("down_proj"), ["bf16", "int8", "int8", "int8"]);
    assert_eq!(forms("self_attn.q_proj"), ["int4"; 4]);
    bits(&load(&out, options(Quantization::Auto)).unwrap());

    let rules = vec![rule("*no such*", Quantization::Int8)];
    let wrong = Quantize { rules, ..how(Quantization::Int4) };
    let error = write(&root("models/tales-1m"), &place.0.join("b"), wrong).unwrap_err();
    assert!(error.to_string().starts_with("rules: found \"*no such*\", expected a pattern"));
}

#[test]
fn calibration_lessens_the_error() {
    let (model, place) = (root("models/tales-1m"), Folder::new());
    let tokenizer = ferrule::tokenizer::Tokenizer::open(&model).unwrap();
    let text = fs::read_to_string(root("models/training/heldout_stories.txt")).unwrap();
    let (seen, unseen) = text.split_at(30_000);
    let ids = |text: &str| tokenizer.encode(&text[..8_000], true, false).unwrap();
    let calibration = ids(seen).chunks_exact(256).map(<[u32]>::to_vec).collect();
    write(&model, &place.0.join("plain"), how(Quantization::Int4)).unwrap();
    let knowing = Quantize { calibration, ..how(Quantization::Int4) };
    write(&model, &place.0.join("knowing"), knowing).unwrap();
    let exact = load(&model, options(Quantization::None)).unwrap();
    let windows = ferrule::evaluate::chunks(&ids(unseen), 256, Some(0));
    let kl = |name: &str| {
        let model = load(&place.0.join(name), options(Quantization::Auto)).unwrap();
        let stop = AtomicBool::new(false);
        let found =
            ferrule::evaluate::evaluate(&model, Some(&exact), &windows, 2, &stop, &mut |_| {});
        found.unwrap().distance.unwrap().kl.value
    };
    let (plain, knowing) = (kl("plain"), kl("knowing"));
    assert!(knowing < 0.7 * plain, "{knowing} is not clearly less than {plain}");
}

/// Text of the trained models as contexts of 256, from a byte on.
fn contexts(from: usize, count: usize) -> Vec<Vec<u32>> {
    let model = root("models/tales-1m");
    let tokenizer = ferrule::tokenizer::Tokenizer::open(&model).unwrap();
    let text = fs::read_to_string(root("models/training/heldout_stories.txt")).unwrap();
    let ids = tokenizer.encode(&text[from..from + 2000 * count], true, false).unwrap();
    ids.chunks_exact(256).take(count).map(<[u32]>::to_vec).collect()
}

#[test]
fn bits_go_where_they_lessen_the_divergence() {
    let (model, place) = (root("models/tales-1m"), Folder::new());
    let exact = load(&model, options(Quantization::None)).unwrap();
    let mixed = |bits, rules: Vec<Rule>| {
        // A rule holds whatever was measured.
        let calibration = contexts(0, if rules.is_empty() { 4 } else { 1 });
        Quantize { bits: Some(bits), calibration, rules, ..how(Quantization::Int4) }
    };
    let kl = |name: &str, how: Quantize| {
        let out = place.0.join(name);
        let written = write(&model, &out, how).unwrap();
        let model = load(&out, options(Quantization::Auto)).unwrap();
        let windows = contexts(50_000, 4);
        let windows: Vec<_> =
            windows.into_iter().filter_map(|ids| ferrule::evaluate::document(ids, 256)).collect();
        let stop = AtomicBool::new(false);
        let found =
            ferrule::evaluate::evaluate(&model, Some(&exact), &windows, 2, &stop, &mut |_| {});
        (found.unwrap().distance.unwrap().kl.value, written)
    };
    let (five, written) =
        kl("five", Quantize { calibration: contexts(0, 4), ..how(Quantization::Int5) });
    let bits = written.bits_per_weight;
    let (found, written) = kl("mixed", mixed(bits, Vec::new()));
    assert!(written.bits_per_weight <= bits && written.bits_per_weight > bits - 0.3);
    assert!(written.forms.len() > 1, "{:?}", written.forms);
    assert!(found < 0.9 * five, "{found} is not less than {five}, that of int5");

    // What a rule says stays.
    let rule = |form| vec![Rule { pattern: "*embed*".into(), form }];
    let (_, written) = kl("rule", mixed(6.0, rule(Quantization::Int5)));
    let embed = Checkpoint::open(&place.0.join("rule")).unwrap();
    assert!(embed.get("model.embed_tokens.weight:int5").is_some());
    assert!(written.bits_per_weight <= 6.0);

    let out = place.0.join("no");
    for (how, expected) in [
        (mixed(3.0, Vec::new()), "bits: found 3, expected 4.9"),
        (mixed(f64::NAN, Vec::new()), "bits: found NaN, expected 4.9"),
        (Quantize { calibration: Vec::new(), ..mixed(5.0, Vec::new()) }, "a calibration text"),
        (Quantize { format: Quantization::Int5, ..mixed(6.0, Vec::new()) }, "format \"int4\""),
    ] {
        let error = write(&model, &out, how).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    assert!(!out.exists());
}

#[test]
fn what_is_beside_the_weights_comes_along() {
    let place = Folder::new();
    let out = place.0.join("deep/er");
    write(&root("models/tales-1m"), &out, how(Quantization::Int8)).unwrap();
    let own = |name: &str| fs::read(out.join(name)).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        assert_eq!(own(name), fs::read(root("models/tales-1m").join(name)).unwrap());
    }
    let config: serde_json::Value = serde_json::from_slice(&own("config.json")).unwrap();
    assert_eq!(config["quantization_config"]["quant_method"], "ferrule");
    assert_eq!(config["hidden_size"], 128);
}

#[test]
fn nothing_is_left_of_what_was_stopped() {
    let place = Folder::new();
    let out = place.0.join("out");
    let stop = AtomicBool::new(false);
    let stopping = |what: &'static str, done: u64, _: u64| {
        assert_eq!(what, "quantizing");
        stop.store(done > 100_000, Ordering::Relaxed);
    };
    let model = root("models/tales-1m");
    let found = quantize(&model, &out, how(Quantization::Int4), &stop, &stopping);
    assert!(matches!(found, Err(Error::Interrupted)));
    assert_eq!(place.names(), [""; 0]);
}

#[test]
fn what_is_there_is_not_overwritten() {
    let place = Folder::new();
    fs::write(place.0.join("a"), "b").unwrap();
    let found = write(&root("models/tales-1m"), &place.0, how(Quantization::Int4));
    assert!(found.unwrap_err().to_string().contains("expected a path where nothing is"));
    assert_eq!(place.names(), ["a"]);
}

#[test]
fn another_form_than_the_stored_one_is_an_error() {
    let place = Folder::new();
    let out = place.0.join("out");
    write(&root("models/tales-1m"), &out, how(Quantization::Int4)).unwrap();
    load(&out, options(Quantization::Int4)).unwrap();
    for wanted in [Quantization::Int8, Quantization::None] {
        let error = load(&out, options(wanted)).err().unwrap().to_string();
        assert!(error.contains("loaded with quantization=\"auto\" only"), "{error}");
    }
    let error = write(&out, &place.0.join("again"), how(Quantization::Int4)).unwrap_err();
    assert!(error.to_string().contains("was made by `ferrule quantize`"));
}

#[test]
fn damage_is_found() {
    let place = Folder::new();
    for (format, at, byte) in [
        (Quantization::Int4, 128, 0x80u8), // an offset of -128
        (Quantization::Int4, 3, 0x7f),     // a scale that is not a number
        (Quantization::Int8, 200, 0x80),   // a weight of -128
        (Quantization::Int8, 3, 0xff),
        (Quantization::Int5, 3, 0x7c), // the second row's scale is infinite
        (Quantization::Int6, 3, 0x7e), // not a number
    ] {
        let out = place.0.join(format!("{format:?}{at}"));
        write(&root("models/tales-1m"), &out, how(format)).unwrap();
        let file = out.join("model.safetensors");
        let mut bytes = fs::read(&file).unwrap();
        let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        assert_eq!(data % 64, 0, "matrices are mapped: they begin at lines of the cache");
        bytes[data + at] = byte;
        if at == 3 {
            bytes[data + 2] = 0x80;
        }
        fs::write(&file, bytes).unwrap();
        let error = load(&out, options(Quantization::Auto)).err().unwrap().to_string();
        assert!(error.contains("found values that no packer writes"), "{error}");
    }
}

#[test]
fn unknown_fields_and_versions_are_errors() {
    let place = Folder::new();
    let out = place.0.join("out");
    write(&root("models/tales-1m"), &out, how(Quantization::Int4)).unwrap();
    let path = out.join("config.json");
    let config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for (key, value, expected) in [
        ("version", 2.into(), "version: found 2, expected 1"),
        ("zeros", true.into(), "zeros: not known"),
    ] {
        let mut config = config.clone();
        config["quantization_config"][key] = value;
        fs::write(&path, config.to_string()).unwrap();
        let error = load(&out, options(Quantization::Auto)).err().unwrap().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

/// Writes a checkpoint of f32 tensors.
fn checkpoint(folder: &Path, tensors: &[(String, Vec<usize>, Vec<f32>)]) {
    use ferrule::file::{Dtype, Writer};
    let heads: Vec<_> =
        tensors.iter().map(|(name, shape, _)| (name.clone(), Dtype::F32, shape.clone())).collect();
    let mut writer = Writer::new(&folder.join("model.safetensors"), &heads).unwrap();
    for (_, _, values) in tensors {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        writer.tensor(&bytes).unwrap();
    }
    writer.finish().unwrap();
}

/// The tensors of tales-1m as f32.
fn tensors() -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let checkpoint = Checkpoint::open(&root("models/tales-1m")).unwrap();
    let tensors = checkpoint.names().map(|name| {
        let tensor = checkpoint.tensor(name).unwrap();
        let value = |b: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
        let values = tensor.bytes.as_chunks().0.iter().map(value).collect();
        (name.to_owned(), tensor.shape.to_vec(), values)
    });
    tensors.collect()
}

#[test]
fn layers_that_were_cut_out_are_not_missed() {
    let place = Folder::new();
    let source = root("models/tales-1m");
    let mut config: serde_json::Value =
        serde_json::from_slice(&fs::read(source.join("config.json")).unwrap()).unwrap();
    config["num_hidden_layers"] = 3.into();
    fs::write(place.0.join("config.json"), config.to_string()).unwrap();
    // Layer 1 is gone, and the others have moved up.
    let mut kept = Vec::new();
    for (name, shape, values) in tensors() {
        let layer = (0..4).find(|l| name.starts_with(&format!("model.layers.{l}.")));
        let name = match layer {
            Some(1) => continue,
            Some(l) if l > 1 => name.replace(&format!(".{l}."), &format!(".{}.", l - 1)),
            _ => name,
        };
        kept.push((name, shape, values));
    }
    checkpoint(&place.0, &kept);
    let whole = load(&source, options(Quantization::Int8)).unwrap();
    let pruned = load(&place.0, options(Quantization::Int8)).unwrap();
    assert_eq!((whole.spec.layers.len(), pruned.spec.layers.len()), (4, 3));
    assert_ne!(bits(&whole), bits(&pruned));
    let out = place.0.join("out");
    write(&place.0, &out, how(Quantization::Int8)).unwrap();
    assert_eq!(bits(&load(&out, options(Quantization::Auto)).unwrap()), bits(&pruned));
}

#[test]
fn weights_that_a_form_cannot_hold_are_errors() {
    let (place, source) = (Folder::new(), root("models/tales-1m"));
    fs::copy(source.join("config.json"), place.0.join("config.json")).unwrap();
    for (weight, form, expected) in [
        (1e30, Quantization::Int5, "too large for int5"),
        (1e30, Quantization::Int6, "too large for int6"),
        (f32::NAN, Quantization::Int6, "not finite"),
        (f32::INFINITY, Quantization::Int4, "not finite"),
    ] {
        let mut all = tensors();
        let down = "model.layers.1.mlp.down_proj.weight";
        let (_, _, values) = all.iter_mut().find(|(name, ..)| name == down).unwrap();
        values[700] = weight;
        checkpoint(&place.0, &all);
        let out = place.0.join("out");
        let error = write(&place.0, &out, how(form)).unwrap_err().to_string();
        assert!(error.contains(down) && error.contains(expected), "{error}");
        assert!(!out.exists());
        fs::remove_file(place.0.join("model.safetensors")).unwrap();
    }
}

#[test]
fn pruned_weights_stay_zero() {
    // Of each four weights in a row the two smallest are zero (2:4), in every other layer whole blocks of 16 by 16.
    let place = Folder::new();
    let source = root("models/tales-1m");
    fs::copy(source.join("config.json"), place.0.join("config.json")).unwrap();
    let mut all = tensors();
    for (name, shape, values) in &mut all {
        if shape.len() != 2 || !name.contains("layers") {
            continue;
        }
        let k = shape[1];
        if name.contains(".0.") || name.contains(".2.") {
            for (i, x) in values.iter_mut().enumerate() {
                if (i / k / 16 + i % k / 16) % 2 == 0 {
                    *x = 0.0;
                }
            }
        } else {
            for four in values.chunks_mut(4) {
                let mut order = [0, 1, 2, 3];
                order.sort_by(|&a, &b| four[a].abs().total_cmp(&four[b].abs()));
                (four[order[0]], four[order[1]]) = (0.0, 0.0);
            }
        }
    }
    checkpoint(&place.0, &all);
    let calibration = vec![(0..200).map(|i| i * 7 % 2048).collect::<Vec<u32>>()];
    for (name, format, calibration) in [
        ("a", Quantization::Int4, Vec::new()),
        ("b", Quantization::Int8, Vec::new()),
        ("c", Quantization::Int4, calibration.clone()),
        ("d", Quantization::Int8, calibration),
    ] {
        let out = place.0.join(name);
        write(&place.0, &out, Quantize { calibration, ..how(format) }).unwrap();
        let written = Checkpoint::open(&out).unwrap();
        let form = if format == Quantization::Int4 { "int4" } else { "int8" };
        let mut zeros = 0;
        for (tensor, shape, values) in &all {
            let Some(packed) = written.get(&format!("{tensor}:{form}")) else { continue };
            let form = if form == "int4" {
                ferrule::kernels::Form::Q4
            } else {
                ferrule::kernels::Form::Q8
            };
            let mut row = vec![0.0; shape[1]];
            for (i, values) in values.chunks(shape[1]).enumerate() {
                ferrule::kernels::layout::unpack_row(form, packed.bytes, i, &mut row);
                for (found, &value) in row.iter().zip(values) {
                    assert!(value != 0.0 || *found == 0.0, "{name}: {tensor} row {i}");
                    zeros += usize::from(value == 0.0);
                }
            }
        }
        assert!(zeros > 80_000, "{zeros}"); // the output and down projections
    }
}
