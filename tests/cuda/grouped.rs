//! Grouped matrices on the emulated device, whatever their fields: the CPU's bits. What no file has is tested, too, as
//! kernels read the fields one by one.

use super::ops::Both;
use ferrule::backend::cpu::{self, Bytes};
use ferrule::backend::{Activation, Backend, Form, Place};
use ferrule::kernels::layout::{ROWS, pack_grouped};
use ferrule::quant::{BLOCK, BlockGrouped, Codes, Grouped, Offset, Scales};

/// Every field of [`Grouped`] at each of its values.
fn all() -> impl Iterator<Item = Grouped> {
    let offsets = [Offset::Signed, Offset::Zero, Offset::Min];
    let linear = |o| [Codes::Linear(o), Codes::Linear5(o), Codes::Linear6(o)];
    let codes = offsets.into_iter().flat_map(linear).chain([Codes::Uneven, Codes::Fp4]);
    let scales = [Scales::F16, Scales::Bf16, Scales::Integer, Scales::Power];
    let both = codes.flat_map(move |codes| scales.map(|scales| (codes, scales)));
    both.flat_map(|(codes, scales)| [16, 32, 64, 128].map(|group| Grouped { codes, scales, group }))
}

/// A packed matrix of any codes and scales.
fn packed(how: Grouped, n: usize, k: usize) -> cpu::Mat {
    let form = Form::Grouped(how);
    let mut bytes = Bytes::zeroed(form.bytes(n, k), "a test").unwrap();
    let size = form.row_block_bytes(k);
    let mut state = 99u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 8
    };
    for (rb, out) in bytes.get_mut().chunks_exact_mut(size).enumerate() {
        let mut done = 0;
        for b in (0..k).step_by(BLOCK) {
            let len = BLOCK.min(k - b);
            let mut rows = [BlockGrouped::ZERO; ROWS];
            for (r, row) in rows.iter_mut().enumerate().take(n.saturating_sub(rb * ROWS)) {
                let largest = (16u8 << how.high()) - 1;
                // Some rows are all of the largest code.
                row.q[..len].fill_with(|| if r == 3 { largest } else { next() as u8 & largest });
                let mut scale = || {
                    let x = (next() % 2001) as f32 / 1000.0 - 1.0;
                    match how.scales {
                        Scales::F16 => half::f16::from_f32(x).to_bits(),
                        Scales::Bf16 => half::bf16::from_f32(x).to_bits(),
                        Scales::Integer => next() as u16 & 255,
                        Scales::Power => next() as u16 % 140,
                    }
                };
                row.s[..len.div_ceil(how.unit())].fill_with(&mut scale);
                row.o[..len.div_ceil(how.unit())].fill_with(&mut scale);
                // In a longer group all are alike.
                for u in 0..how.groups() * how.group / how.unit() {
                    let first = u * how.unit() / how.group * how.group / how.unit();
                    (row.s[u], row.o[u]) = (row.s[first], row.o[first]);
                }
                row.d = half::f16::from_f32((next() % 2001) as f32 / 1000.0 - 1.0).to_bits();
                row.e = half::f16::from_f32((next() % 2001) as f32 / 1000.0 - 1.0).to_bits();
            }
            let bytes = form.row_block_bytes(len);
            pack_grouped(how, &rows, &mut out[done..done + bytes]);
            done += bytes;
        }
    }
    cpu::Mat::new(form, n, k, bytes).unwrap()
}

#[test]
#[ignore = "on the emulated driver: see main.rs"]
fn every_form() {
    let mut b = Both::new();
    for (i, how) in all().enumerate() {
        let (n, k) = [(40, 300), (33, 520), (130, 64), (16, 33)][i % 4];
        let w = (packed(how, n, k), b.cuda.place(Place::End, packed(how, n, k)).unwrap());
        let bias = b.vector(n);
        for rows in [1, 3, 8, 9, 70] {
            if rows > 9 && i % 7 != 0 {
                continue; // the kernel of 9 rows
            }
            let x = b.rows(rows, k);
            let mut out = b.empty();
            b.cpu.linear(&w.0, Some(&bias.0), &x.0, &mut out.0);
            b.cuda.linear(&w.1, Some(&bias.1), &x.1, &mut out.1);
            b.same(&format!("{how:?} [{n}, {k}] x {rows}"), &out);
        }
        let mut out = b.empty();
        let ids = [n as u32 - 1, 0, 7];
        b.cpu.embed(&w.0, &ids, 1.5, &mut out.0);
        b.cuda.embed(&w.1, &ids, 1.5, &mut out.1);
        b.same(&format!("{how:?} [{n}, {k}] embed"), &out);
    }
    // More than 16 blocks of inputs, so that warps go round; gates with their ups.
    for how in [Grouped::Q4_K, Grouped::Q6_K, Grouped::IQ4_XS, Grouped::MXFP4, Grouped::Q5_0] {
        let w = (packed(how, 64, 4360), b.cuda.place(Place::End, packed(how, 64, 4360)).unwrap());
        for rows in [1, 4, 11] {
            let x = b.rows(rows, 4360);
            let mut out = b.empty();
            b.cpu.gated(&w.0, None, Activation::Silu, 30, &x.0, &mut out.0);
            b.cuda.gated(&w.1, None, Activation::Silu, 30, &x.1, &mut out.1);
            b.same(&format!("{how:?} gated x {rows}"), &out);
        }
    }
}
