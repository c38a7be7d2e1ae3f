//! The forward pass. There is one, for every family and every back end; what differs between families is data
//! in [`Spec`](super::spec::Spec).

mod gemma;

use super::kv::PageCopy;
use super::spec::{self, Gate, QkNorm};
use super::weights::{self, Dense, Ffn, Layer, Mixer, Moe, Norm};
use super::{Chunk, Draw, Drawn, Forward, KvGroup, PAGE, Sees, Wanted};
use crate::backend::{self, Backend, KvDtype, KvLayer, Span};
use crate::model::spec::Spec;
use crate::{Error, Result};
use std::sync::atomic::{AtomicBool, Ordering};

/// A model with its weights on one machine. Immutable and shared; what a sequence remembers is in [`Kv`].
pub struct Model<B: Backend> {
    /// Its architecture.
    pub spec: Spec,
    /// The machine.
    pub backend: B,
    pub(super) weights: weights::Weights<B::Mat, B::Row>,
    pub(super) kv_dtype: KvDtype,
    /// Index of each layer's [`KvGroup`].
    pub(super) group_of: Vec<usize>,
    /// The groups.
    pub(super) groups: Vec<KvGroup>,
    /// What was not as wished when it was loaded, and no error.
    pub note: Option<String>,
}

/// Keys, values and states of all sequences, and room for the activations of one step.
pub struct Kv<B: Backend> {
    pages: B::Kv,
    states: B::States,
    x: B::Buf,
    a: B::Buf,
    wide: B::Buf,
    out: B::Buf,
    after: B::Buf,
    gemma: gemma::Work<B>,
}

/// What one layer of a step reads beside the activations.
struct Step<'a, B: Backend> {
    /// For each of [`Spec::ropes`].
    tables: &'a [B::Buf],
    /// With the page tables of this layer.
    spans: &'a [Span<'a>],
}

impl<B: Backend> Model<B> {
    /// `x += mix(norm(x)); x += ffn(norm(x))`, the latter of the same x in parallel layers.
    fn layer(&self, l: usize, w: &Layer<B::Mat, B::Row>, kv: &mut Kv<B>, step: &Step<'_, B>) {
        self.predict(w, kv);
        match (&self.spec.layers[l].mixer, &w.mixer) {
            (spec::Mixer::Attention(how), Mixer::Attention(attn)) => {
                self.attend(l, how, w, attn, kv, step);
            }
            (spec::Mixer::Latent(how), Mixer::Latent(latent)) => {
                self.attend_latent(l, how, w, latent, kv, step);
            }
            (spec::Mixer::Recurrent(how), Mixer::Recurrent(recurrent)) => {
                self.recur(l, how, w, recurrent, kv, step.spans);
            }
            _ => unreachable!("weights are read as the spec says"),
        }
        match (&self.spec.layers[l].ffn, &w.ffn) {
            (spec::Ffn::Moe(how), Ffn::Moe(moe)) => self.experts(how, w, moe, kv),
            (spec::Ffn::Beside(width, how), Ffn::Beside(both)) => {
                self.dense_and_experts(*width, how, w, both, kv);
            }
            (_, Ffn::Dense(dense)) => self.feed_forward(l, w, dense, kv),
            _ => unreachable!("weights are read as the spec says"),
        }
        self.correct(l, w, kv);
    }

    /// `x += attention(norm(x))`.
    fn attend(
        &self,
        l: usize,
        how: &spec::Attention,
        layer: &Layer<B::Mat, B::Row>,
        w: &weights::Attention<B::Mat, B::Row>,
        kv: &mut Kv<B>,
        step: &Step<'_, B>,
    ) {
        let (b, s) = (&self.backend, &self.spec);
        let shape = backend::Attention {
            heads: how.heads,
            kv_heads: how.kv_heads,
            head_dim: how.head_dim,
            latent: None,
            scale: how.scale,
            clip: how.clip,
            softcap: how.softcap,
            window: how.window,
            query_growth: how.query_growth,
            queries_only: how.kv_of.is_some(),
            rope_interleaved: how.rope_interleaved,
        };
        let (centred, full) = (s.norm.centred(), s.qk_norm == QkNorm::Full);
        let norms = w.qk_norms.as_ref();
        let norms = norms.map(|(q, k)| backend::QkNorm {
            q,
            k,
            v: w.v_norm.as_ref(),
            centred,
            full,
            after_rope: s.qk_norm_after_rope,
            eps: s.eps,
        });
        let table = how.rope.map(|rope| &step.tables[rope]);
        let of = how.kv_of.unwrap_or(l);
        self.laurel(layer, kv);
        let Kv { pages, x, a, wide, out, after, .. } = kv;
        let input = self.normed(layer.attn_norm.as_ref(), x, a);
        b.linear(&w.qkv, w.qkv_bias.as_ref(), input, wide);
        b.rotate_and_store(wide, &shape, norms, table, pages, of, step.spans);
        b.attend(wide, &shape, w.sinks.as_ref(), pages, of, step.spans, out);
        if how.gate != Gate::None {
            b.gate_heads(wide, &shape, out);
        }
        if s.parallel {
            // The feed-forward network reads x as it is now: its norm, or the norm that is in `a`.
            self.normed(layer.ffn_norm.as_ref(), x, a);
        }
        self.residual(&w.o, w.o_bias.as_ref(), layer.attn_after_norm.as_ref(), [out, x, a, after]);
        self.add_laurel(layer, kv);
    }

    /// As `attend`, over what keys and values are made from; the formula is at [`spec::Latent`].
    fn attend_latent(
        &self,
        l: usize,
        how: &spec::Latent,
        layer: &Layer<B::Mat, B::Row>,
        w: &weights::Latent<B::Mat, B::Row>,
        kv: &mut Kv<B>,
        step: &Step<'_, B>,
    ) {
        let b = &self.backend;
        let cut =
            backend::Latent { heads: how.heads, nope: how.nope, rope: how.turned, rank: how.rank };
        let shape = backend::Attention {
            heads: how.heads,
            kv_heads: 1,
            head_dim: how.key_dim(),
            latent: Some(how.rank),
            scale: how.scale,
            clip: None,
            softcap: None,
            window: None,
            query_growth: None,
            queries_only: false,
            rope_interleaved: how.rope_interleaved,
        };
        let Kv { pages, x, a, wide, out, after, .. } = kv;
        let input = self.normed(layer.attn_norm.as_ref(), x, a);
        b.linear(&w.kv_a, None, input, after);
        match &w.q_a {
            None => b.linear(&w.q, None, input, out),
            Some((q_a, gain)) => {
                b.linear(q_a, None, input, wide);
                b.rms_norm(wide, gain, how.eps, a);
                b.linear(&w.q, None, a, out);
            }
        }
        b.latent_qk(&w.keys, (&w.kv_norm, how.eps), &cut, out, after, wide);
        let table = how.rope.map(|rope| &step.tables[rope]);
        b.rotate_and_store(wide, &shape, None, table, pages, l, step.spans);
        b.attend(wide, &shape, None, pages, l, step.spans, out);
        b.linear_heads(&w.values, how.heads, out, wide);
        self.residual(&w.o, None, layer.attn_after_norm.as_ref(), [wide, x, a, after]);
    }

    /// `x += recurrence?(convolution(norm(x)))`.
    fn recur(
        &self,
        l: usize,
        how: &spec::Recurrent,
        layer: &Layer<B::Mat, B::Row>,
        w: &weights::Recurrent<B::Mat, B::Row>,
        kv: &mut Kv<B>,
        spans: &[Span<'_>],
    ) {
        let (b, shape, norm) = (&self.backend, &how.shape, layer.attn_after_norm.as_ref());
        let Kv { states, x, a, wide, out, after, .. } = kv;
        let input = self.normed(layer.attn_norm.as_ref(), x, a);
        b.linear(&w.input, w.input_bias.as_ref(), input, wide);
        if let Some(heads) = &w.heads {
            b.linear(&heads.rates, heads.rates_bias.as_ref(), input, after);
        }
        b.conv(wide, shape, &w.taps, w.conv_bias.as_ref(), states, l, spans, out);
        let (y, a) = match &w.heads {
            None => (out, a),
            Some(heads) => {
                let eps = self.spec.eps;
                let rows = heads.rows.as_ref();
                b.recur(wide, after, out, shape, &rows, eps, states, l, spans, a);
                (a, out)
            }
        };
        self.residual(&w.out, w.out_bias.as_ref(), norm, [y, x, a, after]);
    }

    /// `x += down(act(gate(norm(x))) * up(norm(x)))`, or without a gate. In parallel layers norm(x) is in `a`.
    fn feed_forward(
        &self,
        l: usize,
        layer: &Layer<B::Mat, B::Row>,
        w: &Dense<B::Mat, B::Row>,
        kv: &mut Kv<B>,
    ) {
        let (b, s) = (&self.backend, &self.spec);
        let Kv { x, a, wide, after, .. } = kv;
        let input = if s.parallel { &*a } else { self.normed(layer.ffn_norm.as_ref(), x, a) };
        let bias = w.gate_up_bias.as_ref();
        match s.layers[l].ffn {
            spec::Ffn::Dense(width) => b.gated(&w.gate_up, bias, w.act, width, input, wide),
            spec::Ffn::Sparse(width, times) => {
                b.linear(&w.gate_up, bias, input, after);
                b.cut_and_gate(after, times, w.act, width, wide);
            }
            _ => b.activated(&w.gate_up, bias, w.act, input, wide),
        }
        let norm = layer.ffn_after_norm.as_ref();
        self.residual(&w.down, w.down_bias.as_ref(), norm, [wide, x, a, after]);
    }

    /// `x += residual_scale * norm?(sum of p_e expert_e(a) + sigmoid(gate a)? * shared(a))`, `a = norm(x)`.
    fn experts(
        &self,
        how: &spec::Moe,
        layer: &Layer<B::Mat, B::Row>,
        w: &Moe<B::Mat, B::Row>,
        kv: &mut Kv<B>,
    ) {
        let (b, s) = (&self.backend, &self.spec);
        let Kv { x, a, wide, out, after, .. } = kv;
        let input = if s.parallel { &*a } else { self.normed(layer.ffn_norm.as_ref(), x, a) };
        b.linear(&w.router, w.router_bias.as_ref(), input, wide);
        let correction = w.correction.as_ref();
        let experts: Vec<_> = w.experts.iter().map(backend::Expert::as_ref).collect();
        b.moe(&how.routing, wide, correction, None, &experts, w.act, how.width, input, out);
        if let (Some(how), Some(shared)) = (&how.shared, &w.shared) {
            b.gated(&shared.gate_up, None, w.act, how.width, input, wide);
            match &shared.router {
                None => b.linear_add(&shared.down, None, wide, out),
                Some(router) => {
                    b.linear(&shared.down, None, wide, after);
                    b.linear(router, None, input, wide);
                    b.add_gated(wide, after, out);
                }
            }
        }
        let y = match &layer.ffn_after_norm {
            None => out,
            Some(norm) => {
                self.norm(norm, out, after);
                after
            }
        };
        b.add_scaled(x, s.residual_scale, y);
    }

    /// `x += residual_scale * norm?(w y + bias)`, with two buffers to work in; `a` only if there is a norm.
    fn residual(
        &self,
        w: &B::Mat,
        bias: Option<&B::Row>,
        norm: Option<&Norm<B::Row>>,
        [y, x, a, after]: [&mut B::Buf; 4],
    ) {
        let (b, scale) = (&self.backend, self.spec.residual_scale);
        match norm {
            None if scale == 1.0 => return b.linear_add(w, bias, y, x),
            None => b.linear(w, bias, y, after),
            Some(norm) => {
                b.linear(w, bias, y, a);
                self.norm(norm, a, after);
            }
        }
        b.add_scaled(x, scale, after);
    }

    /// `norm?(x)`, in `a` if there is a norm.
    fn normed<'a>(
        &self,
        norm: Option<&Norm<B::Row>>,
        x: &'a B::Buf,
        a: &'a mut B::Buf,
    ) -> &'a B::Buf {
        let Some(norm) = norm else { return x };
        self.norm(norm, x, a);
        a
    }

    /// `out = norm(x)`.
    fn norm(&self, w: &Norm<B::Row>, x: &B::Buf, out: &mut B::Buf) {
        let (b, s) = (&self.backend, &self.spec);
        match s.norm.centred() {
            false => b.rms_norm(x, &w.gain, s.eps, out),
            true => b.layer_norm(x, &w.gain, w.bias.as_ref(), s.eps, out),
        }
    }
}

impl<B: Backend> Model<B> {
    /// Bytes of the packed matrices.
    pub fn weight_bytes(&self) -> u64 {
        self.weights.mats().map(|m| B::stored(m).1 as u64).sum()
    }

    /// How the weights of the layers are stored.
    pub fn form(&self) -> &'static str {
        B::stored(self.weights.layers[0].ffn.mats()[0]).0.name()
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

    fn long_after(&self) -> Option<usize> {
        self.spec.long_after()
    }

    fn kv_groups(&self) -> Vec<KvGroup> {
        self.groups.clone()
    }

    fn new_kv(&self, pages: &[usize]) -> Result<Kv<B>> {
        let (b, s) = (&self.backend, &self.spec);
        let layers =
            self.group_of.iter().enumerate().map(|(l, &g)| kv_layer(&s.layers[l], pages[g]));
        let (paged, states): (Vec<_>, Vec<_>) = layers.unzip();
        Ok(Kv {
            pages: b.kv(self.kv_dtype, &paged)?,
            states: b.states(&states)?,
            x: b.buf(),
            a: b.buf(),
            wide: b.buf(),
            out: b.buf(),
            after: b.buf(),
            gemma: gemma::Work::new(b, s.gemma.as_ref()),
        })
    }

    fn copy_pages(&self, kv: &mut Kv<B>, copies: &[PageCopy]) {
        for copy in copies {
            let layers = self.group_of.iter().enumerate().filter(|(_, g)| **g == copy.group);
            for (layer, _) in layers {
                self.backend.copy_page(&mut kv.pages, layer, copy.from, copy.to);
            }
        }
    }

    fn forward(
        &self,
        kv: &mut Kv<B>,
        batch: &[Chunk<'_>],
        interrupt: &AtomicBool,
    ) -> Result<Vec<f32>> {
        let logits = self.run(kv, batch, interrupt, &mut |_| {}, |b, x| b.read(x))?;
        Ok(logits.unwrap_or_default())
    }

    fn forward_and_draw(
        &self,
        kv: &mut Kv<B>,
        batch: &[Chunk<'_>],
        draws: &[Draw<'_>],
        interrupt: &AtomicBool,
    ) -> Result<Vec<Drawn>> {
        let vocab = self.vocab();
        let draw = |b: &B, x: &B::Buf| {
            let tokens = b.draw(x, draws);
            let odd = tokens.contains(&None).then(|| b.read(x));
            let row = |(r, token): (usize, &Option<u32>)| match (token, &odd) {
                (None, Some(all)) => Drawn::Logits(all[r * vocab..(r + 1) * vocab].to_vec()),
                (token, _) => Drawn::Token(token.unwrap_or(0)),
            };
            tokens.iter().enumerate().map(row).collect()
        };
        Ok(self.run(kv, batch, interrupt, &mut |_| {}, draw)?.unwrap_or_default())
    }
}

impl<B: Backend> Model<B> {
    /// The hidden states of every position of a batch, f32 `[rows, hidden]` each: the first layer's input, then
    /// each layer's output after its residual sums. Of models with several streams `[streams, rows, hidden]`. For
    /// tests and evaluation.
    pub fn hidden_states(&self, kv: &mut Kv<B>, batch: &[Chunk<'_>]) -> Result<Vec<Vec<f32>>> {
        let mut all = Vec::new();
        let see = &mut |x: &B::Buf| all.push(self.backend.read(x));
        self.run(kv, batch, &AtomicBool::new(false), see, |_, _| ())?;
        let streams = kv.gemma.streams.len().max(1);
        Ok(all.chunks(streams).map(<[_]>::concat).collect())
    }

    /// What `take` makes of the wanted rows of logits, if there are any. `see` is shown the residual stream (or streams)
    /// before the first layer and after each.
    fn run<T>(
        &self,
        kv: &mut Kv<B>,
        batch: &[Chunk<'_>],
        interrupt: &AtomicBool,
        see: &mut dyn FnMut(&B::Buf),
        take: impl FnOnce(&B, &B::Buf) -> T,
    ) -> Result<Option<T>> {
        let (b, s) = (&self.backend, &self.spec);
        let (mut ids, mut positions, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
        let mut spans: Vec<Vec<Span<'_>>> = vec![Vec::new(); self.groups.len()];
        let (mut long, long_after) = (Vec::new(), s.long_after().unwrap_or(usize::MAX));
        for chunk in batch {
            let (first_row, len) = (ids.len(), chunk.tokens.len());
            ids.extend_from_slice(chunk.tokens);
            positions.extend((chunk.start..chunk.start + len).map(|p| p as u32));
            long.extend((chunk.start..chunk.start + len).map(|p| chunk.long || p >= long_after));
            match chunk.wanted {
                Wanted::None => {}
                Wanted::Last => wanted.push(first_row + len - 1),
                Wanted::All => wanted.extend(first_row..first_row + len),
            }
            for ((spans, table), KvGroup { sees, .. }) in
                spans.iter_mut().zip(chunk.pages).zip(&self.groups)
            {
                debug_assert!(match sees {
                    Sees::State => table.len() == 2,
                    _ => table.len() * PAGE >= chunk.start + len,
                });
                spans.push(Span { first_row, len, start: chunk.start, table });
            }
        }
        let rope = |r: &spec::Rope| {
            let second = r.long.as_ref().map_or(&r.inv_freq, |long| &long.inv_freq);
            b.rope_table(&positions, &long, [&r.inv_freq, second], r.scale)
        };
        let tables: Vec<_> = s.ropes.iter().map(rope).collect();

        b.embed(&self.weights.embed, &ids, s.embed_scale, &mut kv.x);
        if let (Some(table), Some(count)) = (&self.weights.positions, s.positions) {
            if let Some(beyond) = positions.iter().find(|&&p| p as usize >= count) {
                let expected = format!("one of the {count} positions that the model has learned");
                return Err(Error::parameter("position", beyond, expected));
            }
            b.embed(table, &positions, 1.0, &mut kv.a);
            b.add(&mut kv.x, &kv.a);
        }
        self.begin(&ids, kv);
        kv.show(see);
        for (l, w) in self.weights.layers.iter().enumerate() {
            if interrupt.load(Ordering::Relaxed) {
                b.finish()?;
                return Err(Error::Interrupted);
            }
            let step = Step { tables: &tables, spans: &spans[self.group_of[l]] };
            self.layer(l, w, kv, &step);
            kv.show(see);
        }
        if wanted.is_empty() {
            b.finish()?;
            return Ok(None);
        }
        self.select(&wanted, kv);
        let (w, Kv { a, wide, out, .. }) = (&self.weights, kv);
        self.norm(&w.norm, a, out);
        b.linear(w.head.as_ref().unwrap_or(&w.embed), w.head_bias.as_ref(), out, wide);
        if s.logit_scale != 1.0 {
            b.scale(wide, s.logit_scale);
        }
        if let Some(cap) = s.logit_softcap {
            b.softcap(wide, cap);
        }
        let taken = take(b, wide);
        b.finish()?;
        Ok(Some(taken))
    }
}

/// The groups of a model's layers, and the group of each layer.
pub(super) fn kv_groups(spec: &Spec, dtype: KvDtype) -> (Vec<KvGroup>, Vec<usize>) {
    let mut groups: Vec<KvGroup> = Vec::new();
    let group_of = spec.layers.iter().map(|layer| {
        let sees = match &layer.mixer {
            spec::Mixer::Attention(how) => how.window.into(),
            spec::Mixer::Latent(_) => Sees::All,
            spec::Mixer::Recurrent(_) => Sees::State,
        };
        let g = groups.iter().position(|known| known.sees == sees).unwrap_or_else(|| {
            groups.push(KvGroup { sees, page_bytes: 0 });
            groups.len() - 1
        });
        let (paged, (_, state)) = kv_layer(layer, 1);
        groups[g].page_bytes += paged.pages * paged.page_bytes(dtype) + state * size_of::<f32>();
        g
    });
    let group_of = group_of.collect();
    (groups, group_of)
}

/// What `pages` pages of a layer hold: keys and values, or states and their size.
pub(super) fn kv_layer(layer: &spec::Layer, pages: usize) -> (KvLayer, (usize, usize)) {
    let (pages, heads, head_dim, values, states) = match &layer.mixer {
        spec::Mixer::Attention(how) if how.kv_of.is_some() => (0, 1, 0, false, (0, 0)),
        spec::Mixer::Attention(how) => (pages, how.kv_heads, how.head_dim, true, (0, 0)),
        spec::Mixer::Latent(how) => (pages, 1, how.key_dim(), false, (0, 0)),
        spec::Mixer::Recurrent(how) => (0, 1, 0, false, (pages, how.shape.state())),
    };
    (KvLayer { pages, heads, head_dim, values }, states)
}
