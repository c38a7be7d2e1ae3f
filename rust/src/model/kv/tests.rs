//! Tests of the KV bookkeeping against a memory that holds token ids.

use super::*;
use proptest::prelude::*;

impl KvPool {
    /// What must hold whenever `sequences` are all that have pages.
    pub(crate) fn check(&self, sequences: &[&Pages]) -> std::result::Result<(), String> {
        for (g, group) in self.groups.iter().enumerate() {
            let mut refs = vec![0; group.pages.len()];
            for pages in sequences.iter().filter(|pages| !pages.tables.is_empty()) {
                let table = &pages.tables[g];
                if group.sees == Sees::State {
                    if table.is_empty()
                        || table.len() > 2
                        || (table[0] == NO_PAGE) != (pages.len == 0)
                    {
                        return Err(format!("group {g}: states {table:?} at {}", pages.len));
                    }
                    for (i, &page) in table.iter().enumerate().filter(|(_, page)| **page != NO_PAGE)
                    {
                        refs[page as usize] += 1;
                        let cached = i == 0 && self.reuse && pages.len.is_multiple_of(PAGE);
                        if cached != group.pages[page as usize].key.is_some() {
                            return Err(format!("group {g}: state {i} {table:?} at {}", pages.len));
                        }
                    }
                    continue;
                }
                if table.len() * PAGE < pages.len {
                    return Err(format!("group {g}: {} pages for {}", table.len(), pages.len));
                }
                for (i, &page) in table.iter().enumerate() {
                    if (page == NO_PAGE) != (i < pages.passed[g]) {
                        return Err(format!("group {g}: entry {i} is {page}"));
                    }
                    if page != NO_PAGE {
                        refs[page as usize] += 1;
                        let full = i < pages.len / PAGE;
                        if self.reuse && full != group.pages[page as usize].key.is_some() {
                            return Err(format!("group {g}: page {page}: full {full}, key not"));
                        }
                    }
                }
                if pages.passed[g] > group.first_visible(pages.len) {
                    return Err(format!("group {g}: a visible page was freed"));
                }
            }
            let mut states = vec![0; group.pages.len()];
            group.free.iter().chain(group.cached.values()).for_each(|&p| states[p as usize] += 1);
            for (p, page) in group.pages.iter().enumerate() {
                let known = page.key.is_none_or(|key| group.by_key.get(&key) == Some(&(p as u32)));
                let in_cache = group.cached.get(&page.stamp) == Some(&(p as u32));
                let state = usize::from(page.refs > 0) + states[p];
                if page.refs != refs[p] || state != 1 || !known {
                    return Err(format!("group {g}: page {p} {page:?}, {} tables", refs[p]));
                }
                if (page.refs == 0 && page.key.is_some()) != in_cache {
                    return Err(format!("group {g}: page {p} {page:?}: cached {in_cache}"));
                }
                if page.refs > 1 && page.key.is_none() {
                    return Err(format!("group {g}: page {p} is shared but not full"));
                }
            }
            if let Some(key) = self.heads.keys().find(|key| !group.by_key.contains_key(*key)) {
                return Err(format!(
                    "group {g}: the beginning of page {key:?} is known, not the page"
                ));
            }
            let named = group.pages.iter().filter(|page| page.key.is_some()).count();
            if named != group.by_key.len() {
                return Err(format!("group {g}: {named} keys, {} found", group.by_key.len()));
            }
        }
        Ok(())
    }
}

const BIG: usize = 1 << 20;

fn group(sees: impl Into<Sees>) -> KvGroup {
    KvGroup { sees: sees.into(), page_bytes: 100 }
}

fn tokens(seed: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| seed * 1000 + i).collect()
}

fn keys(tokens: &[u32]) -> Vec<Key> {
    let mut keys = Vec::new();
    extend_keys(&mut keys, tokens, false);
    keys
}

/// A sequence of these tokens, computed in one go.
fn run(pool: &mut KvPool, tokens: &[u32]) -> Pages {
    let keys = keys(tokens);
    let mut pages = pool.adopt(&keys);
    assert_eq!(pool.reserve(&mut pages, tokens.len()), tokens.len());
    pool.commit(&mut pages, tokens.len(), &keys);
    pages
}

#[test]
fn keys_name_the_whole_prefix() {
    let (a, mut b) = (tokens(1, 200), tokens(1, 200));
    assert_eq!(keys(&a).len(), 3);
    b[70] = 0;
    assert_eq!(keys(&a)[0], keys(&b)[0]);
    assert!(keys(&a)[1] != keys(&b)[1] && keys(&a)[2] != keys(&b)[2]);
    let mut grown = keys(&a[..100]);
    extend_keys(&mut grown, &a, false);
    assert_eq!(grown, keys(&a));
}

#[test]
fn pages_for_a_window_is_the_most_that_a_sequence_holds() {
    for window in [1, 2, 63, 64, 65, 100, 129] {
        for chunk in [1, 7, 64, 100] {
            let mut most = 0;
            let mut pool = KvPool::new(&[group(Some(window))], &[100], false);
            // Offsets put the chunk borders at every place in a page.
            for offset in 1..=64 {
                let mut pages = pool.adopt(&[]);
                for end in (offset..1000).step_by(chunk) {
                    pool.reserve(&mut pages, end);
                    most = most.max(pages.tables[0].len() - pages.passed[0]);
                    pool.commit(&mut pages, end, &[]);
                }
                pool.release(&mut pages);
            }
            let bound = pages_for(Sees::Window(window), 1000, chunk);
            assert!(most <= bound, "window {window} chunk {chunk}: {most} > {bound}");
            if chunk == 1 {
                assert_eq!(most, bound, "window {window}");
            }
        }
    }
}

#[test]
fn divide_serves_one_full_context_first_and_then_the_batch() {
    let groups = [group(None), group(Some(64))];
    let one = bytes_for(&groups, 1024, 64);
    assert_eq!(one, 100 * (16 + 3));
    assert_eq!(divide(&groups, one, 1024, 64, 3), Some(vec![16, 3]));
    assert_eq!(divide(&groups, 4 * one, 1024, 64, 3), Some(vec![64, 12]));
    assert_eq!(divide(&groups, u64::MAX, 1024, 64, 3), Some(vec![64, 12]));
    // Three more of two pages each take twelve.
    assert_eq!(divide(&groups, one + 1200, 1024, 64, 3), Some(vec![22, 9]));
    assert_eq!(divide(&groups, one - 1, 1024, 64, 3), Some(vec![15, 3]));
    assert_eq!(divide(&groups, 200, 1024, 64, 0), Some(vec![1, 1]));
    assert_eq!(divide(&groups, 199, 1024, 64, 0), None);
    assert_eq!(divide(&groups, u64::MAX, usize::MAX, usize::MAX, 3).map(|p| p.len()), Some(2));
}

#[test]
fn capacity_is_what_one_sequence_can_have() {
    let capacity =
        |groups: &[KvGroup], pages: &[usize]| KvPool::new(groups, pages, true).capacity();
    assert_eq!(capacity(&[group(None), group(Some(64))], &[10, 2]), 640);
    assert_eq!(capacity(&[group(None), group(Some(64))], &[10, 1]), 64);
    assert_eq!(capacity(&[group(Some(64))], &[2]), usize::MAX);
}

#[test]
fn equal_prefixes_share_pages_and_the_last_leaves_them_cached() {
    let mut pool = KvPool::new(&[group(None)], &[8], true);
    let a = tokens(1, 150);
    let mut first = run(&mut pool, &a);
    let mut second = run(&mut pool, &a);
    assert_eq!(first.tables[0][..2], second.tables[0][..2]);
    assert_ne!(first.tables[0][2], second.tables[0][2]);
    assert_eq!(pool.counts()[0], PageCount { total: 8, free: 4, cached: 0 });
    pool.check(&[&first, &second]).unwrap();
    pool.release(&mut first);
    pool.release(&mut second);
    assert_eq!(pool.counts()[0], PageCount { total: 8, free: 6, cached: 2 });
    pool.check(&[]).unwrap();
}

#[test]
fn pages_computed_twice_at_once_become_one() {
    let mut pool = KvPool::new(&[group(None)], &[8], true);
    let a = tokens(1, 64);
    let keys = keys(&a);
    let mut both = [pool.adopt(&keys), pool.adopt(&keys)];
    for pages in &mut both {
        pool.reserve(pages, 64);
    }
    assert_ne!(both[0].tables, both[1].tables);
    for pages in &mut both {
        pool.commit(pages, 64, &keys);
    }
    assert_eq!(both[0].tables, both[1].tables);
    assert_eq!(pool.counts()[0].free, 7);
    pool.check(&[&both[0], &both[1]]).unwrap();
}

#[test]
fn room_is_what_is_held_and_what_is_available() {
    let mut pool = KvPool::new(&[group(None), group(Some(64))], &[4, 6], true);
    let mut first = run(&mut pool, &tokens(1, 100));
    let second = pool.adopt(&[]);
    assert!(pool.has_room(&second, 128, 64) && !pool.has_room(&second, 129, 64));
    pool.release(&mut first);
    let third = pool.adopt(&keys(&tokens(1, 64)));
    assert_eq!(third.len(), 64);
    assert!(pool.has_room(&third, 256, 64) && !pool.has_room(&third, 257, 64));
    // A window of 64 and chunks of 300 positions hold seven pages; there are six.
    assert!(pool.has_room(&third, 256, 256) && !pool.has_room(&third, 1 << 20, 300));
}

#[test]
fn without_reuse_nothing_is_kept() {
    let mut pool = KvPool::new(&[group(None)], &[8], false);
    let mut pages = run(&mut pool, &tokens(1, 150));
    pool.check(&[&pages]).unwrap();
    pool.release(&mut pages);
    assert_eq!(pool.counts()[0], PageCount { total: 8, free: 8, cached: 0 });
}

#[test]
fn the_tail_of_the_oldest_chain_is_evicted_first() {
    let mut pool = KvPool::new(&[group(None)], &[6], true);
    let (a, b, c) = (tokens(1, 192), tokens(2, 192), tokens(3, 64));
    for tokens in [&a, &b, &c] {
        let mut pages = run(&mut pool, tokens);
        pool.release(&mut pages);
    }
    assert_eq!(pool.find(&keys(&a)), 2); // c took the third page of a
    assert_eq!(pool.find(&keys(&b)), 3);
    assert_eq!(pool.find(&keys(&c)), 1);
}

#[test]
fn a_window_needs_only_the_pages_that_the_next_position_sees() {
    let groups = [group(None), group(Some(65))];
    let mut pool = KvPool::new(&groups, &[8, 4], true);
    let a = tokens(1, 256);
    let keys = keys(&a);
    let mut pages = pool.adopt(&keys);
    for end in (64..=256).step_by(64) {
        assert_eq!(pool.reserve(&mut pages, end), end);
        pool.commit(&mut pages, end, &keys);
    }
    // Position 192 sees 128..=192.
    assert_eq!(pages.tables[1][..2], [NO_PAGE, NO_PAGE]);
    pool.release(&mut pages);
    // Two new pages in each group; the window group loses the oldest: pages 0 and 1 of a.
    let mut other = run(&mut pool, &tokens(2, 100));
    pool.release(&mut other);
    let found = pool.adopt(&keys);
    assert_eq!(found.len(), 256);
    assert_eq!(found.tables[1][..3], [NO_PAGE; 3]);
    // At 128 positions the next sees page 1, which is gone.
    assert_eq!(pool.find(&keys[..2]), 0);
    pool.check(&[&found]).unwrap();
}

#[test]
fn reserve_goes_as_far_as_pages_are_and_takes_no_more() {
    let groups = [group(None), group(Some(10))];
    let mut pool = KvPool::new(&groups, &[3, 2], true);
    let mut pages = pool.adopt(&[]);
    assert_eq!(pool.reserve(&mut pages, 300), 128);
    assert_eq!(pool.counts()[0].free, 1);
    pool.commit(&mut pages, 128, &keys(&tokens(1, 128)));
    assert_eq!(pool.reserve(&mut pages, 300), 192);
    assert_eq!(pool.reserve(&mut pages, 300), 192);
    pool.check(&[&pages]).unwrap();
}

#[test]
fn a_sequence_has_the_state_it_reads_and_the_one_it_writes() {
    let mut pool = KvPool::new(&[group(None), group(Sees::State)], &[8, 3], true);
    let a = tokens(1, 150);
    let keys = keys(&a);
    let mut pages = pool.adopt(&keys[..2]);
    assert_eq!(pages.tables[1], [NO_PAGE]);
    // The chunk ends with the last page that it fills, so that the state there can be found.
    assert_eq!(pool.reserve(&mut pages, 150), 128);
    assert_eq!(pages.tables[1].len(), 2);
    let plan = pages.tables.clone();
    assert_eq!((pool.reserve(&mut pages, 150), &plan), (128, &pages.tables), "planned again");
    pool.commit(&mut pages, 128, &keys);
    assert_eq!(pages.tables[1], plan[1][1..]);
    assert_eq!(pool.reserve(&mut pages, 150), 150);
    pool.commit(&mut pages, 150, &keys);
    pool.check(&[&pages]).unwrap();
    assert_eq!(pool.counts()[1], PageCount { total: 3, free: 1, cached: 1 });
    // The same prompt goes on from 128, another that has 64 positions in common from none.
    let mut b = pool.adopt(&keys[..2]);
    assert_eq!((b.len(), &b.tables[1]), (128, &plan[1][1..].to_vec()));
    pool.release(&mut b);
    assert_eq!(pool.find(&keys[..1]), 0);
    pool.release(&mut pages);
    assert_eq!(pool.counts()[1], PageCount { total: 3, free: 2, cached: 1 });
}

#[test]
fn where_prompts_part_the_third_finds_a_state() {
    let mut pool = KvPool::new(&[group(None), group(Sees::State)], &[40, 8], true);
    let prompt = |own| [tokens(1, 200), tokens(own, 300)].concat();
    let mut found = Vec::new();
    for own in 2..5 {
        let tokens = prompt(own);
        let keys = keys(&tokens);
        let mut pages = pool.adopt(&keys[..(tokens.len() - 1) / PAGE]);
        found.push(pages.len());
        while pages.len() < tokens.len() {
            let end = pool.reserve(&mut pages, tokens.len());
            pool.commit(&mut pages, end, &keys);
        }
        pool.release(&mut pages);
    }
    assert_eq!(found, [0, 0, 192]);
}

#[test]
fn a_prompt_of_whole_pages_is_found_before_its_last() {
    let mut pool = KvPool::new(&[group(None), group(Sees::State)], &[8, 4], true);
    let keys = keys(&tokens(1, 128));
    let mut pages = pool.adopt(&keys[..1]);
    for end in [64, 128] {
        assert_eq!(pool.reserve(&mut pages, 128), end);
        pool.commit(&mut pages, end, &keys);
    }
    assert_eq!(pool.adopt(&keys[..1]).len(), 64);
}

#[test]
fn an_answer_leaves_its_last_state_and_the_prompt_its_own() {
    let mut pool = KvPool::new(&[group(None), group(Sees::State)], &[8, 8], true);
    let a = tokens(1, 330);
    let keys = keys(&a);
    let mut pages = pool.adopt(&keys[..1]);
    let mut len = 0;
    while len < 330 {
        len = pool.reserve(&mut pages, if len < 100 { 100 } else { len + 1 });
        pool.commit(&mut pages, len, &keys);
        pool.check(&[&pages]).unwrap();
    }
    pool.release(&mut pages);
    let found = |n: usize| pool.find(&keys[..n]);
    assert_eq!((1..=5).map(found).collect::<Vec<_>>(), [1, 1, 1, 1, 5]);
}

#[test]
fn one_sequence_needs_two_states() {
    let groups = [group(None), group(Sees::State)];
    assert_eq!(KvPool::new(&groups, &[4, 1], true).capacity(), 0);
    let mut pool = KvPool::new(&groups, &[4, 3], true);
    assert_eq!(pool.capacity(), 256);
    let (mut a, mut b) = (run(&mut pool, &tokens(1, 60)), pool.adopt(&[]));
    assert!(pool.has_room(&b, 60, 60));
    assert_eq!(pool.reserve(&mut a, 61), 61);
    assert!(!pool.has_room(&b, 60, 60));
    assert_eq!((pool.reserve(&mut b, 60), pool.reserve(&mut b, 61)), (60, 61));
    pool.commit(&mut b, 60, &[]);
    pool.commit(&mut a, 61, &[]);
    assert_eq!((pool.reserve(&mut b, 61), pool.reserve(&mut a, 62)), (61, 61), "none is left");
    pool.check(&[&a, &b]).unwrap();
    // Four for one sequence, and an eighth of what its 16 pages take.
    assert_eq!(divide(&groups, u64::MAX, 1024, 64, 1), Some(vec![32, 2 * (4 + 2)]));
}

/// What a test sequence is: its tokens, its pages, their keys.
struct Sequence {
    tokens: Vec<u32>,
    pages: Pages,
    keys: Vec<Key>,
}

#[derive(Clone, Debug)]
enum Op {
    /// A new sequence that has its first tokens in common with others of the kind.
    Start {
        kind: u32,
        common: usize,
        own: u32,
        len: usize,
    },
    Grow {
        which: usize,
        by: usize,
    },
    /// A step that was interrupted.
    Lose {
        which: usize,
        by: usize,
    },
    End {
        which: usize,
    },
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let start = (0u32..3, 0usize..300, 0u32..2, 1usize..400)
        .prop_map(|(kind, common, own, len)| Op::Start { kind, common, own, len });
    let grow = (0usize..8, 1usize..150).prop_map(|(which, by)| Op::Grow { which, by });
    let lose = (0usize..8, 1usize..150).prop_map(|(which, by)| Op::Lose { which, by });
    let end = (0usize..8).prop_map(|which| Op::End { which });
    prop::collection::vec(prop_oneof![2 => start, 4 => grow, 1 => lose, 1 => end], 1..60)
}

fn sees() -> impl Strategy<Value = Sees> {
    prop_oneof![
        2 => Just(Sees::All),
        2 => (1usize..200).prop_map(Sees::Window),
        1 => Just(Sees::State),
    ]
}

/// The state after these tokens.
fn state(before: u32, tokens: &[u32]) -> u32 {
    tokens.iter().fold(before, |state, token| state.wrapping_mul(31).wrapping_add(*token))
}

proptest! {
    #[test]
    fn every_sequence_reads_its_own_tokens(
        ops in ops(),
        sees in prop::collection::vec(sees(), 1..4),
        sizes in prop::collection::vec(1usize..14, 3),
        reuse in prop::bool::weighted(0.8),
    ) {
        let groups: Vec<KvGroup> = sees.iter().map(|&sees| group(sees)).collect();
        let mut pool = KvPool::new(&groups, &sizes[..groups.len()], reuse);
        let mut memory = vec![vec![[u32::MAX; PAGE]; 14]; groups.len()];
        let mut parents: HashMap<Key, Key> = HashMap::new();
        let mut all: Vec<Sequence> = Vec::new();
        for op in ops {
            match op {
                Op::Start { kind, common, own, len } => {
                    let token = |i: usize| match i < common {
                        true => kind * BIG as u32 + i as u32,
                        false => (3 + own) * BIG as u32 + i as u32,
                    };
                    let tokens: Vec<u32> = (0..len).map(token).collect();
                    let keys = keys(&tokens);
                    parents.extend(keys.windows(2).map(|pair| (pair[1], pair[0])));
                    let pages = pool.adopt(&keys[..(len - 1) / PAGE]);
                    prop_assert!(reuse || pages.is_empty());
                    all.push(Sequence { tokens, pages, keys });
                }
                Op::Grow { which, by } | Op::Lose { which, by } if which < all.len() => {
                    let lost = matches!(op, Op::Lose { .. });
                    let s = &mut all[which];
                    let start = s.pages.len();
                    let want = (start + by).min(s.tokens.len());
                    let end = pool.reserve(&mut s.pages, want);
                    prop_assert!(start <= end && end <= want);
                    if end == start {
                        continue;
                    }
                    for ((table, memory), g) in s.pages.tables.iter().zip(&mut memory).zip(&groups) {
                        if g.sees == Sees::State {
                            let read = if start == 0 { 7 } else { memory[table[0] as usize][0] };
                            let after = state(read, &s.tokens[start..end]);
                            memory[table[1] as usize][0] = if lost { 13 } else { after };
                            continue;
                        }
                        for i in start..end {
                            let value = if lost { 13 } else { s.tokens[i] };
                            memory[table[i / PAGE] as usize][i % PAGE] = value;
                        }
                    }
                    if !lost {
                        pool.commit(&mut s.pages, end, &s.keys);
                    }
                }
                Op::End { which } if which < all.len() => {
                    pool.release(&mut all.remove(which).pages);
                }
                _ => {}
            }
            let pages: Vec<&Pages> = all.iter().map(|s| &s.pages).collect();
            prop_assert_eq!(pool.check(&pages), Ok(()));
            for s in &all {
                for (g, table) in s.pages.tables.iter().enumerate() {
                    let next = s.pages.len();
                    let first = match groups[g].sees {
                        Sees::All => 0,
                        Sees::Window(w) => (next + 1).saturating_sub(w),
                        Sees::State => {
                            let state = state(7, &s.tokens[..next]);
                            prop_assert!(next == 0 || memory[g][table[0] as usize][0] == state);
                            continue;
                        }
                    };
                    for i in first..next {
                        prop_assert_eq!(memory[g][table[i / PAGE] as usize][i % PAGE], s.tokens[i]);
                    }
                }
            }
            for group in pool.groups.iter().filter(|g| g.sees == Sees::All) {
                for parent in group.by_key.keys().filter_map(|key| parents.get(key)) {
                    prop_assert!(group.by_key.contains_key(parent), "evicted before its child");
                }
            }
        }
    }
}
