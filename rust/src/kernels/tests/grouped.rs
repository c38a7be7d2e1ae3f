//! The grouped forms, whatever their fields: every set gives the bits of `scalar`, and that is right.

use super::*;
use crate::kernels::layout::pack_grouped;
use crate::quant::{BlockGrouped, Codes, Offset, Scales};

/// Every field of [`Grouped`] at each of its values.
fn all_grouped() -> impl Iterator<Item = Grouped> {
    use Scales::{Bf16, F16, Integer, Power};
    let offsets = [Offset::Signed, Offset::Zero, Offset::Min];
    let linear = |o| [Codes::Linear(o), Codes::Linear5(o), Codes::Linear6(o)];
    let codes = offsets.into_iter().flat_map(linear).chain([Codes::Uneven, Codes::Fp4]);
    let scales = [F16, Bf16, Integer, Power];
    let both = codes.flat_map(move |codes| scales.map(|scales| (codes, scales)));
    both.flat_map(|(codes, scales)| [16, 32, 64, 128].map(|group| Grouped { codes, scales, group }))
}

/// A matrix `[n, k]` of any codes, `n` a multiple of 16, with inputs from `k` on zero as the packer leaves them. Scales
/// that are powers of two are around 1 if `near`, else any that f32 sums can stand.
fn grouped(random: &mut Random, how: Grouped, n: usize, k: usize, near: bool) -> Aligned {
    let form = Form::Grouped(how);
    let size = form.row_block_bytes(k);
    let mut out = Aligned::new(n / ROWS * size);
    for out in out.get_mut().chunks_exact_mut(size) {
        for (b, out) in out.chunks_mut(block_offset(form, 1)).enumerate() {
            let (mut rows, largest) = ([BlockGrouped::ZERO; ROWS], (16u8 << how.high()) - 1);
            let len = BLOCK.min(k - b * BLOCK);
            for row in &mut rows {
                // Some rows are all of one sign and as large as can be.
                let extreme = random.next() % 8;
                row.q[..len].fill_with(|| match extreme {
                    0 => largest / 2,
                    1 => largest,
                    2 => 0,
                    _ => random.next() as u8 & largest,
                });
                let mut number = || match how.scales {
                    Scales::F16 => half::f16::from_f32(random.value()).to_bits(),
                    Scales::Bf16 => half::bf16::from_f32(random.value()).to_bits(),
                    Scales::Integer => random.next() as u16 & 255,
                    Scales::Power if near => 100 + random.next() as u16 % 50,
                    Scales::Power => random.next() as u16 % 200,
                };
                row.s[..len / how.unit()].fill_with(&mut number);
                row.o[..len / how.unit()].fill_with(&mut number);
                row.d = half::f16::from_f32(random.value()).to_bits();
                row.e = half::f16::from_f32(random.value()).to_bits();
            }
            pack_grouped(how, &rows, out);
        }
    }
    out
}

/// All products of a grouped matrix `[n, k]` with `m` tokens.
fn grouped_products(how: Grouped, m: usize, n: usize, k: usize, random: &mut Random) {
    let packed = grouped(random, how, n, k, false);
    let x = random.values(m * k);
    let scalar = &scalar::KERNELS;
    let mut a = Quantized::new(scalar, &x, m);
    for extreme in [false, true] {
        let y = gemm(scalar, Form::Grouped(how), packed.get(), &a.acts());
        for set in integer_sets() {
            let z = gemm(set, Form::Grouped(how), packed.get(), &a.acts());
            assert_eq!(bits(&z), bits(&y), "{} {} {:?}", set.name, extreme, how);
        }
        a.extreme();
    }
    // Against f32 activations: one chain of the weights as they are.
    let packed = grouped(random, how, n, k, true);
    let mut row = vec![0.0; k];
    let mut y = vec![0.0; m * n];
    for r in 0..n {
        unpack_row(Form::Grouped(how), packed.get(), r, &mut row);
        for (t, x) in x.chunks(k).enumerate() {
            y[t * n + r] = row.iter().zip(x).fold(0.0f32, |acc, (w, x)| w.mul_add(*x, acc));
        }
    }
    for set in available() {
        let mut z = vec![0.0; y.len()];
        set.gemm_float(Form::GroupedFloat(how), packed.get(), k, &x, &mut z);
        assert_eq!(bits(&z), bits(&y), "{} {:?}", set.name, how);
    }
    // Against int8 activations: the same weights, in f64.
    let a = Quantized::new(scalar, &x, m);
    let acts = a.acts();
    let z = gemm(scalar, Form::Grouped(how), packed.get(), &acts);
    let size = Form::Grouped(how).row_block_bytes(k);
    for r in 0..n {
        let row_block = &packed.get()[r / ROWS * size..][..size];
        let row: Vec<_> = layout::blocks(Form::Grouped(how), row_block)
            .map(|block| layout::unpack_grouped(how, block, r % ROWS))
            .collect();
        for t in 0..m {
            let (mut sum, mut all) = (0.0, 0.0);
            for i in 0..k {
                let (b, u) = (i / BLOCK, i % BLOCK / how.unit());
                let x = f64::from(acts.s(b, t)) * f64::from(acts.q(b, t)[i % BLOCK]);
                let code = how.value(row[b].q[i % BLOCK]);
                let w = f64::from(row[b].scale(how, u)) * f64::from(code);
                let o = f64::from(row[b].offset(how, u));
                sum += (w + o) * x;
                all += (w.abs() + o.abs()) * x.abs();
            }
            let z = f64::from(z[t * n + r]);
            assert!((z - sum).abs() <= 1e-5 * all, "{} {} {:?}", z, sum, how);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 1 } else { 48 }))]

    #[test]
    fn grouped_gemm(m in 1usize..14, blocks in 1usize..4, k in 1usize..12, which in 0usize..88, seed: u64) {
        for how in all_grouped().skip(which).step_by(88) {
            grouped_products(how, m, blocks * ROWS, k * 32, &mut Random(seed));
        }
    }
}
