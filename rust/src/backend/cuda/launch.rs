//! The parameters of the kernels, as `kernels/*.cu` declare them: field for field, padding spelled out. A test compares
//! their sizes with the PTX.

use crate::kernels::Activation;

/// What a kernel takes, and its name.
///
/// # Safety
/// `repr(C)`, without padding, and what the kernels of these names declare.
pub(super) unsafe trait Params: Copy {
    /// The kernels that take it.
    const KERNELS: &'static [&'static str];
}

macro_rules! params {
    ($($(#[$doc:meta])* $name:ident [$($kernel:literal),*] { $($field:ident: $type:ty),* $(,)? })*) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            #[derive(Clone, Copy, Debug, Default)]
            pub(super) struct $name { $(pub(super) $field: $type),* }
            // SAFETY: `repr(C)`; no padding, as checked here; the test in tests.rs compares names and sizes.
            unsafe impl Params for $name { const KERNELS: &'static [&'static str] = &[$($kernel),*]; }
            const _: () = assert!(size_of::<$name>() == 0 $(+ size_of::<$type>())*);
        )*
        /// Every kernel and the size of its parameter.
        #[cfg(test)]
        pub(super) fn sizes() -> Vec<(&'static str, usize)> {
            let mut all = Vec::new();
            $(all.extend($name::KERNELS.iter().map(|&kernel| (kernel, size_of::<$name>())));)*
            all
        }
    };
}

params! {
    /// An activation.
    Act [] { kind: u32, alpha_p: f32, alpha_n: f32, beta: f32, eps: f32 }
    /// Quantized activations.
    Acts [] { q: u64, s: u64, sums: u64 }
    /// The pages of one layer.
    Pages [] { bytes: u64, page: u32, head: u32, keys: u32, numbers: u32, dtype: u32, pad: u32 }
    /// The spans of a step.
    Spans [] { words: u64, tables: u32, of_row: u32 }
    /// A quantized matrix.
    Matrix [] { w: u64, groups: u32, blocks: u32 }
    /// A grouped matrix.
    Grouped [] {
        m: Matrix, how: u32, header: u32, scales: u32, offsets: u32, scale_bytes: u32, offset_bytes: u32,
    }
    /// Products with several matrices.
    Jobs [] { list: u64, mats: u64, places: u64, heads: u32, rows: u32 }
    /// What becomes of a product.
    Epilogue [] { bias: u64, out: u64, n: u32, width: u32, mode: u32, act: Act }
    Embed ["embed"] { table: u64, ids: u64, out: u64, form: u32, width: u32, scale: f32, pad: u32, how: Grouped }
    Norm ["norm"] {
        x: u64, gain: u64, bias: u64, out: u64, acts: Acts, in_row: u32, out_row: u32, width: u32,
        gain_width: u32, eps: f32, centred: u32, blocks: u32, pad: u32,
    }
    Quantize ["quantize"] { x: u64, acts: Acts, width: u32, blocks: u32 }
    Each ["each"] {
        x: u64, y: u64, out: u64, width: u32, y_row: u32, y_first: u32, kind: u32, scale: f32,
        act: Act, rows: u32, pad: u32,
    }
    Draw ["draw_best", "draw_limit", "draw_sums", "draw_pick"] {
        logits: u64, how: u64, best: u64, limits: u64, sums: u64, out: u64, vocab: u32, parts: u32,
    }
    Edits ["edit"] { logits: u64, edits: u64, saved: u64, rows: u32, vocab: u32, restore: u32, pad: u32 }
    Select ["select_rows"] {
        x: u64, rows: u64, out: u64, width: u32, row: u32, heads: u32, count: u32,
    }
    MatchPower ["match_power"] { x: u64, to: u64, width: u32, least: f32 }
    Cut ["cut"] { x: u64, out: u64, width: u32, in_row: u32, times: f32, pad: u32 }
    AltUp ["altup"] {
        streams: [u64; 8], coefficients: u64, seen: u64, n: u32, width: u32, correct: u32, rows: u32,
    }
    Gemv ["gemv_q4_1", "gemv_q4_4", "gemv_q8_1", "gemv_q8_4"] {
        w: Matrix, acts: Acts, tokens: u32, pad: u32, e: Epilogue, jobs: Jobs,
    }
    GemvFloat [
        "gemv_bf16_1", "gemv_bf16_4", "gemv_f16_1", "gemv_f16_4", "gemv_f32_1", "gemv_f32_4"
    ] { w: u64, x: u64, k: u32, tokens: u32, form: u32, pad: u32, e: Epilogue, jobs: Jobs }
    Gemm ["gemm_q4", "gemm_q8", "few_q4", "few_q8"] {
        w: Matrix, acts: Acts, tokens: u32, pad: u32, e: Epilogue, jobs: Jobs,
    }
    OfGrouped [
        "gemv_g4_1", "gemv_g4_4", "gemv_g5_1", "gemv_g5_4", "gemv_g6_1", "gemv_g6_4", "gemv_gt_1",
        "gemv_gt_4", "gemm_grouped"
    ] { w: Grouped, acts: Acts, tokens: u32, pad: u32, e: Epilogue, jobs: Jobs }
    Route ["route"] {
        logits: u64, correction: u64, scales: u64, chosen: u64, experts: u32, k: u32, softmax: u32,
        groups: u32, open: u32, by_two: u32, renormalise: u32, more: f32, scale: f32, pad: u32,
    }
    Arrange ["arrange"] {
        chosen: u64, jobs: u64, rows: u64, places: u64, count: u32, k: u32, experts: u32,
        each: u32, most: u32, pad: u32,
    }
    Combine ["combine"] {
        chosen: u64, y: u64, out: u64, rows: u32, width: u32, k: u32, pad: u32,
    }
    LatentQk ["latent_qk"] {
        q: u64, kv: u64, y: u64, gain: u64, out: u64, heads: u32, nope: u32, rope: u32, rank: u32,
        eps: f32, pad: u32,
    }
    Conv ["conv"] {
        x: u64, taps: u64, bias: u64, states: u64, out: u64, spans: Spans, row: u32, first: u32,
        channels: u32, width: u32, size: u32, gated: u32,
    }
    Recur ["rates", "recur", "recur_gate"] {
        x: u64, rates: u64, conv: u64, decay: u64, dt_bias: u64, skip: u64, states: u64,
        scalars: u64, out: u64, spans: Spans, heads: u32, groups: u32, tiled: u32, key_dim: u32,
        value_dim: u32, delta: u32, x_row: u32, row: u32, rates_row: u32, size: u32,
        conv_size: u32, count: u32,
    }
    Rope ["rope_store"] {
        qkv: u64, q_gain: u64, k_gain: u64, v_gain: u64, table: u64, pages: Pages, spans: Spans,
        row: u32, heads: u32, kv_heads: u32, d: u32, turned: u32, q_gains: u32, k_gains: u32,
        store: u32, interleaved: u32, centred: u32, after: u32, clip: f32, eps: f32, values: u32,
    }
    Attend [
        "attend_f32_1", "attend_f32_8", "attend_f16_1", "attend_f16_4", "attend_f16_8", "attend_i8_1",
        "attend_i8_4", "attend_i8_8", "attend_latent_f32", "attend_latent_f16", "attend_latent_i8",
        "attend_merge"
    ] {
        qkv: u64, sinks: u64, growth: u64, out: u64, parts: u64, pages: Pages, spans: Spans, row: u32,
        heads: u32, kv_heads: u32, d: u32, window: u32, chunks: u32, group: u32, positions: u32,
        tiles: u32, split: u32, scale: f32, cap: f32, values: u32, pad: u32,
    }
}

impl From<Activation> for Act {
    fn from(act: Activation) -> Act {
        let plain = |kind| Act { kind, ..Act::default() };
        match act {
            Activation::Silu => plain(0),
            Activation::Gelu => plain(1),
            Activation::GeluTanh => plain(2),
            Activation::Relu2 => plain(3),
            Activation::XIelu { alpha_p, alpha_n, beta, eps } => {
                Act { kind: 4, alpha_p, alpha_n, beta, eps }
            }
            Activation::Sigmoid => plain(5),
            Activation::None => plain(6),
            Activation::ClampedSwiglu => plain(7),
        }
    }
}
