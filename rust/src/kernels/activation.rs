//! Activations of feed-forward layers and what they are made of: scalar functions of our own, the same bits on
//! every machine, which `float` compiles for each instruction set. Touches no matrix.

/// The activation of a feed-forward layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `x * sigmoid(x)` (Elfwing et al. 2017).
    Silu,
    /// `x * Phi(x)`, Phi the distribution function of the normal distribution (Hendrycks & Gimpel 2016).
    Gelu,
    /// The same with the tanh approximation of Phi.
    GeluTanh,
    /// `max(x, 0)^2` (So et al. 2021).
    Relu2,
    /// `beta x + alpha_p x^2` where `x > 0`, else `beta x + alpha_n (e^min(x, eps) - 1 - x)`
    /// (Huang & Schlag 2024).
    XIelu {
        /// Of the square.
        alpha_p: f32,
        /// Of the exponential.
        alpha_n: f32,
        /// Slope at 0.
        beta: f32,
        /// Just below 0.
        eps: f32,
    },
    /// `sigmoid(x)`.
    Sigmoid,
    /// `x`.
    None,
    /// `g * sigmoid(1.702 g)` with `g = min(x, 7)`, times `clamp(up, -7, 7) + 1` instead of `up` (GPT-OSS).
    ClampedSwiglu,
}

/// `q` and `s` with `e^x = (1 + q) s`, `s` a power of two, for x between -88 and 88.8.
///
/// `x = n ln 2 + r`; the polynomial in `r` is Cephes' expf; `n` goes into the exponent by an addition.
#[inline(always)]
fn exp_parts(x: f32) -> (f32, f32) {
    const MAGIC: f32 = 12_582_912.0;
    let z = x.clamp(-88.0, 88.8);
    let shifted = z.mul_add(std::f32::consts::LOG2_E, MAGIC);
    let n = shifted - MAGIC;
    // ln 2 in two parts, so that n * the first is exact.
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, z));
    let q = 1.987_569_1e-4f32
        .mul_add(r, 1.398_199_9e-3)
        .mul_add(r, 8.333_452e-3)
        .mul_add(r, 4.166_579_6e-2)
        .mul_add(r, 1.666_666_5e-1)
        .mul_add(r, 0.5)
        .mul_add(r * r, r);
    (q, f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits())))
}

/// e^x to about 1 ulp. Exactly 0 below -87.3, infinite above 88.4.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    let (q, scale) = exp_parts(x);
    if x < -87.3 { 0.0 } else { (q + 1.0) * scale }
}

/// e^x - 1 to a few ulp, for x up to 0.
#[inline(always)]
fn exp_m1(x: f32) -> f32 {
    let (q, scale) = exp_parts(x);
    q.mul_add(scale, scale - 1.0)
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    // 0.5 * (1 + tanh(z)) = sigmoid(2 z)
    const TWICE: f32 = 1.595_769; // 2 * sqrt(2 / pi)
    x * sigmoid(TWICE * (x * x * x).mul_add(0.044_715, x))
}

/// `x * Phi(x)`, off by at most 1.2e-7 |x|: for `t >= 0`, `Phi(-t) = e^-p(t) / 2`, the polynomial fitted to
/// `-ln(2 Phi(-t))` on 0..6 with the weight `Phi(-t)^0.75`; beyond, it grows.
#[inline(always)]
fn gelu(x: f32) -> f32 {
    let t = x.abs();
    let p = 1.310_385_6e-6f32
        .mul_add(t, -1.979_597_3e-5)
        .mul_add(t, 9.539_55e-5)
        .mul_add(t, 1.704_748e-4)
        .mul_add(t, -4.985_739e-3)
        .mul_add(t, 3.644_230_6e-2)
        .mul_add(t, 0.318_283_74)
        .mul_add(t, 0.797_886_67);
    let below = 0.5 * exp(-(p * t));
    x * if x < 0.0 { below } else { 1.0 - below }
}

#[inline(always)]
fn xielu(x: f32, alpha_p: f32, alpha_n: f32, beta: f32, eps: f32) -> f32 {
    let bend = if x > 0.0 { alpha_p * x * x } else { alpha_n * (exp_m1(x.min(eps)) - x) };
    beta.mul_add(x, bend)
}

/// `gate = act(gate) * up`.
#[inline(always)]
pub(super) fn gate(act: Activation, gate: &mut [f32], up: &[f32]) {
    let both = gate.iter_mut().zip(up);
    match act {
        Activation::Silu => {
            for (g, &u) in both {
                *g = *g * sigmoid(*g) * u;
            }
        }
        Activation::Gelu => {
            for (g, &u) in both {
                *g = gelu(*g) * u;
            }
        }
        Activation::GeluTanh => {
            for (g, &u) in both {
                *g = gelu_tanh(*g) * u;
            }
        }
        Activation::Relu2 => {
            for (g, &u) in both {
                *g = g.max(0.0) * g.max(0.0) * u;
            }
        }
        Activation::XIelu { alpha_p, alpha_n, beta, eps } => {
            for (g, &u) in both {
                *g = xielu(*g, alpha_p, alpha_n, beta, eps) * u;
            }
        }
        Activation::Sigmoid => {
            for (g, &u) in both {
                *g = sigmoid(*g) * u;
            }
        }
        Activation::None => {
            for (g, &u) in both {
                *g *= u;
            }
        }
        Activation::ClampedSwiglu => {
            for (g, &u) in both {
                let x = g.min(7.0);
                *g = x * sigmoid(1.702 * x) * (u.clamp(-7.0, 7.0) + 1.0);
            }
        }
    }
}
