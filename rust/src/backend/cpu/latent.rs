//! Products with a matrix for each head, and the queries and keys of latent attention that they make.

use super::{Buf, Claims, Cpu, Disjoint, Inputs, Latent, Mat, ROWS, TOKENS};

impl Cpu {
    /// Part h of `out` = part h of `w` times `x`'s head h, from number `to` of the part on. `out` has its shape;
    /// its row may be longer than all parts.
    pub(super) fn product_heads(&self, w: &Mat, x: Inputs<'_>, to: usize, out: &mut Buf) {
        let n = w.n / x.heads;
        let part = n + to;
        assert!(x.k == w.k && w.n == n * x.heads && n.is_multiple_of(ROWS), "a matrix of each head");
        assert!(out.rows == x.x.rows && out.width >= part * x.heads);
        let width = out.width;
        let mut guard = self.acts.lock().unwrap_or_else(|e| e.into_inner());
        let size = w.form.row_block_bytes(w.k);
        let blocks = n / ROWS; // of a head
        let grain = if x.x.rows <= 4 { (super::CLAIM / size).clamp(1, 64) } else { 2 };
        for t in (0..x.x.rows).step_by(TOKENS) {
            let m = TOKENS.min(x.x.rows - t);
            let acts = w.form.is_quantized().then(|| self.quantize(x, t, m, &mut guard));
            let claims = Claims::new(w.n / ROWS, self.pool.threads(), grain);
            let values = Disjoint::new(&mut out.values_mut()[t * width..]);
            self.pool.run(&|thread| {
                let (mut tile, mut rows) = (Vec::new(), Vec::new());
                claims.each(thread, |run| {
                    let mut first = run.start;
                    while first < run.end {
                        let head = first / blocks;
                        let last = run.end.min((head + 1) * blocks);
                        let columns = (last - first) * ROWS;
                        tile.resize(m * columns, 0.0);
                        let weights = &w.bytes()[first * size..last * size];
                        match &acts {
                            Some(acts) => {
                                self.kernels.gemm(w.form, weights, &acts.head(head), &mut tile);
                            }
                            None => {
                                rows.clear();
                                (t..t + m).for_each(|t| rows.extend_from_slice(x.get(t, head)));
                                self.kernels.gemm_float(w.form, weights, w.k, &rows, &mut tile);
                            }
                        }
                        let at = head * part + to + (first - head * blocks) * ROWS;
                        for (i, tile) in tile.chunks(columns).enumerate() {
                            let at = i * width + at;
                            // SAFETY: these columns belong to the claimed row blocks.
                            unsafe { values.part(at..at + columns) }.copy_from_slice(tile);
                        }
                        first = last;
                    }
                });
            });
        }
    }

    /// See [`super::Backend::latent_qk`].
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
        assert!(q.width == heads * (nope + rope) && kv.width == rank + rope);
        out.shape(q.rows, (heads + 1) * (rope + rank));
        self.product_heads(w, Inputs { x: q, heads, k: nope }, rope, out);
        let width = out.width;
        let values = Disjoint::new(out.values_mut());
        self.each(q.rows, 4, |r| {
            // SAFETY: each row is claimed by one thread.
            let out = unsafe { values.part(r * width..(r + 1) * width) };
            let (queries, key) = out.split_at_mut(heads * (rope + rank));
            for (out, q) in queries.chunks_mut(rope + rank).zip(q.row(r).chunks(nope + rope)) {
                out[..rope].copy_from_slice(&q[nope..]);
            }
            let (compressed, position) = kv.row(r).split_at(rank);
            key[..rope].copy_from_slice(position);
            self.kernels.rms_norm(compressed, gain, eps, &mut key[rope..]);
        });
    }
}
