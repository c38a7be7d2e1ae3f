//! What an engine refuses at the door, and how a request fails alone.

use super::*;
use fake::{NAN_TOKEN, Trouble};

fn refused(change: impl FnOnce(&mut Request)) -> Error {
    let mut request = greedy(ids(1, 10), 5);
    change(&mut request);
    let mut engine = engine();
    let error = engine.submit(request).unwrap_err();
    assert!(engine.is_idle());
    error
}

#[test]
fn bad_requests_are_refused_with_the_reason() {
    let parameter = |field: &str, text: &str, change: fn(&mut Request)| {
        let error = refused(change);
        assert!(
            matches!(&error, Error::InvalidParameter { field: f, .. } if *f == field),
            "{error:?}"
        );
        assert!(error.to_string().contains(text), "{error}");
    };
    parameter("prompt", "no tokens", |r| r.prompt.clear());
    parameter("prompt", "id 400 at index 3", |r| r.prompt[3] = 400);
    parameter("stop_token_ids", "id 4294967295 at index 0", |r| r.stop_token_ids = vec![u32::MAX]);
    parameter("stop", "at 1", |r| r.stop = vec!["a".into(), String::new()]);
    parameter("max_tokens", "prompt_logits", |r| r.max_tokens = Some(0));
    parameter("min_tokens", "at most 5", |r| r.min_tokens = 6);
    parameter("logprobs", "at most 400", |r| r.logprobs = Some(401));
    parameter("prompt_logprobs", "at most 400", |r| r.prompt_logprobs = Some(usize::MAX));
    assert!(matches!(
        refused(|r| r.sampling.temperature = -1.0),
        Error::InvalidParameter { field: "temperature", .. }
    ));
}

#[test]
fn what_does_not_fit_is_refused_with_the_numbers() {
    let numbers = |error| match error {
        Error::ContextLength { prompt_tokens, max_tokens, context_length } => {
            (prompt_tokens, max_tokens, context_length)
        }
        other => panic!("{other:?}"),
    };
    let prompt = |len| move |r: &mut Request| (r.prompt, r.max_tokens) = (ids(1, len), None);
    assert_eq!(numbers(refused(prompt(CONTEXT))), (CONTEXT, None, CONTEXT));
    assert_eq!(numbers(refused(|r| r.max_tokens = Some(631))), (10, Some(631), CONTEXT));
    let huge = numbers(refused(|r| r.max_tokens = Some(usize::MAX)));
    assert_eq!(huge, (10, Some(usize::MAX), CONTEXT));
    let scored = numbers(refused(|r| {
        (r.prompt, r.max_tokens, r.prompt_logits) = (ids(1, CONTEXT + 1), Some(0), true);
    }));
    assert_eq!(scored, (CONTEXT + 1, Some(0), CONTEXT));
    // A cache of four pages.
    let config = EngineConfig { kv_bytes: 4 * PAGE_BYTES as u64 + 1, ..config() };
    let mut engine = engine_of(Fake::new(&[Sees::All], CONTEXT), config);
    assert_eq!(engine.context_length(), 256);
    match engine.submit(greedy(ids(1, 200), 57)).unwrap_err() {
        Error::OutOfMemory { what, requested: 5000, available: 4000 } => {
            assert!(what.contains("257 tokens") && what.contains("256"), "{what}");
        }
        other => panic!("{other:?}"),
    }
    let long = Request { max_tokens: None, min_tokens: 57, ..greedy(ids(1, 200), 1) };
    assert!(matches!(engine.submit(long), Err(Error::OutOfMemory { .. })));
    engine.submit(greedy(ids(1, 200), 56)).unwrap();
    engine.submit(Request { max_tokens: None, ..greedy(ids(1, 250), 1) }).unwrap();
    let lengths = finish(&mut engine).iter().map(|o| o.ids.len()).collect::<Vec<_>>();
    assert_eq!(lengths, [56, 6]);
}

#[test]
fn a_full_queue_says_so() {
    let mut engine = engine_of(
        Fake::new(&[Sees::All], CONTEXT),
        EngineConfig { max_batch: 2, max_queue: 1, ..config() },
    );
    for _ in 0..3 {
        engine.submit(greedy(ids(1, 10), 3)).unwrap();
    }
    let error = engine.submit(greedy(ids(1, 10), 3)).unwrap_err();
    assert!(matches!(error, Error::QueueFull { queued: 1, limit: 1 }), "{error:?}");
    assert_eq!(engine.step().len(), 2);
    assert_eq!((engine.stats().running, engine.stats().waiting), (2, 1));
    engine.submit(greedy(ids(1, 10), 3)).unwrap_err();
    while !engine.is_idle() {
        engine.step();
    }
    engine.submit(greedy(ids(1, 10), 3)).unwrap();
}

#[test]
fn bad_settings_are_refused() {
    let refused = |change: fn(&mut EngineConfig)| {
        let mut config = config();
        change(&mut config);
        let fake = Arc::new(Fake::new(&[Sees::All; 2], CONTEXT));
        Engine::new(fake, TOKENIZER.clone(), vec![1], config).err().unwrap()
    };
    for (field, change) in [
        ("max_batch", (|c| c.max_batch = 0) as fn(&mut EngineConfig)),
        ("chunk_tokens", |c| c.chunk_tokens = 0),
        ("context_length", |c| c.context_length = 0),
        ("context_length", |c| c.context_length = CONTEXT + 1),
    ] {
        let error = refused(change);
        assert!(
            matches!(error, Error::InvalidParameter { field: f, .. } if f == field),
            "{error:?}"
        );
    }
    let error = refused(|c| c.kv_bytes = 1999);
    assert!(
        matches!(error, Error::OutOfMemory { requested: 2000, available: 1999, .. }),
        "{error:?}"
    );
    let fake = Arc::new(Fake::new(&[Sees::All], CONTEXT));
    let error = Engine::new(fake, TOKENIZER.clone(), vec![1, 400], config()).err().unwrap();
    assert!(error.to_string().contains("400"), "{error}");
}

/// Runs `bad` between two good requests; they must not notice. Its error.
fn fails_alone(bad: Request) -> String {
    let mut engine = engine();
    engine.submit(greedy(ids(1, 100), 10)).unwrap();
    engine.submit(bad).unwrap();
    engine.submit(greedy(ids(2, 100), 10)).unwrap();
    let mut outcomes = finish(&mut engine);
    let bad = outcomes.remove(1);
    for (outcome, seed) in outcomes.iter().zip([1, 2]) {
        assert_eq!(outcome.ids, run(greedy(ids(seed, 100), 10)).ids);
    }
    bad.error.unwrap()
}

struct Raises;

impl LogitsProcessor for Raises {
    fn process(&mut self, ids: &[u32], logits: &mut [f32]) -> Result<()> {
        match ids.len() {
            12 => Err(Error::Processor("ValueError: no".into())),
            11 => {
                logits[4] = f32::NAN;
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

#[test]
fn a_processor_fails_its_own_request() {
    let with = |len| Request { processors: vec![Box::new(Raises)], ..greedy(ids(3, len), 9) };
    assert_eq!(fails_alone(with(12)), "ValueError: no");
    let error = fails_alone(with(10));
    assert!(error.contains("id 4") && error.contains("token 1 of the answer"), "{error}");
}

#[test]
fn a_ban_on_everything_fails_its_own_request() {
    let request = Request {
        stop_token_ids: (0..VOCAB as u32).collect(),
        min_tokens: 1,
        ..greedy(ids(3, 10), 9)
    };
    assert!(fails_alone(request).contains("no token that is allowed"));
}

#[test]
fn nan_logits_fail_their_own_request_with_the_position() {
    let prompt = [ids(3, 100), vec![NAN_TOKEN]].concat();
    let error = fails_alone(greedy(prompt.clone(), 9));
    assert!(error.contains("position 100") && error.contains("NaN"), "{error}");
    let prompt = [prompt, ids(1, 20)].concat();
    let error = fails_alone(Request { prompt_logprobs: Some(0), ..greedy(prompt, 9) });
    assert!(error.contains("position 100"), "{error}");
}

#[test]
fn an_error_of_the_model_fails_the_batch_and_no_more() {
    let mut fake = Fake::new(&[Sees::All, Sees::Window(100)], CONTEXT);
    fake.trouble = vec![(2, Trouble::Error)];
    let mut engine = engine_of(fake, config());
    for seed in 1..3 {
        engine.submit(greedy(ids(seed, 100), 10)).unwrap();
    }
    let outcomes = finish(&mut engine);
    assert_eq!(outcomes.len(), 2);
    for outcome in outcomes {
        assert_eq!(outcome.ids.len(), 2);
        assert!(outcome.error.unwrap().contains("the fake broke"));
    }
    engine.submit(greedy(ids(1, 100), 10)).unwrap();
    let again = finish(&mut engine).pop().unwrap();
    assert_eq!((again.cached, again.ids), (99, run(greedy(ids(1, 100), 10)).ids));
}
