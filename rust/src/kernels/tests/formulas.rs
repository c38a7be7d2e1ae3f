//! `scalar` against plain arithmetic in f64.

use super::*;

#[test]
fn scalar_gemm_is_the_dot_product_of_what_is_stored() {
    let (n, k, m) = (2 * ROWS, 320, 3);
    let mut random = Random(5);
    let (w, x) = (random.values(n * k), random.values(m * k));
    let set = &scalar::KERNELS;
    for form in [Form::Q4, Form::Q8] {
        let packed = pack(set, form, &w, k);
        let a = Quantized::new(set, &x, m);
        let y = gemm(set, form, packed.get(), &a.acts());
        let mut row = vec![0.0; k];
        for r in 0..n {
            unpack_row(form, packed.get(), r, &mut row);
            for t in 0..m {
                let dot: f64 = (0..k)
                    .map(|i| {
                        let (b, acts) = (i / BLOCK, a.acts());
                        let x = f64::from(acts.q(b, t)[i % BLOCK]) * f64::from(acts.s(b, t));
                        f64::from(row[i]) * x
                    })
                    .sum();
                let got = f64::from(y[t * n + r]);
                assert!((got - dot).abs() <= 1e-3, "{form:?}: {got} for {dot}");
            }
        }
    }
}

#[test]
fn exp_is_within_two_ulp() {
    let mut x = -87.0f32;
    while x < 88.0 {
        let (got, want) = (f64::from(float::exp(x)), f64::from(x).exp());
        assert!((got / want - 1.0).abs() < 2.0 * f64::from(f32::EPSILON), "exp({x}) = {got}");
        x += 0.000_73;
    }
    assert_eq!(float::exp(f32::NEG_INFINITY), 0.0);
    assert_eq!(float::exp(0.0), 1.0);
    assert_eq!(float::exp(f32::INFINITY), f32::INFINITY);
    assert!(float::exp(f32::NAN).is_nan());
}

/// `(x, act(x))` for x from -20 to 20, and some small x.
fn curve(act: Activation) -> impl Iterator<Item = (f64, f64)> {
    let x = (-20_000..=20_000).map(|i| i as f32 * 1e-3).chain([1e-8, -1e-8, 1e-5, -1e-5]);
    x.map(move |x| {
        let mut y = [x];
        scalar::KERNELS.gate(act, &mut y, &[1.0]);
        (f64::from(x), f64::from(y[0]))
    })
}

#[test]
fn activations_are_their_formulas() {
    for (x, y) in curve(Activation::Gelu) {
        let want = x * 0.5 * libm::erfc(-x / 2f64.sqrt());
        assert!((y - want).abs() <= 1.2e-7 * x.abs(), "gelu({x}) = {y}, expected {want}");
    }
    let eps = -1e-6f32;
    for (x, y) in curve(Activation::XIelu { alpha_p: 0.75, alpha_n: 1.5, beta: 0.5, eps }) {
        let bend = if x > 0.0 { 0.75 * x * x } else { 1.5 * (x.min(eps.into()).exp_m1() - x) };
        let want = 0.5 * x + bend;
        assert!(
            (y - want).abs() <= 4e-7 * (x.abs() + want.abs()),
            "xielu({x}) = {y}, expected {want}"
        );
    }
    for (x, y) in curve(Activation::Relu2) {
        assert!((y - x.max(0.0).powi(2)).abs() <= 1e-7 * y);
    }
}

#[test]
fn layer_norm_is_its_formula() {
    let mut random = Random(7);
    let (x, gain, bias) = (random.values(77), random.values(77), random.values(77));
    let mut y = vec![0.0; 77];
    scalar::KERNELS.layer_norm(&x, &gain, Some(&bias), 1e-5, &mut y);
    let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / 77.0;
    let variance = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / 77.0;
    for i in 0..77 {
        let unit = (f64::from(x[i]) - mean) / (variance + 1e-5).sqrt();
        let want = unit * f64::from(gain[i]) + f64::from(bias[i]);
        assert!((f64::from(y[i]) - want).abs() <= 1e-5 * want.abs().max(1.0), "{i}");
    }
}

#[test]
fn a_cut_keeps_what_stands_out() {
    let x = Random(7).values(1000);
    let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / 1000.0;
    let variance = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / 1000.0;
    let mut y = x.clone();
    scalar::KERNELS.cut(&mut y, 1.5);
    for (x, y) in x.iter().zip(&y) {
        let expected = (f64::from(*x) - mean - 1.5 * variance.sqrt()).max(0.0);
        assert!((f64::from(*y) - expected).abs() < 1e-5, "{x}: {y}, {expected}");
    }
    assert!(y.iter().any(|&y| y > 0.0));
}
