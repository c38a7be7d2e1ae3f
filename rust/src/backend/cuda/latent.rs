//! Products with a matrix for each head, and the queries and keys of latent attention that they make, as launches.

use super::experts::Work;
use super::product::{Into, rows_at_once};
use super::{Buf, Cuda, Latent, Mat, Row, THREADS, launch, pack};

impl Cuda {
    /// Part h of `w` times the first numbers of part h of each row of `x`, to part h of each row of `out`.
    fn by_head(&self, w: &Mat, heads: usize, x: &Buf, input: &mut Buf, out: &Buf) {
        let (m, n, part) = (x.rows, w.n / heads, x.width / heads);
        assert!(w.n == n * heads && n.is_multiple_of(16) && x.width == part * heads && w.k <= part);
        // All first parts, all second ones, ...
        input.shape(heads * m, w.k);
        let params = launch::Select {
            x: x.at,
            rows: 0,
            out: input.at,
            width: w.k as u32,
            row: part as u32,
            heads: heads as u32,
            count: m as u32,
        };
        self.launch("select_rows", [heads * m, 1, 1], THREADS, &params);
        let each = rows_at_once(w.form, m);
        // A part may begin in the middle of a tile.
        let jobs = (0..heads).flat_map(|h| {
            let job = move |t: usize| [h, h * m + t, h * m + m.min(t + each), h * n % 32];
            (0..m).step_by(each).flat_map(job)
        });
        let jobs: Vec<_> = jobs.map(|n| n as u32).collect();
        let list = self.device.input(&jobs);
        let tile = pack::tile_bytes(w.form, w.k).unwrap_or(0);
        let at = |h: usize| [w.memory.at + (h * n / 32 * tile) as u64, 0];
        let mats = self.addresses((0..heads).flat_map(at));
        let jobs = launch::Jobs { list, mats, places: 0, heads: heads as u32, rows: m as u32 };
        let e = Cuda::epilogue(n, None, Into::Store, out);
        let grid = ([heads * m.div_ceil(each), (n + n % 32).div_ceil(32)], each);
        self.products(w, input, grid, jobs, e);
        out.fresh.set(false);
    }

    /// [`Backend::linear_heads`](super::Backend::linear_heads).
    pub(super) fn product_heads(&self, w: &Mat, heads: usize, x: &Buf, out: &mut Buf) {
        let mut work = self.work.lock().unwrap_or_else(|e| e.into_inner());
        out.shape(x.rows, w.n);
        self.by_head(w, heads, x, &mut work.input, out);
    }

    /// [`Backend::latent_qk`](super::Backend::latent_qk).
    pub(super) fn latent(
        &self,
        w: &Mat,
        (gain, eps): (&Row, f32),
        how: &Latent,
        q: &Buf,
        kv: &Buf,
        out: &mut Buf,
    ) {
        let &Latent { heads, nope, rope, rank } = how;
        assert!(w.k == nope && w.n == heads * rank);
        assert!(q.width == heads * (nope + rope) && kv.width == rank + rope);
        let mut work = self.work.lock().unwrap_or_else(|e| e.into_inner());
        let Work { input, output, .. } = &mut *work;
        output.shape(q.rows, w.n);
        self.by_head(w, heads, q, input, output);
        out.shape(q.rows, (heads + 1) * (rope + rank));
        let params = launch::LatentQk {
            q: q.at,
            kv: kv.at,
            y: output.at,
            gain: gain.memory.at,
            out: out.at,
            heads: heads as u32,
            nope: nope as u32,
            rope: rope as u32,
            rank: rank as u32,
            eps,
            pad: 0,
        };
        self.launch("latent_qk", [q.rows, heads + 1, 1], 128, &params);
    }
}
