//! Products with a matrix for each head, and the queries and keys of latent attention that they make.

use super::memory::Disjoint;
use super::product::{Into, Job};
use super::{Buf, Cpu, Latent, Mat};
use crate::kernels::layout::ROWS;

/// Room for one operation: rows of inputs and outputs, `[heads * rows, ..]`, those of a head together.
#[derive(Default)]
pub(super) struct Scratch {
    input: Buf,
    output: Buf,
}

impl Cpu {
    /// Part h of `w` times the first numbers of part h of each row of `x`, in `scratch.output`.
    fn by_head(&self, w: &Mat, heads: usize, x: &Buf, scratch: &mut Scratch) {
        let Scratch { input, output } = scratch;
        let (m, n, k, part) = (x.rows, w.n / heads, w.k, x.width / heads);
        assert!(w.n == n * heads && n.is_multiple_of(ROWS) && x.width == part * heads && k <= part);
        input.shape(heads * m, k);
        let values = Disjoint::new(input.values_mut());
        self.each(heads * m, 4, |r| {
            let (h, t) = (r / m, r % m);
            // SAFETY: each row is claimed by one thread.
            let row = unsafe { values.part(r * k..(r + 1) * k) };
            row.copy_from_slice(&x.row(t)[h * part..][..k]);
        });
        let tokens = self.tokens(w);
        let mut jobs = Vec::with_capacity(heads);
        for h in 0..heads {
            for t in (0..m).step_by(tokens) {
                let rows = h * m + t..h * m + m.min(t + tokens);
                jobs.push(Job { w, block: h * n / ROWS, n, bias: None, rows });
            }
        }
        output.shape(heads * m, n);
        self.products(&jobs, input, Into::Store, output);
    }

    /// [`Backend::linear_heads`](super::Backend::linear_heads).
    pub(super) fn product_heads(&self, w: &Mat, heads: usize, x: &Buf, out: &mut Buf) {
        let mut scratch = self.heads.lock().unwrap_or_else(|e| e.into_inner());
        self.by_head(w, heads, x, &mut scratch);
        let (m, n) = (x.rows, w.n / heads);
        out.shape(m, w.n);
        let values = Disjoint::new(out.values_mut());
        self.each(m, 1, |t| {
            // SAFETY: each row is claimed by one thread.
            let row = unsafe { values.part(t * w.n..(t + 1) * w.n) };
            for (h, out) in row.chunks_mut(n).enumerate() {
                out.copy_from_slice(scratch.output.row(h * m + t));
            }
        });
    }

    /// [`Backend::latent_qk`](super::Backend::latent_qk).
    pub(super) fn latent(
        &self,
        w: &Mat,
        (gain, eps): (&Vec<f32>, f32),
        how: &Latent,
        q: &Buf,
        kv: &Buf,
        out: &mut Buf,
    ) {
        let &Latent { heads, nope, rope, rank } = how;
        assert!(w.k == nope && w.n == heads * rank);
        assert!(q.width == heads * (nope + rope) && kv.width == rank + rope);
        let mut scratch = self.heads.lock().unwrap_or_else(|e| e.into_inner());
        self.by_head(w, heads, q, &mut scratch);
        let (m, dim) = (q.rows, rope + rank);
        let width = (heads + 1) * dim;
        out.shape(m, width);
        let values = Disjoint::new(out.values_mut());
        self.each(m, 1, |t| {
            // SAFETY: each row is claimed by one thread.
            let row = unsafe { values.part(t * width..(t + 1) * width) };
            let (queries, key) = row.split_at_mut(heads * dim);
            for (h, (out, q)) in
                queries.chunks_mut(dim).zip(q.row(t).chunks(nope + rope)).enumerate()
            {
                out[..rope].copy_from_slice(&q[nope..]);
                out[rope..].copy_from_slice(scratch.output.row(h * m + t));
            }
            let (compressed, position) = kv.row(t).split_at(rank);
            key[..rope].copy_from_slice(position);
            self.kernels.rms_norm(compressed, gain, eps, &mut key[rope..]);
        });
    }
}
