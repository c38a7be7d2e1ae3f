//! How far a distribution is from another, both as logits. Never computes logits.

/// `ln(sum of e^x)`.
pub fn log_sum_exp(x: &[f32]) -> f64 {
    let most = f64::from(x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    most + libm::log(x.iter().map(|&x| libm::exp(f64::from(x) - most)).sum())
}

/// `sum of p ln(p / q)` in nats, at least 0, of the distributions with the logits `p` and `q` and their [`log_sum_exp`]
/// (Kullback and Leibler 1951).
pub fn kl((p, p_norm): (&[f32], f64), (q, q_norm): (&[f32], f64)) -> f64 {
    let shift = q_norm - p_norm;
    let mut sum = 0.0;
    for (&p, &q) in p.iter().zip(q) {
        let (p, q) = (f64::from(p), f64::from(q));
        sum += libm::exp(p - p_norm) * (p - q + shift);
    }
    sum.max(0.0) // a rounding error below zero is none
}
