//! A request's answer is that of the request alone in an engine with room for everything: whoever
//! else runs, however small the cache, the chunks and the batch, whatever is cached, lost or cancelled.

use super::*;
use fake::Trouble;
use proptest::prelude::*;

/// Text that tokens of the fake's vocabulary spell now and then.
const STOPS: [&str; 4] = ["e", "th", "a b", "\u{fffd}"];
/// Many, so that some are drawn.
const ENDS: std::ops::Range<u32> = 20..35;

#[derive(Clone, Debug)]
struct Ask {
    step: usize, // when it arrives
    kind: u32,   // those of a kind begin with the same tokens
    common: usize,
    own: usize,
    max_tokens: Option<usize>,
    min_tokens: usize,
    stop: Vec<usize>,
    sampled: bool,
    seed: u64,
    logprobs: bool,
    prompt_logprobs: bool,
    prompt_logits: bool,
    cancel: Option<usize>, // how many steps after it arrived
}

impl Ask {
    fn request(&self) -> Request {
        let mut prompt = ids(self.kind, self.common);
        prompt.extend(ids(self.seed as u32 % 50, self.own));
        let sampling = match self.sampled {
            false => Sampling { temperature: 0.0, ..Sampling::default() },
            true => Sampling {
                temperature: 0.8,
                top_k: 50,
                top_p: 0.9,
                repetition_penalty: 1.1,
                frequency_penalty: 0.2,
                seed: self.seed,
                ..Sampling::default()
            },
        };
        let most = self.max_tokens.unwrap_or(CONTEXT - prompt.len());
        Request {
            max_tokens: self.max_tokens,
            min_tokens: self.min_tokens.min(most),
            sampling,
            stop: self.stop.iter().map(|&i| STOPS[i].to_string()).collect(),
            logprobs: self.logprobs.then_some(2),
            prompt_logprobs: self.prompt_logprobs.then_some(1),
            prompt_logits: self.prompt_logits,
            ..Request::new(prompt)
        }
    }
}

fn ask() -> impl Strategy<Value = Ask> {
    let rare = || prop::bool::weighted(0.1);
    let prompt = (0usize..25, 1u32..4, 0usize..260, 1usize..150);
    let answer = (
        prop::option::weighted(0.95, 1usize..90),
        prop_oneof![Just(0usize), 0usize..30],
        prop::collection::vec(0..STOPS.len(), 0..2),
    );
    let rest = (
        any::<bool>(),
        0u64..100,
        any::<bool>(),
        rare(),
        rare(),
        prop::option::weighted(0.2, 0usize..20),
    );
    (prompt, answer, rest).prop_map(
        |(
            (step, kind, common, own),
            (max_tokens, min_tokens, stop),
            (sampled, seed, logprobs, prompt_logprobs, prompt_logits, cancel),
        )| Ask {
            step,
            kind,
            common,
            own,
            max_tokens,
            min_tokens,
            stop,
            sampled,
            seed,
            logprobs,
            prompt_logprobs,
            prompt_logits,
            cancel,
        },
    )
}

fn sees() -> impl Strategy<Value = Vec<Sees>> {
    let sees = prop_oneof![
        2 => Just(Sees::All),
        2 => (1usize..200).prop_map(Sees::Window),
        1 => Just(Sees::State),
    ];
    prop::collection::vec(sees, 1..4)
}

fn start(mut fake: Fake, long_after: Option<usize>, config: EngineConfig) -> Engine<Fake> {
    fake.long_after = long_after;
    Engine::new(Arc::new(fake), TOKENIZER.clone(), ENDS.collect(), config).unwrap()
}

/// The request by itself: no cache, no chunks.
fn alone(sees: &[Sees], long_after: Option<usize>, ask: &Ask) -> Outcome {
    let config =
        EngineConfig { chunk_tokens: CONTEXT, max_batch: 1, prefix_cache: false, ..config() };
    let mut engine = start(Fake::new(sees, CONTEXT), long_after, config);
    engine.submit(ask.request()).unwrap();
    finish(&mut engine).pop().unwrap()
}

/// The smallest cache that holds one context, and some pages.
fn kv_bytes(sees: &[Sees], chunk: usize, extra: usize) -> u64 {
    let groups = Fake::new(sees, CONTEXT).kv_groups();
    ferrule::model::kv::bytes_for(&groups, CONTEXT, chunk) + (extra * PAGE_BYTES) as u64
}

fn same_answers(
    sees: &[Sees],
    long_after: Option<usize>,
    mut asks: Vec<Ask>,
    config: EngineConfig,
    interrupts: &[usize],
) -> std::result::Result<u64, TestCaseError> {
    asks.sort_by_key(|ask| ask.step);
    let mut fake = Fake::new(sees, CONTEXT);
    fake.trouble = interrupts.iter().map(|&call| (call, Trouble::Interrupted)).collect();
    let mut engine = start(fake, long_after, config);
    let mut outcomes = Outcomes::default();
    let mut arrivals = asks.iter().enumerate().peekable();
    for step in 0.. {
        prop_assert!(step < 50_000, "no end");
        while let Some((i, ask)) = arrivals.next_if(|(_, ask)| ask.step <= step) {
            prop_assert_eq!(engine.submit(ask.request()).unwrap(), i as RequestId);
        }
        for (i, ask) in asks.iter().enumerate() {
            if ask.cancel.is_some_and(|after| ask.step + after == step) {
                engine.cancel(i as RequestId);
            }
        }
        outcomes.add(engine.step());
        let stats = engine.stats();
        if engine.is_idle() && arrivals.peek().is_none() {
            prop_assert!(stats.pages.iter().all(|n| n.free + n.cached == n.total), "{:?}", stats);
            break;
        }
    }
    prop_assert_eq!(outcomes.0.len(), asks.len());
    for (i, ask) in asks.iter().enumerate() {
        let found = &outcomes.0[&(i as RequestId)];
        let mut expected = alone(sees, long_after, ask);
        prop_assert!(expected.error.is_none() && expected.reason.is_some());
        if found.reason == Some(FinishReason::Cancelled) {
            prop_assert!(ask.cancel.is_some());
            prop_assert!(expected.ids.starts_with(&found.ids));
            // A character cut short; what may have begun the stop string.
            let text = found.text.trim_end_matches('\u{fffd}');
            let whole = expected.text + expected.stop_match.as_deref().unwrap_or("");
            prop_assert!(whole.starts_with(text), "{:?} {:?}", found, whole);
            continue;
        }
        expected.cached = found.cached;
        prop_assert_eq!(found, &expected, "request {}", i);
    }
    Ok(engine.stats().preemptions)
}

proptest! {

    #[test]
    fn company_cache_chunks_and_interrupts_change_nothing(
        sees in sees(),
        long_after in prop::option::of(1usize..400),
        asks in prop::collection::vec(ask(), 1..8),
        chunk in prop_oneof![1usize..20, 20usize..700],
        max_batch in 1usize..6,
        extra in 0usize..12,
        prefix_cache in prop::bool::weighted(0.8),
        interrupts in prop::collection::vec(0usize..150, 0..10),
    ) {
        let kv_bytes = kv_bytes(&sees, chunk, extra);
        let config = EngineConfig { max_batch, chunk_tokens: chunk, kv_bytes, prefix_cache, ..config() };
        same_answers(&sees, long_after, asks, config, &interrupts)?;
    }
}

#[test]
fn preemption_changes_nothing() {
    let ask = |i: u64| Ask {
        step: i as usize,
        kind: 1,
        common: 100,
        own: 40,
        max_tokens: Some(300),
        min_tokens: 300,
        stop: vec![],
        sampled: i % 2 == 1,
        seed: i,
        logprobs: true,
        prompt_logprobs: i == 2,
        prompt_logits: false,
        cancel: None,
    };
    for prefix_cache in [true, false] {
        let cases = [
            vec![Sees::All],
            vec![Sees::All, Sees::Window(70)],
            vec![Sees::Window(130)],
            vec![Sees::All, Sees::State],
        ];
        for sees in cases {
            let kv_bytes = kv_bytes(&sees, 64, 10 * sees.len());
            let config =
                EngineConfig { max_batch: 6, chunk_tokens: 64, kv_bytes, prefix_cache, ..config() };
            let asks = (0..6).map(ask).collect();
            let preemptions = same_answers(&sees, None, asks, config, &[]).unwrap();
            assert!(preemptions > 0 || sees == [Sees::Window(130)], "{sees:?} {prefix_cache}");
        }
    }
}
