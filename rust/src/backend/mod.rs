//! What a forward pass may ask of a machine: one trait, each operation defined by its formula and by the CPU
//! back end with scalar kernels. Knows no family, no checkpoint, no request.
//!
//! Activations are `[rows, width]` f32, row-major; weights are matrices `[out, in]`; vectors are gains and biases.

pub mod cpu;

pub use crate::kernels::{Activation, Form, KvDtype, PAGE};

use crate::Result;

/// Consecutive positions of one sequence: rows `first_row..first_row + len` of a batch's activations.
#[derive(Clone, Copy, Debug)]
pub struct Span<'a> {
    /// Row of the first position.
    pub first_row: usize,
    /// Positions.
    pub len: usize,
    /// The first position's number in its sequence.
    pub start: usize,
    /// For the pages of this layer: page of each [`PAGE`] positions.
    pub table: &'a [u32],
}

/// Shape of attention in one layer.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Query heads; head `h` reads key/value head `h / (heads / kv_heads)`.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// Multiplies scores.
    pub scale: f32,
    /// Queries, keys and values are clamped to plus or minus this, before rotation.
    pub clip: Option<f32>,
    /// `cap * tanh(score / cap)`.
    pub softcap: Option<f32>,
    /// Keys seen, the position itself included; `None` = all before.
    pub window: Option<usize>,
}

impl Attention {
    /// Width of a row that holds queries, keys and values side by side.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}

/// Norms of queries and keys.
pub struct QkNorm<'a, R> {
    /// Of queries: as wide as a head (for every head), or as all queries.
    pub q: &'a R,
    /// Of keys, likewise.
    pub k: &'a R,
    /// Layer norms, else RMS norms.
    pub centred: bool,
    /// Over all heads together, not over each.
    pub full: bool,
    /// Added to the mean square or the variance.
    pub eps: f32,
}

/// Stored rows of one checkpoint tensor `[n, k]`.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// F32, F16 or Bf16.
    pub stored: Form,
    /// Rows.
    pub n: usize,
    /// Little-endian, row-major.
    pub bytes: &'a [u8],
}

/// Rows that become one matrix.
#[derive(Clone, Debug)]
pub struct Parts<'a> {
    /// The tensors, all with `k` inputs.
    pub parts: Vec<Part<'a>>,
    /// Inputs.
    pub k: usize,
    /// `false`: one part below the other. `true`: 16 rows of the first of two equal parts, 16 of the second,
    /// and so on, both padded to a multiple of 16 rows, as [`Backend::gated`] wants gate and up.
    pub interleaved: bool,
}

/// A number in the stored weights that is not finite: its part, row and column.
pub type NotFinite = (usize, usize, usize);

/// One machine.
pub trait Backend: Send + Sync {
    /// Activations `[rows, width]`.
    type Buf: Send;
    /// A packed weight matrix.
    type Mat: Send + Sync;
    /// A vector of f32.
    type Row: Send + Sync;
    /// Pages of keys and values of all layers.
    type Kv: Send;

    /// An empty buffer.
    fn buf(&self) -> Self::Buf;
    /// A vector.
    fn row(&self, values: &[f32]) -> Self::Row;
    /// Quantizes (or keeps, for float forms) and packs `parts`.
    fn pack(
        &self,
        form: Form,
        parts: &Parts<'_>,
    ) -> Result<std::result::Result<Self::Mat, NotFinite>>;
    /// Pages for each layer: `(pages, kv_heads, head_dim)`.
    fn kv(&self, dtype: KvDtype, layers: &[(usize, usize, usize)]) -> Result<Self::Kv>;

    /// `out[r] = scale * table[ids[r]]`.
    fn embed(&self, table: &Self::Mat, ids: &[u32], scale: f32, out: &mut Self::Buf);
    /// `out[r] = x[r] / sqrt(mean(x[r]^2) + eps) * gain`.
    fn rms_norm(&self, x: &Self::Buf, gain: &Self::Row, eps: f32, out: &mut Self::Buf);
    /// `out[r] = (x[r] - mean(x[r])) / sqrt(variance(x[r]) + eps) * gain + bias`.
    fn layer_norm(
        &self,
        x: &Self::Buf,
        gain: &Self::Row,
        bias: Option<&Self::Row>,
        eps: f32,
        out: &mut Self::Buf,
    );
    /// `out = x w^T + bias`.
    fn linear(&self, w: &Self::Mat, bias: Option<&Self::Row>, x: &Self::Buf, out: &mut Self::Buf);
    /// `out += x w^T + bias`.
    fn linear_add(
        &self,
        w: &Self::Mat,
        bias: Option<&Self::Row>,
        x: &Self::Buf,
        out: &mut Self::Buf,
    );
    /// `out = act(x gate^T + bias) * (x up^T + bias)`, `width` columns; `w` (and `bias`) interleave gate and
    /// up, see [`Parts::interleaved`].
    fn gated(
        &self,
        w: &Self::Mat,
        bias: Option<&Self::Row>,
        act: Activation,
        width: usize,
        x: &Self::Buf,
        out: &mut Self::Buf,
    );
    /// `out = act(x w^T + bias)`.
    fn activated(
        &self,
        w: &Self::Mat,
        bias: Option<&Self::Row>,
        act: Activation,
        x: &Self::Buf,
        out: &mut Self::Buf,
    );
    /// `x += y`.
    fn add(&self, x: &mut Self::Buf, y: &Self::Buf);
    /// `x = fma(scale, y, x)`.
    fn add_scaled(&self, x: &mut Self::Buf, scale: f32, y: &Self::Buf);
    /// Cosines, then sines, of `position * inv_freq`, times `scale`, for each position.
    fn rope_table(&self, positions: &[u32], inv_freq: &[f32], scale: f32) -> Self::Buf;
    /// Of each row of `qkv`: norms of queries and keys, if given; clamped, if asked for; then rotation by the
    /// row's part of `table`, if there is one; then keys and values go into the pages of `layer`.
    fn rotate_and_store(
        &self,
        qkv: &mut Self::Buf,
        how: &Attention,
        norms: Option<QkNorm<'_, Self::Row>>,
        table: Option<&Self::Buf>,
        kv: &mut Self::Kv,
        layer: usize,
        spans: &[Span<'_>],
    );
    /// `out[r] = softmax(softcap(scale * q k)) v` over the positions that row `r` sees, for each head.
    fn attend(
        &self,
        qkv: &Self::Buf,
        how: &Attention,
        kv: &Self::Kv,
        layer: usize,
        spans: &[Span<'_>],
        out: &mut Self::Buf,
    );
    /// `out` = some rows of `x`, in the given order.
    fn select(&self, x: &Self::Buf, rows: &[usize], out: &mut Self::Buf);
    /// `x *= scale`.
    fn scale(&self, x: &mut Self::Buf, scale: f32);
    /// `x = cap * tanh(x / cap)`.
    fn softcap(&self, x: &mut Self::Buf, cap: f32);
    /// Activations as they lie, `[rows, width]`.
    fn read(&self, x: &Self::Buf) -> Vec<f32>;
}
