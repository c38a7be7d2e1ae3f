//! Which models the CUDA back end has kernels for. Never touches a device.

use super::{Ffn, Gate, Mixer, QkNorm, Spec};
use crate::backend::Core;
use crate::{Error, Result};

/// What the kernels take at most: dimensions of a head, and of a key of latent attention; experts, and those of a
/// position; rows of a head's state.
const MAX_HEAD_DIM: usize = 512;
const MAX_KEY: usize = 576;
const MAX_EXPERTS: usize = 1024;
const MAX_CHOSEN: usize = 32;
const MAX_STATE: usize = 256;

impl Spec {
    /// An error that names the first thing there is no CUDA kernel for.
    pub fn runs_on_cuda(&self) -> Result<()> {
        let full = self.qk_norm == QkNorm::Full;
        let of = |mixer: &Mixer, ffn: &Ffn| match (mixer, ffn) {
            (_, Ffn::Moe(moe) | Ffn::Beside(_, moe))
                if moe.experts > MAX_EXPERTS || moe.routing.top_k > MAX_CHOSEN =>
            {
                Some("mixtures of more than 1024 experts, or 32 of a position,")
            }
            (Mixer::Latent(l), _) if l.key_dim() > MAX_KEY || l.rank > MAX_HEAD_DIM => {
                Some("latent attention over more than 576 dimensions")
            }
            (Mixer::Recurrent(r), _) => match r.shape.core {
                Core::DeltaNet(h) | Core::Mamba2(h) if h.key_dim > MAX_STATE => {
                    Some("states of more than 256 rows")
                }
                _ => None,
            },
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
