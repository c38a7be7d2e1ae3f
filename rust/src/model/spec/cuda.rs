//! Which models the CUDA back end has kernels for. Never touches a device.

use super::{Ffn, Gate, Mixer, QkNorm, Spec};
use crate::{Error, Result};

/// Dimensions of a head that the kernels take at most.
const MAX_HEAD_DIM: usize = 512;

impl Spec {
    /// An error that names the first thing there is no CUDA kernel for.
    pub fn runs_on_cuda(&self) -> Result<()> {
        let full = self.qk_norm == QkNorm::Full;
        let of = |mixer: &Mixer, ffn: &Ffn| match (mixer, ffn) {
            (Mixer::Latent(_), _) => Some("latent attention"),
            (Mixer::Recurrent(_), _) => Some("layers with a state"),
            (_, Ffn::Moe(_) | Ffn::Beside(..)) => Some("mixtures of experts"),
            (Mixer::Attention(a), _) if a.head_dim > MAX_HEAD_DIM => {
                Some("heads of more than 512 dimensions")
            }
            (Mixer::Attention(a), _) if a.clip.is_some() && (full || a.gate != Gate::None) => {
                Some("clipped queries with a gate or a norm over all heads")
            }
            (Mixer::Attention(_), _) if full && self.qk_norm_after_rope => {
                Some("a norm over all heads after the rotation")
            }
            _ => None,
        };
        match self.layers.iter().find_map(|layer| of(&layer.mixer, &layer.ffn)) {
            None => Ok(()),
            Some(what) => Err(Error::Unsupported(format!(
                "{} has {what}, which do not run on CUDA in this version; use device=\"cpu\"",
                self.architecture
            ))),
        }
    }
}
