//! The steps of the forward pass that only Gemma 3n and 4 have. Each does nothing in other models. The formulas are at
//! [`spec::Inputs`], [`spec::Streams`] and [`spec::Ffn::Beside`].

use super::{Kv, Model};
use crate::backend::{Backend, Expert};
use crate::model::spec;
use crate::model::weights::{AltUp, Beside, Layer};
use std::f32::consts::FRAC_1_SQRT_2;

/// Activations of these steps.
pub(super) struct Work<B: Backend> {
    /// The inputs of all layers, side by side.
    inputs: B::Buf,
    /// The low-rank path beside attention.
    laurel: B::Buf,
    /// The residual streams; none: `x` is the only one.
    pub(super) streams: Vec<B::Buf>,
}

impl<B: Backend> Work<B> {
    pub(super) fn new(b: &B, gemma: Option<&spec::Gemma>) -> Work<B> {
        let streams = gemma.and_then(|g| g.streams).map_or(0, |s| s.count);
        let streams = (0..streams).map(|_| b.buf()).collect();
        Work { inputs: b.buf(), laurel: b.buf(), streams }
    }
}

impl<B: Backend> Kv<B> {
    /// Gives `see` the residual stream, or each of several.
    pub(super) fn show(&self, see: &mut dyn FnMut(&B::Buf)) {
        match &self.gemma.streams[..] {
            [] => see(&self.x),
            streams => streams.iter().for_each(see),
        }
    }
}

/// Least power that a projected stream is scaled from.
const LEAST: f32 = 1e-5;

impl<B: Backend> Model<B> {
    /// The inputs of layers and the streams, from the embedding `x`.
    pub(super) fn begin(&self, ids: &[u32], kv: &mut Kv<B>) {
        let (b, s) = (&self.backend, &self.spec);
        let Some((how, w)) = s.gemma.as_ref().zip(self.weights.gemma.as_ref()) else { return };
        let Kv { x, a, wide, gemma: Work { inputs, streams, .. }, .. } = kv;
        if let Some((how, w)) = how.inputs.zip(w.inputs.as_ref()) {
            let known = |&id: &u32| if (id as usize) < how.vocab { id } else { 0 };
            let ids: Vec<u32> = ids.iter().map(known).collect();
            b.embed(&w.embed, &ids, (how.width as f32).sqrt() * FRAC_1_SQRT_2, inputs);
            b.linear(&w.proj, None, x, wide);
            // The norm of y / sqrt(hidden) is the norm of y with hidden times the epsilon.
            b.rms_norm(wide, &w.norm, s.eps * s.hidden as f32, a);
            b.add(inputs, a);
        }
        if let [first, others @ ..] = &mut streams[..] {
            b.copy(x, first);
            for (stream, (project, _)) in others.iter_mut().zip(&w.streams) {
                b.linear(project, None, x, stream);
                b.match_power(stream, x, LEAST);
            }
        }
    }

    /// Before a layer: what each stream is predicted to be, and `x` the first of them.
    pub(super) fn predict(&self, layer: &Layer<B::Mat, B::Row>, kv: &mut Kv<B>) {
        let Some(w) = layer.gemma.as_ref().and_then(|g| g.altup.as_ref()) else { return };
        let b = &self.backend;
        let Kv { x, a, wide, out, gemma: Work { streams, .. }, .. } = kv;
        self.route(w, &w.predict, &streams[0], [a, wide, out]);
        b.altup_predict(out, streams);
        b.copy(&streams[0], x);
    }

    /// `out = w tanh(router norm(x) / hidden)`.
    fn route(
        &self,
        w: &AltUp<B::Mat, B::Row>,
        then: &B::Mat,
        x: &B::Buf,
        [a, wide, out]: [&mut B::Buf; 3],
    ) {
        let (b, s) = (&self.backend, &self.spec);
        b.rms_norm(x, &w.router_norm, s.eps, a);
        b.linear(&w.router, None, a, wide);
        b.softcap(wide, 1.0); // tanh
        b.linear(then, None, wide, out);
    }

    /// `laurel = a + norm(right (left a))`, `a = norm(x)`.
    pub(super) fn laurel(&self, layer: &Layer<B::Mat, B::Row>, kv: &mut Kv<B>) {
        let Some(w) = layer.gemma.as_ref().and_then(|g| g.altup.as_ref()) else { return };
        let b = &self.backend;
        let Kv { x, a, wide, out, gemma: Work { laurel, .. }, .. } = kv;
        let a = self.normed(layer.attn_norm.as_ref(), x, a);
        b.linear(&w.left, None, a, wide);
        b.linear(&w.right, None, wide, out);
        b.rms_norm(out, &w.laurel_norm, self.spec.eps, laurel);
        b.add(laurel, a);
    }

    /// `x = (x + laurel) / sqrt(2)`.
    pub(super) fn add_laurel(&self, layer: &Layer<B::Mat, B::Row>, kv: &mut Kv<B>) {
        if layer.gemma.as_ref().is_some_and(|g| g.altup.is_some()) {
            self.backend.add(&mut kv.x, &kv.gemma.laurel);
            self.backend.scale(&mut kv.x, FRAC_1_SQRT_2);
        }
    }

    /// `x += norm(n(dense(norm(x))) + n(experts(n(x))))`, each `n` a norm of its own.
    pub(super) fn dense_and_experts(
        &self,
        width: usize,
        how: &spec::Moe,
        layer: &Layer<B::Mat, B::Row>,
        w: &Beside<B::Mat, B::Row>,
        kv: &mut Kv<B>,
    ) {
        let (b, eps) = (&self.backend, self.spec.eps);
        let Kv { x, a, wide, out, after, .. } = kv;
        let (dense, moe) = (&w.dense, &w.moe);
        let input = self.normed(layer.ffn_norm.as_ref(), x, a);
        b.gated(&dense.gate_up, dense.gate_up_bias.as_ref(), dense.act, width, input, wide);
        b.linear(&dense.down, dense.down_bias.as_ref(), wide, out);
        b.rms_norm(out, &w.dense_after_norm, eps, after);
        b.rms_norm(x, &w.router_norm, eps, a);
        b.linear(&moe.router, moe.router_bias.as_ref(), a, wide);
        b.rms_norm(x, &w.experts_norm, eps, a);
        let (correction, scales) = (moe.correction.as_ref(), moe.scales.as_ref());
        let experts: Vec<_> = moe.experts.iter().map(Expert::as_ref).collect();
        b.moe(&how.routing, wide, correction, scales, &experts, moe.act, how.width, a, out);
        b.rms_norm(out, &w.experts_after_norm, eps, a);
        b.add(after, a);
        let sum = self.normed(layer.ffn_after_norm.as_ref(), after, a);
        b.add_scaled(x, self.spec.residual_scale, sum);
    }

    /// After a layer: its input, its scale, and the streams after what `x` has become.
    pub(super) fn correct(&self, l: usize, layer: &Layer<B::Mat, B::Row>, kv: &mut Kv<B>) {
        let (b, s) = (&self.backend, &self.spec);
        let Some(w) = &layer.gemma else { return };
        let Kv { x, a, wide, out, after, gemma: Work { inputs, streams, .. }, .. } = kv;
        if let Some(altup) = &w.altup {
            self.route(altup, &altup.correct, x, [a, wide, out]);
            b.altup_correct(out, x, streams);
            b.multiply(&streams[0], &altup.scale, x);
        }
        if let Some(input) = &w.input {
            let width = s.gemma.and_then(|g| g.inputs).map_or(0, |inputs| inputs.width);
            b.linear(&input.gate, None, x, wide);
            b.gate_with(wide, input.act, inputs, l * width);
            b.linear(&input.out, None, wide, out);
            b.rms_norm(out, &input.norm, s.eps, after);
            match streams.get_mut(1..) {
                Some(others) => others.iter_mut().for_each(|stream| b.add(stream, after)),
                None => b.add(x, after),
            }
        }
        if let Some(scale) = w.scale {
            b.scale(x, scale);
        }
    }

    /// The wanted rows of the residual stream, or of the mean of several, in `a`.
    pub(super) fn select(&self, wanted: &[usize], kv: &mut Kv<B>) {
        let b = &self.backend;
        let Kv { x, a, wide, out, after, gemma: Work { streams, .. }, .. } = kv;
        let (Some(w), [first, others @ ..]) = (&self.weights.gemma, &streams[..]) else {
            return b.select(x, wanted, a);
        };
        b.select(first, wanted, after);
        b.copy(after, a);
        for (stream, (_, project)) in others.iter().zip(&w.streams) {
            b.select(stream, wanted, wide);
            b.linear(project, None, wide, out);
            b.match_power(out, after, LEAST);
            b.add(a, out);
        }
        b.scale(a, 1.0 / streams.len() as f32);
    }
}
