//! The weights of experts. Never packs.

use super::{Reader, Source, interleave};
use crate::Result;
use crate::backend::{Activation, Expert};
use crate::model::spec::{self, Slice};

/// The weights of experts.
pub(in crate::model) struct Moe<M, V> {
    pub(in crate::model) act: Activation,
    pub(in crate::model) router: M,
    pub(in crate::model) router_bias: Option<V>,
    pub(in crate::model) correction: Option<V>,
    /// Multiplies the weights that the router gives.
    pub(in crate::model) scales: Option<V>,
    pub(in crate::model) experts: Vec<Expert<M, V>>,
    pub(in crate::model) shared: Option<Shared<M>>,
}

/// The weights of shared experts.
pub(in crate::model) struct Shared<M> {
    pub(in crate::model) gate_up: M,
    pub(in crate::model) down: M,
    /// One row.
    pub(in crate::model) router: Option<M>,
}

impl<M, V> Moe<M, V> {
    pub(super) fn mats(&self) -> Vec<&M> {
        let mut mats: Vec<&M> = self.experts.iter().flat_map(|e| [&e.gate_up, &e.down]).collect();
        if let Some(shared) = &self.shared {
            mats.extend([&shared.gate_up, &shared.down]);
            mats.extend(&shared.router);
        }
        mats.push(&self.router);
        mats
    }
}

impl Reader<'_> {
    pub(super) fn moe<M, V>(
        &self,
        l: usize,
        moe: &spec::Moe,
        row: &impl Fn(&[f32]) -> V,
        mat: &mut impl FnMut(Source) -> Result<M>,
    ) -> Result<Moe<M, V>> {
        let (hidden, width) = (self.spec.hidden, moe.width);
        let place = |what: &str, e| self.spec.place(&self.names, l, what, e);
        let vector = |exists: bool, what: &str| -> Result<Option<V>> {
            exists.then(|| Ok(row(&self.vector(&place(what, 0), moe.experts)?))).transpose()
        };
        let mut source = |parts: Vec<(Slice, usize)>, k, exact| {
            let interleaved = parts.len() == 2;
            mat(Source { parts, k, interleaved, exact })
        };
        let router = source(vec![(place("router", 0), moe.experts)], hidden, true)?;
        let mut expert = |e: usize| -> Result<Expert<M, V>> {
            let bias = |what: &str, n| self.vector(&place(what, e), n);
            let gate_up_bias = || -> Result<V> {
                let gate = bias("expert_gate_bias", width)?;
                Ok(row(&interleave(&gate, &bias("expert_up_bias", width)?)))
            };
            let down_bias = || -> Result<V> { Ok(row(&bias("expert_down_bias", hidden)?)) };
            let gate_up = vec![(place("expert_gate", e), width), (place("expert_up", e), width)];
            Ok(Expert {
                gate_up: source(gate_up, hidden, false)?,
                gate_up_bias: moe.expert_bias.then(gate_up_bias).transpose()?,
                down: source(vec![(place("expert_down", e), hidden)], width, false)?,
                down_bias: moe.expert_bias.then(down_bias).transpose()?,
            })
        };
        let experts = (0..moe.experts).map(&mut expert).collect::<Result<_>>()?;
        let shared = |shared: spec::Shared| -> Result<Shared<M>> {
            let width = shared.width;
            let gate_up = vec![(place("shared_gate", 0), width), (place("shared_up", 0), width)];
            let gate = || vec![(place("shared_router", 0), 1)];
            Ok(Shared {
                gate_up: source(gate_up, hidden, false)?,
                down: source(vec![(place("shared_down", 0), hidden)], width, false)?,
                router: shared.gate.then(|| source(gate(), hidden, true)).transpose()?,
            })
        };
        Ok(Moe {
            act: self.activation(l)?,
            router,
            router_bias: vector(moe.router_bias, "router_bias")?,
            correction: vector(moe.correction, "router_correction")?,
            scales: vector(
                matches!(self.spec.layers[l].ffn, spec::Ffn::Beside(..)),
                "router_scale",
            )?,
            experts,
            shared: moe.shared.map(shared).transpose()?,
        })
    }
}
