//! Each format packed here by its description, number by number, and read back.

use super::super::*;
use super::*;

/// Pseudo-random numbers below `n`.
fn numbers(count: usize, n: u32, seed: u32) -> Vec<u32> {
    let mut x = seed;
    let next = |_| {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (x >> 8) % n
    };
    (0..count).map(next).collect()
}

/// Codes, zero points and scales of a matrix, and the group of each column.
struct Matrix {
    n: usize,
    k: usize,
    codes: Vec<u32>,  // [n][k]
    zeros: Vec<u32>,  // [groups][n], from 1 on
    scales: Vec<f32>, // [groups][n], exact in f16 and bf16
    group_of: Vec<usize>,
}

impl Matrix {
    fn new(n: usize, k: usize, bits: u32, group: usize) -> Matrix {
        let groups = k.div_ceil(group);
        let scales = numbers(groups * n, 127, 3).into_iter().map(|s| (s as f32 + 1.0) / 512.0);
        Matrix {
            n,
            k,
            codes: numbers(n * k, 1 << bits, 1),
            zeros: numbers(groups * n, (1 << bits) - 1, 2).iter().map(|z| z + 1).collect(),
            scales: scales.collect(),
            group_of: (0..k).map(|j| j / group).collect(),
        }
    }
    fn code(&self, i: usize, j: usize) -> u32 {
        self.codes[i * self.k + j]
    }
    fn groups(&self) -> usize {
        self.scales.len() / self.n
    }
    fn weight(&self, i: usize, j: usize) -> f32 {
        let at = self.group_of[j] * self.n + i;
        (self.code(i, j) as f32 - self.zeros[at] as f32) * self.scales[at]
    }
    /// Every row, read in pieces of odd lengths; and in blocks of the form that it is kept in, if that is exact.
    fn is(&self, encoded: &Encoded<'_>, weight: impl Fn(usize, usize) -> f32) {
        for i in 0..self.n {
            for b in (0..self.k).step_by(BLOCK) {
                let (at, len) = (i * self.k + b, BLOCK.min(self.k - b));
                let block = match encoded.kept() {
                    Kept::Q4 => encoded.q4(at, len).unwrap().dequantize(),
                    Kept::Grouped(how) => encoded.grouped(at, len).dequantize(how),
                    Kept::Q8 => continue,
                };
                for (j, &w) in (b..).zip(&block[..len]) {
                    assert_eq!(w, weight(i, j), "row {i}, column {j} of a block"); // a zero has no sign
                }
            }
            for (from, len) in [(0, self.k), (1, 30), (self.k - 33, 33), (self.k / 2, 1)] {
                let mut out = vec![0.0; len];
                encoded.decode(i * self.k + from, &mut out);
                for (j, &w) in (from..).zip(&out) {
                    assert_eq!(w.to_bits(), weight(i, j).to_bits(), "row {i}, column {j}");
                }
            }
        }
    }
}

/// Words of `each` numbers, given in order, number `order[s]` in slot `s`.
fn words(numbers: impl Iterator<Item = u32>, bits: u32, order: &[usize]) -> Vec<u8> {
    let numbers: Vec<u32> = numbers.collect();
    let word = |some: &[u32]| {
        let slots = order.iter().enumerate().filter(|(_, at)| **at < some.len());
        slots.fold(0u32, |word, (slot, &at)| word | some[at] << (slot as u32 * bits))
    };
    numbers.chunks(order.len()).flat_map(|some| word(some).to_le_bytes()).collect()
}

fn f16s(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect()
}

fn f32s(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|&x| x.to_le_bytes()).collect()
}

#[test]
fn gptq_packs_down_the_columns() {
    for (bits, group) in [(4, 32), (4, 96), (8, 32), (8, 480)] {
        let mut m = Matrix::new(24, 480, bits, group);
        let each = 32 / bits as usize;
        let order: Vec<usize> = (0..each).collect();
        // Word (r, i) has codes each * r, ... of output i.
        let codes = (0..m.k / each).flat_map(|r| {
            let m = &m;
            (0..m.n).flat_map(move |i| (0..each).map(move |s| m.code(i, each * r + s)))
        });
        let codes = words(codes, bits, &order);
        let scales = f16s(&m.scales);
        for v2 in [false, true] {
            let zeros = m.zeros.iter().map(|z| z - u32::from(!v2));
            let zeros = words(zeros, bits, &order);
            let scales = Floats::F16(&scales);
            let e = gptq(bits, v2, (m.n, m.k), &codes, &zeros, scales, Groups::Even(group));
            m.is(&e, |i, j| m.weight(i, j));
            assert_eq!(matches!(e.kept(), Kept::Grouped(_)), bits == 4);
            // Act-order: inputs are in groups wherever they lie.
            m.group_of = numbers(m.k, m.groups() as u32, 5).iter().map(|&g| g as usize).collect();
            let of: Vec<u8> = m.group_of.iter().flat_map(|&g| (g as u32).to_le_bytes()).collect();
            let e = gptq(bits, v2, (m.n, m.k), &codes, &zeros, scales, Groups::Of(&of));
            m.is(&e, |i, j| m.weight(i, j));
            assert!(!e.fits_q4() && !e.fits_q8());
            m.group_of = (0..m.k).map(|j| j / group).collect();
        }
    }
}

#[test]
fn awq_packs_along_the_rows_in_its_order() {
    let m = Matrix::new(24, 480, 4, 32);
    let order = [0, 2, 4, 6, 1, 3, 5, 7];
    let codes = words(
        (0..m.k).flat_map(|j| (0..m.n).map(move |i| (i, j))).map(|(i, j)| m.code(i, j)),
        4,
        &order,
    );
    let zeros = words(m.zeros.iter().copied(), 4, &order);
    let scales = f16s(&m.scales);
    let e = awq((m.n, m.k), &codes, &zeros, Floats::F16(&scales), 32);
    m.is(&e, |i, j| m.weight(i, j));
}

#[test]
fn compressed_tensors_packs_along_the_inputs() {
    for (bits, group) in [(4, 32), (8, 96), (4, 476)] {
        let m = Matrix::new(20, 476, bits, group); // neither n nor k is whole words
        let each = 32 / bits as usize;
        let order: Vec<usize> = (0..each).collect();
        let codes: Vec<u8> =
            m.codes.chunks(m.k).flat_map(|row| words(row.iter().copied(), bits, &order)).collect();
        // Word (r, g) has zero points each * r, ... of group g.
        let zeros = (0..m.n.div_ceil(each)).flat_map(|r| {
            let m = &m;
            (0..m.groups()).flat_map(move |g| {
                (each * r..each * (r + 1))
                    .map(move |i| if i < m.n { m.zeros[g * m.n + i] } else { 0 })
            })
        });
        let zeros = words(zeros, bits, &order);
        let turned: Vec<f32> =
            (0..m.n).flat_map(|i| m.scales.iter().skip(i).step_by(m.n).copied()).collect();
        let bytes = f32s(&turned);
        let scales = Scaling {
            floats: Floats::F32(&bytes),
            rows: 1,
            down: m.groups(),
            right: 1,
            times: 1.0,
        };
        let read =
            |zeros| packed(bits, m.k, &codes, zeros, m.groups(), scales, Groups::Even(group));
        m.is(&read(Some(&zeros)), |i, j| m.weight(i, j));
        let half = (1 << (bits - 1)) as f32;
        m.is(&read(None), |i, j| (m.code(i, j) as f32 - half) * m.scales[j / group * m.n + i]);
    }
}

/// The number of an E2M1 code; a zero has no sign here.
fn e2m1(q: u32) -> f32 {
    let value = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][q as usize % 8];
    if q > 8 { -value } else { value }
}

/// Codes of 4 bits in bytes, the first in the low nibble; and scales below `most`, one for each `group` codes.
fn fours(codes: &[u32], group: usize, most: u32) -> (Vec<u8>, Vec<u8>) {
    let bytes = codes.chunks(2).map(|two| (two[1] << 4 | two[0]) as u8).collect();
    let scales = numbers(codes.len() / group, most, 2).iter().map(|&e| e as u8).collect();
    (bytes, scales)
}

#[test]
fn mxfp4_of_compressed_tensors() {
    let (n, k) = (4, 288);
    let codes = numbers(n * k, 16, 1);
    let (bytes, scales) = fours(&codes, 32, 250);
    let m = Matrix { n, k, ..Matrix::new(8, 64, 4, 32) };
    let e = fp4(k, &bytes, &scales);
    assert_eq!(e.kept(), Kept::Grouped(Grouped::MXFP4));
    m.is(&e, |i, j| {
        let scale = 2f32.powi(i32::from(scales[(i * k + j) / 32]) - 127);
        e2m1(codes[i * k + j]) * scale
    });
}

#[test]
fn nvfp4_has_a_scale_for_the_matrix() {
    let (n, k) = (4, 272);
    let codes = numbers(n * k, 16, 1);
    let (bytes, scales) = fours(&codes, 16, 127);
    let m = Matrix { n, k, ..Matrix::new(8, 64, 4, 16) };
    let weight = |i: usize, j: usize, times: f32| {
        float8::E4M3[usize::from(scales[(i * k + j) / 16])] * times * e2m1(codes[i * k + j])
    };
    // Products with a power of two are f16; others are rounded in the packed form, and only there.
    let e = nvfp4(k, &bytes, &scales, 0.25);
    assert_eq!((e.kept(), e.is_exact()), (Kept::Grouped(Grouped::NVFP4), false));
    m.is(&e, |i, j| weight(i, j, 0.25));
    let e = nvfp4(k, &bytes, &scales, 0.003);
    let mut row = vec![0.0; k];
    for i in 0..n {
        e.decode(i * k, &mut row);
        for b in (0..k).step_by(BLOCK) {
            let block = e.grouped(i * k + b, BLOCK.min(k - b)).dequantize(Grouped::NVFP4);
            for (j, &near) in (b..k).zip(&block) {
                let w = weight(i, j, 0.003);
                assert_eq!(row[j], w);
                assert!((near - w).abs() <= w.abs() / 2048.0 + 3e-7, "{near} for {w}");
            }
        }
    }
    let broken = nvfp4(k, &bytes, &[0x7f; 17], 1.0).grouped(0, BLOCK);
    assert_eq!(broken.not_finite(Grouped::NVFP4), Some(0));
}

#[test]
fn scales_of_blocks_rows_and_matrices() {
    let (n, k) = (20, 300);
    let bytes: Vec<u8> = (0..n * k).map(|at| (at * 37 % 251) as u8).collect();
    let m = Matrix::new(n, k, 8, 128); // for `is`
    let value = |i: usize, j: usize| float8::E4M3[usize::from(bytes[i * k + j])];
    for (rows, group) in [(8, 128), (1, k), (n, k), (1, 32)] {
        let (tall, wide) = (n.div_ceil(rows), k.div_ceil(group));
        let all: Vec<f32> = (0..tall * wide).map(|at| 0.25 + at as f32).collect();
        let scale = |i: usize, j: usize| all[i / rows * wide + j / group];
        let floats = all.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes());
        let floats: Vec<u8> = floats.collect();
        let scales =
            Scaling { floats: Floats::Bf16(&floats), rows, down: wide, right: 1, times: 1.0 };
        let scale = |i, j| half::bf16::from_f32(scale(i, j)).to_f32();
        m.is(&float8(k, &bytes, scales, group), |i, j| scale(i, j) * value(i, j));
        let zeros: Vec<u8> = (0..tall * wide).map(|at| at as u8).collect();
        m.is(&int8(k, &bytes, Some(&zeros), scales, group), |i, j| {
            let zero = zeros[i / rows * wide + j / group] as i8;
            scale(i, j) * f32::from(i16::from(bytes[i * k + j] as i8) - i16::from(zero))
        });
    }
}

#[test]
fn e4m3_has_its_values() {
    let e4m3 = float8::E4M3;
    for (byte, value) in [
        (0x00, 0.0),
        (0x01, 1.0 / 512.0), // subnormal
        (0x07, 7.0 / 512.0),
        (0x08, 1.0 / 64.0),
        (0x38, 1.0),
        (0x3c, 1.5),
        (0xc0, -2.0),
        (0x7e, 448.0),
        (0xfe, -448.0),
    ] {
        assert_eq!(e4m3[byte], value, "{byte:#x}");
    }
    assert!((0..256).all(|byte| e4m3[byte].is_nan() == (byte & 127 == 127)));
    assert!((0..126).all(|byte| e4m3[byte] < e4m3[byte + 1] && e4m3[byte + 128] == -e4m3[byte]));
}

#[test]
fn bitsandbytes_counts_blocks_through_all_rows() {
    let (n, k, block) = (6, 40, 64); // a block is no whole number of rows
    let codes = numbers(n * k, 16, 1);
    let bytes: Vec<u8> = codes.chunks(2).map(|two| (two[0] << 4 | two[1]) as u8).collect();
    let map: Vec<f32> = (0..16).map(|q| (q as f32 - 7.0) / 8.0).collect();
    let map_bytes = f32s(&map);
    let m = Matrix { n, k, ..Matrix::new(8, 64, 4, 32) };
    let absmax: Vec<f32> = (0..(n * k).div_ceil(block)).map(|b| 1.0 + b as f32).collect();
    let absmax_bytes = f32s(&absmax);
    let e = nibbles(n * k, &bytes, &map_bytes, Floats::F32(&absmax_bytes), block);
    let value = |i: usize, j: usize| map[codes[i * k + j] as usize];
    m.is(&e, |i, j| absmax[(i * k + j) / block] * value(i, j));
    // Scaling that are quantized themselves.
    let outer: Vec<f32> = (0..256).map(|q| q as f32 / 256.0).collect();
    let (outer_bytes, scales) = (f32s(&outer), [3.0, 5.0]);
    let scale_bytes = f32s(&scales);
    let nested = Floats::Nested {
        codes: &[9, 200, 17, 255],
        map: &outer_bytes,
        scales: &scale_bytes,
        every: 2,
        offset: 0.125,
    };
    let e = nibbles(n * k, &bytes, &map_bytes, nested, block);
    m.is(&e, |i, j| {
        let b = (i * k + j) / block;
        let scale = outer[[9, 200, 17, 255][b]] * scales[b / 2] + 0.125;
        scale * value(i, j)
    });
    for (byte, scale) in
        [(0, 2f32.powi(-127)), (1, 2f32.powi(-126)), (127, 1.0), (254, 2f32.powi(127))]
    {
        assert_eq!(Floats::Power(&[byte]).get(0), scale);
    }
    assert!(Floats::Power(&[255]).get(0).is_nan());
    let scb = f32s(&[12.7, 0.5]);
    let e = llm_int8(3, &[1, 255, 127, 0, 2, 129], &scb);
    let mut row = [0.0; 3];
    e.decode(3, &mut row);
    let unit = 0.5 * (1.0 / 127.0);
    assert_eq!(row, [0.0, 2.0 * unit, -127.0 * unit]);
}

#[test]
fn blocks_hold_integers_with_one_scale_exactly() {
    let (n, k) = (3, 600);
    let mut bytes: Vec<u8> = (0..n * k).map(|at| (at * 37 % 256) as u8).collect();
    bytes[599] = 128;
    let scales = f32s(&[0.5, f32::NAN, 1e-30]);
    let scales = Scaling { floats: Floats::F32(&scales), rows: 1, down: 1, right: 1, times: 1.0 };
    let e = int8(k, &bytes, None, scales, k);
    assert!(e.fits_q8() && !e.fits_q4());
    let block = e.q8(512, 88).unwrap();
    for j in 0..88 {
        let q = (bytes[512 + j] as i8).max(-127); // -128 has no absolute value
        assert_eq!((block.d, block.q[j]), (0.5, q));
    }
    assert_eq!((block.q[87], &block.q[88..]), (-127, &[0; 168][..]));
    assert_eq!(e.q8(600, 256), None);
    assert_eq!(e.q8(1200, 256).unwrap().d, 0.0);
    // With zero points, or groups within a block, it would not be exact.
    assert!(!int8(k, &bytes, Some(&[0, 0, 0]), scales, k).fits_q8());
    assert!(!int8(k, &bytes, None, scales, 128).fits_q8());
    assert!(int8(k, &bytes, None, scales, 512).fits_q8());

    let m = Matrix::new(8, 600, 4, 600);
    let codes: Vec<u8> = m
        .codes
        .chunks(m.k)
        .flat_map(|row| words(row.iter().copied(), 4, &[0, 1, 2, 3, 4, 5, 6, 7]))
        .collect();
    let zeros = words(m.zeros.iter().copied(), 4, &[0, 1, 2, 3, 4, 5, 6, 7]);
    let bytes = f32s(&m.scales);
    let scales = Scaling { floats: Floats::F32(&bytes), ..scales };
    let e = packed(4, m.k, &codes, Some(&zeros), 1, scales, Groups::Even(m.k));
    assert!(e.fits_q4() && e.fits_q8());
    let (q4, q8) = (e.q4(5 * m.k + 512, 88).unwrap(), e.q8(5 * m.k + 512, 88).unwrap());
    let (w4, w8) = (q4.dequantize(), q8.dequantize());
    for j in 0..88 {
        assert_eq!((w4[j], w8[j]), (m.weight(5, 512 + j), m.weight(5, 512 + j)));
    }
}
