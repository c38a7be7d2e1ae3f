//! The only SIMD. One table of kernel sets, the choice of a set, and safe wrappers that check shapes.
//! Never allocates in a hot path, starts no threads, does no I/O.
//!
//! A set is a [`Kernels`]: function pointers, stated as a difference from a weaker set. `scalar` is the
//! specification; every other set gives the same bits (`tests.rs`). Holding a `&Kernels` proves that the
//! CPU has its instructions, because only [`available`] hands them out.

mod activation;
#[cfg(target_arch = "aarch64")]
mod arm;
mod attention;
mod float;
mod grouped;
pub mod layout;
mod pack;
mod recurrent;
mod scalar;
mod simd;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use activation::Activation;
pub use attention::{Attend, KvDtype, MAX_ROWS, PAGE, scratch_len};
pub use float::Score;
pub use layout::Form;
pub use recurrent::{Recur, rates};

use crate::quant::{BLOCK, BlockGrouped, GROUPS, Grouped};
use crate::{Error, Result};
use layout::ROWS;

/// Quantized activations of `m` tokens, by block of K: block `b` is `[m][kb]` int8 values, with `kb` 256
/// but for the last, shorter one; or, tiled, `[kb / 64][m][64]`.
#[derive(Clone, Copy)]
pub struct Acts<'a> {
    /// Tokens.
    pub m: usize,
    /// Inputs, a multiple of 64.
    pub k: usize,
    /// Values, `m * k` of them. AMX reads lines of 64 bytes: faster from a multiple of 64 bytes.
    pub q: &'a [i8],
    /// The order of `q` within a block, as [`Kernels::tiled`] asks for it.
    pub tiled: bool,
    /// Scale of block `b` of token `t` at `b * m + t`.
    pub s: &'a [f32],
    /// Sums of `q` over each group, at the same index.
    pub sums: &'a [[i16; GROUPS]],
    /// Sums of `q` over the block, at the same index.
    pub totals: &'a [i32],
}

impl Acts<'_> {
    /// Blocks of K.
    pub fn blocks(&self) -> usize {
        self.k.div_ceil(BLOCK)
    }
    /// Inputs of block `b`.
    pub fn len(&self, b: usize) -> usize {
        BLOCK.min(self.k - b * BLOCK)
    }
    /// Values of block `b` of token `t`, where they are not tiled.
    pub fn q(&self, b: usize, t: usize) -> &[i8] {
        assert!(!self.tiled);
        let len = self.len(b);
        &self.q[b * BLOCK * self.m + t * len..][..len]
    }
    /// Scale of block `b` of token `t`.
    pub fn s(&self, b: usize, t: usize) -> f32 {
        self.s[b * self.m + t]
    }
}

type Gemm = unsafe fn(&[u8], &Acts<'_>, &mut [f32]);

/// All kernels of one instruction set.
#[derive(Clone, Copy)]
pub struct Kernels {
    name: &'static str,
    /// What its functions are compiled for: the CPU must have all of it (names of `detect`).
    needs: &'static [&'static str],
    gemm_q4: Gemm,
    gemm_q8: Gemm,
    gemm_grouped: unsafe fn(Grouped, &[u8], &Acts<'_>, &mut [f32]),
    /// Tokens from which on the activations that int4 and int8 meet are tiled.
    tiled: usize,
    float: float::Floats,
}

/// Every set compiled into this build, best first.
static ALL: &[&Kernels] = &[
    #[cfg(target_arch = "x86_64")]
    &x86::amx::KERNELS,
    #[cfg(target_arch = "x86_64")]
    &x86::avx512vnni::KERNELS,
    #[cfg(target_arch = "x86_64")]
    &x86::avxvnni::KERNELS,
    #[cfg(target_arch = "x86_64")]
    &x86::avx2::KERNELS,
    #[cfg(target_arch = "aarch64")]
    &arm::i8mm::KERNELS,
    #[cfg(target_arch = "aarch64")]
    &arm::dotprod::KERNELS,
    #[cfg(target_arch = "aarch64")]
    &arm::neon::KERNELS,
    &scalar::KERNELS,
];

/// Names of all sets of this build, best first.
pub fn names() -> impl Iterator<Item = &'static str> {
    ALL.iter().map(|k| k.name)
}

/// The sets this CPU can run, best first.
pub fn available() -> impl Iterator<Item = &'static Kernels> {
    on(cpu_features())
}

/// The sets that a CPU with these features can run, best first.
fn on(features: Vec<&'static str>) -> impl Iterator<Item = &'static Kernels> {
    ALL.iter().copied().filter(move |k| k.runs_with(&features))
}

/// The instructions beyond the baseline that the sets need and this CPU has.
pub fn cpu_features() -> Vec<&'static str> {
    detect().into_iter().filter(|(_, has)| *has).map(|(name, _)| name).collect()
}

/// Every feature that a set of this build may name in `needs`, and whether this CPU has it.
fn detect() -> Vec<(&'static str, bool)> {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    macro_rules! has {
        ($detected:ident: $($name:tt)*) => {
            vec![$(($name, std::arch::$detected!($name))),*]
        };
    }
    #[cfg(target_arch = "x86_64")]
    {
        let mut all = has!(is_x86_feature_detected: "avx2" "fma" "f16c" "avxvnni" "avx512f"
            "avx512bw" "avx512vl" "avx512vnni");
        all.push(("amx-int8", x86::amx::allowed()));
        all
    }
    #[cfg(target_arch = "aarch64")]
    {
        has!(is_aarch64_feature_detected: "neon" "dotprod" "i8mm")
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    Vec::new()
}

/// The best set, or the one that `forced` (the environment's `FERRULE_ISA`) names.
pub fn choose(forced: Option<&str>) -> Result<&'static Kernels> {
    let mut sets = available();
    let Some(name) = forced else { return Ok(sets.next().unwrap_or(&scalar::KERNELS)) };
    sets.find(|k| k.name == name).ok_or_else(|| {
        let here: Vec<_> = available().map(|k| k.name).collect();
        Error::parameter("FERRULE_ISA", name, format!("one of {} on this CPU", here.join(", ")))
    })
}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

// SAFETY (for every call below): `self` came from `ALL` by way of `available`, or is `scalar`, so the
// CPU has the instructions of `self`; the assertions are what the kernels rely on for their accesses.
impl Kernels {
    fn runs_with(&self, features: &[&str]) -> bool {
        self.needs.iter().all(|name| features.contains(name))
    }

    /// The set's name, as `FERRULE_ISA` spells it.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Whether [`Kernels::gemm`] takes the activations of `m` tokens tiled.
    pub fn tiled(&self, form: Form, m: usize) -> bool {
        matches!(form, Form::Q4 | Form::Q8) && m >= self.tiled
    }

    /// `y[t][n] = sum over k of w[n][k] * x[t][k]` for whole row blocks `w` of a quantized matrix.
    /// `y`: `[m, 16 * row blocks]`; fastest from a multiple of 64 bytes.
    pub fn gemm(&self, form: Form, w: &[u8], a: &Acts<'_>, y: &mut [f32]) {
        let size = form.row_block_bytes(a.k);
        assert!(form.is_quantized() && a.k > 0 && a.k.is_multiple_of(layout::K_PADDED));
        assert!(w.len().is_multiple_of(size) && y.len() == a.m * w.len() / size * ROWS);
        assert!(w.as_ptr().addr().is_multiple_of(64), "packed weights are 64-byte aligned");
        let scales = a.blocks() * a.m;
        assert!(a.q.len() == a.m * a.k && a.s.len() == scales && a.sums.len() == scales);
        assert!(a.totals.len() == scales && a.tiled == self.tiled(form, a.m));
        // SAFETY: see above.
        unsafe {
            match form {
                Form::Q4 => (self.gemm_q4)(w, a, y),
                Form::Grouped(how) => (self.gemm_grouped)(how, w, a, y),
                _ => (self.gemm_q8)(w, a, y),
            }
        }
    }

    /// As [`Kernels::gemm`], for stored floats and f32 activations `[m, k]`.
    pub fn gemm_float(&self, form: Form, w: &[u8], k: usize, x: &[f32], y: &mut [f32]) {
        let size = form.row_block_bytes(k);
        assert!(k > 0 && x.len().is_multiple_of(k) && w.len().is_multiple_of(size));
        assert!(y.len() == x.len() / k * (w.len() / size) * ROWS);
        assert!(w.as_ptr().addr().is_multiple_of(64), "packed weights are 64-byte aligned");
        let gemm = match form {
            Form::F32 => self.float.gemm_f32,
            Form::F16 => self.float.gemm_f16,
            Form::Bf16 => self.float.gemm_bf16,
            Form::GroupedFloat(how) => {
                // SAFETY: see above.
                return unsafe { (self.float.gemm_grouped)(how, w, k, x, y) };
            }
            Form::Q4 | Form::Q8 | Form::Grouped(_) => {
                unreachable!("quantized forms take quantized activations")
            }
        };
        // SAFETY: see above.
        unsafe { gemm(w, k, x, y) }
    }

    /// Quantizes one block of one token. `q` is as long as the block (a multiple of 64), `x` at most.
    /// Gives the scale and the sum of `q`; `sums` are by group.
    pub fn quantize(&self, x: &[f32], q: &mut [i8], sums: &mut [i16; GROUPS]) -> (f32, i32) {
        assert!(x.len() <= q.len() && q.len() <= BLOCK);
        // SAFETY: see above.
        unsafe { (self.float.quantize)(x, q, sums) }
    }

    /// Quantizes and packs one block of 16 rows; the first `k` weights of each row count.
    pub fn pack(&self, form: Form, x: &[[f32; BLOCK]; ROWS], k: usize, out: &mut [u8]) {
        assert!(k <= BLOCK && out.len() == form.row_block_bytes(k));
        let pack = match form {
            Form::Q4 => self.float.pack_q4,
            Form::Q8 => self.float.pack_q8,
            Form::Grouped(how) => {
                return layout::pack_grouped(how, &self.quantize_grouped(how, x, k), out);
            }
            _ => unreachable!("other forms are kept as they come"),
        };
        // SAFETY: see above.
        unsafe { pack(x, k, out) }
    }

    /// Quantizes 16 rows to int5 or int6; the first `k` weights of each row count.
    pub fn quantize_grouped(
        &self,
        how: Grouped,
        x: &[[f32; BLOCK]; ROWS],
        k: usize,
    ) -> [BlockGrouped; ROWS] {
        assert!(k <= BLOCK && (how == Grouped::INT5 || how == Grouped::INT6));
        let mut blocks = [BlockGrouped::ZERO; ROWS];
        // SAFETY: see above.
        unsafe { (self.float.quantize_grouped)(how, x, k, &mut blocks) }
        blocks
    }

    /// `out = x / sqrt(mean(x^2) + eps) * gain`.
    pub fn rms_norm(&self, x: &[f32], gain: &[f32], eps: f32, out: &mut [f32]) {
        assert!(x.len() == gain.len() && x.len() == out.len());
        // SAFETY: see above.
        unsafe { (self.float.rms_norm)(x, gain, eps, out) }
    }

    /// `mean(x^2)`.
    pub fn mean_square(&self, x: &[f32]) -> f32 {
        // SAFETY: see above.
        unsafe { (self.float.mean_square)(x) }
    }

    /// `x = max(0, x - mean(x) - times * sqrt(mean((x - mean(x))^2)))`.
    pub fn cut(&self, x: &mut [f32], times: f32) {
        // SAFETY: see above.
        unsafe { (self.float.cut)(x, times) }
    }

    /// `out = (x - mean(x)) / sqrt(variance(x) + eps) * gain + bias`.
    pub fn layer_norm(
        &self,
        x: &[f32],
        gain: &[f32],
        bias: Option<&[f32]>,
        eps: f32,
        out: &mut [f32],
    ) {
        assert!(x.len() == gain.len() && x.len() == out.len());
        assert!(bias.is_none_or(|bias| bias.len() == x.len()));
        // SAFETY: see above.
        unsafe { (self.float.layer_norm)(x, gain, bias, eps, out) }
    }

    /// Rotates one head; `cos_sin` is as long as the part of the head that turns, cosines first.
    pub fn rope(&self, x: &mut [f32], cos_sin: &[f32], interleaved: bool) {
        assert!(cos_sin.len() <= x.len() && cos_sin.len().is_multiple_of(2));
        // SAFETY: see above.
        unsafe { (self.float.rope)(x, cos_sin, interleaved) }
    }

    /// `gate = act(gate) * up`.
    pub fn gate(&self, act: Activation, gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len());
        // SAFETY: see above.
        unsafe { (self.float.gate)(act, gate, up) }
    }

    /// `x += y`.
    pub fn add(&self, x: &mut [f32], y: &[f32]) {
        assert_eq!(x.len(), y.len());
        // SAFETY: see above.
        unsafe { (self.float.add)(x, y) }
    }

    /// `x = fma(scale, y, x)`.
    pub fn add_scaled(&self, x: &mut [f32], scale: f32, y: &[f32]) {
        assert_eq!(x.len(), y.len());
        // SAFETY: see above.
        unsafe { (self.float.add_scaled)(x, scale, y) }
    }

    /// A router's scores of one position's logits, in place.
    pub fn score(&self, score: Score, x: &mut [f32]) {
        // SAFETY: see above.
        unsafe { (self.float.score)(score, x) }
    }

    /// `x = cap * tanh(x / cap)`.
    pub fn softcap(&self, x: &mut [f32], cap: f32) {
        // SAFETY: see above.
        unsafe { (self.float.softcap)(x, cap) }
    }

    /// Attention of some rows of queries over the pages of one head; see [`Attend`].
    /// `out`: `[rows, a.out_width()]`.
    pub fn attend(&self, dtype: KvDtype, a: &Attend<'_>, out: &mut [f32], scratch: &mut [f32]) {
        let rows = a.seen.len();
        assert!(rows <= MAX_ROWS && a.q.len() == rows * a.d);
        assert!(out.len() == rows * a.out_width() && a.latent.is_none_or(|dv| dv <= a.d));
        assert!(a.sinks.is_none_or(|sinks| sinks.len() == rows));
        let offsets = a.kv.as_ptr().addr() | a.page_stride | a.head_offset;
        assert!(offsets.is_multiple_of(4), "pages hold f32 scales");
        let attend = match dtype {
            KvDtype::F32 => self.float.attend_f32,
            KvDtype::F16 => self.float.attend_f16,
            KvDtype::Int8 => self.float.attend_i8,
        };
        // SAFETY: see above; pages are sliced with bounds checks.
        unsafe { attend(a, out, &mut scratch[..scratch_len(rows, a.d)]) }
    }

    /// Writes one position's key and value (`v` empty: the key only) into slot `slot` of a head's page.
    pub fn write_kv(&self, dtype: KvDtype, k: &[f32], v: &[f32], slot: usize, page: &mut [u8]) {
        assert!((v.is_empty() || k.len() == v.len()) && slot < PAGE);
        assert!(page.len() == dtype.page_bytes(k.len(), !v.is_empty()));
        let write = match dtype {
            KvDtype::F32 => self.float.write_f32,
            KvDtype::F16 => self.float.write_f16,
            KvDtype::Int8 => self.float.write_i8,
        };
        // SAFETY: see above.
        unsafe { write(k, v, slot, page) }
    }

    /// One position of a causal convolution of each channel: `out = bias? + sum over j of rows[j] * taps[j]`, then
    /// `out * sigmoid(out)` if `silu`. The oldest row first.
    pub fn conv(
        &self,
        rows: &[&[f32]],
        taps: &[&[f32]],
        bias: Option<&[f32]>,
        silu: bool,
        out: &mut [f32],
    ) {
        assert!(rows.len() == taps.len() && bias.is_none_or(|b| b.len() == out.len()));
        assert!(rows.iter().chain(taps).all(|row| row.len() == out.len()));
        // SAFETY: see above.
        unsafe { (self.float.conv)(rows, taps, bias, silu, out) }
    }

    /// One position of a recurrence: `u = beta * (v - decay * S^T k)` if `delta`, else `beta * v`;
    /// `S = decay * S + k u^T`; `out = S^T q`.
    pub fn recur(&self, r: &Recur<'_>, state: &mut [f32], out: &mut [f32; 16]) {
        assert!(r.q.len() == r.k.len() && r.k.len().is_multiple_of(4));
        assert!(state.len() == 16 * r.k.len());
        // SAFETY: see above.
        unsafe { (self.float.recur)(r, state, out) }
    }
}

/// Plain numbers that any bytes may be read as.
trait Plain: Copy {}
impl Plain for f32 {}
impl Plain for u16 {}
impl Plain for i8 {}
impl Plain for u8 {}

/// The bytes of 16 numbers as those numbers.
#[inline(always)]
fn cast<T: Plain>(bytes: &[u8]) -> &[T; 16] {
    assert!(bytes.len() == 16 * size_of::<T>());
    debug_assert!(bytes.as_ptr().addr().is_multiple_of(align_of::<T>()));
    // SAFETY: the length was checked; `T` is plain, so any bytes are a value; packed weights and pages
    // start at 64-byte boundaries and every offset in them is a multiple of 16 numbers.
    unsafe { &*bytes.as_ptr().cast::<[T; 16]>() }
}

/// `N` elements from `i` on.
#[inline(always)]
fn array<T, const N: usize>(x: &[T], i: usize) -> &[T; N] {
    let Some(x) = x.get(i..).and_then(|x| x.first_chunk()) else { unreachable!("checked shapes") };
    x
}

/// `N` elements from `i` on.
#[inline(always)]
fn array_mut<T, const N: usize>(x: &mut [T], i: usize) -> &mut [T; N] {
    let Some(x) = x.get_mut(i..).and_then(|x| x.first_chunk_mut()) else {
        unreachable!("checked shapes")
    };
    x
}

#[cfg(test)]
mod tests;
