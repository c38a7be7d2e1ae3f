//! The weights that only Gemma 3n and 4 have. Never packs.

use super::{Dense, Moe, Reader, Source};
use crate::backend::{Activation, Place};
use crate::model::spec::{self, Slice};
use crate::{Error, Result};

/// As [`spec::Ffn::Beside`].
pub(in crate::model) struct Beside<M, V> {
    pub(in crate::model) dense: Dense<M, V>,
    pub(in crate::model) moe: Moe<M, V>,
    /// Divided by `sqrt(hidden)`.
    pub(in crate::model) router_norm: V,
    pub(in crate::model) dense_after_norm: V,
    pub(in crate::model) experts_norm: V,
    pub(in crate::model) experts_after_norm: V,
}

/// As [`spec::Gemma`], outside the layers.
pub(in crate::model) struct Gemma<M, V> {
    pub(in crate::model) inputs: Option<Inputs<M, V>>,
    /// The projections into and out of each stream but the first.
    pub(in crate::model) streams: Vec<(M, M)>,
}

/// As [`spec::Inputs`], of all layers.
pub(in crate::model) struct Inputs<M, V> {
    pub(in crate::model) embed: M,
    pub(in crate::model) proj: M,
    /// Divided by `sqrt(2)`.
    pub(in crate::model) norm: V,
}

/// As [`spec::Gemma`], of one layer.
pub(in crate::model) struct GemmaLayer<M, V> {
    pub(in crate::model) input: Option<LayerInput<M, V>>,
    pub(in crate::model) scale: Option<f32>,
    pub(in crate::model) altup: Option<AltUp<M, V>>,
}

/// As [`spec::Inputs`], of one layer.
pub(in crate::model) struct LayerInput<M, V> {
    pub(in crate::model) act: Activation,
    pub(in crate::model) gate: M,
    pub(in crate::model) out: M,
    pub(in crate::model) norm: V,
}

/// As [`spec::Streams`].
pub(in crate::model) struct AltUp<M, V> {
    /// Divided by `hidden`.
    pub(in crate::model) router_norm: V,
    pub(in crate::model) router: M,
    pub(in crate::model) predict: M,
    pub(in crate::model) correct: M,
    pub(in crate::model) scale: V,
    pub(in crate::model) left: M,
    pub(in crate::model) right: M,
    pub(in crate::model) laurel_norm: V,
}

impl<M, V> Gemma<M, V> {
    pub(super) fn mats(&self) -> Vec<&M> {
        let inputs = self.inputs.iter().flat_map(|inputs| [&inputs.embed, &inputs.proj]);
        inputs.chain(self.streams.iter().flat_map(|(a, b)| [a, b])).collect()
    }
}

impl<M, V> GemmaLayer<M, V> {
    pub(super) fn mats(&self) -> Vec<&M> {
        let input = self.input.iter().flat_map(|input| [&input.gate, &input.out]);
        let altup = self.altup.iter();
        let altup = altup.flat_map(|a| [&a.router, &a.predict, &a.correct, &a.left, &a.right]);
        input.chain(altup).collect()
    }
}

/// One matrix.
fn source(place: Slice, n: usize, k: usize, exact: bool) -> Source {
    Source { parts: vec![(place, n)], k, interleaved: false, exact }
}

impl Reader<'_> {
    /// Those outside the layers.
    pub(super) fn gemma<M, V>(
        &self,
        row: &impl Fn(&[f32]) -> V,
        mat: &mut impl FnMut(Source) -> Result<M>,
    ) -> Result<Option<Gemma<M, V>>> {
        let s = self.spec;
        let Some(gemma) = &s.gemma else { return Ok(None) };
        let inputs = |inputs: spec::Inputs, mat: &mut dyn FnMut(Source) -> Result<M>| {
            let all = s.layers.len() * inputs.width;
            let mut whole = |what: &str, n, k| {
                mat(source(Slice::whole(self.names.model(what), vec![n, k]), n, k, false))
            };
            let norm = Slice::whole(self.names.model("input_proj_norm"), vec![inputs.width]);
            let mut norm = self.norm(&norm, inputs.width, 1)?;
            norm.iter_mut().for_each(|g| *g *= std::f32::consts::FRAC_1_SQRT_2); // see spec::Inputs
            Ok(Inputs {
                embed: whole("input_embed", inputs.vocab, all)?,
                proj: whole("input_proj", all, s.hidden)?,
                norm: row(&norm),
            })
        };
        let inputs = gemma.inputs.map(|i| inputs(i, mat)).transpose()?;
        let streams = gemma.streams.map_or(0, |streams| streams.count - 1);
        let mut one = |i: usize, what: &str| {
            let (n, name) = (s.hidden, self.names.model(what));
            let place = match name.contains("{l}") {
                true => s.place(&self.names, i, what, 0),
                // All in one tensor.
                false => {
                    Slice { first: i * n * n, row: n, ..Slice::whole(name, vec![streams, n, n]) }
                }
            };
            mat(source(place, n, n, false))
        };
        let streams = (0..streams).map(|i| {
            let into = one(i, "altup_in")?;
            self.at.set(Place::End);
            let out = one(i, "altup_out")?;
            self.at.set(Place::Begin);
            Ok((into, out))
        });
        Ok(Some(Gemma { inputs, streams: streams.collect::<Result<_>>()? }))
    }

    /// Those of layer `l`.
    pub(super) fn gemma_layer<M, V>(
        &self,
        l: usize,
        row: &impl Fn(&[f32]) -> V,
        mat: &mut impl FnMut(Source) -> Result<M>,
    ) -> Result<Option<GemmaLayer<M, V>>> {
        let s = self.spec;
        let Some(gemma) = &s.gemma else { return Ok(None) };
        let place = |what: &str| s.place(&self.names, l, what, 0);
        let mut one = |what: &str, n, k, exact| mat(source(place(what), n, k, exact));
        let norm = |what: &str| self.norm(&place(what), s.hidden, 1);
        let input = match gemma.inputs {
            None => None,
            Some(inputs) => Some(LayerInput {
                act: self.activation(l)?,
                gate: one("input_gate", inputs.width, s.hidden, false)?,
                out: one("input_out", s.hidden, inputs.width, false)?,
                norm: row(&norm("input_norm")?),
            }),
        };
        let altup = match gemma.streams {
            None => None,
            Some(spec::Streams { count: n, laurel_rank, clip }) => {
                let correct = place("altup_correct");
                if let Some(x) = self.values(&correct, n, n)?.iter().find(|x| x.abs() > clip) {
                    return Err(Error::Unsupported(format!(
                        "tensor `{}`: found {x}, expected numbers within {clip}, as altup_coef_clip says",
                        correct.tensor
                    )));
                }
                let mut router_norm = norm("altup_router_norm")?;
                router_norm.iter_mut().for_each(|g| *g /= s.hidden as f32); // see spec::Streams
                Some(AltUp {
                    router_norm: row(&router_norm),
                    router: one("altup_router", n, s.hidden, true)?,
                    predict: one("altup_predict", n * n, n, true)?,
                    correct: one("altup_correct", n, n, true)?,
                    scale: row(&self.vector(&place("altup_scale"), s.hidden)?),
                    left: one("laurel_left", laurel_rank, s.hidden, false)?,
                    right: one("laurel_right", s.hidden, laurel_rank, false)?,
                    laurel_norm: row(&norm("laurel_norm")?),
                })
            }
        };
        let scale = || Ok(self.vector(&place("layer_scale"), 1)?[0]);
        let scale = gemma.layer_scale.then(scale).transpose()?;
        Ok(Some(GemmaLayer { input, scale, altup }))
    }

    /// Experts beside a dense network.
    pub(super) fn beside<M, V>(
        &self,
        l: usize,
        dense: Dense<M, V>,
        moe: Moe<M, V>,
        row: &impl Fn(&[f32]) -> V,
    ) -> Result<Beside<M, V>> {
        let hidden = self.spec.hidden;
        let place = |what: &str| self.spec.place(&self.names, l, what, 0);
        let norm = |what: &str| Ok(row(&self.norm(&place(what), hidden, 1)?));
        let mut router_norm = self.vector(&place("router_norm"), hidden)?;
        router_norm.iter_mut().for_each(|g| *g /= (hidden as f32).sqrt());
        Ok(Beside {
            dense,
            moe,
            router_norm: row(&router_norm),
            dense_after_norm: norm("dense_after_norm")?,
            experts_norm: norm("experts_norm")?,
            experts_after_norm: norm("experts_after_norm")?,
        })
    }
}
