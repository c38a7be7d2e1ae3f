//! Which models the CUDA back end has kernels for. Never touches a device.

use super::{Ffn, Gate, Mixer, QkNorm, Spec};
use crate::backend::{Core, cuda_limits as limits};
use crate::{Error, Result};

impl Spec {
    /// An error that names the first thing there is no CUDA kernel for.
    pub fn runs_on_cuda(&self) -> Result<()> {
        let full = self.qk_norm == QkNorm::Full;
        let of = |mixer: &Mixer, ffn: &Ffn| match (mixer, ffn) {
            (_, Ffn::Moe(moe) | Ffn::Beside(_, moe))
                if moe.experts > limits::EXPERTS || moe.routing.top_k > limits::CHOSEN =>
            {
                Some("mixtures of more than 1024 experts, or 32 of a position,")
            }
            (Mixer::Latent(l), _)
                if l.key_dim() > limits::LATENT_KEY || l.rank > limits::HEAD_DIM =>
            {
                Some("latent attention over more than 576 dimensions")
            }
            (Mixer::Recurrent(r), _) => match r.shape.core {
                Core::DeltaNet(h) | Core::Mamba2(h) if h.key_dim > limits::STATE_ROWS => {
                    Some("states of more than 256 rows")
                }
                _ => None,
            },
            (Mixer::Attention(a), _) if a.head_dim > limits::HEAD_DIM => {
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
