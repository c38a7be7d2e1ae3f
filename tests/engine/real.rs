//! The engine on real models: the same answers as its fake promises, bit for bit.

use super::*;
use ferrule::backend::cpu::Cpu;
use ferrule::model::{KvDtype, LoadOptions, Model, Quantization, load};

fn open(folder: &str, options: LoadOptions) -> (Arc<Model<Cpu>>, Arc<Tokenizer>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    (Arc::new(load(&folder, options).unwrap()), Arc::new(Tokenizer::open(&folder).unwrap()))
}

/// Requests that share prompts in part, sampled and greedy, one scored.
fn request(i: u64) -> Request {
    let own = ids(i as u32 + 1, 40 + 17 * i as usize);
    let sampling = Sampling { temperature: (i & 1) as f32, seed: i, ..Sampling::default() };
    Request {
        max_tokens: Some(100),
        sampling,
        logprobs: Some(2),
        prompt_logprobs: (i == 3).then_some(1),
        prompt_logits: i == 3,
        ..Request::new([ids(1 + i as u32 / 4, 150), own].concat())
    }
}

#[test]
fn company_cache_and_chunks_change_no_bit() {
    let cases = [
        ("tests/golden/gemma3-a", Quantization::None, KvDtype::F32),
        ("tests/golden/gemma3-a", Quantization::Int4, KvDtype::F16),
        ("tests/golden/mistral-a", Quantization::Int8, KvDtype::Int8),
        ("models/tales-1m", Quantization::Int4, KvDtype::F16),
        ("tests/golden/lfm3-a", Quantization::Int8, KvDtype::F16),
        ("tests/golden/qwen35-a", Quantization::Int4, KvDtype::Int8),
    ];
    for (folder, quantization, kv_dtype) in cases {
        let options =
            LoadOptions { quantization, kv_dtype, threads: Some(2), ..Default::default() };
        let (model, tokenizer) = open(folder, options);
        let start = |config| Engine::new(model.clone(), tokenizer.clone(), vec![], config).unwrap();
        let ample = EngineConfig { prefix_cache: false, max_batch: 1, ..config() };
        let answer = |i| {
            let mut engine = start(ample.clone());
            engine.submit(request(i)).unwrap();
            finish(&mut engine).pop().unwrap()
        };
        let alone: Vec<Outcome> = (0..8).map(answer).collect();
        let context_length = 512;
        let kv_bytes = 2 * ferrule::model::kv::bytes_for(&model.kv_groups(), context_length, 50);
        let tight = EngineConfig { kv_bytes, chunk_tokens: 50, context_length, ..config() };
        let mut engine = start(tight);
        for i in 0..8 {
            engine.submit(request(i)).unwrap();
        }
        let mut together = finish(&mut engine);
        if ["models/tales-1m", "tests/golden/qwen35-a"].contains(&folder) {
            assert!(together.iter().any(|outcome| outcome.cached > 0), "{folder}");
            assert!(engine.stats().preemptions > 0, "{folder}");
        }
        for (i, (alone, together)) in alone.iter().zip(&mut together).enumerate() {
            together.cached = 0;
            assert_eq!(alone, together, "{folder} {quantization:?} request {i}");
        }
    }
}

#[test]
fn states_survive_interrupts_in_the_middle_of_a_step() {
    for folder in ["tests/golden/lfm3-a", "tests/golden/qwen35-a"] {
        let options = LoadOptions { threads: Some(2), ..Default::default() };
        let (model, tokenizer) = open(folder, options);
        let answers = |interrupts: u32| {
            let config = EngineConfig { chunk_tokens: 90, ..config() };
            let mut engine = Engine::new(model.clone(), tokenizer.clone(), vec![], config).unwrap();
            for i in 0..4 {
                engine.submit(request(i)).unwrap();
            }
            let flag = engine.interrupt();
            std::thread::scope(|scope| {
                scope.spawn(move || {
                    for i in 0..interrupts {
                        std::thread::sleep(std::time::Duration::from_micros(
                            u64::from(i) % 7 * 100,
                        ));
                        flag.store(true, Ordering::SeqCst);
                    }
                });
                finish(&mut engine)
            })
        };
        assert_eq!(answers(500), answers(0), "{folder}");
    }
}

#[test]
fn tales_tells_the_story_of_its_reference() {
    let options = LoadOptions { quantization: Quantization::None, ..Default::default() };
    let (model, tokenizer) = open("models/tales-4m", options);
    let mut engine = Engine::new(model, tokenizer.clone(), vec![1, 5], config()).unwrap();
    let prompt = tokenizer.encode("Once upon a time", true, false).unwrap();
    // transformers, greedy.
    let expected = [
        17, 497, 281, 263, 1395, 585, 499, 901, 19, 901, 356, 263, 903, 1041, 17, 380, 386, 483,
        263, 1082, 1473, 666, 639, 1498, 19, 460, 448, 17, 901, 427, 287, 268, 997, 19, 410, 281,
        263, 1544, 17, 1617,
    ];
    engine.submit(greedy(prompt, expected.len())).unwrap();
    assert_eq!(finish(&mut engine)[0].ids, expected);
}
