//! The weights of layers that keep a state. Never packs.

use super::{Reader, Recurrent, Source, by_group};
use crate::Result;
use crate::backend::{Core, HeadRows};
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
        let source = |parts, k| Source { parts, k, interleaved: false, exact: false };
        let input = match shape.core {
            Core::DeltaNet(h) => {
                let all = [
                    ("mix_q", h.keys()),
                    ("mix_k", h.keys()),
                    ("mix_v", h.values()),
                    ("mix_z", h.values()),
                    ("mix_b", h.heads),
                    ("mix_a", h.heads),
                ];
                let mut parts: Vec<(Slice, usize)> = all.map(|(what, n)| (place(what), n)).into();
                // Where z is in one tensor with q, and a with b, they are so for each group.
                if parts[0].0.tensor == parts[3].0.tensor {
                    let (last, values) = (parts.split_off(4), h.values() / h.groups);
                    let sizes = [h.key_dim, h.key_dim, values, values];
                    parts = by_group(&parts[0].0, h.groups, &sizes);
                    parts.extend(last);
                }
                if parts[parts.len() - 2].0.tensor == parts[parts.len() - 1].0.tensor {
                    let both = parts.split_off(parts.len() - 2);
                    let heads = h.heads / h.groups;
                    parts.extend(by_group(&both[0].0, h.groups, &[heads, heads]));
                }
                parts
            }
            Core::Gated(_) | Core::Mamba2(_) => vec![(place("mix_in"), shape.projection())],
        };
        // Stored as [channels, 1, width].
        let stored = self.values(&place("conv"), channels, shape.width)?;
        let taps: Vec<f32> = (0..shape.width)
            .flat_map(|j| stored.iter().skip(j).step_by(shape.width).copied())
            .collect();
        let heads = match shape.core {
            Core::Gated(_) => None,
            Core::DeltaNet(h) | Core::Mamba2(h) => {
                let mamba = matches!(shape.core, Core::Mamba2(_));
                let decay: Vec<f32> =
                    vector("a_log", h.heads)?.into_iter().map(|a| -libm::expf(a)).collect();
                // Its weight is as stored, also where all other norms are `1 + w`.
                let norm = vector("mix_norm", if mamba { h.values() } else { h.value_dim })?;
                Some(HeadRows {
                    decay: row(&decay),
                    dt_bias: row(&vector("dt", h.heads)?),
                    skip: bias(mamba, "skip", h.heads)?,
                    norm: row(&norm),
                })
            }
        };
        Ok(Recurrent {
            input: mat(source(input, hidden))?,
            input_bias: bias(how.bias, "mix_in_bias", shape.projection())?,
            taps: row(&taps),
            conv_bias: bias(how.conv_bias, "conv_bias", channels)?,
            heads,
            out: mat(source(vec![(place("mix_out"), hidden)], shape.output()))?,
            out_bias: bias(how.bias, "mix_out_bias", hidden)?,
        })
    }
}
