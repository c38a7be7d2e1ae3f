//! Tests of the scheduler without a model: tokens are made up.

use super::*;
use crate::model::{KvGroup, Sees};
use proptest::prelude::*;

fn scheduler(
    sees: &[impl Into<Sees> + Copy],
    pages: &[usize],
    reuse: bool,
    max_batch: usize,
    chunk: usize,
) -> Scheduler<usize> {
    let groups: Vec<KvGroup> =
        sees.iter().map(|&sees| KvGroup { sees: sees.into(), page_bytes: 1 }).collect();
    Scheduler::new(KvPool::new(&groups, pages, reuse), max_batch, chunk)
}

fn prompt(kind: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| kind * 10_000 + i).collect()
}

fn check<T>(s: &Scheduler<T>) {
    let pages: Vec<&Pages> = s.slots.iter().map(|slot| &slot.pages).collect();
    s.pool.check(&pages).unwrap();
    assert!(s.slots.iter().all(|slot| slot.running || slot.pages.is_empty()));
}

/// Plans, commits, gives each finished prompt its next token; what was planned, by id.
fn step(s: &mut Scheduler<usize>) -> Vec<(RequestId, usize, usize)> {
    let plan = s.plan();
    check(s);
    for work in &plan {
        s.commit(work);
        let slot = &mut s.slots[work.slot];
        if work.end == slot.tokens.len() {
            slot.tokens.push(7);
        }
    }
    check(s);
    plan.iter().map(|work| (s.slots[work.slot].id, work.start, work.end)).collect()
}

#[test]
fn answers_take_one_position_and_prompts_the_rest_oldest_first() {
    let mut s = scheduler(&[Sees::All], &[100], false, 3, 100);
    for (id, len) in [(0, 30), (1, 150), (2, 40), (3, 10)] {
        s.push(id, prompt(id as u32, len), false, 0);
    }
    assert_eq!(step(&mut s), [(0, 0, 30), (1, 0, 70)]);
    assert_eq!(step(&mut s), [(0, 30, 31), (1, 70, 150), (2, 0, 20)]);
    // Three run, so the fourth waits though there is room.
    assert_eq!(step(&mut s), [(0, 31, 32), (1, 150, 151), (2, 20, 40)]);
    s.remove(1).unwrap();
    assert_eq!(step(&mut s), [(0, 32, 33), (2, 40, 41), (3, 0, 10)]);
    assert!(s.remove(1).is_none());
}

#[test]
fn an_uncommitted_plan_is_planned_again() {
    let mut s = scheduler(&[Sees::All, Sees::Window(70)], &[10, 10], true, 3, 100);
    s.push(0, prompt(1, 150), false, 0);
    step(&mut s);
    let plan = s.plan();
    assert_eq!(plan, s.plan());
    assert_eq!((plan[0].start, plan[0].end), (100, 150));
    check(&s);
}

#[test]
fn who_shares_a_prefix_waits_for_it() {
    let mut s = scheduler(&[Sees::All], &[100], true, 9, 1000);
    for id in 0..3 {
        s.push(id, prompt(1, 150), false, 0);
    }
    s.push(3, prompt(2, 150), false, 0);
    assert_eq!(step(&mut s), [(0, 0, 150), (3, 0, 150)]);
    let late = step(&mut s);
    assert_eq!(late, [(0, 150, 151), (1, 128, 150), (2, 128, 150), (3, 150, 151)]);
    assert_eq!(
        s.slots.iter().map(|slot| slot.cached).collect::<Vec<_>>(),
        [0, 128, 128, 0].map(Some)
    );
}

#[test]
fn who_shares_a_prompt_shares_the_state_at_its_last_page() {
    let mut s = scheduler(&[Sees::All, Sees::State], &[100, 9], true, 9, 100);
    for id in 0..3 {
        s.push(id, prompt(1, 300), false, 0);
    }
    for (start, end) in [(0, 64), (64, 128), (128, 192), (192, 256)] {
        assert_eq!(step(&mut s), [(0, start, end)]);
    }
    // A chunk that would end inside a page ends with it, and the rest of the budget serves others.
    assert_eq!(step(&mut s), [(0, 256, 300), (1, 256, 300), (2, 256, 268)]);
    assert_eq!(step(&mut s), [(0, 300, 301), (1, 300, 301), (2, 268, 300)]);
    assert_eq!(s.slots.iter().map(|slot| slot.cached).collect::<Vec<_>>(), [0, 256, 256].map(Some));
}

#[test]
fn without_room_for_states_the_youngest_waits() {
    let mut s = scheduler(&[Sees::All, Sees::State], &[100, 4], true, 9, 1000);
    s.push(0, prompt(1, 70), false, 0);
    s.push(1, prompt(2, 70), false, 0);
    s.push(2, prompt(3, 70), false, 0);
    assert_eq!(step(&mut s), [(0, 0, 64), (1, 0, 64), (2, 0, 64)]);
    // Each needs a second state; there is one more.
    assert_eq!(step(&mut s), [(0, 64, 70), (1, 64, 70)]);
    assert_eq!((s.preemptions, s.slots[2].running), (1, false));
    assert_eq!(step(&mut s), [(0, 70, 71), (1, 70, 71)]);
    s.remove(0);
    assert_eq!(step(&mut s), [(1, 71, 72), (2, 0, 64)], "its state gave way");
}

#[test]
fn the_last_token_is_always_computed() {
    let mut s = scheduler(&[Sees::All], &[100], true, 9, 1000);
    s.push(0, prompt(1, 128), false, 0);
    step(&mut s);
    s.push(1, prompt(1, 128), false, 0);
    s.push(2, prompt(1, 128), true, 0);
    assert_eq!(step(&mut s), [(0, 128, 129), (1, 127, 128), (2, 0, 128)]);
    assert_eq!(s.slots[0].pages.tables()[0][..2], s.slots[2].pages.tables()[0][..2]);
}

#[test]
fn the_youngest_gives_its_pages_and_comes_back_with_what_is_cached() {
    let mut s = scheduler(&[Sees::All], &[4], true, 9, 1000);
    s.push(0, prompt(1, 63), false, 0);
    s.push(1, prompt(2, 190), false, 0);
    assert_eq!(step(&mut s), [(0, 0, 63), (1, 0, 190)]);
    step(&mut s);
    // The older one needs a second page; there is none.
    assert_eq!(step(&mut s), [(0, 64, 65)]);
    assert_eq!(s.preemptions, 1);
    assert!(!s.slots[1].running);
    // It waits: all its tokens do not fit beside the older one.
    assert_eq!(step(&mut s), [(0, 65, 66)]);
    s.remove(0);
    let hit = s.plan();
    assert_eq!((hit[0].start, hit[0].end), (128, 192));
    assert_eq!(s.slots[0].cached, Some(0));
    check(&s);
}

#[test]
fn the_youngest_pauses_with_its_pages() {
    let mut s = scheduler(&[Sees::All], &[4], false, 9, 1000);
    s.push(0, prompt(1, 120), false, 0);
    s.push(1, prompt(2, 127), false, 0);
    step(&mut s);
    step(&mut s);
    assert_eq!(step(&mut s), [(0, 121, 122)]);
    assert_eq!((s.preemptions, s.slots[1].running), (0, true));
    for end in 123..=128 {
        assert_eq!(step(&mut s), [(0, end - 1, end)]);
    }
    assert_eq!(step(&mut s), [(0, 128, 129)]);
    assert_eq!((s.preemptions, s.slots[1].running), (1, false));
}

#[test]
fn no_younger_one_starts_before_an_older_one_that_waits_for_pages() {
    let mut s = scheduler(&[Sees::All], &[4], false, 9, 1000);
    for (id, len) in [(0, 100), (1, 200), (2, 10)] {
        s.push(id, prompt(id as u32, len), false, 0);
    }
    assert_eq!(step(&mut s), [(0, 0, 100)]);
    s.remove(0);
    assert_eq!(step(&mut s), [(1, 0, 200)]);
}

#[derive(Clone, Debug)]
struct Plan {
    at: usize,
    kind: u32,
    prompt: usize,
    answer: usize,
    all: bool,
}

fn plans() -> impl Strategy<Value = Vec<Plan>> {
    let plan = (0usize..20, 0u32..3, 1usize..300, 1usize..100, prop::bool::weighted(0.1));
    let plan =
        plan.prop_map(|(at, kind, prompt, answer, all)| Plan { at, kind, prompt, answer, all });
    prop::collection::vec(plan, 1..10)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..Default::default() })]
    #[test]
    fn everybody_ends_within_the_limits(
        mut plans in plans(),
        sees in prop::collection::vec(
            prop_oneof![
                2 => Just(Sees::All),
                2 => (1usize..200).prop_map(Sees::Window),
                1 => Just(Sees::State),
            ],
            1..4,
        ),
        extra in 0usize..8,
        reuse: bool,
        max_batch in 1usize..5,
        chunk in 1usize..200,
        lost in prop::collection::vec(0usize..200, 0..20),
    ) {
        plans.sort_by_key(|plan| plan.at);
        // Just enough for the longest alone, and a little more.
        let longest = plans.iter().map(|p| p.prompt + p.answer).max().unwrap_or(1);
        let pages: Vec<usize> =
            sees.iter().map(|&s| crate::model::kv::pages_for(s, longest, 1) + extra).collect();
        let mut s = scheduler(&sees, &pages, reuse, max_batch, chunk);
        prop_assert!(s.pool.capacity() >= longest);
        let mut waiting = plans.iter().enumerate().peekable();
        let (mut now, mut last) = (0, Vec::new());
        while waiting.peek().is_some() || !s.slots.is_empty() {
            while let Some((id, plan)) = waiting.next_if(|(_, plan)| plan.at <= now) {
                let goal = plan.prompt + plan.answer;
                s.push(id as RequestId, prompt(plan.kind, plan.prompt), plan.all, goal);
            }
            let work = s.plan();
            check(&s);
            prop_assert!(s.slots.is_empty() || !work.is_empty(), "stuck");
            prop_assert!(work.len() <= max_batch);
            let of_prompts: usize = work.iter()
                .filter(|w| s.slots[w.slot].tokens.len() - w.start > 1)
                .map(|w| w.end - w.start).sum();
            prop_assert!(of_prompts <= chunk);
            prop_assert!(work.windows(2).all(|pair| pair[0].slot < pair[1].slot));
            prop_assert!(s.slots.iter().filter(|slot| slot.running).count() <= max_batch);
            now += 1;
            prop_assert!(now < 20_000, "no end");
            if lost.contains(&now) {
                continue;
            }
            last.clear();
            for w in &work {
                prop_assert_eq!(s.slots[w.slot].pages.len(), w.start);
                s.commit(w);
                let slot = &mut s.slots[w.slot];
                if w.end == slot.tokens.len() {
                    slot.tokens.push(7);
                }
                if slot.tokens.len() == slot.data {
                    last.push(slot.id);
                }
            }
            for &id in &last {
                s.remove(id);
            }
            check(&s);
        }
        let used = s.pool.counts().into_iter().any(|n| n.free + n.cached != n.total);
        prop_assert!(!used, "pages lost");
    }
}
