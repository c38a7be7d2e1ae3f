//! The weights of layers that keep a state. Never packs.

use super::{Heads, Reader, Recurrent, Source, by_group};
use crate::Result;
use crate::backend::{self, Core, HeadRows};
use crate::model::spec::{self, Slice};

impl Reader<'_> {
    pub(super) fn recurrent<M, V>(
        &self,
        l: usize,
        how: &spec::Recurrent,
        row: &impl Fn(&[f32]) -> V,
        mat: &mut impl FnMut(Source) -> Result<M>,
    ) -> Result<Recurrent<M, V>> {
        let (shape, hidden) = (&how.shape, self.spec.hidden);
        let (_, channels) = shape.channels();
        let place = |what: &str| self.spec.place(&self.names, l, what, 0);
        let vector = |what: &str, n: usize| self.vector(&place(what), n);
        let bias = |exists: bool, what: &str, n: usize| -> Result<Option<V>> {
            exists.then(|| Ok(row(&vector(what, n)?))).transpose()
        };
        let source = |parts, k, exact| Source { parts, k, interleaved: false, exact };
        // The rows of `mix_in` from one on.
        let from = |first: usize| {
            let place = place("mix_in");
            Slice { first: place.first + first * place.row, ..place }
        };
        let (input, rates) = match shape.core {
            Core::Gated(_) | Core::Mamba2(_) => (
                vec![(from(0), shape.projection())],
                vec![(from(shape.projection()), shape.rates())],
            ),
            Core::DeltaNet(h) => {
                // Where z is in one tensor with q, and a with b, they are so for each group.
                let values = h.values() / h.groups;
                let parts = |all: &[(&str, usize)], each: &[usize]| -> Vec<(Slice, usize)> {
                    let places: Vec<_> = all.iter().map(|&(what, n)| (place(what), n)).collect();
                    match places[0].0.tensor == places[places.len() - 1].0.tensor {
                        true => by_group(&places[0].0, h.groups, each),
                        false => places,
                    }
                };
                let qkvz = [
                    ("mix_q", h.keys()),
                    ("mix_k", h.keys()),
                    ("mix_v", h.values()),
                    ("mix_z", h.values()),
                ];
                let heads = h.heads / h.groups;
                (
                    parts(&qkvz, &[h.key_dim, h.key_dim, values, values]),
                    parts(&[("mix_b", h.heads), ("mix_a", h.heads)], &[heads, heads]),
                )
            }
        };
        let in_bias = match how.bias {
            true => vector("mix_in_bias", shape.projection() + shape.rates())?,
            false => Vec::new(),
        };
        let (input_bias, rates_bias) = in_bias.split_at(in_bias.len().min(shape.projection()));
        // Stored as [channels, 1, width].
        let stored = self.values(&place("conv"), channels, shape.width)?;
        let taps: Vec<f32> = (0..shape.width)
            .flat_map(|j| stored.iter().skip(j).step_by(shape.width).copied())
            .collect();
        let heads = |h: backend::Heads, mat: &mut dyn FnMut(Source) -> Result<M>| {
            let mamba = matches!(shape.core, Core::Mamba2(_));
            let decay = vector("a_log", h.heads)?;
            let decay: Vec<f32> = match how.decay {
                true => decay,
                false => decay.into_iter().map(|a| -libm::expf(a)).collect(),
            };
            // Its weight is as stored, also where all other norms are `1 + w`.
            let norm = vector("mix_norm", if mamba { h.values() } else { h.value_dim })?;
            Ok(Heads {
                // Never quantized: a small matrix whose errors would add up over all positions.
                rates: mat(source(rates, hidden, true))?,
                rates_bias: how.bias.then(|| row(rates_bias)),
                rows: HeadRows {
                    decay: row(&decay),
                    dt_bias: row(&vector("dt", h.heads)?),
                    skip: bias(mamba, "skip", h.heads)?,
                    norm: row(&norm),
                },
            })
        };
        Ok(Recurrent {
            input: mat(source(input, hidden, false))?,
            input_bias: how.bias.then(|| row(input_bias)),
            taps: row(&taps),
            conv_bias: bias(how.conv_bias, "conv_bias", channels)?,
            heads: match shape.core {
                Core::Gated(_) => None,
                Core::DeltaNet(h) | Core::Mamba2(h) => Some(heads(h, mat)?),
            },
            out: mat(source(vec![(place("mix_out"), hidden)], shape.output(), false))?,
            out_bias: bias(how.bias, "mix_out_bias", hidden)?,
        })
    }
}
