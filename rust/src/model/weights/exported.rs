//! What a writer of GGUF files asks of a checkpoint. Never writes.

use super::{Reader, by_group};
use crate::Result;
use crate::model::spec::{Act, Attention, Mixer, Names, Slice, Spec};

impl Reader<'_> {
    /// What the weights are called in this checkpoint.
    pub(in crate::model) fn names(&self) -> &Names {
        &self.names
    }

    /// Whether 1 is added to a weight to make it that of `written`, and whether minus its exponential is what that has.
    pub(in crate::model) fn changes(&self, written: &Spec, what: &str) -> (bool, bool) {
        let norm = what.ends_with("norm") && what != "mix_norm";
        let decay = |spec: &Spec| {
            let mut mixers = spec.layers.iter().map(|layer| &layer.mixer);
            mixers.any(|mixer| matches!(mixer, Mixer::Recurrent(r) if r.decay))
        };
        (
            norm && self.spec.norm.plus_one() && !written.norm.plus_one(),
            what == "a_log" && decay(written) && !decay(self.spec),
        )
    }

    /// The numbers of xIELU in each layer, where they are tensors.
    pub(in crate::model) fn xielu(&self) -> Result<Option<Vec<[f32; 4]>>> {
        if self.spec.act != Act::XIelu || self.spec.xielu.is_some() {
            return Ok(None);
        }
        let number = |l: usize, what: &str| -> Result<f32> {
            Ok(self.vector(&self.spec.place(&self.names, l, what, 0), 1)?[0])
        };
        let four = |l| -> Result<[f32; 4]> {
            Ok([
                number(l, "xielu_alpha_p")?,
                number(l, "xielu_alpha_n")?,
                number(l, "xielu_beta")?,
                number(l, "xielu_eps")?,
            ])
        };
        (0..self.spec.layers.len()).map(four).collect::<Result<_>>().map(Some)
    }
}

/// The rows of queries, keys or values (or their biases), where one tensor has those of each key/value head together;
/// of other weights the rows as they are.
pub(in crate::model) fn of_heads(
    place: &Slice,
    what: &str,
    a: &Attention,
    rows: usize,
) -> Vec<(Slice, usize)> {
    let kind = match what.strip_suffix("_bias").unwrap_or(what) {
        "q" => 0,
        "k" => 1,
        "v" => 2,
        _ => return vec![(place.clone(), rows)],
    };
    let first = Slice { first: 0, ..place.clone() };
    let each = [a.heads / a.kv_heads * a.head_dim, a.head_dim, a.head_dim];
    by_group(&first, a.kv_heads, &each)[kind * a.kv_heads..][..a.kv_heads].to_vec()
}
