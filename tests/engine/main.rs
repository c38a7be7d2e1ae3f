//! The engine as its callers see it: on a fake model with the tokenizer of models/tales-4m, and on real
//! models.

mod checks;
mod fake;
mod real;
mod same_answers;

use fake::{Fake, PAGE_BYTES, VOCAB};
use ferrule::engine::{
    Engine, EngineConfig, Event, FinishReason, LogitsProcessor, Request, RequestId, TokenLogprobs,
};
use ferrule::model::{Forward, Sees};
use ferrule::sample::{self, Sampling, Scratch};
use ferrule::tokenizer::Tokenizer;
use ferrule::{Error, Result};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock};

static TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tales-4m");
    Arc::new(Tokenizer::open(&folder).unwrap())
});

const CONTEXT: usize = 640;

/// Room for everything.
fn config() -> EngineConfig {
    EngineConfig {
        max_batch: 16,
        max_queue: 100,
        chunk_tokens: 512,
        context_length: CONTEXT,
        kv_bytes: 1 << 30,
        prefix_cache: true,
    }
}

fn engine_of(fake: Fake, config: EngineConfig) -> Engine<Fake> {
    Engine::new(Arc::new(fake), TOKENIZER.clone(), vec![1, 5], config).unwrap()
}

fn engine() -> Engine<Fake> {
    engine_of(Fake::new(&[Sees::All, Sees::Window(100)], CONTEXT), config())
}

fn greedy(prompt: Vec<u32>, max_tokens: usize) -> Request {
    let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
    Request { max_tokens: Some(max_tokens), sampling, ignore_eos: true, ..Request::new(prompt) }
}

fn ids(seed: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| (seed * 37 + i * (seed + 1)) % 390 + 6).collect()
}

/// Draws these ids in order, whatever the logits.
struct Script {
    prompt_tokens: usize,
    answer: Vec<u32>,
}

impl LogitsProcessor for Script {
    fn process(&mut self, ids: &[u32], logits: &mut [f32]) -> Result<()> {
        logits.fill(f32::NEG_INFINITY);
        logits[self.answer[ids.len() - self.prompt_tokens] as usize] = 0.0;
        Ok(())
    }
}

/// A request whose answer is this text, or ends earlier.
fn says(text: &str) -> Request {
    let answer: Vec<u32> = TOKENIZER.encode(text, false, true).unwrap();
    assert!(answer.iter().all(|&id| (id as usize) < VOCAB), "{text}: {answer:?}");
    says_ids(answer)
}

fn says_ids(answer: Vec<u32>) -> Request {
    let max_tokens = Some(answer.len());
    let script = Script { prompt_tokens: 1, answer };
    Request { max_tokens, processors: vec![Box::new(script)], ..greedy(vec![9], 1) }
}

/// What came out of a request.
#[derive(Clone, Debug, Default, PartialEq)]
struct Outcome {
    text: String,
    ids: Vec<u32>,
    logprobs: Vec<TokenLogprobs>,
    reason: Option<FinishReason>,
    stop_match: Option<String>,
    cached: usize,
    prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
    prompt_logits: Option<Vec<f32>>,
    error: Option<String>,
}

/// Sorts events by request; whoever is over says no more.
#[derive(Default)]
struct Outcomes(BTreeMap<RequestId, Outcome>);

impl Outcomes {
    fn add(&mut self, events: Vec<Event>) {
        for event in events {
            let (Event::Chunk { id, .. } | Event::Done { id, .. } | Event::Failed { id, .. }) =
                event;
            let outcome = self.0.entry(id).or_default();
            assert!(outcome.reason.is_none() && outcome.error.is_none(), "over: {event:?}");
            match event {
                Event::Chunk { text, token_ids, logprobs, .. } => {
                    outcome.text.push_str(&text);
                    outcome.ids.extend(token_ids);
                    outcome.logprobs.extend(logprobs);
                }
                Event::Done {
                    reason,
                    stop_match,
                    cached_tokens,
                    completion_tokens,
                    prompt_logprobs,
                    prompt_logits,
                    ..
                } => {
                    assert_eq!(completion_tokens, outcome.ids.len());
                    outcome.reason = Some(reason);
                    outcome.stop_match = stop_match;
                    outcome.cached = cached_tokens;
                    outcome.prompt_logprobs = prompt_logprobs;
                    outcome.prompt_logits = prompt_logits;
                }
                Event::Failed { error, .. } => outcome.error = Some(error.to_string()),
            }
        }
    }
}

/// Steps until nothing is left.
fn finish<M: Forward>(engine: &mut Engine<M>) -> Vec<Outcome> {
    let mut outcomes = Outcomes::default();
    for _ in 0..100_000 {
        if engine.is_idle() {
            let stats = engine.stats();
            assert!(stats.pages.iter().all(|n| n.free + n.cached == n.total), "{stats:?}");
            return outcomes.0.into_values().collect();
        }
        outcomes.add(engine.step());
    }
    panic!("the engine does not end");
}

fn run(request: Request) -> Outcome {
    let mut engine = engine();
    engine.submit(request).unwrap();
    finish(&mut engine).pop().unwrap()
}

#[test]
fn the_answer_is_the_text_of_its_ids() {
    let outcome = run(greedy(ids(1, 100), 50));
    assert_eq!(outcome.ids.len(), 50);
    assert_eq!(outcome.text, TOKENIZER.decode(&outcome.ids, true).unwrap());
    assert_eq!(outcome.reason, Some(FinishReason::Length));
}

#[test]
fn max_tokens_none_is_the_rest_of_the_context() {
    let request = Request { max_tokens: None, ..greedy(ids(1, 600), 1) };
    let outcome = run(request);
    assert_eq!((outcome.ids.len(), outcome.reason), (CONTEXT - 600, Some(FinishReason::Length)));
}

#[test]
fn the_end_token_is_an_id_but_no_text() {
    for skip_special_tokens in [true, false] {
        let outcome =
            run(Request { ignore_eos: false, skip_special_tokens, ..says("the<|end|>the") });
        assert_eq!((outcome.ids.last(), outcome.text.as_str()), (Some(&5), "the"));
        assert_eq!((outcome.reason, outcome.stop_match), (Some(FinishReason::Stop), None));
    }
    let outcome = run(says("the<|end|>the"));
    assert_eq!((outcome.text.as_str(), outcome.reason), ("thethe", Some(FinishReason::Length)));
}

#[test]
fn a_stop_token_is_named() {
    let stop = TOKENIZER.id("e").unwrap();
    let outcome = run(Request { stop_token_ids: vec![stop], ..says_ids(vec![80, stop, 81]) });
    assert_eq!(outcome.ids, [80, stop]);
    assert_eq!(outcome.text, TOKENIZER.decode(&[80], true).unwrap());
    assert_eq!((outcome.reason, outcome.stop_match), (Some(FinishReason::Stop), Some("e".into())));
}

#[test]
fn a_stop_string_ends_the_text_before_it_over_token_borders() {
    let letters = |text: &str| -> Vec<u32> {
        text.chars().map(|c| TOKENIZER.id(&c.to_string()).unwrap()).collect()
    };
    let outcome = run(Request { stop: vec!["cde".into()], ..says_ids(letters("abcdcdefg")) });
    assert_eq!((outcome.text.as_str(), outcome.ids), ("abcd", letters("abcdcde")));
    assert_eq!(
        (outcome.reason, outcome.stop_match),
        (Some(FinishReason::Stop), Some("cde".into()))
    );
    // Held back text comes out when the answer ends without the stop string.
    let outcome = run(Request { stop: vec!["cdx".into()], ..says_ids(letters("abcd")) });
    assert_eq!((outcome.text.as_str(), outcome.reason), ("abcd", Some(FinishReason::Length)));
    let request = Request { stop: vec!["bc".into()], min_tokens: 2, ..says_ids(letters("bcbcbc")) };
    let outcome = run(request);
    assert_eq!((outcome.text.as_str(), outcome.ids), ("", letters("bc")));
    let request = Request { stop: vec!["bc".into()], min_tokens: 3, ..says_ids(letters("bcbcbc")) };
    let outcome = run(request);
    assert_eq!((outcome.text.as_str(), outcome.ids), ("bc", letters("bcbc")));
}

#[test]
fn characters_are_never_split() {
    // The three bytes of a euro sign, alone and then cut short.
    let euro: Vec<u32> = ["â", "Ĥ", "¬"].iter().map(|byte| TOKENIZER.id(byte).unwrap()).collect();
    let mut engine = engine();
    engine.submit(says_ids([&euro[..], &euro[..2]].concat())).unwrap();
    let mut texts = Vec::new();
    while !engine.is_idle() {
        for event in engine.step() {
            if let Event::Chunk { text, .. } = event {
                texts.push(text);
            }
        }
    }
    assert_eq!(texts, ["", "", "€", "", "\u{fffd}"]);
}

#[test]
fn end_tokens_are_banned_before_min_tokens() {
    // Every id but one ends the answer.
    let ends: Vec<u32> = (0..VOCAB as u32).filter(|&id| id != 50).collect();
    for min_tokens in [0, 1, 7] {
        let request = Request { stop_token_ids: ends.clone(), min_tokens, ..greedy(ids(1, 5), 20) };
        let outcome = run(request);
        assert_eq!(outcome.ids[..min_tokens], vec![50; min_tokens]);
        assert_eq!(outcome.ids.len(), min_tokens + 1);
    }
}

#[test]
fn logprobs_are_of_the_raw_logits() {
    let plain = run(Request { logprobs: Some(3), ..greedy(ids(1, 20), 5) });
    assert_eq!(plain.logprobs.len(), 5);
    for (id, logprobs) in plain.ids.iter().zip(&plain.logprobs) {
        assert_eq!((logprobs.token.id, logprobs.token.rank, logprobs.top.len()), (*id, 1, 3));
    }
    let mut biased = Request { logprobs: Some(3), ..greedy(ids(1, 20), 5) };
    biased.sampling.logit_bias = vec![(77, 100.0)];
    let biased = run(biased);
    assert_eq!(biased.ids, [77; 5]);
    assert_eq!(biased.logprobs[0].top, plain.logprobs[0].top);
    assert!(biased.logprobs[0].token.logprob < plain.logprobs[0].token.logprob);
    assert!(run(greedy(ids(1, 20), 5)).logprobs.is_empty());
}

/// All ids alike.
struct Flat;

impl LogitsProcessor for Flat {
    fn process(&mut self, _: &[u32], logits: &mut [f32]) -> Result<()> {
        logits.fill(0.0);
        Ok(())
    }
}

#[test]
fn the_coin_depends_on_the_seed_and_the_place_in_the_answer() {
    for (seed, prompt) in [(7, 1), (7, 30), (8, 30)] {
        let mut request = greedy(ids(1, prompt), 20);
        (request.sampling.temperature, request.sampling.seed) = (1.0, seed);
        request.processors = vec![Box::new(Flat)];
        let sampling = request.sampling.clone();
        let draw = |i| {
            sample::draw(&sampling, &[0.0; VOCAB], sample::coin(seed, i), &mut Scratch::default())
        };
        let expected: Vec<u32> = (0..20).map(|i| draw(i).unwrap()).collect();
        assert_eq!(run(request).ids, expected);
    }
}

#[test]
fn a_prompt_preempted_while_it_is_scored_is_scored_once() {
    let config = || EngineConfig { max_batch: 2, chunk_tokens: 1, ..config() };
    let scored =
        || Request { prompt_logits: true, prompt_logprobs: Some(0), ..greedy(ids(2, 250), 5) };
    let small = EngineConfig { kv_bytes: 5 * PAGE_BYTES as u64, ..config() };
    let mut engine = engine_of(Fake::new(&[Sees::All], CONTEXT), small);
    engine.submit(greedy(ids(1, 1), 300)).unwrap();
    engine.submit(scored()).unwrap();
    let outcomes = finish(&mut engine);
    assert_eq!(engine.stats().preemptions, 1);
    let mut engine = engine_of(Fake::new(&[Sees::All], CONTEXT), config());
    engine.submit(scored()).unwrap();
    assert_eq!(outcomes[1], finish(&mut engine)[0]);
}

#[test]
fn a_prompt_is_scored_at_every_position() {
    let prompt = ids(3, CONTEXT); // no room for an answer, none asked for
    let request = || Request { prompt_logits: true, ..greedy(prompt.clone(), 0) };
    let outcome = run(Request { prompt_logprobs: Some(1), ..request() });
    assert_eq!((outcome.reason, outcome.ids.len()), (Some(FinishReason::Length), 0));
    let logits = outcome.prompt_logits.unwrap();
    assert_eq!(logits.len(), CONTEXT * VOCAB);
    let logprobs = outcome.prompt_logprobs.unwrap();
    assert_eq!((logprobs.len(), &logprobs[0]), (CONTEXT, &None));
    for (i, row) in logits.chunks(VOCAB).enumerate().take(CONTEXT - 1) {
        let (token, top) = sample::logprobs(row, prompt[i + 1], 1);
        assert_eq!(logprobs[i + 1], Some(TokenLogprobs { token, top }));
    }
    // The last row is what the first token of an answer is drawn from.
    let first = run(greedy(prompt[..100].to_vec(), 1)).ids[0];
    let row = &logits[99 * VOCAB..100 * VOCAB];
    assert_eq!(row.iter().position(|x| row.iter().all(|y| y <= x)), Some(first as usize));
}

#[test]
fn scoring_and_answering_go_together() {
    let plain = run(greedy(ids(3, 200), 10));
    let both = run(Request { prompt_logprobs: Some(0), ..greedy(ids(3, 200), 10) });
    assert_eq!((both.ids, both.prompt_logprobs.unwrap().len()), (plain.ids, 200));
}

#[test]
fn a_prefix_in_the_cache_is_found_and_changes_nothing() {
    let mut engine = engine();
    let mut outcomes = Vec::new();
    for request in [
        greedy(ids(1, 200), 10),
        greedy(ids(1, 200), 10),
        Request { prompt_logprobs: Some(0), ..greedy(ids(1, 200), 10) },
    ] {
        engine.submit(request).unwrap();
        outcomes.extend(finish(&mut engine));
    }
    assert_eq!(outcomes.iter().map(|o| o.cached).collect::<Vec<_>>(), [0, 199, 0]);
    assert!(outcomes.iter().all(|o| o.ids == outcomes[0].ids));
    // The conversation goes on: the answer's pages are found too.
    let next = [ids(1, 200), outcomes[0].ids.clone(), ids(2, 60)].concat();
    engine.submit(greedy(next.clone(), 10)).unwrap();
    let warm = finish(&mut engine).pop().unwrap();
    assert_eq!((warm.cached, warm.ids), (209, run(greedy(next, 10)).ids));
    // Equal tokens after another first page are another page.
    for (first, second, cached) in [(3, 6, 0), (4, 2, 0), (3, 2, 64)] {
        let prompt = [ids(first, 64), ids(second, 100)].concat();
        engine.submit(greedy(prompt.clone(), 10)).unwrap();
        let outcome = finish(&mut engine).pop().unwrap();
        assert_eq!((outcome.cached, outcome.ids), (cached, run(greedy(prompt, 10)).ids));
    }
    let mut off = engine_of(
        Fake::new(&[Sees::All], CONTEXT),
        EngineConfig { prefix_cache: false, ..config() },
    );
    for _ in 0..2 {
        off.submit(greedy(ids(1, 200), 1)).unwrap();
        assert_eq!(finish(&mut off)[0].cached, 0);
    }
}

#[test]
fn a_state_is_found_where_a_prompt_ended_or_an_answer() {
    let sees = [Sees::All, Sees::State];
    let mut engine = engine_of(Fake::new(&sees, CONTEXT), config());
    let alone = |request: Request| {
        let config = EngineConfig { prefix_cache: false, max_batch: 1, ..config() };
        let mut engine = engine_of(Fake::new(&sees, CONTEXT), config);
        engine.submit(request).unwrap();
        finish(&mut engine).pop().unwrap()
    };
    let mut ask = |prompt: &[u32], max_tokens| {
        engine.submit(greedy(prompt.to_vec(), max_tokens)).unwrap();
        let found = finish(&mut engine).pop().unwrap();
        let expected = alone(greedy(prompt.to_vec(), max_tokens));
        assert_eq!((&found.ids, found.text), (&expected.ids, expected.text));
        (found.cached, found.ids)
    };
    let prompt = ids(1, 200);
    let (cached, answer) = ask(&prompt, 150);
    assert_eq!(cached, 0);
    assert_eq!(ask(&prompt, 1).0, 192);
    assert_eq!(ask(&[prompt.clone(), answer, ids(2, 60)].concat(), 1).0, 320);
    // Prompts that begin alike: the second computes all, and leaves the state where they part.
    let other = |own| [prompt[..150].to_vec(), ids(own, 100)].concat();
    assert_eq!([ask(&other(3), 1).0, ask(&other(4), 1).0], [0, 128]);
}

#[test]
fn answers_to_one_prompt_share_its_state() {
    let sees = [Sees::Window(80), Sees::State, Sees::All];
    let mut engine = engine_of(Fake::new(&sees, CONTEXT), config());
    let sampled = |seed| {
        let sampling = Sampling { temperature: 1.0, seed, ..Sampling::default() };
        Request { sampling, ..greedy(ids(1, 300), 100) }
    };
    for seed in 0..4 {
        engine.submit(sampled(seed)).unwrap();
    }
    let together = finish(&mut engine);
    for (seed, together) in together.iter().enumerate() {
        assert_eq!(together.cached, if seed == 0 { 0 } else { 256 });
        let mut engine = engine_of(Fake::new(&sees, CONTEXT), config());
        engine.submit(sampled(seed as u64)).unwrap();
        assert_eq!(finish(&mut engine)[0].ids, together.ids);
    }
}

#[test]
fn a_state_survives_interrupts_and_the_end_of_others() {
    let sees = [Sees::All, Sees::State];
    let mut engine = engine_of(Fake::new(&sees, CONTEXT), config());
    let first = engine.submit(greedy(ids(1, 100), 80)).unwrap();
    let second = engine.submit(greedy(ids(2, 100), 80)).unwrap();
    let mut outcomes = Outcomes::default();
    for step in 0.. {
        if engine.is_idle() {
            break;
        }
        if step % 3 == 1 {
            engine.interrupt().store(true, Ordering::SeqCst);
        }
        if step == 20 {
            engine.cancel(second);
        }
        outcomes.add(engine.step());
    }
    let mut alone = engine_of(Fake::new(&sees, CONTEXT), config());
    alone.submit(greedy(ids(1, 100), 80)).unwrap();
    assert_eq!(outcomes.0[&first].ids, finish(&mut alone)[0].ids);
    assert_eq!(outcomes.0[&second].reason, Some(FinishReason::Cancelled));
}

#[test]
fn cancelled_requests_give_what_they_have() {
    let mut engine = engine();
    let (a, b) =
        (engine.submit(greedy(ids(1, 600), 30)).unwrap(), engine.submit(says("the")).unwrap());
    assert!(engine.cancel(b) && !engine.cancel(b) && !engine.cancel(99));
    let mut outcomes = Outcomes::default();
    outcomes.add(engine.step()); // the first chunk of a prompt of 600
    assert!(engine.cancel(a));
    assert!(!engine.is_idle());
    assert_eq!(engine.stats().running, 0);
    outcomes.add(engine.step());
    assert!(engine.is_idle());
    for outcome in outcomes.0.values() {
        assert_eq!((outcome.reason, outcome.ids.len()), (Some(FinishReason::Cancelled), 0));
    }
    // Text held for a stop string comes out.
    let mut engine = self::engine();
    let id = engine.submit(Request { stop: vec!["thx".into()], ..says("thee") }).unwrap();
    let mut outcomes = Outcomes::default();
    outcomes.add(engine.step());
    engine.cancel(id);
    outcomes.add(engine.step());
    let outcome = &outcomes.0[&id];
    assert_eq!(outcome.text, TOKENIZER.decode(&outcome.ids, true).unwrap());
    assert!(!outcome.ids.is_empty());
}

#[test]
fn an_interrupt_loses_nobody() {
    let mut engine = engine();
    engine.submit(greedy(ids(1, 100), 10)).unwrap();
    let second = engine.submit(greedy(ids(2, 100), 10)).unwrap();
    let mut outcomes = Outcomes::default();
    outcomes.add(engine.step());
    engine.interrupt().store(true, Ordering::SeqCst);
    assert!(engine.step().is_empty());
    assert!(!engine.interrupt().load(Ordering::SeqCst));
    engine.cancel(second);
    while !engine.is_idle() {
        outcomes.add(engine.step());
    }
    assert_eq!(outcomes.0[&0].ids, run(greedy(ids(1, 100), 10)).ids);
    assert_eq!(outcomes.0[&second].reason, Some(FinishReason::Cancelled));
}
