//! Logits -> token id. Pure: no clock, no global, no randomness but the coin it is given.

use crate::Result;

/// How to choose the next token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 = greedy, ties to the lowest id.
    pub temperature: f32,
    /// Keep the k likeliest; 0 = all.
    pub top_k: usize,
    /// Keep the smallest set with at least this probability; 1 = all.
    pub top_p: f32,
    /// Drop tokens less likely than this times the likeliest; 0 = none.
    pub min_p: f32,
    /// Locally typical sampling (Meister et al. 2022), mass kept; 1 = off.
    pub typical_p: f32,
    /// Divides (multiplies if negative) the logits of tokens in prompt and answer; 1 = off (Keskar et al. 2019).
    pub repetition_penalty: f32,
    /// Subtracted from tokens that occur in the answer.
    pub presence_penalty: f32,
    /// Subtracted from tokens in the answer, times their count.
    pub frequency_penalty: f32,
    /// Added to the logits of these ids.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of this request's coins.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Sampling {
        Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, typical_p: 1.0, repetition_penalty: 1.0, presence_penalty: 0.0, frequency_penalty: 0.0, logit_bias: Vec::new(), seed: 0 }
    }
}

impl Sampling {
    /// Checks every range; `vocab` bounds the ids of `logit_bias`.
    pub fn check(&self, _vocab: usize) -> Result<()> { todo!() }
}

/// A coin in [0, 1): a function of seed and position alone.
pub fn coin(_seed: u64, _position: u64) -> f64 { todo!() }

/// Applies penalties, bias and bans to `logits` in place. `prompt` and `answer` are the ids so far; `banned` ids become -inf.
pub fn adjust(_s: &Sampling, _logits: &mut [f32], _prompt: &[u32], _answer: &[u32], _banned: &[u32]) { todo!() }

/// Draws from adjusted logits.
pub fn draw(_s: &Sampling, _logits: &[f32], _coin: f64) -> u32 { todo!() }

/// Natural-log probability of an id.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Logprob {
    /// Token id.
    pub id: u32,
    /// ln p.
    pub logprob: f32,
    /// 1 = likeliest.
    pub rank: u32,
}

/// Log-probability of `id` and the `n` likeliest (descending, ties to the lowest id) under softmax of raw `logits`.
pub fn logprobs(_logits: &[f32], _id: u32, _n: usize) -> (Logprob, Vec<Logprob>) { todo!() }
