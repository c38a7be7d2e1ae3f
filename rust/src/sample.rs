//! Logits -> token id. Pure: no clock, no global, no randomness but the coin it is given.
//!
//! Order, as in transformers' `_get_logits_processor` and vLLM's V1 sampler: bias, repetition, frequency and
//! presence penalty, bans ([`edits`]); then temperature, top-k, top-p, min-p, typical ([`draw`]), each on what
//! the one before left, renormalised. Where either of them keeps all tokens that tie at a limit, the lowest ids
//! win here, so that k means k.
//!
//! Same bits on every machine: a token's weight is an integer, `round(2^38 exp((logit - max) / temperature))`,
//! by a polynomial of plain f64 operations. Sums are exact whatever their order; less than 2^-39 of the
//! likeliest token's probability counts as none. NaN counts as -inf.

use crate::{Error, Result};

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
        Sampling {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

impl Sampling {
    /// Checks every range, which are those of vLLM's `SamplingParams._verify_args`; `vocab` bounds the ids of
    /// `logit_bias`.
    pub fn check(&self, vocab: usize) -> Result<()> {
        let fields = [
            ("temperature", self.temperature, 0.0, f32::MAX, "a finite number, 0 or more"),
            ("top_p", self.top_p, f32::MIN_POSITIVE, 1.0, "a number above 0 and up to 1"),
            ("min_p", self.min_p, 0.0, 1.0, "a number from 0 to 1"),
            ("typical_p", self.typical_p, f32::MIN_POSITIVE, 1.0, "a number above 0 and up to 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                f32::MIN_POSITIVE,
                f32::MAX,
                "a finite number above 0",
            ),
            ("presence_penalty", self.presence_penalty, -2.0, 2.0, "a number from -2 to 2"),
            ("frequency_penalty", self.frequency_penalty, -2.0, 2.0, "a number from -2 to 2"),
        ];
        for (field, value, low, high, expected) in fields {
            if !(low..=high).contains(&value) {
                return Err(Error::parameter(field, value, expected));
            }
        }
        for (id, bias) in &self.logit_bias {
            if *id as usize >= vocab {
                return Err(Error::parameter("logit_bias", id, format!("ids below {vocab}")));
            }
            if !bias.is_finite() {
                return Err(Error::parameter("logit_bias", bias, "finite numbers"));
            }
        }
        Ok(())
    }
}

/// Buffers that calls reuse; holds nothing that a result depends on.
#[derive(Debug, Default)]
pub struct Scratch {
    places: Vec<u32>,
    weights: Vec<u64>,
    keys: Vec<u64>,
    kept: Vec<Token>,
    ranked: Vec<Ranked>,
    edited: Vec<f32>,
}

/// A coin in [0, 1): a function of seed and position alone. SplitMix64's finalizer (Steele, Lea and Flood 2014)
/// over a counter that starts at the finalized seed, so that neighbouring seeds share no stretch of coins.
pub fn coin(seed: u64, position: u64) -> f64 {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    let mix = |mut x: u64| {
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    };
    let start = mix(seed.wrapping_add(STEP));
    let bits = mix(start.wrapping_add(position.wrapping_add(1).wrapping_mul(STEP)));
    (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// What bias, penalties and a ban make of one logit; no change is 0, 1, 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Edit {
    /// Whose logit.
    pub id: u32,
    /// The bias, added first.
    pub add: f32,
    /// The repetition penalty: divides what is above 0, multiplies what is not.
    pub penalty: f32,
    /// What the other penalties take away last; infinite for a ban.
    pub subtract: f32,
}

impl Edit {
    fn apply(&self, logit: f32) -> f32 {
        let x = logit + self.add;
        (if x > 0.0 { x / self.penalty } else { x * self.penalty }) - self.subtract
    }
}

/// The changes of logits: one for each id that has any. `prompt` and `answer` are the ids so far; `banned` ids become
/// -inf. Ids from `vocab` on are skipped.
pub fn edits(
    s: &Sampling,
    vocab: usize,
    prompt: &[u32],
    answer: &[u32],
    banned: &[u32],
    scratch: &mut Scratch,
) -> Vec<Edit> {
    let counted = s.presence_penalty != 0.0 || s.frequency_penalty != 0.0;
    let mut all: Vec<Edit> = Vec::new();
    if s.logit_bias.is_empty() && s.repetition_penalty == 1.0 && !counted && banned.is_empty() {
        return all;
    }
    let places = &mut scratch.places; // of an id in `all`, from 1; all 0 before and after
    places.resize(places.len().max(vocab), 0);
    let mut edit = |id: u32, change: fn(&mut Edit, f32), by: f32| {
        let Some(place) = places[..vocab].get_mut(id as usize) else { return };
        if *place == 0 {
            all.push(Edit { id, add: 0.0, penalty: 1.0, subtract: 0.0 });
            *place = all.len() as u32;
        }
        change(&mut all[*place as usize - 1], by);
    };
    for &(id, bias) in &s.logit_bias {
        edit(id, |e, bias| e.add += bias, bias);
    }
    if s.repetition_penalty != 1.0 {
        for &id in prompt.iter().chain(answer) {
            edit(id, |e, penalty| e.penalty = penalty, s.repetition_penalty);
        }
    }
    if counted {
        answer.iter().for_each(|&id| edit(id, |e, one| e.subtract += one, 1.0));
    }
    banned.iter().for_each(|&id| edit(id, |e, ban| e.subtract = ban, f32::INFINITY));
    for e in &mut all {
        places[e.id as usize] = 0;
        if e.subtract > 0.0 && e.subtract < f32::INFINITY {
            e.subtract = s.frequency_penalty * e.subtract + s.presence_penalty; // it was a count
        }
    }
    all
}

/// How a token is drawn from a row of logits.
#[derive(Clone, Debug, PartialEq)]
pub struct Draw<'a> {
    /// What changes the logits first.
    pub edits: Vec<Edit>,
    /// The filters and the temperature.
    pub sampling: &'a Sampling,
    /// From 0 to 1.
    pub coin: f64,
}

impl Draw<'_> {
    /// The token; `None` if the logits are no numbers, or if none is allowed.
    pub fn token(&self, logits: &[f32], scratch: &mut Scratch) -> Option<u32> {
        if !are_numbers(logits) {
            return None;
        }
        if self.edits.is_empty() {
            return draw(self.sampling, logits, self.coin, scratch).ok();
        }
        let mut edited = std::mem::take(&mut scratch.edited);
        edited.clear();
        edited.extend_from_slice(logits);
        for edit in &self.edits {
            let logit = &mut edited[edit.id as usize];
            *logit = edit.apply(*logit);
        }
        let token = draw(self.sampling, &edited, self.coin, scratch).ok();
        scratch.edited = edited;
        token
    }
}

/// Whether all are numbers; -inf may stand for "never".
pub fn are_numbers(logits: &[f32]) -> bool {
    // Without an early exit, so that it vectorizes.
    logits.iter().fold(true, |good, x| good & (*x < f32::INFINITY))
}

/// Applies [`edits`] to `logits` in place.
pub fn adjust(
    s: &Sampling,
    logits: &mut [f32],
    prompt: &[u32],
    answer: &[u32],
    banned: &[u32],
    scratch: &mut Scratch,
) {
    for edit in edits(s, logits.len(), prompt, answer, banned, scratch) {
        let logit = &mut logits[edit.id as usize];
        *logit = edit.apply(*logit);
    }
}

/// Weight of the likeliest token. With at most 2^24 tokens, sums stay below 2^62.
const ONE: u64 = 1 << 38;

/// A token that may still be drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Token {
    key: u64,
    weight: u64, // above 0
}

/// A token's weight and its place in some order.
type Ranked = (u64, u64, u64); // rank, key, weight

/// A token's place among all: ascending keys are descending logits, ties ascending ids.
fn key(id: usize, logit: f32) -> u64 {
    let logit = if logit.is_nan() { f32::NEG_INFINITY } else { logit + 0.0 }; // -0.0 ties with 0.0
    let bits = logit.to_bits();
    let descending = if bits >> 31 == 1 { bits } else { !bits & 0x7fff_ffff };
    u64::from(descending) << 32 | id as u64
}

fn id(key: u64) -> usize {
    (key & 0xffff_ffff) as usize
}

/// The largest logit, -inf if there is none; NaN counts as -inf.
fn largest(logits: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; 16]; // the maximum is the same in any order
    let (chunks, rest) = logits.as_chunks::<16>();
    for chunk in chunks {
        for (lane, &logit) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, logit);
        }
    }
    lanes.into_iter().chain(rest.iter().copied()).fold(f32::NEG_INFINITY, larger)
}

/// `(logit - max) / temperature`, at most 0, so that infinity is as likely as itself and nothing more.
#[derive(Clone, Copy)]
struct Scale {
    max: f64,
    per_temperature: f64,
}

impl Scale {
    fn new(max: f32, temperature: f32) -> Scale {
        Scale { max: f64::from(max.min(f32::MAX)), per_temperature: 1.0 / f64::from(temperature) }
    }

    #[inline(always)]
    fn x(self, logit: f32) -> f64 {
        let x = (f64::from(logit) - self.max) * self.per_temperature;
        if x > 0.0 { 0.0 } else { x }
    }

    /// `round(ONE * exp(x))`: adding 2^52 leaves the integer in the mantissa.
    #[inline(always)]
    fn weight(self, logit: f32) -> u64 {
        const SHIFT: f64 = (1u64 << 52) as f64;
        (exp(self.x(logit)) * ONE as f64 + SHIFT).to_bits() & ((1 << 52) - 1)
    }
}

/// `exp(x)` for `x <= 0`; NaN and less than -60 count as -60. Rounds `x / ln 2` to k by adding 1.5 * 2^52, which
/// leaves k in the low bits; the Taylor series of the rest, `|r| < 0.35`, has a relative error below 1e-9.
/// Straight-line code, which the compiler turns into vector code.
#[inline(always)]
fn exp(x: f64) -> f64 {
    const ROUND: f64 = 6_755_399_441_055_744.0;
    const LN2_HIGH: f64 = 0.693_147_180_369_123_8; // 33 bits: k * LN2_HIGH is exact
    const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    // 1 / n!, n from 8 to 0
    const TAYLOR: [f64; 9] = [
        1.0 / 40_320.0,
        1.0 / 5_040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ];
    let x = if x > -60.0 { x } else { -60.0 };
    let t = x * std::f64::consts::LOG2_E + ROUND;
    let k = t - ROUND;
    let r = (x - k * LN2_HIGH) - k * LN2_LOW;
    let sum = TAYLOR.iter().fold(0.0, |sum, c| sum * r + c);
    f64::from_bits(sum.to_bits().wrapping_add(t.to_bits() << 52))
}

/// Draws from adjusted logits, of which there are at most 2^24; `s` has passed `Sampling::check`. An error if they
/// allow no token.
pub fn draw(s: &Sampling, logits: &[f32], coin: f64, scratch: &mut Scratch) -> Result<u32> {
    let max = largest(logits);
    if max == f32::NEG_INFINITY {
        return Err(Error::parameter(
            "logits",
            "no token that is allowed (all are -inf or NaN)",
            "at least one; check logit_bias, bans and logits processors",
        ));
    }
    if s.temperature == 0.0 {
        return Ok(logits.iter().position(|&x| x == max).unwrap_or(0) as u32);
    }
    if keep(s, logits, Scale::new(max, s.temperature), scratch) {
        let total = scratch.kept.iter().map(|t| t.weight).sum();
        Ok(walk(scratch.kept.iter().map(|t| (id(t.key), t.weight)), coin, total))
    } else {
        let total = scratch.weights.iter().sum();
        Ok(walk(scratch.weights.iter().copied().enumerate(), coin, total))
    }
}

/// The token at which the sum of weights, by ascending id, exceeds `coin` times their total.
fn walk(tokens: impl Iterator<Item = (usize, u64)>, coin: f64, total: u64) -> u32 {
    let mut left = ((coin * total as f64) as u64).min(total - 1);
    for (id, weight) in tokens {
        if left < weight {
            return id as u32;
        }
        left -= weight;
    }
    unreachable!("the weights sum to the total")
}

/// The least weight that `min_p` keeps.
fn min_weight(min_p: f32) -> u64 {
    ((f64::from(min_p) * ONE as f64).ceil() as u64).max(1)
}

impl Sampling {
    /// The least weight of a token that `min_p` keeps, if it, top-k and top-p are all that decides after [`edits`]: if
    /// there is no typical sampling.
    pub fn least_weight(&self) -> Option<u64> {
        let decided = self.temperature == 0.0 || self.typical_p == 1.0;
        decided.then(|| min_weight(self.min_p))
    }
}

/// Fills `scratch.kept` with the tokens that the filters keep, by ascending id, and returns true; or, without
/// filters, fills `scratch.weights` with all tokens' weights and returns false.
fn keep(s: &Sampling, logits: &[f32], scale: Scale, scratch: &mut Scratch) -> bool {
    let Scratch { weights, keys, kept, ranked, .. } = scratch;
    let top_k = (1..logits.len()).contains(&s.top_k);
    let min_weight = min_weight(s.min_p);
    kept.clear();
    let total: u64 = if top_k {
        likeliest(logits, s.top_k, keys);
        keys.sort_unstable_by_key(|&key| id(key));
        let tokens = keys.iter().map(|&key| Token { key, weight: scale.weight(logits[id(key)]) });
        kept.extend(tokens.filter(|t| t.weight > 0));
        kept.iter().map(|t| t.weight).sum()
    } else {
        weights.clear();
        weights.extend(logits.iter().map(|&logit| scale.weight(logit)));
        let total = weights.iter().sum();
        // Only weights of at least `floor` can be kept: most of the vocabulary is never selected from.
        let floor = if s.top_p < 1.0 {
            let enough = |floor: u64| {
                let above = weights.iter().map(|&w| if w >= floor { w } else { 0 });
                above.sum::<u64>() >= share(total, s.top_p)
            };
            [6, 12, 18, 24].map(|shift| ONE >> shift).into_iter().find(|f| enough(*f)).unwrap_or(1)
        } else if s.min_p > 0.0 {
            min_weight
        } else if s.typical_p < 1.0 {
            1
        } else {
            return false;
        };
        let tokens = weights.iter().zip(logits).enumerate().filter(|(_, (w, _))| **w >= floor);
        kept.extend(tokens.map(|(i, (&weight, &logit))| Token { key: key(i, logit), weight }));
        total
    };
    if s.top_p < 1.0 {
        keep_share(kept, ranked, share(total, s.top_p), |_| 0);
    }
    kept.retain(|t| t.weight >= min_weight);
    if s.typical_p < 1.0 {
        // |-ln p - H| = |sum(p x) - x|, since -ln p = ln Z - x
        let total: u64 = kept.iter().map(|t| t.weight).sum();
        let value = |t: &Token| scale.x(logits[id(t.key)]);
        let mean = kept.iter().map(|t| t.weight as f64 * value(t)).sum::<f64>() / total as f64;
        let rank = |t: &Token| (mean - value(t)).abs().to_bits(); // of positive floats: in their order
        keep_share(kept, ranked, share(total, s.typical_p), rank);
    }
    true
}

/// `p` of `total`, at least 1.
fn share(total: u64, p: f32) -> u64 {
    ((f64::from(p) * total as f64).ceil() as u64).clamp(1, total)
}

/// Keeps the smallest set with a weight of at least `need`, by ascending rank, then key.
fn keep_share(
    kept: &mut Vec<Token>,
    ranked: &mut Vec<Ranked>,
    mut need: u64,
    rank: impl Fn(&Token) -> u64,
) {
    ranked.clear();
    ranked.extend(kept.iter().map(|t| (rank(t), t.key, t.weight)));
    // Halve the part in which the limit lies until one token is left.
    let mut part = &mut ranked[..];
    while part.len() > 1 {
        let half = part.len() / 2;
        part.select_nth_unstable(half);
        let first: u64 = part[..half].iter().map(|t| t.2).sum();
        if need <= first {
            part = &mut part[..half];
        } else {
            need -= first;
            part = &mut part[half..];
        }
    }
    let Some(&(last_rank, last_key, _)) = part.first() else { return };
    kept.retain(|t| (rank(t), t.key) <= (last_rank, last_key));
}

/// Fills `keys` with those of the `k` likeliest tokens, in no order.
fn likeliest(logits: &[f32], k: usize, keys: &mut Vec<u64>) {
    keys.clear();
    let k = k.min(logits.len());
    if k == 0 {
        return;
    }
    // A buffer a few times as long as k: after it has filled once, few tokens get below its limit.
    let full = (4 * k).max(256);
    let mut limit = u64::MAX;
    for (i, &logit) in logits.iter().enumerate() {
        let key = key(i, logit);
        if key < limit {
            keys.push(key);
            if keys.len() == full {
                limit = *keys.select_nth_unstable(k - 1).1;
                keys.truncate(k);
            }
        }
    }
    if keys.len() > k {
        keys.select_nth_unstable(k - 1);
        keys.truncate(k);
    }
}

/// Natural-log probability of an id.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Logprob {
    /// Token id.
    pub id: u32,
    /// ln p.
    pub logprob: f32,
    /// 1 = likeliest; ties by ascending id.
    pub rank: u32,
}

/// Log-probability of `id` and the `n` likeliest (descending, ties to the lowest id) under softmax of raw `logits`.
/// An `id` outside the logits has -inf, and so has every id if all logits are -inf or NaN.
pub fn logprobs(logits: &[f32], id: u32, n: usize) -> (Logprob, Vec<Logprob>) {
    let scale = Scale::new(largest(logits).max(f32::MIN), 1.0);
    let sum: u64 = logits.iter().map(|&logit| scale.weight(logit)).sum();
    let ln_sum = libm::log(sum as f64 / ONE as f64);
    let logprob = |id: usize, rank: usize| {
        let logit = logits.get(id).copied().filter(|x| *x > f32::NEG_INFINITY);
        let logprob = logit.map_or(f32::NEG_INFINITY, |logit| (scale.x(logit) - ln_sum) as f32);
        Logprob { id: id as u32, logprob, rank: rank as u32 }
    };
    let mut top = Vec::new();
    likeliest(logits, n, &mut top);
    top.sort_unstable();
    let top = top.iter().enumerate().map(|(i, &key)| logprob(self::id(key), i + 1)).collect();
    let own = logits.get(id as usize).map_or(u64::MAX, |&logit| key(id as usize, logit));
    let before = logits.iter().enumerate().filter(|&(i, &logit)| key(i, logit) < own).count();
    (logprob(id as usize, before + 1), top)
}

#[cfg(test)]
mod tests;
