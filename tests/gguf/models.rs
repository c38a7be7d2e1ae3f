//! GGUF models against reference logits from their dequantized weights, in f32.

use super::tokenizers::{goldens, models};
use ferrule::backend::cpu::Cpu;
use ferrule::file::Checkpoint;
use ferrule::model::{
    Chunk, Forward, KvDtype, LoadOptions, Model, PAGE, Quantization, Wanted, load,
};
use std::path::Path;
use std::sync::atomic::AtomicBool;

fn options(quantization: Quantization) -> LoadOptions {
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
struct Session<'a> {
    model: &'a Model<Cpu>,
    kv: <Model<Cpu> as Forward>::Kv,
    pages: Vec<Vec<u32>>,
    len: usize,
}

impl<'a> Session<'a> {
    fn new(model: &'a Model<Cpu>) -> Session<'a> {
        let groups = model.kv_groups().len();
        let pages = vec![(0..4).collect(); groups];
        Session { model, kv: model.new_kv(&vec![4; groups]).unwrap(), pages, len: 0 }
    }
    fn feed(&mut self, tokens: &[u32], wanted: Wanted) -> Vec<f32> {
        let chunk = Chunk { tokens, start: self.len, pages: &self.pages, wanted };
        self.len += tokens.len();
        assert!(self.len <= 4 * PAGE);
        self.model.forward(&mut self.kv, &[chunk], &AtomicBool::new(false)).unwrap()
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
                let Some(greedy) = golden.ints(&format!("{kind}.{prompt}.greedy")) else { continue };
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
