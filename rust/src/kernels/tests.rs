//! Every set this CPU can run gives the bits of `scalar`, over shapes that straddle every edge and over
//! corner values.

mod choice;
mod formulas;
mod grouped;

use super::layout::{Form, ROWS, block_offset, pack_float, pack_q4, pack_q8, unpack_row};
use super::*;
use crate::quant::{BLOCK, BlockGrouped, BlockQ4, BlockQ8, Grouped};
use proptest::prelude::*;

/// Bytes that start at a multiple of 64.
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    fn new(len: usize) -> Aligned {
        let bytes = vec![0; len + 64];
        let start = bytes.as_ptr().addr().next_multiple_of(64) - bytes.as_ptr().addr();
        Aligned { bytes, start, len }
    }
    fn get(&self) -> &[u8] {
        &self.bytes[self.start..][..self.len]
    }
    fn get_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..][..self.len]
    }
}

/// SplitMix64 (Steele et al. 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// In -1..1, with a few zeros and a few values a hundred times larger.
    fn value(&mut self) -> f32 {
        let x = (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0;
        match self.next() % 64 {
            0 => 0.0,
            1 => 100.0 * x,
            _ => x,
        }
    }
    fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.value()).collect()
    }
}

/// Owned [`Acts`].
struct Quantized {
    m: usize,
    k: usize,
    q: Vec<i8>,
    s: Vec<f32>,
    sums: Vec<[i16; GROUPS]>,
    totals: Vec<i32>,
}

impl Quantized {
    fn new(kernels: &Kernels, x: &[f32], m: usize) -> Quantized {
        let inputs = x.len() / m;
        let k = layout::padded_k(inputs);
        let scales = k.div_ceil(BLOCK) * m;
        let mut a = Quantized {
            m,
            k,
            q: vec![0; m * k],
            s: vec![0.0; scales],
            sums: vec![[0; GROUPS]; scales],
            totals: vec![0; scales],
        };
        for b in 0..k.div_ceil(BLOCK) {
            let len = BLOCK.min(k - b * BLOCK);
            for t in 0..m {
                let x = &x[t * inputs..(t + 1) * inputs];
                let x = &x[(b * BLOCK).min(inputs)..((b + 1) * BLOCK).min(inputs)];
                let q = &mut a.q[b * BLOCK * m + t * len..][..len];
                let i = b * m + t;
                (a.s[i], a.totals[i]) = kernels.quantize(x, q, &mut a.sums[i]);
            }
        }
        a
    }
    /// Every value at an extreme.
    fn extreme(&mut self) {
        for (i, q) in self.q.iter_mut().enumerate() {
            *q = if i % 3 == 0 { -127 } else { 127 };
        }
        for b in 0..self.k.div_ceil(BLOCK) {
            let len = BLOCK.min(self.k - b * BLOCK);
            for t in 0..self.m {
                let q = &self.q[b * BLOCK * self.m + t * len..][..len];
                let i = b * self.m + t;
                self.sums[i] = [0; GROUPS];
                for (sum, q) in self.sums[i].iter_mut().zip(q.chunks(32)) {
                    *sum = q.iter().map(|&q| i16::from(q)).sum();
                }
                self.totals[i] = q.iter().map(|&q| i32::from(q)).sum();
            }
        }
    }
    fn acts(&self) -> Acts<'_> {
        let Quantized { m, k, q, s, sums, totals } = self;
        Acts { m: *m, k: *k, q, tiled: false, s, sums, totals }
    }
}

/// Packs an `[n, k]` matrix, `n` a multiple of 16.
fn pack(kernels: &Kernels, form: Form, w: &[f32], k: usize) -> Aligned {
    let n = w.len() / k;
    let size = form.row_block_bytes(k);
    let mut out = Aligned::new(n / ROWS * size);
    for (rb, out) in out.get_mut().chunks_exact_mut(size).enumerate() {
        let mut done = 0;
        for b in 0..k.div_ceil(BLOCK) {
            let len = BLOCK.min(k - b * BLOCK);
            let mut rows = [[0.0; BLOCK]; ROWS];
            for (r, row) in rows.iter_mut().enumerate() {
                row[..len].copy_from_slice(&w[(rb * ROWS + r) * k + b * BLOCK..][..len]);
            }
            let bytes = form.row_block_bytes(len);
            kernels.pack(form, &rows, len, &mut out[done..done + bytes]);
            done += bytes;
        }
    }
    out
}

/// Blocks whose every field is at an extreme.
fn extremes(form: Form, n: usize, k: usize) -> Aligned {
    let size = form.row_block_bytes(k);
    let mut out = Aligned::new(n / ROWS * size);
    for out in out.get_mut().chunks_exact_mut(size) {
        for out in out.chunks_mut(block_offset(form, 1)) {
            if form == Form::Q4 {
                let (d, mut rows) = (1.5f32, [BlockQ4::ZERO; ROWS]);
                for (r, row) in rows.iter_mut().enumerate() {
                    *row = match r % 3 {
                        0 => BlockQ4 { d, sc: [16; 8], mn: [113; 8], q: [15; BLOCK] },
                        1 => BlockQ4 { d, sc: [16; 8], mn: [127; 8], q: [0; BLOCK] },
                        _ => BlockQ4 { d, sc: [1; 8], mn: [-112; 8], q: [15; BLOCK] },
                    };
                }
                pack_q4(&rows, out);
            } else {
                let mut rows = [BlockQ8 { d: 1.5, q: [127; BLOCK] }; ROWS];
                for row in rows.iter_mut().step_by(2) {
                    row.q = [-127; BLOCK];
                }
                pack_q8(&rows, out);
            }
        }
    }
    out
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

fn gemm(kernels: &Kernels, form: Form, w: &[u8], a: &Acts<'_>) -> Vec<f32> {
    let mut y = vec![f32::NAN; a.m * w.len() / form.row_block_bytes(a.k) * ROWS];
    let (mut q, mut a) = (Vec::new(), *a);
    if kernels.tiled(form, a.m) {
        for b in 0..a.blocks() {
            for i in 0..a.len(b) / 64 {
                q.extend((0..a.m).flat_map(|t| &a.q(b, t)[64 * i..][..64]));
            }
        }
        (a.q, a.tiled) = (&q, true);
    }
    kernels.gemm(form, w, &a, &mut y);
    y
}

/// Sets to compare with `scalar`.
fn others() -> impl Iterator<Item = &'static Kernels> {
    available().filter(|k| k.name != "scalar")
}

/// As [`others`], and the sets whose integer kernels this CPU runs with help.
fn integer_sets() -> Vec<&'static Kernels> {
    let sets = others();
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    let sets = sets.chain(x86::trap::sets());
    sets.collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 48 }))]

    #[test]
    fn rows_side_by_side_are_quantized_as_one_by_one(
        k in prop_oneof![Just(BLOCK), 1..=BLOCK],
        seed in any::<u64>(),
        scales in prop::array::uniform16(-90i32..90),
        zeros in 0usize..4,
    ) {
        let mut random = Random(seed);
        let mut x = [[f32::NAN; BLOCK]; ROWS]; // beyond k nothing may be read
        for (r, x) in x.iter_mut().enumerate() {
            for x in &mut x[..k] {
                let value = random.value(); // few rows with zeros: they go another way
                *x = if value == 0.0 { 0.5 } else { value } * (scales[r] as f32).exp2();
            }
            if r % 5 == 0 && zeros > 0 {
                x[random.next() as usize % k] = 0.0;
            }
            if r == 3 && zeros == 2 {
                x[..k].fill(0.0);
            }
        }
        let rows: Vec<_> = x.iter().map(|x| BlockQ4::quantize(&x[..k])).collect();
        let mut expected = vec![0; Form::Q4.row_block_bytes(k)];
        pack_q4(rows[..].try_into().unwrap(), &mut expected);
        for kernels in available() {
            let mut out = vec![0xa5; expected.len()];
            kernels.pack(Form::Q4, &x, k, &mut out);
            prop_assert!(out == expected, "{}", kernels.name);
            for how in [Grouped::INT5, Grouped::INT6] {
                let found = kernels.quantize_grouped(how, &x, k);
                for (x, found) in x.iter().zip(found) {
                    prop_assert_eq!(found, BlockGrouped::quantize(how, &x[..k]), "{}", kernels.name);
                }
            }
        }
    }

    #[test]
    fn integer_gemm(m in 1usize..140, blocks in 1usize..6, k in 1usize..10, q4: bool, seed: u64) {
        let (form, k) = (if q4 { Form::Q4 } else { Form::Q8 }, k * 64);
        let mut random = Random(seed);
        let w = random.values(blocks * ROWS * k);
        let x = random.values(m * k);
        let scalar = &scalar::KERNELS;
        let packed = pack(scalar, form, &w, k);
        let mut a = Quantized::new(scalar, &x, m);
        let y = gemm(scalar, form, packed.get(), &a.acts());
        for set in integer_sets() {
            prop_assert!(pack(set, form, &w, k).get() == packed.get(), "pack, {}", set.name);
            let b = Quantized::new(set, &x, m);
            prop_assert!(b.q == a.q && bits(&b.s) == bits(&a.s), "quantize, {}", set.name);
            prop_assert!(b.sums == a.sums && b.totals == a.totals, "sums, {}", set.name);
            let z = gemm(set, form, packed.get(), &a.acts());
            prop_assert_eq!(bits(&z), bits(&y), "{}", set.name);
        }
        a.extreme();
        let packed = extremes(form, blocks * ROWS, k);
        let y = gemm(scalar, form, packed.get(), &a.acts());
        for set in integer_sets() {
            let z = gemm(set, form, packed.get(), &a.acts());
            prop_assert_eq!(bits(&z), bits(&y), "extremes, {}", set.name);
        }
    }

    #[test]
    fn float_gemm(m in 1usize..10, blocks in 1usize..7, k in 1usize..70, seed: u64) {
        let mut random = Random(seed);
        let w = random.values(blocks * ROWS * k);
        let x = random.values(m * k);
        for form in [Form::F32, Form::F16, Form::Bf16] {
            let stored: Vec<Vec<u8>> = w.chunks(k).map(|row| row.iter().flat_map(|&w| match form {
                Form::F32 => w.to_le_bytes().to_vec(),
                Form::F16 => half::f16::from_f32(w).to_le_bytes().to_vec(),
                _ => half::bf16::from_f32(w).to_le_bytes().to_vec(),
            }).collect()).collect();
            let size = form.row_block_bytes(k);
            let mut packed = Aligned::new(blocks * size);
            for (rb, out) in packed.get_mut().chunks_exact_mut(size).enumerate() {
                pack_float(size / k / ROWS, |r| Some(&stored[rb * ROWS + r][..]), out);
            }
            let mut y = vec![0.0; m * blocks * ROWS];
            scalar::KERNELS.gemm_float(form, packed.get(), k, &x, &mut y);
            let mut row = vec![0.0; k];
            for n in 0..blocks * ROWS {
                unpack_row(form, packed.get(), n, &mut row);
                for (t, x) in x.chunks(k).enumerate() {
                    let sum = row.iter().zip(x).fold(0.0f32, |acc, (w, x)| w.mul_add(*x, acc));
                    prop_assert_eq!(sum.to_bits(), y[t * blocks * ROWS + n].to_bits());
                }
            }
            for set in others() {
                let mut z = vec![0.0; y.len()];
                set.gemm_float(form, packed.get(), k, &x, &mut z);
                prop_assert_eq!(bits(&z), bits(&y), "{} {:?}", set.name, form);
            }
        }
    }

    #[test]
    fn elementwise(n in 1usize..100, seed: u64) {
        let mut random = Random(seed);
        let (x, y) = (random.values(n), random.values(n));
        let run = |set: &Kernels| {
            let mut all = Vec::new();
            let mut z = vec![0.0; n];
            set.rms_norm(&x, &y, 1e-5, &mut z);
            all.extend_from_slice(&z);
            for bias in [None, Some(&y[..])] {
                set.layer_norm(&x, &y, bias, 1e-5, &mut z);
                all.extend_from_slice(&z);
            }
            let xielu = Activation::XIelu { alpha_p: 0.8, alpha_n: 0.3, beta: 0.5, eps: -1e-6 };
            use Activation::{ClampedSwiglu, Gelu, GeluTanh, None as Linear, Relu2, Sigmoid, Silu};
            for act in [Silu, Gelu, GeluTanh, Relu2, xielu, ClampedSwiglu, Sigmoid, Linear] {
                z.copy_from_slice(&x);
                set.gate(act, &mut z, &y);
                all.extend_from_slice(&z);
            }
            z.copy_from_slice(&x);
            set.rope(&mut z, &y[..n / 2 * 2], false);
            set.rope(&mut z, &y[..n / 4 * 2], true);
            set.softcap(&mut z, 30.0);
            set.add(&mut z, &y);
            set.add_scaled(&mut z, 0.3, &x);
            all.extend_from_slice(&z);
            for score in [Score::Softmax, Score::Sigmoid] {
                z.copy_from_slice(&x);
                set.score(score, &mut z);
                all.extend_from_slice(&z);
            }
            all.push(set.mean_square(&z));
            set.cut(&mut z, 0.5);
            all.extend_from_slice(&z);
            all
        };
        let expected = run(&scalar::KERNELS);
        for set in others() {
            prop_assert_eq!(bits(&run(set)), bits(&expected), "{}", set.name);
        }
    }

    #[test]
    fn convolution(n in 1usize..100, width in 1usize..8, bias: bool, silu: bool, seed: u64) {
        let mut random = Random(seed);
        let rows: Vec<Vec<f32>> = (0..width).map(|_| random.values(n)).collect();
        let rows: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
        let (taps, b) = (random.values(width * n), random.values(n));
        let taps: Vec<&[f32]> = taps.chunks(n).collect();
        let run = |set: &Kernels| {
            let mut out = vec![0.0; n];
            set.conv(&rows, &taps, bias.then_some(&b[..]), silu, &mut out);
            out
        };
        let expected = run(&scalar::KERNELS);
        for c in 0..n {
            let sum: f64 = (0..width).map(|j| f64::from(rows[j][c]) * f64::from(taps[j][c])).sum();
            let sum = sum + if bias { f64::from(b[c]) } else { 0.0 };
            let sum = if silu { sum / (1.0 + (-sum).exp()) } else { sum };
            prop_assert!((f64::from(expected[c]) - sum).abs() <= 1e-5 * sum.abs().max(100.0));
        }
        for set in others() {
            prop_assert_eq!(bits(&run(set)), bits(&expected), "{}", set.name);
        }
    }

    #[test]
    fn recurrence(n in 1usize..40, steps in 1usize..5, delta: bool, seed: u64) {
        let n = 4 * n;
        let mut random = Random(seed);
        let mut of = |n: usize| -> Vec<f32> { (0..n).map(|_| random.value().clamp(-1.0, 1.0)).collect() };
        let (start, qk, v) = (of(16 * n), of(2 * n * steps), of(16 * steps));
        let scalars = of(2 * steps);
        let step = |t: usize| Recur {
            q: &qk[2 * n * t..][..n],
            k: &qk[2 * n * t + n..][..n],
            v: array(&v, 16 * t),
            decay: scalars[2 * t].abs(),
            beta: scalars[2 * t + 1].abs() / n as f32,
            delta,
        };
        let run = |set: &Kernels| {
            let (mut state, mut all) = (start.clone(), Vec::new());
            for t in 0..steps {
                let mut out = [0.0; 16];
                set.recur(&step(t), &mut state, &mut out);
                all.extend_from_slice(&out);
            }
            all.extend_from_slice(&state);
            all
        };
        let expected = run(&scalar::KERNELS);
        let mut state: Vec<f64> = start.iter().map(|&x| f64::from(x)).collect();
        for t in 0..steps {
            let r = step(t);
            for c in 0..16 {
                let held: f64 = (0..n).map(|i| state[16 * i + c] * f64::from(r.k[i])).sum();
                let held = if delta { held * f64::from(r.decay) } else { 0.0 };
                let u = (f64::from(r.v[c]) - held) * f64::from(r.beta);
                let mut out = 0.0;
                for i in 0..n {
                    let s = &mut state[16 * i + c];
                    *s = *s * f64::from(r.decay) + f64::from(r.k[i]) * u;
                    out += *s * f64::from(r.q[i]);
                }
                prop_assert!((f64::from(expected[16 * t + c]) - out).abs() <= 1e-4 * n as f64);
            }
        }
        for set in others() {
            prop_assert_eq!(bits(&run(set)), bits(&expected), "{}", set.name);
        }
    }

    #[test]
    fn attention(rows in 1usize..=MAX_ROWS, d in prop_oneof![9 => 1usize..20, 1 => Just(72)], len in 1usize..1200, window in 1u32..1500,
                 kind in 0usize..3, cap: bool, keys_only: bool, sink: bool, seed: u64) {
        let d = 8 * d;
        let dtype = [KvDtype::F32, KvDtype::F16, KvDtype::Int8][kind];
        let mut random = Random(seed);
        let pages = len.div_ceil(PAGE);
        // Of latent attention the values are the last numbers of the keys.
        let latent = keys_only.then_some(d - d / 3);
        let stride = 2 * dtype.page_bytes(d, !keys_only);
        // Pages lie in reverse order, every second record belongs to another head.
        let table: Vec<u32> = (0..pages as u32).rev().collect();
        let mut mild = |n| -> Vec<f32> { random.values(n).iter().map(|x| x.clamp(-1.0, 1.0)).collect() };
        let (k, mut v, q) = (mild(len * d), mild(len * d), mild(rows * d));
        if keys_only {
            v.clear();
        }
        let sinks = mild(rows);
        let seen: Vec<(u32, u32)> = (0..rows).map(|_| {
            let to = 1 + (random.next() % len as u64) as u32;
            (to.saturating_sub(window), to)
        }).collect();
        let write = |set: &Kernels| {
            let mut kv = Aligned::new(pages * stride);
            for p in 0..len {
                let start = table[p / PAGE] as usize * stride + stride / 2;
                let page = &mut kv.get_mut()[start..][..stride / 2];
                let v = if keys_only { &[][..] } else { &v[p * d..][..d] };
                set.write_kv(dtype, &k[p * d..][..d], v, p % PAGE, page);
            }
            kv
        };
        let kv = write(&scalar::KERNELS);
        let attend = |set: &Kernels, rows: std::ops::Range<usize>| {
            let a = Attend {
                q: &q[rows.start * d..rows.end * d],
                d,
                latent,
                scale: 0.2,
                softcap: cap.then_some(50.0),
                sinks: sink.then_some(&sinks[rows.clone()]),
                seen: &seen[rows.clone()],
                kv: kv.get(),
                table: &table,
                page_stride: stride,
                head_offset: stride / 2,
            };
            let mut out = vec![0.0; rows.len() * a.out_width()];
            let mut scratch = vec![f32::NAN; scratch_len(rows.len(), d)];
            set.attend(dtype, &a, &mut out, &mut scratch);
            out
        };
        let expected = attend(&scalar::KERNELS, 0..rows);
        for set in others() {
            prop_assert!(write(set).get() == kv.get(), "write, {}", set.name);
            prop_assert_eq!(bits(&attend(set, 0..rows)), bits(&expected), "{}", set.name);
        }
        // A row's result does not depend on the rows beside it.
        let dv = latent.unwrap_or(d);
        let dp = dv.next_multiple_of(16);
        for r in 0..rows {
            let alone = attend(available().next().unwrap(), r..r + 1);
            prop_assert_eq!(bits(&alone), bits(&expected[r * dp..][..dp]));
        }
        // Against softmax in f64 over what a page can hold.
        let stored = |x: &[f32]| -> Vec<f64> {
            x.chunks(d).flat_map(|x| {
                let step = f64::from(crate::quant::amax(x)) / 127.0;
                x.iter().map(move |&x| match dtype {
                    KvDtype::F32 => f64::from(x),
                    KvDtype::F16 => half::f16::from_f32(x).to_f64(),
                    KvDtype::Int8 => (f64::from(x) / step).round_ties_even() * step,
                })
            }).collect()
        };
        let (k, v) = (stored(&k), stored(if keys_only { &k } else { &v }));
        for (r, &(from, to)) in seen.iter().enumerate().take(2) {
            let q = &q[r * d..][..d];
            let scores: Vec<f64> = (from as usize..to as usize).map(|p| {
                let s: f64 = q.iter().zip(&k[p * d..][..d]).map(|(&q, k)| f64::from(q) * k).sum();
                if cap { 50.0 * (s * 0.2 / 50.0).tanh() } else { s * 0.2 }
            }).collect();
            let max = scores.iter().fold(f64::MIN, |a, &b| a.max(b));
            let extra = if sink { (f64::from(sinks[r]) - max).exp() } else { 0.0 };
            let total: f64 = scores.iter().map(|s| (s - max).exp()).sum::<f64>() + extra;
            for i in 0..dv {
                let o: f64 = scores.iter().zip(from as usize..)
                    .map(|(s, p)| (s - max).exp() / total * v[p * d + d - dv + i]).sum();
                let e = (o - f64::from(expected[r * dp + i])).abs();
                // A value halfway between two int8 steps may round the other way in f32.
                prop_assert!(e <= if dtype == KvDtype::Int8 { 1e-2 } else { 1e-4 }, "{e}");
            }
        }
    }
}

#[test]
fn a_forced_set_must_exist() {
    assert_eq!(choose(Some("scalar")).unwrap().name(), "scalar");
    let error = choose(Some("sse9")).unwrap_err().to_string();
    assert!(error.contains("sse9") && error.contains("scalar"), "{error}");
}
