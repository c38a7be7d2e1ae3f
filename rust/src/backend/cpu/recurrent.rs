//! The states of sequences, and the layers that keep them, cut into pieces for the threads. Positions follow each
//! other inside a piece; pieces share channels, heads and columns of a state among them, never a sum.

use super::memory::Disjoint;
use super::{Activation, Buf, Bytes, Cpu, Span};
use crate::Result;
use crate::backend::{Core, HeadRows, Heads, Recurrent};
use crate::kernels::{self, Recur};

/// Channels of a piece of a convolution.
const STRIP: usize = 1024;
/// The widest convolution.
const WIDTH: usize = Recurrent::MAX_WIDTH;

/// States of every layer.
pub struct States {
    layers: Vec<Layer>,
}

struct Layer {
    bytes: Bytes,
    /// f32 of a state.
    size: usize,
}

impl States {
    /// `layers`: states, and the f32 of each.
    pub(super) fn new(layers: &[(usize, usize)]) -> Result<States> {
        let layer = |&(states, size): &(usize, usize)| {
            let bytes = Bytes::zeroed(states * size * 4, "states of recurrent layers")?;
            Ok(Layer { bytes, size })
        };
        Ok(States { layers: layers.iter().map(layer).collect::<Result<_>>()? })
    }
}

/// The states of one layer while some are written.
struct Open<'a> {
    values: Disjoint<'a, f32>,
    size: usize,
}

impl Open<'_> {
    fn of<'a>(layer: &'a mut Layer, spans: &[Span<'_>]) -> Open<'a> {
        let mut written: Vec<u32> = spans.iter().map(|span| span.table[1]).collect();
        written.sort_unstable();
        let read =
            |span: &Span<'_>| span.start > 0 && written.binary_search(&span.table[0]).is_ok();
        assert!(written.windows(2).all(|two| two[0] < two[1]) && !spans.iter().any(read));
        Open { values: Disjoint::new(layer.bytes.floats_mut()), size: layer.size }
    }
    /// A part of the state that a span reads; `None`: zeros.
    fn read(&self, span: &Span<'_>, at: usize, len: usize) -> Option<&[f32]> {
        let at = span.table[0] as usize * self.size + at;
        // SAFETY: a state that is read is none that any span writes (`of` has checked).
        (span.start > 0).then(|| unsafe { self.values.shared(at..at + len) })
    }
    /// A part of the state that a span writes.
    ///
    /// # Safety
    /// While it is used, no other thread has a part of that state that overlaps it.
    #[allow(clippy::mut_from_ref)] // as `Disjoint::part`
    unsafe fn write(&self, span: &Span<'_>, at: usize, len: usize) -> &mut [f32] {
        let at = span.table[1] as usize * self.size + at;
        // SAFETY: spans write states of their own (`of` has checked); the rest is the caller's promise.
        unsafe { self.values.part(at..at + len) }
    }
}

impl Cpu {
    pub(super) fn convolve(
        &self,
        x: &mut Buf,
        how: &Recurrent,
        taps: &[f32],
        bias: Option<&Vec<f32>>,
        (states, layer): (&mut States, usize),
        spans: &[Span<'_>],
        out: &mut Buf,
    ) {
        let (first, n) = how.channels();
        let (rows, width, past) = (x.rows, x.width, how.width - 1);
        let gated = matches!(how.core, Core::Gated(_));
        if gated {
            let values = Disjoint::new(x.values_mut());
            self.each(rows, 4, |r| {
                // SAFETY: each row is claimed by one thread.
                let row = unsafe { values.part(r * width..(r + 1) * width) };
                let (b, x) = row.split_at_mut(first);
                self.kernels.gate(Activation::None, &mut x[..n], &b[..n]);
            });
        }
        let x: &Buf = x;
        out.shape(rows, n);
        let values = Disjoint::new(out.values_mut());
        let states = Open::of(&mut states.layers[layer], spans);
        let span_of: Vec<usize> = spans
            .iter()
            .enumerate()
            .flat_map(|(s, span)| std::iter::repeat_n(s, span.len))
            .collect();
        let zeros = [0.0; STRIP];
        let strips = n.div_ceil(STRIP);
        self.each(rows * strips, 1, |piece| {
            let (r, c) = (piece / strips, piece % strips * STRIP);
            let len = STRIP.min(n - c);
            let span = &spans[span_of[r]];
            let i = r - span.first_row;
            // Position `i - past` of the span for `j` 0, and so on: below 0 they are in the state.
            let u = |j: usize| match (i + j).checked_sub(past) {
                Some(i) => &x.row(span.first_row + i)[first + c..][..len],
                None => states.read(span, (i + j) * n + c, len).unwrap_or(&zeros[..len]),
            };
            let (mut rows, mut strip): ([&[f32]; WIDTH], [&[f32]; WIDTH]) = Default::default();
            for j in 0..how.width {
                (rows[j], strip[j]) = (u(j), &taps[j * n + c..][..len]);
            }
            // SAFETY: this strip of this row belongs to the claimed piece.
            let out = unsafe { values.part(r * n + c..r * n + c + len) };
            let bias = bias.map(|bias| &bias[c..c + len]);
            self.kernels.conv(&rows[..how.width], &strip[..how.width], bias, !gated, out);
            if gated {
                self.kernels.gate(Activation::None, out, &x.row(r)[n + c..][..len]);
            }
            if i + 1 == span.len {
                for j in 0..past {
                    // SAFETY: this strip of the state is written with the span's last row only.
                    unsafe { states.write(span, j * n + c, len) }.copy_from_slice(u(j + 1));
                }
            }
        });
    }

    pub(super) fn recurrence(
        &self,
        (x, rates): (&Buf, &Buf),
        conv: &mut Buf,
        how: &Recurrent,
        w: &HeadRows<&Vec<f32>>,
        eps: f32,
        (states, layer): (&mut States, usize),
        spans: &[Span<'_>],
        out: &mut Buf,
    ) {
        let (Core::DeltaNet(h) | Core::Mamba2(h)) = how.core else {
            unreachable!("a gate has no heads");
        };
        let delta = matches!(how.core, Core::DeltaNet(_));
        let (keys, values) = (h.keys(), h.values());
        // Where queries, keys and values begin in a row of `conv`, and the gate of the norm in one of `x`.
        let [q, k, v] = if delta { [0, keys, 2 * keys] } else { [values + keys, values, 0] };
        let z = if delta { 2 * keys + values } else { 0 };
        let (rows, width) = (conv.rows, conv.width);

        // Decay and strength of each head.
        let mut scalars = vec![[0.0; 2]; rows * h.heads];
        let part = Disjoint::new(&mut scalars);
        let channels = Disjoint::new(conv.values_mut());
        self.each(rows, 1, |r| {
            // SAFETY: each row is claimed by one thread.
            let (scalars, row) = unsafe {
                (
                    part.part(r * h.heads..(r + 1) * h.heads),
                    channels.part(r * width..(r + 1) * width),
                )
            };
            let rates = rates.row(r);
            for (i, to) in scalars.iter_mut().enumerate() {
                let dt = rates[rates.len() - h.heads + i];
                *to = kernels::rates(dt, w.dt_bias[i], w.decay[i], delta.then_some(rates[i]));
            }
            if delta {
                self.unit_lengths(&h, &mut row[..2 * keys]);
            }
        });

        out.shape(rows, values);
        let outs = Disjoint::new(out.values_mut());
        let conv: &Buf = conv;
        let states = Open::of(&mut states.layers[layer], spans);
        let (blocks, size) = (h.value_dim / 16, h.key_dim * 16);
        let pieces = h.heads * blocks;
        self.each(spans.len() * pieces, 4, |piece| {
            let (span, piece) = (&spans[piece / pieces], piece % pieces);
            let (head, column) = (piece / blocks, v + piece * 16);
            let group = h.group(head) * h.key_dim;
            let at = how.conv_state() + piece * size;
            // SAFETY: this part of the state belongs to the claimed piece.
            let state = unsafe { states.write(span, at, size) };
            match states.read(span, at, size) {
                Some(before) => state.copy_from_slice(before),
                None => state.fill(0.0),
            }
            for r in span.first_row..span.first_row + span.len {
                let row = conv.row(r);
                let [decay, beta] = scalars[r * h.heads + head];
                let (q, k) = (&row[q + group..][..h.key_dim], &row[k + group..][..h.key_dim]);
                // SAFETY: these columns of this row belong to the claimed piece.
                let out =
                    unsafe { outs.part(r * values + piece * 16..r * values + piece * 16 + 16) };
                if let (Some(v), Some(out)) = (row[column..].first_chunk(), out.first_chunk_mut()) {
                    self.kernels.recur(&Recur { q, k, v, decay, beta, delta }, state, out);
                }
            }
        });

        self.each(rows, 1, |r| {
            // SAFETY: each row is claimed by one thread.
            let out = unsafe { outs.part(r * values..(r + 1) * values) };
            let mut gate = x.row(r)[z..z + values].to_vec();
            if delta {
                let mut normed = vec![0.0; h.value_dim];
                for (out, gate) in
                    out.chunks_exact_mut(h.value_dim).zip(gate.chunks_exact_mut(h.value_dim))
                {
                    self.kernels.rms_norm(out, w.norm, eps, &mut normed);
                    self.kernels.gate(Activation::Silu, gate, &normed);
                    out.copy_from_slice(gate);
                }
                return;
            }
            if let Some(skip) = w.skip {
                let v = conv.row(r)[v..].chunks_exact(h.value_dim);
                for ((out, v), skip) in out.chunks_exact_mut(h.value_dim).zip(v).zip(skip) {
                    out.iter_mut().zip(v).for_each(|(out, v)| *out += skip * v);
                }
            }
            self.kernels.gate(Activation::Silu, &mut gate, out);
            let group = values / h.groups;
            let gains = w.norm.chunks_exact(group);
            for ((out, gate), gain) in
                out.chunks_exact_mut(group).zip(gate.chunks_exact(group)).zip(gains)
            {
                self.kernels.rms_norm(gate, gain, eps, out);
            }
        });
    }

    /// Queries and keys side by side: `x / sqrt(sum(x^2) + 1e-6)`, queries also divided by `sqrt(key_dim)`.
    fn unit_lengths(&self, h: &Heads, row: &mut [f32]) {
        let d = h.key_dim as f32;
        let mut normed = vec![0.0; h.key_dim];
        // x / sqrt(sum + e) = x / sqrt(mean + e / d) / sqrt(d)
        let (q, k) = (vec![1.0 / d; h.key_dim], vec![1.0 / d.sqrt(); h.key_dim]);
        for (i, head) in row.chunks_exact_mut(h.key_dim).enumerate() {
            let gain = if i < h.groups { &q } else { &k };
            self.kernels.rms_norm(head, gain, 1e-6 / d, &mut normed);
            head.copy_from_slice(&normed);
        }
    }
}

#[cfg(test)]
mod tests;
