//! What Gemma 3n and 4 do to rows beside attention and products: streams that predict each other, inputs of each
//! layer, gates of which only the largest count.

use super::memory::Disjoint;
use super::{Activation, Buf, Cpu, ROWS};

impl Cpu {
    /// [`Backend::gate_with`](super::Backend::gate_with).
    pub(super) fn gate_rows(&self, x: &mut Buf, act: Activation, y: &Buf, from: usize) {
        let (rows, width) = (x.rows, x.width);
        assert!(y.rows == rows && from + width <= y.width);
        let values = Disjoint::new(x.values_mut());
        self.each(rows, 4, |r| {
            // SAFETY: each row is claimed by one thread.
            let x = unsafe { values.part(r * width..(r + 1) * width) };
            self.kernels.gate(act, x, &y.row(r)[from..][..width]);
        });
    }

    /// [`Backend::cut_and_gate`](super::Backend::cut_and_gate).
    pub(super) fn cut_rows(
        &self,
        x: &Buf,
        times: f32,
        act: Activation,
        width: usize,
        out: &mut Buf,
    ) {
        assert_eq!(x.width, width.next_multiple_of(ROWS) * 2, "gate and up, interleaved");
        out.shape(x.rows, width);
        let values = Disjoint::new(out.values_mut());
        self.each(x.rows, 4, |r| {
            // SAFETY: each row is claimed by one thread.
            let gate = unsafe { values.part(r * width..(r + 1) * width) };
            let (blocks, _) = x.row(r).as_chunks::<{ 2 * ROWS }>();
            for (gate, both) in gate.chunks_mut(ROWS).zip(blocks) {
                gate.copy_from_slice(&both[..gate.len()]);
            }
            self.kernels.cut(gate, times);
            for (gate, both) in gate.chunks_mut(ROWS).zip(blocks) {
                self.kernels.gate(act, gate, &both[ROWS..][..gate.len()]);
            }
        });
    }

    /// [`Backend::altup_predict`](super::Backend::altup_predict).
    pub(super) fn predict(&self, coefficients: &Buf, streams: &mut [Buf]) {
        let n = streams.len();
        let (rows, width) = (streams[0].rows, streams[0].width);
        assert!(coefficients.rows == rows && coefficients.width == n * n);
        let streams: Vec<_> = streams.iter_mut().map(|s| Disjoint::new(s.values_mut())).collect();
        self.each(rows, 4, |r| {
            // SAFETY: each row, of every stream, is claimed by one thread.
            let row = |i: usize| unsafe { streams[i].part(r * width..(r + 1) * width) };
            let old: Vec<f32> = (0..n).flat_map(|i| row(i).iter().copied()).collect();
            for (i, coefficients) in coefficients.row(r).chunks(n).enumerate() {
                for (old, &c) in old.chunks(width).zip(coefficients) {
                    self.kernels.add_scaled(row(i), c, old);
                }
            }
        });
    }

    /// [`Backend::altup_correct`](super::Backend::altup_correct).
    pub(super) fn correct(&self, coefficients: &Buf, seen: &Buf, streams: &mut [Buf]) {
        let n = streams.len();
        let (rows, width) = (seen.rows, seen.width);
        assert!(coefficients.rows == rows && coefficients.width == n);
        let streams: Vec<_> = streams.iter_mut().map(|s| Disjoint::new(s.values_mut())).collect();
        self.each(rows, 4, |r| {
            // SAFETY: each row, of every stream, is claimed by one thread.
            let row = |i: usize| unsafe { streams[i].part(r * width..(r + 1) * width) };
            let new: Vec<f32> = seen.row(r).iter().zip(&*row(0)).map(|(x, p)| x - p).collect();
            for (i, &c) in coefficients.row(r).iter().enumerate() {
                self.kernels.add_scaled(row(i), 1.0 + c, &new);
            }
        });
    }

    /// [`Backend::multiply`](super::Backend::multiply).
    pub(super) fn multiply_rows(&self, x: &Buf, gain: &[f32], out: &mut Buf) {
        assert_eq!(x.width, gain.len());
        out.shape(x.rows, x.width);
        let values = Disjoint::new(out.values_mut());
        self.each(x.rows, 4, |r| {
            // SAFETY: each row is claimed by one thread.
            let out = unsafe { values.part(r * x.width..(r + 1) * x.width) };
            for ((out, x), gain) in out.iter_mut().zip(x.row(r)).zip(gain) {
                *out = x * gain;
            }
        });
    }

    /// [`Backend::match_power`](super::Backend::match_power).
    pub(super) fn match_rows(&self, x: &mut Buf, to: &Buf, least: f32) {
        let (rows, width) = (x.rows, x.width);
        let values = Disjoint::new(x.values_mut());
        self.each(rows, 4, |r| {
            // SAFETY: each row is claimed by one thread.
            let x = unsafe { values.part(r * width..(r + 1) * width) };
            let own = self.kernels.mean_square(x).max(least).sqrt();
            let factor = self.kernels.mean_square(to.row(r)).sqrt() / own;
            x.iter_mut().for_each(|x| *x *= factor);
        });
    }
}
