//! What a forward pass may ask of a machine: one trait, each operation defined by its formula and by the CPU
//! back end with scalar kernels. Knows no family, no checkpoint, no request.
//!
//! Activations are `[rows, width]` f32, row-major; weights are matrices `[out, in]`; vectors are gains and biases.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod cuda_limits;
mod recurrent;

pub use crate::kernels::{Activation, Form, KvDtype, PAGE, Score};
pub use crate::quant::{Blocks, Encoded, Kept};
pub use recurrent::{Core, HeadRows, Heads, Recurrent};

pub use crate::sample::{Draw, Edit};

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
    /// For the pages of this layer: page of each [`PAGE`] positions. Of a layer with states two: the state before
    /// `start` (zeros if that is 0), and where the one after the last position goes.
    pub table: &'a [u32],
}

/// Shape of attention in one layer.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Query heads; head `h` reads key/value head `h / (heads / kv_heads)`.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Dimensions of a query and of a key.
    pub head_dim: usize,
    /// The values are the last so many numbers of the keys, and keys are all that is stored. `None`: values
    /// stand beside the keys, as wide as they.
    pub latent: Option<usize>,
    /// Multiplies scores.
    pub scale: f32,
    /// Queries, keys and values are clamped to plus or minus this, before rotation.
    pub clip: Option<f32>,
    /// `cap * tanh(score / cap)`.
    pub softcap: Option<f32>,
    /// Keys seen, the position itself included; `None` = all before.
    pub window: Option<usize>,
    /// `(growth, every)`: queries of position p count `1 + growth * ln(1 + floor(p / every))` times.
    pub query_growth: Option<(f32, usize)>,
    /// Rows hold queries only: keys and values are in the pages, those of another layer.
    pub queries_only: bool,
    /// Rotary pairs are dimensions `2 i` and `2 i + 1`, not `i` and `i` + half of those that turn.
    pub rope_interleaved: bool,
}

impl Attention {
    /// Width of a row that holds queries, keys and values side by side.
    pub fn qkv_width(&self) -> usize {
        let values = if self.latent.is_some() { 0 } else { self.kv_heads };
        let keys_and_values = if self.queries_only { 0 } else { self.kv_heads + values };
        (self.heads + keys_and_values) * self.head_dim
    }

    /// Dimensions of a value, and of what attention gives for a query.
    pub fn value_dim(&self) -> usize {
        self.latent.unwrap_or(self.head_dim)
    }
}

/// What the pages of one layer hold.
#[derive(Clone, Copy, Debug)]
pub struct KvLayer {
    /// Pages.
    pub pages: usize,
    /// Key/value heads.
    pub heads: usize,
    /// Dimensions of a key.
    pub head_dim: usize,
    /// Whether there are values beside the keys.
    pub values: bool,
}

impl KvLayer {
    /// Bytes of a page.
    pub fn page_bytes(&self, dtype: KvDtype) -> usize {
        self.heads * dtype.page_bytes(self.head_dim, self.values)
    }
}

/// How queries and keys of latent attention are cut.
#[derive(Clone, Copy, Debug)]
pub struct Latent {
    /// Query heads.
    pub heads: usize,
    /// Numbers of a query that meet the compressed key.
    pub nope: usize,
    /// Numbers of a query and of the key that carry the position.
    pub rope: usize,
    /// Numbers of the compressed key.
    pub rank: usize,
}

/// How a position chooses its experts. With `s = score(logits)` and `c = s + correction`: of all experts, or of those
/// in the chosen groups, the `top_k` with the largest `c`, the lowest of equals first. Their weights are `p = s`,
/// divided by `sum of the chosen s + renormalise` if that is given, times `scale`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Routing {
    /// Experts of a position.
    pub top_k: usize,
    /// What becomes of the logits.
    pub score: Score,
    /// Groups of neighbouring experts of which some are chosen first.
    pub groups: Option<Groups>,
    /// Weights are divided by their sum plus this.
    pub renormalise: Option<f32>,
    /// Multiplies the weights.
    pub scale: f32,
}

/// Groups of experts (DeepSeek V2, V3): those with the largest group score are chosen, the lowest of equals first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Groups {
    /// Groups, all of one size.
    pub count: usize,
    /// Groups that are chosen.
    pub top_k: usize,
    /// A group's score is the sum of the two largest `c` in it, not the largest one.
    pub by_two: bool,
}

/// The weights of one expert: `down(act(gate(x)) * up(x))`.
pub struct Expert<M, V> {
    /// Interleaved, see [`Parts::interleaved`].
    pub gate_up: M,
    /// Of `gate_up`.
    pub gate_up_bias: Option<V>,
    /// From the width of the expert.
    pub down: M,
    /// Of `down`.
    pub down_bias: Option<V>,
}

impl<M, V> Expert<M, V> {
    /// The same of each part.
    pub fn as_ref(&self) -> Expert<&M, &V> {
        Expert {
            gate_up: &self.gate_up,
            gate_up_bias: self.gate_up_bias.as_ref(),
            down: &self.down,
            down_bias: self.down_bias.as_ref(),
        }
    }
}

#[cfg(feature = "cuda")]
impl<'a, M, V> Expert<&'a M, &'a V> {
    /// A part of each.
    fn map<N, W>(&self, mat: fn(&'a M) -> &'a N, row: fn(&'a V) -> &'a W) -> Expert<&'a N, &'a W> {
        let Expert { gate_up, gate_up_bias, down, down_bias } = self;
        Expert {
            gate_up: mat(gate_up),
            gate_up_bias: gate_up_bias.map(row),
            down: mat(down),
            down_bias: down_bias.map(row),
        }
    }
}

/// Norms of queries and keys.
pub struct QkNorm<'a, R> {
    /// Of queries: as wide as a head (for every head), or as all queries.
    pub q: &'a R,
    /// Of keys, likewise.
    pub k: &'a R,
    /// Of values, as wide as a head; `None`: values have no norm.
    pub v: Option<&'a R>,
    /// Layer norms, else RMS norms.
    pub centred: bool,
    /// Over all heads together, not over each.
    pub full: bool,
    /// After the rotation, not before it.
    pub after_rope: bool,
    /// Added to the mean square or the variance.
    pub eps: f32,
}

/// Stored rows of one checkpoint tensor.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// F32, F16, Bf16 or [`Form::MXFP4`].
    pub stored: Form,
    /// Blocks that the numbers come from, which then are F32; `row` is a multiple of their weights, `column` is 1.
    pub blocks: Option<Blocks>,
    /// What the numbers come from instead, which then are F32; `bytes` is empty, and no number lies before its first.
    pub encoded: Option<Encoded<'a>>,
    /// Rows.
    pub n: usize,
    /// From the first number on, little-endian. MXFP4: two codes in a byte, the first in the low nibble.
    pub bytes: &'a [u8],
    /// Numbers from one to the one below it. MXFP4: a multiple of 32.
    pub row: usize,
    /// Numbers from one to the one beside it. MXFP4: 1.
    pub column: usize,
    /// MXFP4: the exponent of each 32 numbers.
    pub scales: &'a [u8],
}

impl<'a> Part<'a> {
    /// A matrix `[n, k]` of plain floats.
    pub fn floats(stored: Form, n: usize, k: usize, bytes: &'a [u8]) -> Part<'a> {
        Part { stored, blocks: None, encoded: None, n, bytes, row: k, column: 1, scales: &[] }
    }
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

/// Where in a model a weight is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Before the first layer.
    Begin,
    /// In this layer.
    Layer(usize),
    /// After the last layer.
    End,
    /// Before the first and after the last: an embedding that is the head, too.
    Both,
}

/// One machine, or two that share a model.
pub trait Backend: Send + Sync {
    /// Activations `[rows, width]`.
    type Buf: Send;
    /// A packed weight matrix.
    type Mat: Send + Sync;
    /// A vector of f32.
    type Row: Send + Sync;
    /// Pages of keys and values of all layers.
    type Kv: Send;
    /// States of all layers.
    type States: Send;

    /// The CPU that packs its weights.
    fn packer(&self) -> &cpu::Cpu;
    /// A packed matrix that is used at `at`, where this machine wants it.
    fn place(&self, at: Place, packed: cpu::Mat) -> Result<Self::Mat>;
    /// Whether packed matrices of `at` stay in the computer's memory.
    fn holds(&self, _at: Place) -> bool {
        true
    }
    /// A matrix of any numbers, made without a checkpoint's: to measure with.
    fn random(&self, _form: Form, _n: usize, _k: usize) -> Result<Self::Mat> {
        Err(crate::Error::Unsupported("random weights are for device=\"cuda\"".into()))
    }
    /// How a matrix is stored, and its bytes.
    fn stored(mat: &Self::Mat) -> (Form, usize);
    /// Ends a step (and a load): what an operation could not do comes out here. None of the CPU's fails.
    fn finish(&self) -> Result<()> {
        Ok(())
    }

    /// An empty buffer.
    fn buf(&self) -> Self::Buf;
    /// A vector that is used at `at`.
    fn row(&self, at: Place, values: &[f32]) -> Self::Row;
    /// Quantizes (or keeps, for float forms) and packs `parts`.
    fn pack(
        &self,
        form: Form,
        parts: &Parts<'_>,
    ) -> Result<std::result::Result<Self::Mat, NotFinite>>;
    /// Pages for each layer.
    fn kv(&self, dtype: KvDtype, layers: &[KvLayer]) -> Result<Self::Kv>;
    /// Page `to` of a layer becomes equal to page `from`.
    fn copy_page(&self, kv: &mut Self::Kv, layer: usize, from: u32, to: u32);

    /// States for each layer: how many, and the f32 of each.
    fn states(&self, layers: &[(usize, usize)]) -> Result<Self::States>;

    /// `out[r] = scale * table[ids[r]]`.
    fn embed(&self, table: &Self::Mat, ids: &[u32], scale: f32, out: &mut Self::Buf);
    /// `out[r] = x[r] / sqrt(mean(x[r]^2) + eps) * gain`; if rows are longer than `gain`, of each piece as long as it.
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
    /// `out = x` times a matrix for each head: rows of `x` and of `out`, and the rows of `w`, are cut into
    /// `heads` equal parts; part h of `out` is part h of `w` times part h of `x`. A part of `w` has a multiple
    /// of 16 rows.
    fn linear_heads(&self, w: &Self::Mat, heads: usize, x: &Self::Buf, out: &mut Self::Buf);
    /// Queries and key of latent attention (DeepSeek-AI 2024, "absorbed": the matrix that would expand the key
    /// is applied to the query). `q` is `[heads][nope + rope]`, `kv` `[rank + rope]`; `out` is
    /// `[heads + 1][rope + rank]`: of each query its `rope` numbers and, as in [`Backend::linear_heads`], `w_h`
    /// times its `nope` numbers; of the key its `rope` numbers and the RMS norm of the rest.
    fn latent_qk(
        &self,
        w: &Self::Mat,
        norm: (&Self::Row, f32),
        how: &Latent,
        q: &Self::Buf,
        kv: &Self::Buf,
        out: &mut Self::Buf,
    );
    /// `out[t] = sum of p_e expert_e(x[t])` over the experts that row `t` of `logits` chooses with the weights `p_e`:
    /// fused multiply-adds from zero on, experts ascending. `scales` multiply the weights, each that of its expert.
    /// `logits` are left as scores.
    fn moe(
        &self,
        how: &Routing,
        logits: &mut Self::Buf,
        correction: Option<&Self::Row>,
        scales: Option<&Self::Row>,
        experts: &[Expert<&Self::Mat, &Self::Row>],
        act: Activation,
        width: usize,
        x: &Self::Buf,
        out: &mut Self::Buf,
    );
    /// `out[r] = fma(sigmoid(gate[r]), y[r], out[r])`; `gate` has one column.
    fn add_gated(&self, gate: &mut Self::Buf, y: &Self::Buf, out: &mut Self::Buf);
    /// `x = act(x) * y[.., from..from + width of x]`.
    fn gate_with(&self, x: &mut Self::Buf, act: Activation, y: &Self::Buf, from: usize);
    /// `out = act(max(0, gate - mean(gate) - times * deviation(gate))) * up` (Gemma 3n's sparse layers), `width`
    /// columns, of gate and up interleaved as [`Backend::linear`] gives them.
    fn cut_and_gate(
        &self,
        x: &Self::Buf,
        times: f32,
        act: Activation,
        width: usize,
        out: &mut Self::Buf,
    );
    /// AltUp (Baykal et al. 2023), before a layer: with n streams, `streams[i] += sum over j of
    /// coefficients[n i + j] * streams[j]`, all of the streams as they were.
    fn altup_predict(&self, coefficients: &Self::Buf, streams: &mut [Self::Buf]);
    /// After it: `streams[i] += (1 + coefficients[i]) * (seen - streams[0])`, with `streams[0]` as it was.
    fn altup_correct(&self, coefficients: &Self::Buf, seen: &Self::Buf, streams: &mut [Self::Buf]);
    /// `out = x * gain`, each row.
    fn multiply(&self, x: &Self::Buf, gain: &Self::Row, out: &mut Self::Buf);
    /// `out = x`.
    fn copy(&self, x: &Self::Buf, out: &mut Self::Buf);
    /// `x[r] *= sqrt(mean(to[r]^2) / max(mean(x[r]^2), least))`.
    fn match_power(&self, x: &mut Self::Buf, to: &Self::Buf, least: f32);
    /// `x += y`.
    fn add(&self, x: &mut Self::Buf, y: &Self::Buf);
    /// `x = fma(scale, y, x)`.
    fn add_scaled(&self, x: &mut Self::Buf, scale: f32, y: &Self::Buf);
    /// Cosines, then sines, of `position * inv_freq`, times `scale`, for each position; with the second `inv_freq`
    /// where `long` says so.
    fn rope_table(
        &self,
        positions: &[u32],
        long: &[bool],
        inv_freq: [&[f32]; 2],
        scale: f32,
    ) -> Self::Buf;
    /// Of each row of `qkv`: norms of queries and keys, if given; clamped, if asked for; then rotation of the first
    /// dimensions of a head, as many as `table` is wide, by its row, if there is a table; then keys and values go into
    /// the pages of `layer`, if there are any in a row.
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
    /// `out[r] = softmax(softcap(scale * growth(r) * q k)) v` over the positions that row `r` sees, for each head. `sinks`
    /// holds for each head one more score of that softmax, whose value is zero.
    fn attend(
        &self,
        qkv: &Self::Buf,
        how: &Attention,
        sinks: Option<&Self::Row>,
        kv: &Self::Kv,
        layer: usize,
        spans: &[Span<'_>],
        out: &mut Self::Buf,
    );
    /// `out` times the sigmoid of the columns of `qkv` behind the values: one for each head, or for each number.
    fn gate_heads(&self, qkv: &Self::Buf, how: &Attention, out: &mut Self::Buf);
    /// `out` = the convolution of a part of the rows of `x` (see [`Core`]): `bias? + sum over j of taps[j] * u[r - j]`,
    /// `j` from `width - 1` down to 0. `taps`: `[width, channels]`, the oldest position first. `u` are the channels of `x`,
    /// times `B` if the core is a gate (then `x` may be left with them); positions before the span are those of its state.
    /// The last `width - 1` of `u` go into the next state. Of a gate `out` is times `C`, of the others it is its `silu`.
    fn conv(
        &self,
        x: &mut Self::Buf,
        how: &Recurrent,
        taps: &Self::Row,
        bias: Option<&Self::Row>,
        states: &mut Self::States,
        layer: usize,
        spans: &[Span<'_>],
        out: &mut Self::Buf,
    );
    /// `out` = the recurrence of a core with heads over what [`Backend::conv`] gave, and its gated norm. `x` is the
    /// projection, `rates` its last part; `conv` is left with what it holds.
    fn recur(
        &self,
        x: &Self::Buf,
        rates: &Self::Buf,
        conv: &mut Self::Buf,
        how: &Recurrent,
        rows: &HeadRows<&Self::Row>,
        eps: f32,
        states: &mut Self::States,
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
    /// A token from each row of logits, as [`Draw::token`] does; also `None` where this back end does not know how. Then
    /// all logits are as they were, else unspecified.
    fn draw(&self, logits: &Self::Buf, how: &[Draw<'_>]) -> Vec<Option<u32>>;
    /// Activations as they lie, `[rows, width]`.
    fn read(&self, x: &Self::Buf) -> Vec<f32>;
}
