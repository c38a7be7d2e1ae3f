//! The engine on the emulated device: sequences that share pages, join, wait and are preempted get the answers that the
//! engine gives on the CPU, and count the same cached positions.

use ferrule::engine::{Engine, EngineConfig, Event, Request};
use ferrule::model::kv::bytes_for;
use ferrule::model::{Forward, KvDtype, LoadOptions, Model, PAGE, Quantization, load, load_cuda};
use ferrule::sample::Sampling;
use ferrule::tokenizer::Tokenizer;
use std::path::Path;
use std::sync::Arc;

fn ids(seed: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| (seed * 37 + i * (seed + 1)) % 390 + 6).collect()
}

/// Two families of prompts that begin alike for a page and a bit, and end beside a page's end; every kind of drawing.
fn request(i: u64) -> Request {
    let plain = Sampling { temperature: 0.0, seed: i, ..Sampling::default() };
    let sampling = match i % 5 {
        0 => plain,
        1 => Sampling { temperature: 0.9, ..plain },
        2 => Sampling { temperature: 1.1, top_k: 30, top_p: 0.9, min_p: 0.01, ..plain },
        3 => Sampling {
            temperature: 0.8,
            repetition_penalty: 1.3,
            presence_penalty: 0.5,
            frequency_penalty: -0.2,
            logit_bias: vec![(7, 3.0), (11, -4.0)],
            ..plain
        },
        _ => Sampling { temperature: 1.0, typical_p: 0.7, ..plain },
    };
    let own = ids(i as u32 + 1, 45 + 2 * i as usize);
    Request {
        max_tokens: Some(10),
        sampling,
        ignore_eos: true,
        logprobs: (i == 4).then_some(2),
        ..Request::new([ids(1 + i as u32 / 3, PAGE + 9), own].concat())
    }
}

type Outcome = (Vec<u32>, usize, String);

/// Answers in the order of requests, then those of the first two again; and how often one was preempted.
fn answers<M: Forward>(model: M, folder: &Path, tight: bool) -> (Vec<Outcome>, u64) {
    let (context_length, chunk_tokens) = (192, 50);
    let enough = bytes_for(&model.kv_groups(), context_length, chunk_tokens);
    let config = EngineConfig {
        max_batch: 4,
        max_queue: 100,
        chunk_tokens,
        context_length,
        kv_bytes: if tight { enough * 5 / 4 } else { 1 << 30 },
        prefix_cache: true,
    };
    let tokenizer = Arc::new(Tokenizer::open(folder).unwrap());
    let mut engine = Engine::new(Arc::new(model), tokenizer, vec![], config).unwrap();
    let mut all = Vec::new();
    for requests in [0..6, 0..2] {
        let first = all.len();
        let known: Vec<_> = requests.map(|i| engine.submit(request(i)).unwrap()).collect();
        all.resize(first + known.len(), Outcome::default());
        while !engine.is_idle() {
            for event in engine.step() {
                let place = |id| first + known.iter().position(|known| *known == id).unwrap();
                match event {
                    Event::Chunk { id, token_ids, logprobs, .. } => {
                        let outcome = &mut all[place(id)];
                        outcome.0.extend(token_ids);
                        outcome.2 += &format!("{logprobs:?}");
                    }
                    Event::Done { id, cached_tokens, .. } => all[place(id)].1 = cached_tokens,
                    Event::Failed { error, .. } => panic!("{error}"),
                }
            }
        }
    }
    (all, engine.stats().preemptions)
}

#[test]
#[ignore = "on the emulated driver: see main.rs"]
fn engines() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (folder, quantization, kv_dtype, tight) in [
        ("models/tales-1m", Quantization::Int4, KvDtype::F16, false),
        ("tests/golden/mistral-a", Quantization::None, KvDtype::F32, true),
        ("tests/golden/qwen3-a", Quantization::Int8, KvDtype::Int8, true),
        ("tests/golden/qwen35-a", Quantization::Int4, KvDtype::F16, true),
    ] {
        let folder = root.join(folder);
        let options =
            || LoadOptions { quantization, kv_dtype, threads: Some(1), ..LoadOptions::default() };
        let cpu: Model<_> = load(&folder, options()).unwrap();
        let cuda = load_cuda(&folder, None, options()).unwrap();
        let (want, preempted) = answers(cpu, &folder, tight);
        let found = answers(cuda, &folder, tight);
        assert_eq!(found, (want.clone(), preempted), "{folder:?}");
        assert!(want.iter().any(|outcome| outcome.1 >= PAGE), "nothing was shared");
        let copied = want[6..].iter().any(|outcome| outcome.1 % PAGE > 0);
        assert!(copied || tight, "no part of a page was copied");
        for (first, again) in want.iter().zip(&want[6..]) {
            assert_eq!((&first.0, &first.2), (&again.0, &again.2), "{folder:?}: with cached pages");
        }
        println!(
            "{folder:?}: {preempted} preempted, cached {:?}",
            want.iter().map(|o| o.1).collect::<Vec<_>>()
        );
        // With a window, pages come back before they run out.
        assert_eq!(preempted > 0, tight && !folder.ends_with("mistral-a"), "{folder:?}");
    }
}
