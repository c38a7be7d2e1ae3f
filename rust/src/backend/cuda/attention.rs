//! Attention as launches: which kernel, how rows are cut into blocks, when chunks of keys are blocks of their own.

use super::{Attention, Buf, Cuda, Kv, KvDtype, QkNorm, Row, Span, kv, launch};
use crate::backend::cuda_limits as limits;

/// Rows (positions times query heads) of a block at most.
const ROWS: usize = 8;
/// Keys of a chunk: part of the definition (kernels/attention.rs).
const CHUNK: usize = 512;

/// What there is no kernel for.
fn refused(how: &Attention) -> Option<&'static str> {
    match how.latent {
        None if how.head_dim > limits::HEAD_DIM => Some("heads of more than 512 dimensions"),
        Some(values) if how.head_dim > limits::LATENT_KEY || values > limits::HEAD_DIM => {
            Some("latent attention over more than 576 dimensions")
        }
        _ => None,
    }
}

impl Cuda {
    /// [`Backend::rotate_and_store`](super::Backend::rotate_and_store).
    pub(super) fn rotate(
        &self,
        qkv: &mut Buf,
        how: &Attention,
        norms: Option<QkNorm<'_, Row>>,
        table: Option<&Buf>,
        kv: &mut Kv,
        layer: usize,
        spans: &[Span<'_>],
    ) {
        let d = how.head_dim;
        let full = norms.as_ref().is_some_and(|n| n.full);
        let gated = qkv.width > how.qkv_width();
        let odd = [
            (
                how.clip.is_some() && (gated || full),
                "clipped queries with a gate or a norm over all heads",
            ),
            (
                full && norms.as_ref().is_some_and(|n| n.after_rope),
                "a norm over all heads after the rotation",
            ),
        ];
        let odd = odd.iter().find(|(odd, _)| *odd).map(|(_, what)| *what);
        if let Some(what) = refused(how).or(odd) {
            return self.device.refuse(what);
        }
        qkv.fresh.set(false);
        let kv_heads = if how.queries_only { 0 } else { how.kv_heads };
        let values = usize::from(how.latent.is_none());
        if let Some(norms) = norms.as_ref().filter(|_| full) {
            let parts = [(0, how.heads, norms.q), (how.heads * d, kv_heads, norms.k)];
            for (first, heads, gain) in parts.into_iter().filter(|(_, heads, _)| *heads > 0) {
                let at = (qkv.at + 4 * first as u64, qkv.width);
                let style = (norms.centred, norms.eps);
                self.norm(at, at, [qkv.rows, 1, heads * d], gain, None, style, None);
            }
        }
        let gain = |row: Option<&Row>| row.map_or((0, 1), |row| (row.memory.at, row.len as u32));
        let each = norms.as_ref().filter(|_| !full);
        let ((q_gain, q_gains), (k_gain, k_gains)) =
            (gain(each.map(|n| n.q)), gain(each.map(|n| n.k)));
        let params = launch::Rope {
            qkv: qkv.at,
            q_gain,
            q_gains,
            k_gain,
            k_gains,
            v_gain: gain(norms.as_ref().and_then(|n| n.v)).0,
            table: table.map_or(0, |table| table.at),
            turned: table.map_or(0, |table| table.width as u32),
            pages: kv.pages(layer),
            spans: kv::spans(&self.device, spans),
            row: qkv.width as u32,
            heads: how.heads as u32,
            kv_heads: kv_heads as u32,
            d: d as u32,
            store: (kv_heads > 0).into(),
            interleaved: how.rope_interleaved.into(),
            centred: norms.as_ref().is_some_and(|n| n.centred).into(),
            after: norms.as_ref().is_some_and(|n| n.after_rope).into(),
            clip: how.clip.unwrap_or(0.0),
            eps: norms.as_ref().map_or(0.0, |n| n.eps),
            values: values as u32,
        };
        let heads = how.heads + (1 + values) * kv_heads;
        self.launch("rope_store", [qkv.rows, heads.div_ceil(4), 1], 128, &params);
    }

    /// [`Backend::attend`](super::Backend::attend).
    pub(super) fn attention(
        &self,
        qkv: &Buf,
        how: &Attention,
        sinks: Option<&Row>,
        kv: &Kv,
        layer: usize,
        spans: &[Span<'_>],
        out: &mut Buf,
    ) {
        let (d, values) = (how.head_dim, how.value_dim());
        if let Some(what) = refused(how) {
            return self.device.refuse(what);
        }
        out.shape(qkv.rows, how.heads * values);
        let single = spans.iter().all(|span| span.len == 1);
        let of_kv = how.heads / how.kv_heads;
        let most = if how.latent.is_some() { 4 } else { ROWS };
        let group = of_kv.min(most);
        let positions = if single { 1 } else { (most / group).max(1) };
        let tiles = spans.iter().map(|s| s.len.div_ceil(positions)).max().unwrap_or(0);
        // Chunks of generated tokens are blocks of their own: a power of two, so that one graph serves many lengths.
        let keys = spans.iter().map(|s| s.start + s.len).max().unwrap_or(0);
        let chunks = keys.div_ceil(CHUNK).next_power_of_two();
        let split = single && chunks > 1;
        let growth = how.query_growth.map_or(0, |(growth, every)| {
            let factor = |position: usize| {
                let log = libm::log((1 + position / every) as f64) as f32;
                (1.0 + growth * log).to_bits()
            };
            let rows = spans.iter().flat_map(|s| s.start..s.start + s.len);
            self.device.input(&rows.map(factor).collect::<Vec<_>>())
        });
        let mut parts = self.parts.lock().unwrap_or_else(|e| e.into_inner());
        if split {
            self.device.grow(&mut parts, qkv.rows * how.heads * chunks * (values + 2) * 4);
        }
        let params = launch::Attend {
            qkv: qkv.at,
            sinks: sinks.map_or(0, |sinks| sinks.memory.at),
            growth,
            out: out.at,
            parts: parts.at,
            pages: kv.pages(layer),
            spans: kv::spans(&self.device, spans),
            row: qkv.width as u32,
            heads: how.heads as u32,
            kv_heads: how.kv_heads as u32,
            d: d as u32,
            window: how.window.unwrap_or(0) as u32,
            chunks: chunks as u32,
            group: group as u32,
            positions: positions as u32,
            tiles: tiles as u32,
            split: split.into(),
            scale: how.scale,
            cap: how.softcap.unwrap_or(0.0),
            values: values as u32,
            pad: 0,
        };
        let kernel = match (kv.dtype, group * positions) {
            (KvDtype::F32, _) if how.latent.is_some() => "attend_latent_f32",
            (KvDtype::F16, _) if how.latent.is_some() => "attend_latent_f16",
            (KvDtype::Int8, _) if how.latent.is_some() => "attend_latent_i8",
            (KvDtype::F32, 1) => "attend_f32_1",
            (KvDtype::F32, _) => "attend_f32_8",
            (KvDtype::F16, 1) => "attend_f16_1",
            (KvDtype::F16, 2..=4) => "attend_f16_4",
            (KvDtype::F16, _) => "attend_f16_8",
            (KvDtype::Int8, 1) => "attend_i8_1",
            (KvDtype::Int8, 2..=4) => "attend_i8_4",
            (KvDtype::Int8, _) => "attend_i8_8",
        };
        // Spans times tiles may be more than the 65,535 that y and z can be.
        let heads = how.kv_heads * of_kv.div_ceil(group);
        let grid = [spans.len() * tiles, heads, if split { chunks } else { 1 }];
        self.launch(kernel, grid, 256, &params);
        if split {
            self.launch("attend_merge", [qkv.rows, how.heads, 1], 128, &params);
        }
    }
}
