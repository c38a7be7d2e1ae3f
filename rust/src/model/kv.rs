//! Bookkeeping of the paged KV cache: which page holds which positions of which sequence.
//! Page ids only; never touches keys or values, never reads a clock.
//!
//! Each group of layers (see [`KvGroup`]) has its own pages, and a sequence has one table per group.
//! A page is in exactly one state: *free*; *owned* by the tables that refer to it; or *cached*: full,
//! in no table, found again by the content hash of all tokens up to its end.
//!
//! Only full pages are shared; of others, and where prompts part inside a page, a copy is (`kv/heads.rs`). A full page whose content another page already holds is given up for
//! that one: equal tokens at equal positions give equal bits, so either serves.
//!
//! Cached pages are evicted least recently used first. A sequence gives its pages back from the last
//! to the first, so in a group without a window a page is never evicted before the pages that
//! continue it. In a group with a window pages leave as the window passes them, first to last: there
//! the pages at the end of a prefix are the ones a later sequence needs.
//!
//! In a group of states ([`Sees::State`]) a page is the whole state after some position. A sequence has
//! the one after its last position; a step reads it and writes the next into another page, so a step
//! that is interrupted can be run again. A state at the end of a full page is cached as that page, and
//! a prefix is found only where its state is. So that states lie where they are looked for, a chunk
//! ends with a page if it reaches the end of one; it ends where the prompt may be found again; and
//! where it computes pages anew because their state is missing, it ends with the last of them: where
//! two prompts part, the third finds a state.

mod heads;

pub use heads::PageCopy;

use super::{KvGroup, NO_PAGE, PAGE, Sees};
use heads::Heads;
use std::collections::{BTreeMap, HashMap};

/// Names the content of a full page: a hash of all tokens from position 0 to its end, and of whether they belong to
/// a long request ([`Forward::long_after`](super::Forward::long_after)).
pub type Key = [u8; 16];

/// Appends the keys of the full pages of `tokens` that `keys` lacks.
pub fn extend_keys(keys: &mut Vec<Key>, tokens: &[u32], long: bool) {
    let first: &[u8] = if long { b"long" } else { b"" };
    for page in tokens.chunks_exact(PAGE).skip(keys.len()) {
        let mut hasher = blake3::Hasher::new();
        hasher.update(keys.last().map_or(first, |parent| parent.as_slice()));
        for token in page {
            hasher.update(&token.to_le_bytes());
        }
        let mut key = Key::default();
        key.copy_from_slice(&hasher.finalize().as_bytes()[..size_of::<Key>()]);
        keys.push(key);
    }
}

/// Most pages that a sequence of `len` positions, computed `chunk` at a time, holds at once.
pub fn pages_for(sees: Sees, len: usize, chunk: usize) -> usize {
    let all = len.div_ceil(PAGE);
    match sees {
        Sees::All => all,
        // A chunk sees window - 1 positions before its first, and n positions lie in at most
        // (n + 62) / 64 + 1 pages.
        Sees::Window(window) => all.min(window.saturating_add(chunk).saturating_add(61) / PAGE + 1),
        Sees::State => 2 * all.min(1), // the one read and the one written
    }
}

/// Pages that are worth having for such a sequence, in each group. To be found again it leaves a state at the end
/// of its prompt and one at that of its answer; and an eighth of the bytes of its keys and values goes to others.
fn share(groups: &[KvGroup], len: usize, chunk: usize) -> Vec<usize> {
    let needed = |g: &KvGroup| pages_for(g.sees, len, chunk);
    let paged = groups.iter().filter(|g| g.sees != Sees::State);
    let bytes =
        paged.fold(0usize, |sum, g| sum.saturating_add(needed(g).saturating_mul(g.page_bytes)));
    let kept = |g: &KvGroup| match g.sees {
        Sees::State if len > 0 => 2 + bytes / 8 / g.page_bytes.max(1),
        _ => 0,
    };
    groups.iter().map(|g| needed(g).saturating_add(kept(g))).collect()
}

/// Bytes that the pages of a sequence of `len` positions take in all groups.
pub fn bytes_for(groups: &[KvGroup], len: usize, chunk: usize) -> u64 {
    groups.iter().zip(share(groups, len, chunk)).fold(0, |sum: u64, (g, pages)| {
        sum.saturating_add((pages as u64).saturating_mul(g.page_bytes as u64))
    })
}

/// Most positions of a sequence that fit into `bytes`, in whole pages; the last of `context` may be the first that
/// is beyond it.
pub fn longest(groups: &[KvGroup], bytes: u64, context: usize, chunk: usize) -> usize {
    let fits = |n: usize| bytes_for(groups, n.saturating_mul(PAGE), chunk) <= bytes;
    let (mut low, mut high) = (0, context.div_ceil(PAGE));
    while low < high {
        let middle = (low + high).div_ceil(2);
        if fits(middle) { low = middle } else { high = middle - 1 }
    }
    low.saturating_mul(PAGE)
}

/// Pages per group within `bytes`: first for one sequence of `context` positions (or as many as
/// fit), then for `others` more that are all as long as fits. `None`: not even one page each.
pub fn divide(
    groups: &[KvGroup],
    bytes: u64,
    context: usize,
    chunk: usize,
    others: usize,
) -> Option<Vec<usize>> {
    let longest = |bytes: u64, copies: u64| longest(groups, bytes / copies, context, chunk);
    let first = longest(bytes, 1);
    let rest = match first >= context {
        true => longest(bytes - bytes_for(groups, first, chunk), others.max(1) as u64),
        false => 0,
    };
    let pages = share(groups, first, chunk).into_iter().zip(share(groups, rest, chunk));
    (first > 0).then(|| pages.map(|(one, each)| one + others * each).collect())
}

/// The pages of one sequence. Belongs to one [`KvPool`], which must get them back by `release`.
#[derive(Debug, Default)]
pub struct Pages {
    tables: Vec<Vec<u32>>, // [group][position / 64], or [group][0 read, 1 written] of states
    passed: Vec<usize>,    // per group: the first entries, NO_PAGE because the window passed them
    len: usize,
    stops: [usize; 2],   // positions at which a chunk ends, if there are states
    answer: Option<Key>, // of the last state that was left by one position alone
}

impl Pages {
    /// Positions whose keys and values are in the pages.
    pub fn len(&self) -> usize {
        self.len
    }

    /// No position is computed.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The page table of each group, as [`Chunk`](super::Chunk) wants it.
    pub fn tables(&self) -> &[Vec<u32>] {
        &self.tables
    }
}

/// Pages of a group by state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageCount {
    /// All.
    pub total: usize,
    /// Hold nothing.
    pub free: usize,
    /// Hold a prefix that no sequence uses at present.
    pub cached: usize,
}

#[derive(Clone, Debug, Default)]
struct Page {
    refs: usize,
    key: Option<Key>,
    stamp: u64, // when it became cached
}

#[derive(Debug)]
struct Group {
    sees: Sees,
    pages: Vec<Page>,
    free: Vec<u32>,
    cached: BTreeMap<u64, u32>, // stamp -> page
    by_key: HashMap<Key, u32>,
    clock: u64,        // counts stamps
    evicted: Vec<Key>, // since the pool last looked
}

impl Group {
    fn available(&self) -> usize {
        self.free.len() + self.cached.len()
    }

    /// A page for new content; there must be one available.
    fn take(&mut self) -> u32 {
        let page = self.free.pop().unwrap_or_else(|| {
            let (_, page) = self.cached.pop_first().expect("a page is available");
            let key = self.pages[page as usize].key.take().expect("a cached page has a key");
            self.by_key.remove(&key);
            self.evicted.push(key);
            page
        });
        self.pages[page as usize].refs = 1;
        page
    }

    fn share(&mut self, page: u32) {
        let entry = &mut self.pages[page as usize];
        if entry.refs == 0 {
            self.cached.remove(&entry.stamp);
        }
        entry.refs += 1;
    }

    fn give_back(&mut self, page: u32) {
        let entry = &mut self.pages[page as usize];
        entry.refs -= 1;
        if entry.refs > 0 {
            return;
        }
        if entry.key.is_some() {
            self.clock += 1;
            entry.stamp = self.clock;
            self.cached.insert(entry.stamp, page);
        } else {
            self.free.push(page);
        }
    }

    /// Makes a full page findable, or gives it up for the one that is already found under `key`.
    fn publish(&mut self, page: &mut u32, key: Key) {
        match self.by_key.get(&key) {
            Some(&known) if known != *page => {
                self.share(known);
                self.give_back(*page);
                *page = known;
            }
            Some(_) => {}
            None => {
                self.pages[*page as usize].key = Some(key);
                self.by_key.insert(key, *page);
            }
        }
    }

    /// The page of `key` need not be found again, unless a sequence has it.
    fn forget(&mut self, key: &Key) {
        let Some(&page) = self.by_key.get(key) else { return };
        let entry = &mut self.pages[page as usize];
        if entry.refs == 0 {
            entry.key = None;
            self.cached.remove(&entry.stamp);
            self.by_key.remove(key);
            self.free.push(page);
        }
    }

    /// Index of the first page that position `next` or a later one sees.
    fn first_visible(&self, next: usize) -> usize {
        match self.sees {
            Sees::All => 0,
            Sees::Window(window) => (next + 1).saturating_sub(window) / PAGE,
            Sees::State => next.saturating_sub(1) / PAGE,
        }
    }
}

/// The pages of a cache and who uses them.
#[derive(Debug)]
pub struct KvPool {
    groups: Vec<Group>,
    reuse: bool,
    heads: Heads,
}

impl KvPool {
    /// `pages[g]` pages for `groups[g]`; `reuse` keeps full pages for later sequences.
    pub fn new(groups: &[KvGroup], pages: &[usize], reuse: bool) -> KvPool {
        let group = |(g, &count): (&KvGroup, &usize)| Group {
            sees: g.sees,
            pages: vec![Page::default(); count],
            free: (0..count as u32).rev().collect(),
            cached: BTreeMap::new(),
            by_key: HashMap::new(),
            clock: 0,
            evicted: Vec::new(),
        };
        let groups = groups.iter().zip(pages).map(group).collect();
        KvPool { groups, reuse, heads: Heads::default() }
    }

    /// Whether full pages are kept for later sequences.
    pub fn reuses(&self) -> bool {
        self.reuse
    }

    /// Positions that one sequence may have if it has all pages.
    pub fn capacity(&self) -> usize {
        let endless = |g: &Group| g.pages.len() >= pages_for(g.sees, usize::MAX, 1);
        let limited = self.groups.iter().filter(|g| !endless(g));
        limited
            .map(|g| if g.sees == Sees::State { 0 } else { g.pages.len() * PAGE })
            .min()
            .unwrap_or(usize::MAX)
    }

    /// Pages of each group by state.
    pub fn counts(&self) -> Vec<PageCount> {
        let count = |g: &Group| PageCount {
            total: g.pages.len(),
            free: g.free.len(),
            cached: g.cached.len(),
        };
        self.groups.iter().map(count).collect()
    }

    /// How many leading pages of a sequence with these keys are present: all of them in groups
    /// without a window, those that the next position sees in the others.
    pub fn find(&self, keys: &[Key]) -> usize {
        let (mut found, mut absent_from) = (0, vec![0; self.groups.len()]);
        for n in 1..=self.find_all(keys) {
            let mut valid = true;
            for (group, absent) in self.groups.iter().zip(&mut absent_from) {
                if group.sees != Sees::All && !group.by_key.contains_key(&keys[n - 1]) {
                    *absent = n; // pages before this one are useless for prefixes beyond it
                }
                valid &= *absent <= group.first_visible(n * PAGE);
            }
            if valid {
                found = n;
            }
        }
        found
    }

    /// How many leading pages are present in groups that see all.
    fn find_all(&self, keys: &[Key]) -> usize {
        let mut longest = keys.len();
        for group in self.groups.iter().filter(|g| g.sees == Sees::All) {
            longest = keys[..longest]
                .iter()
                .position(|key| !group.by_key.contains_key(key))
                .unwrap_or(longest);
        }
        longest
    }

    /// The pages of a new sequence whose prompt has these keys, as far as they are present.
    pub fn adopt(&mut self, keys: &[Key]) -> Pages {
        let (count, all) = match self.reuse {
            true => (self.find(keys), self.find_all(keys)),
            false => (0, 0),
        };
        let stops = [all * PAGE, keys.len() * PAGE];
        let mut pages = Pages { len: count * PAGE, stops, ..Pages::default() };
        for group in &mut self.groups {
            let first = group.first_visible(count * PAGE).min(count);
            let mut table = match group.sees {
                Sees::State if count == 0 => vec![NO_PAGE],
                Sees::State => Vec::new(),
                _ => vec![NO_PAGE; first],
            };
            for key in &keys[first..count] {
                let page = group.by_key[key];
                group.share(page);
                table.push(page);
            }
            pages.tables.push(table);
            pages.passed.push(if group.sees == Sees::State { 0 } else { first });
        }
        pages
    }

    /// Makes room for positions up to `end`, or as far as pages are available; returns how far.
    /// Pages that the next position no longer sees are given back first.
    pub fn reserve(&mut self, pages: &mut Pages, end: usize) -> usize {
        let mut reach = end;
        for ((group, table), passed) in
            self.groups.iter_mut().zip(&mut pages.tables).zip(&mut pages.passed)
        {
            if group.sees == Sees::State {
                if table.len() < 2 && group.available() == 0 {
                    reach = pages.len;
                }
                continue;
            }
            let first = group.first_visible(pages.len).min(table.len());
            for page in &mut table[*passed..first] {
                group.give_back(std::mem::replace(page, NO_PAGE));
            }
            *passed = first;
            reach = reach.min((table.len() + group.available()) * PAGE);
        }
        if self.reuse && self.groups.iter().any(|g| g.sees == Sees::State) {
            let stop =
                pages.stops.into_iter().filter(|&stop| stop > pages.len).fold(reach, usize::min);
            let whole = stop / PAGE * PAGE;
            reach = if whole > pages.len { whole } else { stop };
        }
        for (group, table) in self.groups.iter_mut().zip(&mut pages.tables) {
            let wanted = match group.sees {
                Sees::State if reach > pages.len => 2,
                Sees::State => 0,
                _ => reach.div_ceil(PAGE),
            };
            while table.len() < wanted {
                table.push(group.take());
            }
        }
        self.forget_evicted();
        reach
    }

    /// Whether the pages that a sequence of `len` positions still lacks are available.
    pub fn has_room(&self, pages: &Pages, len: usize, chunk: usize) -> bool {
        self.groups.iter().zip(&pages.tables).zip(&pages.passed).all(|((group, table), passed)| {
            let held = table[*passed..].iter().filter(|&&page| page != NO_PAGE).count();
            pages_for(group.sees, len, chunk) <= held + group.available()
        })
    }

    /// Positions up to `len` are computed; `keys` are those of all full pages among them.
    pub fn commit(&mut self, pages: &mut Pages, len: usize, keys: &[Key]) {
        let full = pages.len / PAGE..len / PAGE;
        for (group, table) in self.groups.iter_mut().zip(&mut pages.tables) {
            if group.sees == Sees::State {
                let read = table.remove(0);
                if read != NO_PAGE {
                    group.give_back(read);
                }
                if self.reuse && len.is_multiple_of(PAGE) {
                    group.publish(&mut table[0], keys[full.end - 1]);
                }
            } else if self.reuse {
                for (page, key) in table[full.clone()].iter_mut().zip(&keys[full.clone()]) {
                    group.publish(page, *key);
                }
            }
        }
        // An answer leaves its last state, not one for each page.
        if self.reuse && len == pages.len + 1 && len.is_multiple_of(PAGE) {
            let last = pages.answer.replace(keys[full.end - 1]);
            for group in self.groups.iter_mut().filter(|g| g.sees == Sees::State) {
                last.iter().for_each(|key| group.forget(key));
            }
        }
        pages.len = len;
    }

    /// Takes a sequence's pages back, the last first.
    pub fn release(&mut self, pages: &mut Pages) {
        for (group, table) in self.groups.iter_mut().zip(&pages.tables) {
            for &page in table.iter().rev().filter(|&&page| page != NO_PAGE) {
                group.give_back(page);
            }
        }
        *pages = Pages::default();
    }
}

#[cfg(test)]
mod tests;
