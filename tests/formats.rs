//! What each format of quantized safetensors costs: the table in `models/README.md`, made here from numbers that are
//! quantized as each format's own programs do, kept as `auto` keeps them, and read back.

use ferrule::backend::cpu::Cpu;
use ferrule::backend::{Backend, Encoded, Form, Kept, Part, Parts};
use ferrule::quant::{self, Floats, Groups, Scaling};

const N: usize = 64;
const K: usize = 1024;

/// Nearly normally distributed: sums of twelve uniform numbers.
fn weights() -> Vec<f32> {
    let mut x = 1u64;
    let mut uniform = || {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (x >> 40) as f32 / (1 << 24) as f32
    };
    (0..N * K).map(|_| ((0..12).map(|_| uniform()).sum::<f32>() - 6.0) * 0.02).collect()
}

/// Codes, and for each row and group a scale (exact in f16) and a zero point.
struct Integers {
    bits: u32,
    codes: Vec<u32>,
    scales: Vec<f32>,
    zeros: Vec<u32>,
    groups: usize,
}

fn integers(bits: u32, group: usize, symmetric: bool) -> Integers {
    let top = (1 << bits) - 1;
    let (mut scales, mut zeros, mut codes) = (Vec::new(), Vec::new(), Vec::new());
    for w in weights().chunks(group) {
        let (low, high) = w.iter().fold((0f32, 0f32), |(l, h), &x| (l.min(x), h.max(x)));
        let (low, high) = match symmetric {
            true => (low.min(-high), high.max(-low)),
            false => (low, high),
        };
        let scale = half::f16::from_f32((high - low) / top as f32).to_f32();
        let zero = if symmetric { 1 << (bits - 1) } else { (-low / scale).round() as u32 };
        let code = |x: &f32| (x / scale + zero as f32).round().clamp(0.0, top as f32) as u32;
        codes.extend(w.iter().map(code));
        scales.push(scale);
        zeros.push(zero.max(1)); // GPTQ stores one less
    }
    Integers { bits, codes, scales, zeros, groups: K / group }
}

/// Rows below one another become rows beside one another.
fn turned<T: Copy>(x: &[T], width: usize) -> Vec<T> {
    (0..width).flat_map(|j| x.iter().skip(j).step_by(width).copied()).collect()
}

/// Neighbours in one word, number `order[s]` in slot `s`.
fn words(x: &[u32], bits: u32, order: &[usize]) -> Vec<u8> {
    let each = order.iter().enumerate();
    let word = |some: &[u32]| each.clone().fold(0, |w, (s, &at)| w | some[at] << (s as u32 * bits));
    x.chunks(order.len()).flat_map(|some| word(some).to_le_bytes()).collect()
}

fn ascending(bits: u32) -> Vec<usize> {
    (0..32 / bits as usize).collect()
}

fn f16s(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect()
}

fn f32s(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// The rows of the table.
struct Table(String);

impl Table {
    /// `bytes` of a file make `encoded`.
    fn row(&mut self, name: &str, bytes: usize, encoded: Encoded<'_>) {
        let cpu = Cpu::new(1, None).unwrap();
        let part = Part { encoded: Some(encoded), ..Part::floats(Form::F32, N, K, &[]) };
        let parts = Parts { parts: vec![part], k: K, interleaved: false };
        let off = |form: Form| {
            let packed = cpu.pack(form, &parts).unwrap().unwrap();
            let (mut kept, mut stored) = (vec![0.0; K], vec![0.0; K]);
            let (mut error, mut all) = (0.0, 0.0);
            for i in 0..N {
                packed.unpack_row(i, &mut kept);
                encoded.decode(i * K, &mut stored);
                let square = |x: f32| f64::from(x) * f64::from(x);
                error += stored.iter().zip(&kept).map(|(s, k)| square(s - k)).sum::<f64>();
                all += stored.iter().map(|s| square(*s)).sum::<f64>();
            }
            match 100.0 * (error / all).sqrt() {
                0.0 => "0".to_owned(),
                off => format!("{off:.2} %"),
            }
        };
        let form = match encoded.kept() {
            Kept::Q4 => Form::Q4,
            Kept::Q8 => Form::Q8,
            Kept::Grouped(how) => Form::Grouped(how),
        };
        let bits = |bytes: usize| format!("{:.3}", 8.0 * bytes as f64 / (N * K) as f64);
        let bits = |bytes| bits(bytes).trim_end_matches('0').trim_end_matches('.').to_owned();
        let (stored, packed) = (bits(bytes), bits(form.bytes(N, K)));
        self.0 += &format!(
            "| {name} | {stored} | {} | {packed} | {} | {} |\n",
            form.name(),
            off(form),
            off(if form == Form::MXFP4 { form } else { Form::Q4 }) // that stays whatever is asked for
        );
    }

    fn gptq(&mut self, name: &str, bits: u32, group: usize, order: bool) {
        let x = integers(bits, group, false);
        let qweight = {
            // Words hold neighbours in a column.
            let each = 32 / bits as usize;
            let word = |r: usize, i: usize| (0..each).map(move |s| i * K + r * each + s);
            let at = (0..K / each).flat_map(|r| (0..N).flat_map(move |i| word(r, i)));
            words(&at.map(|at| x.codes[at]).collect::<Vec<_>>(), bits, &ascending(bits))
        };
        let zeros: Vec<u32> = turned(&x.zeros, x.groups).iter().map(|z| z - 1).collect();
        let zeros = words(&zeros, x.bits, &ascending(bits));
        let scales = f16s(&turned(&x.scales, x.groups));
        let of: Vec<u8> = (0..K).flat_map(|j| ((j % x.groups) as i32).to_le_bytes()).collect();
        let groups = if order { Groups::Of(&of) } else { Groups::Even(group) };
        let bytes = qweight.len() + zeros.len() + scales.len();
        let scales = Floats::F16(&scales);
        self.row(name, bytes, quant::gptq(bits, false, (N, K), &qweight, &zeros, scales, groups));
    }

    fn packed(&mut self, name: &str, bits: u32, group: usize, symmetric: bool) {
        let x = integers(bits, group, symmetric);
        let codes = words(&x.codes, bits, &ascending(bits));
        // Words hold neighbours in a column.
        let each = 32 / bits as usize;
        let word = |r: usize, g: usize| (0..each).map(move |s| (r * each + s) * x.groups + g);
        let at = (0..N / each).flat_map(|r| (0..x.groups).flat_map(move |g| word(r, g)));
        let zeros = words(&at.map(|at| x.zeros[at]).collect::<Vec<_>>(), bits, &ascending(bits));
        let scales = f16s(&x.scales);
        let zeros = (!symmetric).then_some(&zeros[..]);
        let bytes = codes.len() + zeros.map_or(0, <[u8]>::len) + scales.len();
        let floats = Floats::F16(&scales);
        let scales = Scaling { floats, rows: 1, down: x.groups, right: 1, times: 1.0 };
        let groups = Groups::Even(group);
        self.row(name, bytes, quant::packed(bits, K, &codes, zeros, x.groups, scales, groups));
    }
}

#[test]
fn the_readme_has_the_table_of_formats() {
    let head =
        "| format | bits | kept as | bits | off | off as int4 |\n|---|---|---|---|---|---|\n";
    let mut table = Table(head.to_owned());
    for group in [32, 64, 128] {
        table.gptq(&format!("GPTQ int4, groups of {group}"), 4, group, false);
    }
    table.gptq("GPTQ int4, groups of 128, act-order", 4, 128, true);
    table.gptq("GPTQ int4, one scale for an output", 4, K, false);
    table.gptq("GPTQ int8, groups of 128", 8, 128, false);
    let x = integers(4, 128, false);
    let order = [0, 2, 4, 6, 1, 3, 5, 7];
    let codes = words(&turned(&x.codes, K), 4, &order);
    let zeros = words(&turned(&x.zeros, x.groups), 4, &order);
    let scales = f16s(&turned(&x.scales, x.groups));
    let bytes = codes.len() + zeros.len() + scales.len();
    let awq = quant::awq((N, K), &codes, &zeros, Floats::F16(&scales), 128);
    table.row("AWQ, groups of 128", bytes, awq);
    table.packed("compressed-tensors int4, groups of 32", 4, 32, false);
    table.packed("compressed-tensors int4, groups of 128, symmetric", 4, 128, true);
    table.packed("compressed-tensors int8, groups of 128, symmetric", 8, 128, true);
    table.packed("compressed-tensors int8, one scale for an output", 8, K, true);

    // One scale for each row; int8 made as llm-compressor does, so that there are weights of -128.
    let w = weights();
    let largest_of = |w: &[f32]| w.iter().fold(0f32, |m, x| m.max(x.abs()));
    let largest: Vec<f32> = w.chunks(K).map(largest_of).collect();
    let int8 = |step: f32| -> Vec<u8> {
        let code =
            |(at, x): (usize, &f32)| (x / largest[at / K] * step).round_ties_even() as i8 as u8;
        w.iter().enumerate().map(code).collect()
    };
    let codes = int8(127.5);
    assert!(codes.contains(&128));
    let scales = f32s(&largest.iter().map(|m| m / 127.5).collect::<Vec<_>>());
    let rows = Scaling { floats: Floats::F32(&scales), rows: 1, down: 1, right: 1, times: 1.0 };
    let bytes = codes.len() + scales.len();
    table.row("compressed-tensors W8A8", bytes, quant::int8(K, &codes, None, rows, K));
    let codes = int8(127.0);
    let scb = f32s(&largest);
    table.row("bitsandbytes int8", codes.len() + scb.len(), quant::llm_int8(K, &codes, &scb));

    let e2m1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let nearest = |x: f32, values: &[f32]| {
        let off = |at: &usize| (values[*at] - x).abs();
        (0..values.len()).min_by(|a, b| off(a).total_cmp(&off(b))).unwrap() as u8
    };
    let powers = w.chunks(32).map(|w| (largest_of(w).log2().floor() as i32 - 2 + 127) as u8);
    let powers: Vec<u8> = powers.collect();
    let code = |at: usize| {
        let x = w[at] / 2f32.powi(i32::from(powers[at / 32]) - 127);
        nearest(x.abs(), &e2m1) | if x < 0.0 { 8 } else { 0 }
    };
    let codes: Vec<u8> = (0..N * K / 2).map(|b| code(2 * b) | code(2 * b + 1) << 4).collect();
    let bytes = codes.len() + powers.len();
    table.row("compressed-tensors MXFP4", bytes, quant::fp4(K, &codes, &powers));

    let e4m3: Vec<f32> = (0..127u32)
        .map(|b| match b >> 3 {
            0 => b as f32 / 512.0,
            e => (8 + b % 8) as f32 / 8.0 * 2f32.powi(e as i32 - 7),
        })
        .collect();
    let all = largest_of(&w) / (448.0 * 6.0);
    let scales: Vec<u8> = w.chunks(16).map(|w| nearest(largest_of(w) / 6.0 / all, &e4m3)).collect();
    let code = |at: usize| {
        let x = w[at] / (e4m3[usize::from(scales[at / 16])] * all);
        nearest(x.abs(), &e2m1) | if x < 0.0 { 8 } else { 0 }
    };
    let codes: Vec<u8> = (0..N * K / 2).map(|b| code(2 * b) | code(2 * b + 1) << 4).collect();
    let bytes = codes.len() + scales.len() + 4;
    table.row("NVFP4", bytes, quant::nvfp4(K, &codes, &scales, all));

    let step = largest.iter().fold(0f32, |m, x| m.max(*x)) / 448.0;
    let code = |x: &f32| nearest((x / step).abs(), &e4m3) | if *x < 0.0 { 128 } else { 0 };
    let codes: Vec<u8> = w.iter().map(code).collect();
    let scales = f32s(&[step]);
    let floats = Floats::F32(&scales);
    let one = Scaling { floats, rows: N, down: 1, right: 1, times: 1.0 };
    table.row("FP8 e4m3", codes.len() + scales.len(), quant::float8(K, &codes, one, K));

    // The quantiles of QLoRA (Dettmers et al. 2023), to four digits: a checkpoint brings its own.
    let map = [
        -1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461,
        0.3379, 0.4407, 0.5626, 0.7230, 1.0,
    ];
    let absmax: Vec<f32> = w.chunks(64).map(largest_of).collect();
    let code = |at: usize| nearest(w[at] / absmax[at / 64], &map);
    let codes: Vec<u8> = (0..N * K / 2).map(|b| code(2 * b) << 4 | code(2 * b + 1)).collect();
    let (map, scales) = (f32s(&map), f32s(&absmax));
    let nf4 = quant::nibbles(N * K, &codes, &map, Floats::F32(&scales), 64);
    table.row("bitsandbytes NF4", codes.len() + scales.len(), nf4);

    let readme = include_str!("../models/README.md");
    assert!(readme.contains(&table.0), "models/README.md should have\n{}", table.0);
}
