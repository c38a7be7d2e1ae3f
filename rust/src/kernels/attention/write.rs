//! Writing the key and value of a position into a page, whose order is at the head of the parent module.

use super::super::simd::F32x16;
use super::{KvDtype, PAGE, int8, integer_scale};
use crate::quant::MAX;

/// Writes the key and value of one position and head, `[d]` each, into slot `slot` of a head's page. `v` may be
/// empty: keys only.
#[inline(always)]
pub(in super::super) fn write_f16<V: F32x16>(k: &[f32], v: &[f32], slot: usize, page: &mut [u8]) {
    let (d, dp) = (k.len(), v.len().next_multiple_of(16));
    let (keys, values) = page.split_at_mut(PAGE * d * 2);
    let lines = &mut keys[slot / 16 * d * 32..][..d * 32];
    let row = &mut values[slot * dp * 2..][..dp * 2];
    let mut half = [0u16; 16];
    for i in (0..d).step_by(16) {
        let n = 16.min(d - i);
        let mut lanes = [0.0f32; 16];
        lanes[..n].copy_from_slice(&k[i..i + n]);
        V::load(&lanes).store_f16(&mut half);
        for (j, half) in half[..n].iter().enumerate() {
            lines[((i + j) * 16 + slot % 16) * 2..][..2].copy_from_slice(&half.to_le_bytes());
        }
        if v.is_empty() {
            continue;
        }
        lanes = [0.0; 16];
        lanes[..n].copy_from_slice(&v[i..i + n]);
        V::load(&lanes).store_f16(&mut half);
        for (row, half) in row[i * 2..].chunks_exact_mut(2).zip(half) {
            row.copy_from_slice(&half.to_le_bytes());
        }
    }
}

/// As [`write_f16`], in f32.
#[inline(always)]
pub(in super::super) fn write_f32(k: &[f32], v: &[f32], slot: usize, page: &mut [u8]) {
    let (d, dp) = (k.len(), v.len().next_multiple_of(16));
    let (keys, values) = page.split_at_mut(PAGE * d * 4);
    for (i, x) in k.iter().enumerate() {
        let at = ((slot / 16 * d + i) * 16 + slot % 16) * 4;
        keys[at..at + 4].copy_from_slice(&x.to_le_bytes());
    }
    let row = &mut values[slot * dp * 4..][..dp * 4];
    row.fill(0);
    for (row, x) in row.chunks_exact_mut(4).zip(v) {
        row.copy_from_slice(&x.to_le_bytes());
    }
}

/// As [`write_f16`], in int8.
#[inline(always)]
pub(in super::super) fn write_i8(k: &[f32], v: &[f32], slot: usize, page: &mut [u8]) {
    let (d, dp) = (k.len(), v.len().next_multiple_of(16));
    let integers = KvDtype::Int8.in_integers(d, !v.is_empty());
    let width = if integers { d.next_multiple_of(4) } else { d };
    let (keys, rest) = page.split_at_mut(PAGE * width);
    let (values, scales) = rest.split_at_mut(PAGE * dp);
    let (key_scales, value_scales) = scales.split_at_mut(PAGE * 4);
    let round = |x: &[f32], i: usize, inv: f32| match x.get(i) {
        Some(x) => (x * inv).round_ties_even() as i8 as u8,
        None => 0,
    };
    let (inv, scale) = integer_scale(k, MAX);
    key_scales[slot * 4..][..4].copy_from_slice(&scale.to_le_bytes());
    for i in 0..width {
        let at = match integers {
            true => int8::key_at(d, slot, i),
            false => (slot / 16 * d + i) * 16 + slot % 16,
        };
        keys[at] = round(k, i, inv);
    }
    if v.is_empty() {
        return;
    }
    let (inv, scale) = integer_scale(v, MAX);
    value_scales[slot * 4..][..4].copy_from_slice(&scale.to_le_bytes());
    for i in 0..dp {
        let at = if integers { int8::value_at(slot, i) } else { slot * dp + i };
        values[at] = round(v, i, inv);
    }
}
