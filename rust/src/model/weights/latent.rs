//! Reads the weights of latent attention: the stored `kv_b` holds, for each head, rows that make a key and rows that
//! make a value; here each is a matrix of its own, in the direction in which the forward pass applies it.

use super::{Latent, Reader, Source};
use crate::Result;
use crate::model::spec::{self, Rows};

impl Reader<'_> {
    pub(super) fn latent<M, V>(
        &self,
        l: usize,
        a: &spec::Latent,
        row: &impl Fn(&[f32]) -> V,
        mat: &mut impl FnMut(Source) -> Result<M>,
    ) -> Result<Latent<M, V>> {
        let hidden = self.spec.hidden;
        let place = |what: &str| self.spec.place(&self.names, l, what);
        let norm = |what: &str, n| Ok(row(&self.norm(&self.names.layer(l, what), &[n])?));
        let mut whole = |what: &str, n, k| mat(Source::rows(vec![(place(what), n)], k));
        let q = a.heads * (a.nope + a.turned);
        let (q_a, q) = match a.q_rank {
            None => (None, whole("q", q, hidden)?),
            Some(rank) => {
                let q_a = whole("q_a", rank, hidden)?;
                (Some((q_a, norm("q_a_norm", rank)?)), whole("q_b", q, rank)?)
            }
        };
        let kv_a = whole("kv_a", a.rank + a.turned, hidden)?;
        let kv_b = place("kv_b");
        // From row `at` on of each head's part.
        let parts = |at: usize, n: usize| -> Vec<(Rows, usize)> {
            let part = |h: usize| Rows { first: h * (a.nope + a.value) + at, ..kv_b.clone() };
            (0..a.heads).map(|h| (part(h), n)).collect()
        };
        let keys = Source { transposed: true, ..Source::rows(parts(0, a.rank), a.nope) };
        Ok(Latent {
            q_a,
            q,
            kv_a,
            kv_norm: norm("kv_a_norm", a.rank)?,
            keys: mat(keys)?,
            values: mat(Source::rows(parts(a.nope, a.value), a.rank))?,
            o: mat(Source::rows(vec![(place("o"), hidden)], a.heads * a.value))?,
        })
    }
}
