//! The pages of keys and values, and attention cut into pieces for the threads.

use super::memory::Disjoint;
use super::{Attention, Buf, Bytes, Cpu, KvDtype, KvLayer, QkNorm, Span};
use crate::Result;
use crate::kernels::{Attend, MAX_ROWS, PAGE, scratch_len};

/// Pages of keys and values of every layer.
pub struct Kv {
    dtype: KvDtype,
    layers: Vec<Layer>,
}

struct Layer {
    bytes: Bytes,
    /// Bytes of one head's part of a page.
    head: usize,
    /// Bytes from a page to the next.
    stride: usize,
}

impl Kv {
    pub(super) fn new(dtype: KvDtype, layers: &[KvLayer]) -> Result<Kv> {
        let layer = |l: &KvLayer| {
            let stride = l.page_bytes(dtype);
            let bytes = Bytes::zeroed(l.pages * stride, "pages of keys and values")?;
            Ok(Layer { bytes, head: stride / l.heads, stride })
        };
        Ok(Kv { dtype, layers: layers.iter().map(layer).collect::<Result<_>>()? })
    }

    pub(super) fn copy_page(&mut self, layer: usize, from: u32, to: u32) {
        let Layer { bytes, stride, .. } = &mut self.layers[layer];
        let start = from as usize * *stride;
        bytes.get_mut().copy_within(start..start + *stride, to as usize * *stride);
    }
}

impl Cpu {
    /// Norms, clamps and rotates every query and key head.
    pub(super) fn rotate(
        &self,
        qkv: &mut Buf,
        how: &Attention,
        norms: Option<&QkNorm<'_, Vec<f32>>>,
        table: Option<&Buf>,
    ) {
        let (rows, width, d) = (qkv.rows, qkv.width, how.head_dim);
        let values = Disjoint::new(qkv.values_mut());
        self.each(rows, 4, |r| {
            // SAFETY: each row is claimed by one thread.
            let row = unsafe { values.part(r * width..(r + 1) * width) };
            if let Some(norms) = norms.filter(|norms| !norms.after_rope) {
                self.norm_heads(norms, how, row);
            }
            if let Some(clip) = how.clip {
                row.iter_mut().for_each(|x| *x = x.clamp(-clip, clip));
            }
            if let Some(table) = table {
                let keys = if how.queries_only { 0 } else { how.kv_heads };
                for head in row.chunks_exact_mut(d).take(how.heads + keys) {
                    self.kernels.rope(head, table.row(r), how.rope_interleaved);
                }
            }
            if let Some(norms) = norms.filter(|norms| norms.after_rope) {
                self.norm_heads(norms, how, row);
            }
        });
    }

    /// Norms the query, key and value heads of one position in place.
    fn norm_heads(&self, norms: &QkNorm<'_, Vec<f32>>, how: &Attention, row: &mut [f32]) {
        let (q, rest) = row.split_at_mut(how.heads * how.head_dim);
        let keys = if how.queries_only { 0 } else { how.kv_heads * how.head_dim };
        let (k, rest) = rest.split_at_mut(keys);
        let v = &mut rest[..if norms.v.is_some() { keys } else { 0 }];
        let v_gain = norms.v.unwrap_or(norms.k);
        let all = [(q, norms.q, norms.full), (k, norms.k, norms.full), (v, v_gain, false)];
        for (heads, gain, full) in all {
            if heads.is_empty() {
                continue;
            }
            let width = if full { heads.len() } else { how.head_dim };
            let mut normed = vec![0.0; width];
            for (x, gain) in heads.chunks_exact_mut(width).zip(gain.chunks_exact(width).cycle()) {
                match norms.centred {
                    false => self.kernels.rms_norm(x, gain, norms.eps, &mut normed),
                    true => self.kernels.layer_norm(x, gain, None, norms.eps, &mut normed),
                }
                x.copy_from_slice(&normed);
            }
        }
    }

    /// Writes keys and values into their pages.
    pub(super) fn store(
        &self,
        qkv: &Buf,
        how: &Attention,
        kv: &mut Kv,
        layer: usize,
        spans: &[Span<'_>],
    ) {
        let dtype = kv.dtype;
        let Layer { bytes, head, stride } = &mut kv.layers[layer];
        let pages = Disjoint::new(bytes.get_mut());
        let d = how.head_dim;
        for span in spans {
            // A head's page is one piece: positions of one page share lines of keys.
            let first = span.start / PAGE;
            let count = (span.start + span.len).div_ceil(PAGE) - first;
            self.each(count * how.kv_heads, 1, |piece| {
                let (page, h) = (first + piece / how.kv_heads, piece % how.kv_heads);
                let at = span.table[page] as usize * *stride + h * *head;
                // SAFETY: `(page, h)` names this range, and each piece is claimed by one thread.
                let bytes = unsafe { pages.part(at..at + *head) };
                let end = (span.start + span.len).min((page + 1) * PAGE);
                for position in span.start.max(page * PAGE)..end {
                    let row = qkv.row(span.first_row + position - span.start);
                    let k = &row[(how.heads + h) * d..][..d];
                    let v = match how.latent {
                        Some(_) => &[][..],
                        None => &row[(how.heads + how.kv_heads + h) * d..][..d],
                    };
                    self.kernels.write_kv(dtype, k, v, position % PAGE, bytes);
                }
            });
        }
    }

    /// Attention for every row and head.
    pub(super) fn attention(
        &self,
        qkv: &Buf,
        how: &Attention,
        sinks: Option<&Vec<f32>>,
        kv: &Kv,
        layer: usize,
        spans: &[Span<'_>],
        out: &mut Buf,
    ) {
        let Layer { bytes, head, stride } = &kv.layers[layer];
        let (d, dv) = (how.head_dim, how.value_dim());
        let dp = dv.next_multiple_of(16);
        let group = how.heads / how.kv_heads;
        let width = how.heads * dv;
        out.shape(qkv.rows, width);
        let values = Disjoint::new(out.values_mut());
        // Query heads of a piece, and positions of a piece.
        let heads = group.min(MAX_ROWS);
        let positions = (MAX_ROWS / heads).max(1);
        let parts = group.div_ceil(heads);
        // Pieces of a span: a key/value head, a part of its query heads, some positions.
        let mut ends = Vec::with_capacity(spans.len());
        let mut total = 0;
        for span in spans {
            total += how.kv_heads * parts * span.len.div_ceil(positions);
            ends.push(total);
        }
        let work = |piece: usize| {
            let s = ends.partition_point(|&end| end <= piece);
            let span = &spans[s];
            let piece = piece - if s == 0 { 0 } else { ends[s - 1] };
            let tiles = span.len.div_ceil(positions);
            let (h, part, tile) = (piece / tiles / parts, piece / tiles % parts, piece % tiles);
            let first_head = h * group + part * heads;
            let heads = heads.min((h + 1) * group - first_head);
            let tile = tile * positions..span.len.min((tile + 1) * positions);
            let rows = tile.len() * heads;
            let mut q = Vec::with_capacity(rows * d);
            let mut seen = Vec::with_capacity(rows);
            let mut sink = Vec::new();
            for i in tile.clone() {
                let row = qkv.row(span.first_row + i);
                let before = q.len();
                q.extend_from_slice(&row[first_head * d..][..heads * d]);
                let to = span.start + i + 1;
                if let Some((growth, every)) = how.query_growth {
                    let log = libm::log((1 + (to - 1) / every) as f64) as f32;
                    let times = 1.0 + growth * log;
                    q[before..].iter_mut().for_each(|x| *x *= times);
                }
                let from = how.window.map_or(0, |w| to.saturating_sub(w));
                seen.extend(std::iter::repeat_n((from as u32, to as u32), heads));
                sink.extend_from_slice(sinks.map_or(&[], |s| &s[first_head..first_head + heads]));
            }
            let attend = Attend {
                q: &q,
                d,
                latent: how.latent,
                scale: how.scale,
                softcap: how.softcap,
                sinks: sinks.map(|_| &sink[..]),
                seen: &seen,
                kv: bytes.get(),
                table: span.table,
                page_stride: *stride,
                head_offset: h * head,
            };
            let mut result = vec![0.0; rows * dp];
            let mut scratch = vec![0.0; scratch_len(rows, d)];
            self.kernels.attend(kv.dtype, &attend, &mut result, &mut scratch);
            for (row, i) in tile.enumerate() {
                let at = (span.first_row + i) * width + first_head * dv;
                // SAFETY: these heads of this row belong to the claimed piece.
                let out = unsafe { values.part(at..at + heads * dv) };
                for (j, out) in out.chunks_exact_mut(dv).enumerate() {
                    out.copy_from_slice(&result[(row * heads + j) * dp..][..dv]);
                }
            }
        };
        // One position reads its keys once: even a single token is worth all threads once the context is long.
        if self.pool.threads() == 1
            || spans.iter().all(|s| s.len == 1 && s.start < 2 * PAGE) && total < 64
        {
            return (0..total).for_each(work);
        }
        let claims = super::Claims::new(total, self.pool.threads(), 1);
        self.pool.run(&|thread| claims.each(thread, |run| run.for_each(&work)));
    }
}
