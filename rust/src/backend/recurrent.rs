//! Shapes of layers that keep a state of a fixed size for each sequence. Never computes.
//!
//! All of them begin with a projection and a causal convolution of each channel of a part of it, over the position
//! itself and `width - 1` before it. Then comes a gate, or a recurrence over a matrix for each head: position by
//! position, which is both the definition and the way it is computed, so that chunks do not change a bit.

/// The mixer of one layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Recurrent {
    /// Positions that the convolution sees, its own included: 2 to [`Recurrent::MAX_WIDTH`].
    pub width: usize,
    /// What follows the convolution.
    pub core: Core,
}

/// What follows the convolution.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Core {
    /// Short convolution (LFM2, Liquid AI 2025) of so many channels. The projection is `[B, C, x]`:
    /// `y = C * conv(B * x)`.
    Gated(usize),
    /// Gated delta rule (Yang et al. 2024, arXiv:2412.06464; Qwen3-Next). The projection is `[q, k, v, z, b, a]`, and
    /// `q, k, v = silu(conv(.))`, `q` and `k` divided by their length, `q` by `sqrt(key_dim)` too. For each head, with
    /// `beta = sigmoid(b)` and `g = exp(decay * softplus(a + dt_bias))`:
    /// `S = g S + k (beta (v - g S^T k))^T`, `o = S^T q`, `y = rms_norm(o) * silu(z)`.
    DeltaNet(Heads),
    /// Mamba 2 (Dao and Gu 2024, arXiv:2405.21060; Granite 4). The projection is `[z, x, B, C, dt]`, and
    /// `x, B, C = silu(conv(.))`. For each head, with `d = softplus(dt + dt_bias)`:
    /// `S = exp(decay * d) S + B (d x)^T`, `o = S^T C + skip * x`, and over the heads of a group `y = rms_norm(o * silu(z))`.
    Mamba2(Heads),
}

/// Shape of a recurrence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    /// Heads, each with a state `[key_dim, value_dim]`.
    pub heads: usize,
    /// Groups of heads that share keys and queries.
    pub groups: usize,
    /// Head h is of group `h % groups`; else neighbouring heads are of one group.
    pub tiled: bool,
    /// Rows of a state, a multiple of 4.
    pub key_dim: usize,
    /// Columns of a state, a multiple of 16.
    pub value_dim: usize,
}

impl Heads {
    /// The group of a head.
    pub fn group(&self, head: usize) -> usize {
        if self.tiled { head % self.groups } else { head / (self.heads / self.groups) }
    }
    /// Width of all keys, and of all queries.
    pub fn keys(&self) -> usize {
        self.groups * self.key_dim
    }
    /// Width of all values.
    pub fn values(&self) -> usize {
        self.heads * self.value_dim
    }
}

impl Recurrent {
    /// The widest convolution.
    pub const MAX_WIDTH: usize = 16;

    /// Width of the projection, without what the next function counts.
    pub fn projection(&self) -> usize {
        match self.core {
            Core::Gated(channels) => 3 * channels,
            Core::DeltaNet(h) | Core::Mamba2(h) => 2 * h.keys() + 2 * h.values(),
        }
    }
    /// Width of the part of the projection that says how much each head keeps and writes: `b, a`, or `dt`.
    pub fn rates(&self) -> usize {
        match self.core {
            Core::Gated(_) => 0,
            Core::DeltaNet(h) => 2 * h.heads,
            Core::Mamba2(h) => h.heads,
        }
    }
    /// The first channel of the projection that is convolved, and how many are.
    pub fn channels(&self) -> (usize, usize) {
        match self.core {
            Core::Gated(channels) => (2 * channels, channels),
            Core::DeltaNet(h) => (0, 2 * h.keys() + h.values()),
            Core::Mamba2(h) => (h.values(), 2 * h.keys() + h.values()),
        }
    }
    /// Width of what it gives.
    pub fn output(&self) -> usize {
        match self.core {
            Core::Gated(channels) => channels,
            Core::DeltaNet(h) | Core::Mamba2(h) => h.values(),
        }
    }
    /// f32 of what the convolution remembers, whole lines of 16.
    pub fn conv_state(&self) -> usize {
        ((self.width - 1) * self.channels().1).next_multiple_of(16)
    }
    /// f32 of a state.
    pub fn state(&self) -> usize {
        let matrices = match self.core {
            Core::Gated(_) => 0,
            Core::DeltaNet(h) | Core::Mamba2(h) => h.values() * h.key_dim,
        };
        self.conv_state() + matrices
    }
}

/// The vectors of a recurrence over matrices.
pub struct HeadRows<V> {
    /// `-exp(A_log)` of each head.
    pub decay: V,
    /// Of each head.
    pub dt_bias: V,
    /// `D` of each head (Mamba 2).
    pub skip: Option<V>,
    /// Gain of the norm: `[value_dim]` (delta net) or `[values]`.
    pub norm: V,
}

impl<V> HeadRows<V> {
    /// The same of each vector.
    pub fn as_ref(&self) -> HeadRows<&V> {
        let HeadRows { decay, dt_bias, skip, norm } = self;
        HeadRows { decay, dt_bias, skip: skip.as_ref(), norm }
    }
}

#[cfg(feature = "cuda")]
impl<'a, V> HeadRows<&'a V> {
    /// A part of each.
    pub(super) fn map<W>(&self, part: fn(&'a V) -> &'a W) -> HeadRows<&'a W> {
        let HeadRows { decay, dt_bias, skip, norm } = self;
        HeadRows {
            decay: part(decay),
            dt_bias: part(dt_bias),
            skip: skip.map(part),
            norm: part(norm),
        }
    }
}
