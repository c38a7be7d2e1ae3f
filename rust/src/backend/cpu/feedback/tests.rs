//! What feedback does to the error of products, with sums made by the back end itself.

use super::super::tests::{mat, noise};
use super::*;
use crate::backend::cpu::{Buf, Bytes, Mat};
use crate::backend::{Backend, Part};

const FORMS: [Form; 4] = [Form::Q4, Form::INT5, Form::INT6, Form::Q8];

/// `m` inputs that have much in common, and the sums over them as the back end makes them.
fn inputs(cpu: &mut Cpu, m: usize, k: usize) -> (Buf, Vec<f32>) {
    let (own, common) = (noise(m * k, 5), noise(m, 6));
    let mix = |(i, x): (usize, f32)| 0.3 * x + common[i / k] * (1.0 + (i % k % 7) as f32);
    let x = Buf::new(own.into_iter().enumerate().map(mix).collect(), k);
    let [w, other] =
        [7, 8].map(|seed| mat(cpu, Form::F32, &[(&noise(16 * k, seed), 16)], k, false));
    cpu.watch_inputs([w.id()].into_iter());
    let mut out = cpu.buf();
    cpu.linear(&w, None, &x, &mut out);
    cpu.linear(&other, None, &x, &mut out);
    let mut inputs = cpu.take_inputs();
    assert!(inputs.take(other.id()).is_none());
    let sums = inputs.take(w.id()).unwrap();
    assert!(inputs.take(w.id()).is_none());
    (x, sums)
}

#[test]
fn sums_are_those_of_plain_loops() {
    let mut cpu = Cpu::new(2, None).unwrap();
    let (m, k) = (70, 83);
    let (x, sums) = inputs(&mut cpu, m, k);
    for i in 0..k {
        for j in i..k {
            let expected: f32 = (0..m).map(|t| x.row(t)[i] * x.row(t)[j]).sum();
            let found = sums[i * k + j];
            assert!(
                (found - expected).abs() <= 1e-3 * (1.0 + expected.abs()),
                "{found} {expected}"
            );
        }
    }
}

#[test]
fn the_factor_times_itself_is_the_sums_and_the_damping() {
    let mut cpu = Cpu::new(2, None).unwrap();
    for k in [1, 16, 63, 64, 65, 130, 300] {
        let (_, sums) = inputs(&mut cpu, 40, k);
        let mut m = sums.clone();
        assert!(cpu.factor(&mut m, k));
        let mean = (0..k).map(|i| sums[i * k + i]).sum::<f32>() / k as f32;
        for i in 0..k {
            for j in i..k {
                let found: f32 = (j..k).map(|n| m[i * k + n] * m[j * k + n]).sum();
                let expected = sums[i * k + j] + if i == j { DAMP * mean } else { 0.0 };
                assert!((found - expected).abs() < 1e-4 * mean, "{k}: {i} {j} {found} {expected}");
            }
        }
    }
}

/// Square error of the products with `x`; the bytes.
fn pack(
    cpu: &Cpu,
    form: Form,
    (w, n): (&[f32], usize),
    x: &Buf,
    sums: Option<Vec<f32>>,
) -> (f64, Vec<u8>) {
    let k = x.width;
    let stored: Vec<u8> = w.iter().flat_map(|x| x.to_le_bytes()).collect();
    let parts = vec![Part::floats(Form::F32, n, k, &stored)];
    let parts = Parts { parts, k, interleaved: false };
    let mut bytes = Bytes::zeroed(form.bytes(n, k), "test").unwrap();
    match sums {
        Some(sums) => cpu.pack_knowing(form, &parts, sums, bytes.get_mut()).unwrap(),
        None => cpu.pack_into(form, &parts, bytes.get_mut()).unwrap(),
    }
    let packed = Mat::new(form, n, k, bytes).unwrap();
    assert!(cpu.is_valid(&packed), "{}", form.name());
    let (mut error, mut row) = (0.0, vec![0.0; k]);
    for r in 0..n {
        packed.unpack_row(r, &mut row);
        for t in 0..x.rows {
            let w = w[r * k..][..k].iter().zip(&row);
            let off: f32 = w.zip(x.row(t)).map(|((w, q), x)| (w - q) * x).sum();
            error += f64::from(off * off);
        }
    }
    (error, packed.bytes().to_vec())
}

#[test]
fn feedback_lessens_the_error_of_products_inside_blocks_and_beyond() {
    let mut cpu = Cpu::new(2, None).unwrap();
    let (n, k) = (24, 600);
    let (x, sums) = inputs(&mut cpu, 64, k);
    let mut apart = sums.clone();
    for (i, x) in apart.iter_mut().enumerate() {
        *x = if i / k / BLOCK == i % k / BLOCK { *x } else { 0.0 };
    }
    let w = noise(n * k, 9);
    for form in FORMS {
        let error = |sums| pack(&cpu, form, (&w, n), &x, sums).0;
        let (plain, blocks) = (error(None), error(Some(apart.clone())));
        let whole = error(Some(sums.clone()));
        println!("{}: {plain:.2e}, in blocks {blocks:.2e}, whole {whole:.2e}", form.name());
        assert!(blocks < 0.05 * plain && whole < 0.7 * blocks, "{}", form.name());
    }
}

#[test]
fn sums_that_say_nothing_are_not_used() {
    let cpu = Cpu::new(2, None).unwrap();
    let (n, k) = (16, 300);
    let (w, x) = (noise(n * k, 3), Buf::new(noise(k, 4), k));
    for form in FORMS {
        let (_, plain) = pack(&cpu, form, (&w, n), &x, None);
        for value in [0.0, f32::INFINITY, f32::NAN] {
            let sums = Some(vec![value; k * k]);
            assert!(pack(&cpu, form, (&w, n), &x, sums).1 == plain, "{}", form.name());
        }
    }
}
