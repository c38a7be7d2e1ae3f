//! The forward pass. There is one, for every family and every back end; what differs between families is data
//! in [`Spec`](super::spec::Spec).

use super::spec::Act;
use super::weights::{Layer, Weights};
use super::{Chunk, Forward, KvGroup, PAGE, Wanted};
use crate::backend::{Activation, Attention, Backend, KvDtype, Span};
use crate::model::spec::Spec;
use crate::{Error, Result};
use std::sync::atomic::{AtomicBool, Ordering};

/// A model with its weights on one machine. Immutable and shared; what a sequence remembers is in [`Kv`].
pub struct Model<B: Backend> {
    /// Its architecture.
    pub spec: Spec,
    /// The machine.
    pub backend: B,
    pub(super) weights: Weights<B>,
    pub(super) kv_dtype: KvDtype,
    /// Index of each layer's [`KvGroup`].
    pub(super) group_of: Vec<usize>,
    /// The windows of the groups.
    pub(super) windows: Vec<Option<usize>>,
}

/// Keys and values of all sequences, and room for the activations of one step.
pub struct Kv<B: Backend> {
    pages: B::Kv,
    x: B::Buf,
    a: B::Buf,
    wide: B::Buf,
    out: B::Buf,
    after: B::Buf,
}

impl<B: Backend> Model<B> {
    fn attention(&self, l: usize) -> Attention {
        let s = &self.spec;
        Attention {
            heads: s.heads,
            kv_heads: s.kv_heads,
            head_dim: s.head_dim,
            scale: s.attn_scale,
            softcap: s.attn_softcap,
            window: s.layers[l].window,
        }
    }

    /// `x += attention(norm(x))`.
    fn attend(&self, l: usize, w: &Layer<B>, kv: &mut Kv<B>, table: &B::Buf, spans: &[Span<'_>]) {
        let (b, s) = (&self.backend, &self.spec);
        let how = self.attention(l);
        let norms = w.qk_norms.as_ref().map(|(q, k)| (q, k, s.eps));
        let Kv { pages, x, a, wide, out, after } = kv;
        let input = normed(b, w.attn_norm.as_ref(), s.eps, x, a);
        b.linear(&w.qkv, w.qkv_bias.as_ref(), input, wide);
        b.rotate_and_store(wide, &how, norms, table, pages, l, spans);
        b.attend(wide, &how, pages, l, spans, out);
        self.residual(&w.o, w.o_bias.as_ref(), w.attn_after_norm.as_ref(), [out, x, a, after]);
    }

    /// `x += down(act(gate(norm(x))) * up(norm(x)))`.
    fn feed_forward(&self, w: &Layer<B>, kv: &mut Kv<B>) {
        let (b, s) = (&self.backend, &self.spec);
        let act = match s.act {
            Act::Silu => Activation::Silu,
            Act::GeluTanh => Activation::GeluTanh,
        };
        let Kv { x, a, wide, after, .. } = kv;
        let input = normed(b, w.ffn_norm.as_ref(), s.eps, x, a);
        b.gated(&w.gate_up, w.gate_up_bias.as_ref(), act, s.ffn, input, wide);
        self.residual(
            &w.down,
            w.down_bias.as_ref(),
            w.ffn_after_norm.as_ref(),
            [wide, x, a, after],
        );
    }

    /// `x += norm?(w y + bias)`, with two buffers to work in.
    fn residual(
        &self,
        w: &B::Mat,
        bias: Option<&B::Row>,
        norm: Option<&B::Row>,
        [y, x, a, after]: [&mut B::Buf; 4],
    ) {
        let b = &self.backend;
        match norm {
            None => b.linear_add(w, bias, y, x),
            Some(gain) => {
                b.linear(w, bias, y, a);
                b.rms_norm(a, gain, self.spec.eps, after);
                b.add(x, after);
            }
        }
    }
}

/// `norm?(x)`, in `a` if there is a norm.
fn normed<'a, B: Backend>(
    b: &B,
    gain: Option<&B::Row>,
    eps: f32,
    x: &'a B::Buf,
    a: &'a mut B::Buf,
) -> &'a B::Buf {
    let Some(gain) = gain else { return x };
    b.rms_norm(x, gain, eps, a);
    a
}

impl Model<crate::backend::cpu::Cpu> {
    /// Numbers that were trained.
    pub fn parameters(&self) -> u64 {
        let s = &self.spec;
        let count = |weights: Vec<super::spec::Weight>| -> u64 {
            weights.iter().map(|w| w.shape.iter().map(|&n| n as u64).product::<u64>()).sum()
        };
        count(s.model_weights()) + s.layers.len() as u64 * count(s.layer_weights())
    }

    /// Bytes of the packed matrices.
    pub fn weight_bytes(&self) -> u64 {
        let w = &self.weights;
        let layer = |l: &Layer<crate::backend::cpu::Cpu>| {
            [&l.qkv, &l.o, &l.gate_up, &l.down].map(|m| m.bytes().len())
        };
        let layers = w.layers.iter().flat_map(layer);
        let ends = std::iter::once(&w.embed).chain(&w.head).map(|m| m.bytes().len());
        layers.chain(ends).sum::<usize>() as u64
    }

    /// How the weights of the layers are stored.
    pub fn form(&self) -> &'static str {
        self.weights.layers[0].down.form().name()
    }
}

impl<B: Backend> Forward for Model<B> {
    type Kv = Kv<B>;

    fn vocab(&self) -> usize {
        self.spec.vocab
    }

    fn context_length(&self) -> usize {
        self.spec.context_length
    }

    fn kv_groups(&self) -> Vec<KvGroup> {
        let s = &self.spec;
        let layer = s.kv_heads * self.kv_dtype.page_bytes(s.head_dim);
        let group = |(g, &window): (usize, &Option<usize>)| KvGroup {
            window,
            page_bytes: layer * self.group_of.iter().filter(|&&of| of == g).count(),
        };
        self.windows.iter().enumerate().map(group).collect()
    }

    fn new_kv(&self, pages: &[usize]) -> Result<Kv<B>> {
        let (b, s) = (&self.backend, &self.spec);
        let layer = |&g: &usize| (pages[g], s.kv_heads, s.head_dim);
        let layers: Vec<_> = self.group_of.iter().map(layer).collect();
        Ok(Kv {
            pages: b.kv(self.kv_dtype, &layers)?,
            x: b.buf(),
            a: b.buf(),
            wide: b.buf(),
            out: b.buf(),
            after: b.buf(),
        })
    }

    fn forward(
        &self,
        kv: &mut Kv<B>,
        batch: &[Chunk<'_>],
        interrupt: &AtomicBool,
    ) -> Result<Vec<f32>> {
        self.run(kv, batch, interrupt, &mut |_| {})
    }
}

impl<B: Backend> Model<B> {
    /// The hidden states of every position of a batch, f32 `[rows, hidden]` each: the first layer's input, then
    /// each layer's output after its residual sums. For tests and evaluation.
    pub fn hidden_states(&self, kv: &mut Kv<B>, batch: &[Chunk<'_>]) -> Result<Vec<Vec<f32>>> {
        let mut all = Vec::new();
        self.run(kv, batch, &AtomicBool::new(false), &mut |x| all.push(self.backend.read(x)))?;
        Ok(all)
    }

    /// `see` is shown the residual stream before the first layer and after each.
    fn run(
        &self,
        kv: &mut Kv<B>,
        batch: &[Chunk<'_>],
        interrupt: &AtomicBool,
        see: &mut dyn FnMut(&B::Buf),
    ) -> Result<Vec<f32>> {
        let (b, s) = (&self.backend, &self.spec);
        let (mut ids, mut positions, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
        let mut spans: Vec<Vec<Span<'_>>> = vec![Vec::new(); self.windows.len()];
        for chunk in batch {
            let (first_row, len) = (ids.len(), chunk.tokens.len());
            ids.extend_from_slice(chunk.tokens);
            positions.extend((chunk.start..chunk.start + len).map(|p| p as u32));
            match chunk.wanted {
                Wanted::None => {}
                Wanted::Last => wanted.push(first_row + len - 1),
                Wanted::All => wanted.extend(first_row..first_row + len),
            }
            for (spans, table) in spans.iter_mut().zip(chunk.pages) {
                debug_assert!(table.len() * PAGE >= chunk.start + len);
                spans.push(Span { first_row, len, start: chunk.start, table });
            }
        }
        let rope = |r: &super::spec::Rope| b.rope_table(&positions, &r.inv_freq, r.scale);
        let tables: Vec<_> = s.ropes.iter().map(rope).collect();

        b.embed(&self.weights.embed, &ids, s.embed_scale, &mut kv.x);
        see(&kv.x);
        for (l, w) in self.weights.layers.iter().enumerate() {
            if interrupt.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            self.attend(l, w, kv, &tables[s.layers[l].rope], &spans[self.group_of[l]]);
            self.feed_forward(w, kv);
            see(&kv.x);
        }
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let Kv { x, a, wide, out, .. } = kv;
        b.select(x, &wanted, a);
        b.rms_norm(a, &self.weights.norm, s.eps, out);
        b.linear(self.weights.head.as_ref().unwrap_or(&self.weights.embed), None, out, wide);
        if let Some(cap) = s.logit_softcap {
            b.softcap(wide, cap);
        }
        Ok(b.read(wide))
    }
}
