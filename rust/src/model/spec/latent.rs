//! Latent attention: its shape, read from `config.json`, and its weights. Never touches a tensor.

use super::build::{MAX_HEAD_DIM, MAX_WIDTH};
use super::config::{Facts, bad};
use super::family::Family;
use super::names::{Weight, existing};
use super::rope;
use crate::Result;

/// Multi-head latent attention (DeepSeek-AI 2024, DeepSeek-V2, section 2.1). With `a` the input of the layer:
///
/// ```text
/// q = a Wq, or norm(a Wqa) Wqb         [heads][nope + rope]
/// [c, r] = a Wkva;  c = norm(c)        [rank + rope]: what is cached, one "head" for all queries
/// [n_h, v_h] = c Wkvb                  [heads][nope + value]
/// s_h = scale * (q_nope_h n_h + turned(q_rope_h) turned(r));  o_h = softmax(s_h) v_h
/// ```
///
/// It is computed in the form that the paper calls absorbed, for prompts too: with `Wkvb = [N_h, V_h]`, `s_h` is
/// `scale * ([turned(q_rope_h), N_h^T q_nope_h] [turned(r), c])` and `o_h` is `V_h (softmax(s_h) c)`, so that
/// neither keys nor values are ever expanded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Latent {
    /// Query heads.
    pub heads: usize,
    /// Width between `Wqa` and `Wqb`; `None`: there is one matrix `Wq`.
    pub q_rank: Option<usize>,
    /// Width of what keys and values are made from.
    pub rank: usize,
    /// Width of the part of a query and a key that carries no position.
    pub nope: usize,
    /// Width of the part that is turned.
    pub turned: usize,
    /// Width of a value.
    pub value: usize,
    /// A checkpoint has `N_h^T` of all heads in one tensor and `V_h` in another, not `Wkvb`.
    pub split: bool,
    /// Epsilon of the two inner norms: the released code leaves it at 1e-6, whatever the other norms have.
    pub eps: f32,
    /// `1 / sqrt(nope + rope)`, and with YaRN times `(0.1 mscale_all_dim ln(factor) + 1)^2`.
    pub scale: f32,
    /// As in [`Attention`](super::Attention).
    pub rope: Option<usize>,
    /// As in [`Attention`](super::Attention).
    pub rope_interleaved: bool,
}

impl Latent {
    /// What the family and the file say, if this is a model with latent attention; `turned` is its `head_dim`.
    pub(super) fn read(
        family: &Family,
        facts: &Facts<'_>,
        (hidden, heads, turned): (usize, usize, usize),
    ) -> Result<Option<Latent>> {
        let Some(rank) = facts.count(&family.latent_rank, MAX_WIDTH)? else { return Ok(None) };
        let nope = facts.need_count(&family.latent_nope, MAX_HEAD_DIM)?;
        let value = facts.count(&family.latent_value, MAX_HEAD_DIM)?.unwrap_or(hidden / heads);
        for (fact, n) in [
            (&family.latent_rank, rank),
            (&family.latent_nope, nope),
            (&family.latent_value, value),
        ] {
            // The matrices of the heads lie side by side in blocks of 16 rows.
            if n % 16 != 0 {
                let key = fact.key.first().map_or("the family's fact", String::as_str);
                return Err(bad(key, &n.to_string(), "a multiple of 16"));
            }
        }
        let mut scale = 1.0 / ((nope + turned) as f64).sqrt();
        for params in facts.objects(&family.rope_scaling)? {
            scale *= rope::latent_scale(&params)?;
        }
        Ok(Some(Latent {
            heads,
            q_rank: facts.count(&family.latent_q_rank, MAX_WIDTH)?,
            rank,
            nope,
            turned,
            value,
            split: facts.flag(&family.latent_split)?,
            eps: facts.need_number(&family.latent_eps, 1e-12, 1.0)? as f32,
            scale: scale as f32,
            rope: None,
            rope_interleaved: facts.flag(&family.rope_interleaved)?,
        }))
    }

    /// Width of a query and of a key as they are computed: what one position takes in the cache.
    pub fn key_dim(&self) -> usize {
        self.turned + self.rank
    }

    pub(super) fn weights(&self, hidden: usize) -> Vec<Weight> {
        let q = self.heads * (self.nope + self.turned);
        let (low, q_rank) = (self.q_rank.is_some(), self.q_rank.unwrap_or(0));
        existing([
            (!low, "q", vec![q, hidden]),
            (low, "q_a", vec![q_rank, hidden]),
            (low, "q_a_norm", vec![q_rank]),
            (low, "q_b", vec![q, q_rank]),
            (true, "kv_a", vec![self.rank + self.turned, hidden]),
            (true, "kv_a_norm", vec![self.rank]),
            (!self.split, "kv_b", vec![self.heads * (self.nope + self.value), self.rank]),
            (self.split, "k_b", vec![self.heads, self.rank, self.nope]),
            (self.split, "v_b", vec![self.heads, self.value, self.rank]),
            (true, "o", vec![hidden, self.heads * self.value]),
        ])
    }
}
