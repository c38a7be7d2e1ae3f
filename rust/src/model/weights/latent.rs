//! The weights of latent attention: a stored `kv_b` holds, for each head, rows that make a key and rows that make a
//! value; here each is a matrix of its own, in the direction in which the forward pass applies it.

use super::{Reader, Source};
use crate::Result;
use crate::model::spec::{self, Slice};

/// The weights of latent attention, see [`spec::Latent`].
pub(in crate::model) struct Latent<M, V> {
    pub(in crate::model) q_a: Option<(M, V)>,
    /// From the input, or from `q_a`'s output.
    pub(in crate::model) q: M,
    pub(in crate::model) kv_a: M,
    pub(in crate::model) kv_norm: V,
    pub(in crate::model) o: M,
    /// For each head `[rank, nope]`: what the released `kv_b` makes keys with, transposed.
    pub(in crate::model) keys: M,
    /// For each head `[value, rank]`: what it makes values with.
    pub(in crate::model) values: M,
}

impl Reader<'_> {
    pub(super) fn latent<M, V>(
        &self,
        l: usize,
        a: &spec::Latent,
        row: &impl Fn(&[f32]) -> V,
        mat: &mut impl FnMut(Source) -> Result<M>,
    ) -> Result<Latent<M, V>> {
        let hidden = self.spec.hidden;
        let place = |what: &str| self.spec.place(&self.names, l, what, 0);
        let norm = |what: &str, n| Ok(row(&self.norm(&place(what), n, 1)?));
        let plain = |parts, k| Source { parts, k, interleaved: false, exact: false };
        let mut whole = |what: &str, n, k| mat(plain(vec![(place(what), n)], k));
        let q = a.heads * (a.nope + a.turned);
        let (q_a, q) = match a.q_rank {
            None => (None, whole("q", q, hidden)?),
            Some(rank) => {
                let q_a = whole("q_a", rank, hidden)?;
                (Some((q_a, norm("q_a_norm", rank)?)), whole("q_b", q, rank)?)
            }
        };
        let kv_a = whole("kv_a", a.rank + a.turned, hidden)?;
        let o = whole("o", hidden, a.heads * a.value)?;
        let (keys, values) = match a.split {
            // One head below the other.
            true => {
                let plain = |what: &str, rows, k| (Slice { row: k, ..place(what) }, a.heads * rows);
                (vec![plain("k_b", a.rank, a.nope)], vec![plain("v_b", a.value, a.rank)])
            }
            false => {
                // Of each head, from row `at` of its part on.
                let kv_b = place("kv_b");
                let first = |h: usize, at: usize| (h * (a.nope + a.value) + at) * a.rank;
                let key = |h| Slice { first: first(h, 0), row: 1, column: a.rank, ..kv_b.clone() };
                let value = |h| Slice { first: first(h, a.nope), ..kv_b.clone() };
                (
                    (0..a.heads).map(|h| (key(h), a.rank)).collect(),
                    (0..a.heads).map(|h| (value(h), a.value)).collect(),
                )
            }
        };
        Ok(Latent {
            q_a,
            q,
            kv_a,
            kv_norm: norm("kv_a_norm", a.rank)?,
            o,
            keys: mat(plain(keys, a.nope))?,
            values: mat(plain(values, a.rank))?,
        })
    }
}
