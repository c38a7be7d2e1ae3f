//! What single pages hold, token by token: where a prompt parts from an earlier one inside a page, or ends there, the
//! page's beginning serves all the same. It is copied, and the copy goes on with other tokens. Not in models with
//! states: a state is known after a whole page only.

use super::{Key, KvPool, PAGE, Pages, Sees};
use std::collections::HashMap;

/// Before the next forward pass page `to` of a group takes the content of page `from`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageCopy {
    /// The group of both.
    pub group: usize,
    /// What is copied.
    pub from: u32,
    /// The copy.
    pub to: u32,
}

/// Pages by what comes before them.
#[derive(Debug, Default)]
pub(super) struct Heads {
    held: HashMap<Key, (Key, Vec<u32>)>, // page -> the page before it, its tokens
    after: HashMap<Key, Vec<Key>>,
}

impl Heads {
    fn insert(&mut self, key: Key, before: Key, tokens: &[u32]) {
        if self.held.insert(key, (before, tokens.to_vec())).is_none() {
            self.after.entry(before).or_default().push(key);
        }
    }

    pub(super) fn remove(&mut self, key: &Key) {
        let Some((before, _)) = self.held.remove(key) else { return };
        if let Some(pages) = self.after.get_mut(&before) {
            pages.retain(|page| page != key);
            if pages.is_empty() {
                self.after.remove(&before);
            }
        }
    }

    /// The page after `before` that begins with most of `tokens`, and with how many; the oldest of several.
    fn best(&self, before: &Key, tokens: &[u32]) -> Option<(Key, usize)> {
        let common = |key: &Key| {
            let pairs = self.held[key].1.iter().zip(tokens);
            pairs.take_while(|(a, b)| a == b).count()
        };
        let pages = self.after.get(before)?.iter().map(|key| (*key, common(key)));
        pages.rev().max_by_key(|(_, n)| *n).filter(|(_, n)| *n > 0)
    }

    #[cfg(test)]
    pub(super) fn keys(&self) -> impl Iterator<Item = &Key> {
        self.held.keys()
    }
}

/// The key before page `n` of a sequence with these keys.
fn before(keys: &[Key], n: usize, long: bool) -> Key {
    match n.checked_sub(1) {
        Some(last) => keys[last],
        None => [u8::from(long); size_of::<Key>()],
    }
}

impl KvPool {
    fn keeps_heads(&self) -> bool {
        self.reuse && self.groups.iter().all(|g| g.sees != Sees::State)
    }

    /// The pages of a sequence that has just adopted its prefix, with the beginning of one more page if another
    /// sequence left one that fits. `tokens` are those that may be found: of the pages adopted and after. What must be
    /// copied before these pages are used is added to `copies`, after what is there.
    pub fn adopt_head(
        &mut self,
        pages: &mut Pages,
        keys: &[Key],
        tokens: &[u32],
        long: bool,
        copies: &mut Vec<PageCopy>,
    ) {
        let n = pages.len / PAGE;
        let Some(rest) = tokens.get(pages.len..).filter(|_| self.keeps_heads()) else { return };
        let Some((key, len)) = self.heads.best(&before(keys, n, long), rest) else { return };
        let fits = |g: &super::Group| g.available() > 0 && g.by_key.contains_key(&key);
        if !self.groups.iter().all(fits) {
            return;
        }
        for (g, group) in self.groups.iter_mut().enumerate() {
            let from = group.by_key[&key];
            let to = group.take(); // perhaps `from` itself, whose content nobody else wants then
            pages.tables[g].push(to);
            copies.push(PageCopy { group: g, from, to });
        }
        pages.len += len.min(PAGE - 1);
        self.forget_evicted();
    }

    /// Pages from `first` on of a sequence with these tokens are full: their beginnings can be found.
    pub fn keep_heads(&mut self, first: usize, keys: &[Key], tokens: &[u32], long: bool) {
        if !self.keeps_heads() {
            return;
        }
        for (n, page) in tokens.chunks_exact(PAGE).enumerate().take(keys.len()).skip(first) {
            if self.groups.iter().all(|g| g.by_key.contains_key(&keys[n])) {
                self.heads.insert(keys[n], before(keys, n, long), page);
            }
        }
    }

    /// A sequence with these tokens is about to give its pages back: the beginning of the last one can be found.
    pub fn keep_last(&mut self, pages: &mut Pages, keys: &[Key], tokens: &[u32], long: bool) {
        let (n, rest) = (pages.len / PAGE, pages.len % PAGE);
        if !self.keeps_heads() || rest == 0 || pages.tables.iter().any(|table| table.len() <= n) {
            return;
        }
        let before = before(keys, n, long);
        let tail = &tokens[n * PAGE..pages.len];
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"part").update(&before);
        tail.iter().for_each(|token| {
            hasher.update(&token.to_le_bytes());
        });
        let mut key = Key::default();
        key.copy_from_slice(&hasher.finalize().as_bytes()[..size_of::<Key>()]);
        for (group, table) in self.groups.iter_mut().zip(&mut pages.tables) {
            group.publish(&mut table[n], key);
        }
        self.heads.insert(key, before, tail);
    }

    /// Pages that were taken for other content are found no more.
    pub(super) fn forget_evicted(&mut self) {
        for group in &mut self.groups {
            group.evicted.drain(..).for_each(|key| self.heads.remove(&key));
        }
    }
}
