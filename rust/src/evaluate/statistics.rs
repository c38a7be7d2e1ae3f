//! Sums over predicted tokens, in f64. Knows logits and the tokens that came; no model.

use crate::model::divergence::{kl, log_sum_exp};
use crate::{Error, Result};

/// Quantiles of the divergence that are given.
pub const QUANTILES: [f64; 6] = [0.5, 0.9, 0.95, 0.99, 0.999, 1.0];
/// Standard errors on each side of a mean that hold it 95 times of 100, if it is normally distributed.
const WIDTH: f64 = 1.959_963_984_540_054;

/// A mean over tokens and its 95 % confidence interval.
///
/// Tokens of one context are not independent, so the standard error is that of a ratio of sums over contexts
/// (Cochran 1977, "Sampling Techniques", 6.3): with `s_i` the sum and `n_i` the tokens of context i of w, and
/// `m = sum s / sum n`, it is `sqrt(w / (w - 1) * sum (s_i - n_i m)^2) / sum n`. One context has none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The mean.
    pub value: f64,
    /// The interval's ends; `None` with a single context.
    pub interval: Option<(f64, f64)>,
}

impl Estimate {
    fn of(sums: &[Sum], of: impl Fn(&Sum) -> f64) -> Estimate {
        let n: f64 = sums.iter().map(|s| s.tokens as f64).sum();
        let value = sums.iter().map(&of).sum::<f64>() / n;
        let square = |s: &Sum| (of(s) - s.tokens as f64 * value).powi(2);
        let contexts = sums.len() as f64;
        let squares = sums.iter().map(square).sum::<f64>() * contexts / (contexts - 1.0);
        let half = WIDTH * squares.sqrt() / n;
        let interval = (sums.len() > 1).then_some((value - half, value + half));
        Estimate { value, interval }
    }

    /// `f` of the value and of the ends; `f` is monotonic.
    fn map(self, f: impl Fn(f64) -> f64) -> Estimate {
        let interval = self.interval.map(|(low, high)| (f(low), f(high)));
        Estimate { value: f(self.value), interval }
    }
}

/// What was measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    /// Tokens that were predicted.
    pub tokens: usize,
    /// Contexts they stand in.
    pub contexts: usize,
    /// `exp` of the mean of `-ln p(token)`.
    pub perplexity: Estimate,
    /// How often the token that came was the likeliest, the lowest id of equals.
    pub accuracy: Estimate,
    /// Against the reference.
    pub distance: Option<Distance>,
}

/// How far a model's predictions are from a reference's.
#[derive(Clone, Debug, PartialEq)]
pub struct Distance {
    /// Of the reference.
    pub perplexity: Estimate,
    /// The model's perplexity over the reference's; its interval is that of the difference, token by token.
    pub ratio: Estimate,
    /// Mean of `sum over v of p_reference(v) * ln(p_reference(v) / p(v))`, in nats.
    pub kl: Estimate,
    /// Its [`QUANTILES`] over tokens, with linear interpolation.
    pub kl_quantiles: [f64; 6],
    /// How often the likeliest token is the same.
    pub same_top: Estimate,
    /// How often the likeliest token is right in exactly one of the two (Dutta et al. 2024, "Accuracy is not all
    /// you need").
    pub flips: Estimate,
    /// Root of the mean square of the difference of `p(token)`.
    pub rms_dp: Estimate,
}

/// Sums over the tokens of one context.
#[derive(Clone, Copy, Default)]
struct Sum {
    tokens: usize,
    loss: f64,
    right: usize,
    reference_loss: f64,
    kl: f64,
    same: usize,
    flips: usize,
    square_dp: f64,
}

/// All that is kept of the predictions.
#[derive(Default)]
pub(super) struct Sums {
    contexts: Vec<Sum>,
    /// Divergence of each token.
    kl: Vec<f32>,
    paired: bool,
}

impl Sums {
    /// A new context.
    pub(super) fn begin(&mut self) {
        self.contexts.push(Sum::default());
    }

    /// Takes the rows of logits that predicted `tokens`: the model's, and the reference's if there is one.
    pub(super) fn add(
        &mut self,
        logits: &[Vec<f32>],
        vocab: usize,
        tokens: &[u32],
        threads: usize,
    ) -> Result<()> {
        let mut rows = vec![Row::default(); tokens.len()];
        let each = tokens.len().div_ceil(threads.max(1)).max(1);
        std::thread::scope(|scope| {
            for (part, rows) in rows.chunks_mut(each).enumerate() {
                scope.spawn(move || {
                    for (i, row) in rows.iter_mut().enumerate() {
                        let i = part * each + i;
                        let x = &logits[0][i * vocab..][..vocab];
                        let y = logits.get(1).map(|y| &y[i * vocab..][..vocab]);
                        *row = Row::of(x, y, tokens[i] as usize);
                    }
                });
            }
        });
        self.paired = logits.len() > 1;
        let Some(sum) = self.contexts.last_mut() else { return Ok(()) };
        for row in &rows {
            if !(row.loss + row.reference_loss + row.kl).is_finite() {
                return Err(Error::Numeric("found logits that are not finite".into()));
            }
            sum.tokens += 1;
            sum.loss += row.loss;
            sum.right += usize::from(row.right);
            sum.reference_loss += row.reference_loss;
            sum.kl += row.kl;
            sum.same += usize::from(row.same);
            sum.flips += usize::from(row.right != row.reference_right);
            let dp = libm::exp(-row.loss) - libm::exp(-row.reference_loss);
            sum.square_dp += dp * dp;
        }
        if self.paired {
            self.kl.extend(rows.iter().map(|row| row.kl as f32));
        }
        Ok(())
    }

    pub(super) fn finish(mut self) -> Evaluation {
        let contexts = &self.contexts;
        let mean = |of: fn(&Sum) -> f64| Estimate::of(contexts, of);
        self.kl.sort_unstable_by(f32::total_cmp);
        let distance = self.paired.then(|| Distance {
            perplexity: mean(|s| s.reference_loss).map(libm::exp),
            ratio: mean(|s| s.loss - s.reference_loss).map(libm::exp),
            kl: mean(|s| s.kl),
            kl_quantiles: QUANTILES.map(|q| quantile(&self.kl, q)),
            same_top: mean(|s| s.same as f64),
            flips: mean(|s| s.flips as f64),
            rms_dp: mean(|s| s.square_dp).map(|square| square.max(0.0).sqrt()),
        });
        Evaluation {
            tokens: contexts.iter().map(|s| s.tokens).sum(),
            contexts: contexts.len(),
            perplexity: mean(|s| s.loss).map(libm::exp),
            accuracy: mean(|s| s.right as f64),
            distance,
        }
    }
}

/// What one prediction says.
#[derive(Clone, Copy, Default)]
struct Row {
    loss: f64,
    right: bool,
    reference_loss: f64,
    reference_right: bool,
    kl: f64,
    same: bool,
}

impl Row {
    fn of(x: &[f32], reference: Option<&[f32]>, token: usize) -> Row {
        let (top, norm) = (top(x), log_sum_exp(x));
        let loss = norm - f64::from(x[token]);
        let mut row = Row { loss, right: top == token, ..Row::default() };
        let Some(y) = reference else { return row };
        let (reference_top, reference_norm) = (self::top(y), log_sum_exp(y));
        row.reference_loss = reference_norm - f64::from(y[token]);
        row.reference_right = reference_top == token;
        row.same = top == reference_top;
        row.kl = kl((y, reference_norm), (x, norm));
        row
    }
}

/// The lowest index of the largest value.
fn top(x: &[f32]) -> usize {
    (0..x.len()).fold(0, |best, i| if x[i] > x[best] { i } else { best })
}

/// Quantile `q` of sorted values.
fn quantile(sorted: &[f32], q: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let at = q * last as f64;
    let (low, part) = (at.floor() as usize, at - at.floor());
    let (a, b) = (f64::from(sorted[low]), f64::from(sorted[last.min(low + 1)]));
    a + (b - a) * part
}

#[cfg(test)]
pub(super) fn of_rows(rows: &[(Vec<f32>, Vec<f32>, u32)], contexts: usize) -> Evaluation {
    let mut sums = Sums::default();
    for part in rows.chunks(rows.len().div_ceil(contexts)) {
        sums.begin();
        let logits = |of: fn(&(Vec<f32>, Vec<f32>, u32)) -> &Vec<f32>| {
            part.iter().flat_map(|row| of(row).clone()).collect::<Vec<f32>>()
        };
        let tokens: Vec<u32> = part.iter().map(|row| row.2).collect();
        let both = [logits(|r| &r.0), logits(|r| &r.1)];
        sums.add(&both, part[0].0.len(), &tokens, 2).unwrap();
    }
    sums.finish()
}
