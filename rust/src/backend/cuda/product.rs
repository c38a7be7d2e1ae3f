//! Matrices on the device and products with them: which kernel, how rows and tokens are cut into blocks.

use super::{Activation, Buf, Cuda, Form, Mat, Row, THREADS, cpu, launch, pack};
use crate::quant::Grouped;
use crate::{Error, Result};

/// Tokens up to which a product reads weights token by token; beyond, tensor cores take 64 at once,
pub(super) const FEW: usize = 8;
/// but up to so many 16 at once of int4 and int8, with the inputs of a matrix split over warps.
const SOME: usize = 64;
/// Bytes of tiles made at once on their way to the device, unless one is larger.
const STAGE: usize = 16 << 20;

/// What a product does to its output; the numbers are `Epilogue`'s.
#[derive(Clone, Copy)]
pub(super) enum Into {
    Store,
    Add,
    Act(Activation),
    Gate(Activation, usize),
}

/// Rows that a thread block takes.
pub(super) fn rows_at_once(form: Form, rows: usize) -> usize {
    match rows {
        1 => 1,
        _ if rows <= FEW || !form.is_quantized() => 4,
        _ if rows <= SOME && matches!(form, Form::Q4 | Form::Q8) => 16,
        _ => 64,
    }
}

/// Those of the kernels that `products` chooses from.
fn modules(form: Form) -> &'static [&'static str] {
    match form {
        Form::Q4 | Form::Q8 => &["gemv", "few", "gemm"],
        Form::Grouped(_) | Form::GroupedFloat(_) => &["gemv_grouped", "gemm"],
        Form::Bf16 | Form::F16 | Form::F32 => &["gemv_float"],
    }
}

impl Mat {
    fn matrix(&self) -> launch::Matrix {
        let (groups, blocks) = pack::groups(self.k);
        launch::Matrix { w: self.memory.at, groups: groups as u32, blocks: blocks as u32 }
    }
    pub(super) fn grouped(&self, how: Grouped) -> launch::Grouped {
        let head = pack::head(how);
        launch::Grouped {
            m: self.matrix(),
            how: head.how,
            header: head.words as u32,
            scales: head.scales[0] as u32,
            offsets: head.offsets[0] as u32,
            scale_bytes: head.scales[1] as u32,
            offset_bytes: head.offsets[1] as u32,
        }
    }
}

impl Cuda {
    /// The matrix in tiles on the device: by way of a buffer of a bounded size, so that it is never in memory twice.
    pub(super) fn copied(&self, packed: &cpu::Mat) -> Result<Mat> {
        let (form, (n, k)) = (packed.form(), packed.shape());
        let (Some(bytes), Some(tile)) = (pack::bytes(form, n, k), pack::bytes(form, 1, k)) else {
            let what = format!(
                "{} weights with quantization=\"none\" do not run on CUDA yet; use quantization=\"auto\"",
                form.name()
            );
            return Err(Error::Unsupported(what));
        };
        self.device.load(modules(form))?;
        let memory = self.device.alloc(bytes)?;
        let tiles = (STAGE / tile).max(1);
        let mut stage = vec![0; bytes.min(tiles * tile)];
        let from = packed.bytes().chunks(tiles * pack::pair_bytes(form, k));
        for (i, from) in from.enumerate() {
            let at = i * tiles * tile;
            let stage = &mut stage[..(bytes - at).min(tiles * tile)];
            pack::tiles(form, k, from, stage);
            self.device.upload(memory.at + at as u64, stage);
        }
        Ok(Mat { form, n, k, memory })
    }

    /// `x`, quantized.
    fn quantized(&self, x: &Buf) -> launch::Acts {
        let acts = x.acts();
        if !x.fresh.get() {
            let blocks = x.blocks();
            let params =
                launch::Quantize { x: x.at, acts, width: x.width as u32, blocks: blocks as u32 };
            self.launch("quantize", [x.rows, blocks.div_ceil(THREADS / 32), 1], THREADS, &params);
            x.fresh.set(true);
        }
        acts
    }

    /// What becomes of a product; `n`: rows of the matrix.
    pub(super) fn epilogue(
        n: usize,
        bias: Option<&Row>,
        into: Into,
        out: &Buf,
    ) -> launch::Epilogue {
        let (mode, width, act) = match into {
            Into::Store => (0, n, launch::Act::default()),
            Into::Add => (1, n, launch::Act::default()),
            Into::Act(a) => (2, n, a.into()),
            Into::Gate(a, width) => (3, width, a.into()),
        };
        let bias = bias.map_or(0, |bias| bias.memory.at);
        launch::Epilogue { bias, out: out.at, n: n as u32, width: width as u32, mode, act }
    }

    pub(super) fn product(&self, w: &Mat, bias: Option<&Row>, x: &Buf, into: Into, out: &mut Buf) {
        assert_eq!(w.k, x.width);
        match into {
            Into::Add => assert!(out.rows == x.rows && out.width == w.n),
            Into::Gate(_, width) => out.shape(x.rows, width),
            Into::Store | Into::Act(_) => out.shape(x.rows, w.n),
        }
        out.fresh.set(false);
        let e = Cuda::epilogue(w.n, bias, into, out);
        let each = rows_at_once(w.form, x.rows);
        let grid = [x.rows.div_ceil(each), w.n.div_ceil(32)];
        self.products(w, x, (grid, each), launch::Jobs::default(), e);
    }

    /// Products of `x` with `w`, or by jobs with matrices of its form and shape. The grid: blocks of `each` rows, tiles.
    pub(super) fn products(
        &self,
        w: &Mat,
        x: &Buf,
        ([x_blocks, tiles], each): ([usize; 2], usize),
        jobs: launch::Jobs,
        e: launch::Epilogue,
    ) {
        let (grid, tokens, one) = ([x_blocks, tiles, 1], x.rows as u32, each == 1);
        if !w.form.is_quantized() {
            let kernel = match (w.form, one) {
                (Form::Bf16, true) => "gemv_bf16_1",
                (Form::Bf16, _) => "gemv_bf16_4",
                (Form::F16, true) => "gemv_f16_1",
                (Form::F16, _) => "gemv_f16_4",
                (_, true) => "gemv_f32_1",
                _ => "gemv_f32_4",
            };
            let (at, k, form) = (w.memory.at, w.k as u32, pack::code(w.form));
            let params = launch::GemvFloat { w: at, x: x.at, k, tokens, form, pad: 0, e, jobs };
            return self.launch(kernel, grid, 32, &params);
        }
        let acts = self.quantized(x);
        let gemm_grid = [x_blocks, tiles.div_ceil(4), 1];
        // A warp for each 256 inputs, and at least as many as tokens.
        let warps = pack::groups(w.k).1.clamp(each.min(16), 16);
        if let Form::Grouped(how) = w.form {
            let params = launch::OfGrouped { w: w.grouped(how), acts, tokens, pad: 0, e, jobs };
            if each == 64 {
                return self.launch("gemm_grouped", gemm_grid, 256, &params);
            }
            let kernel = match (how.table().is_some(), how.high(), one) {
                (true, _, true) => "gemv_gt_1",
                (true, ..) => "gemv_gt_4",
                (_, 0, true) => "gemv_g4_1",
                (_, 0, _) => "gemv_g4_4",
                (_, 1, true) => "gemv_g5_1",
                (_, 1, _) => "gemv_g5_4",
                (.., true) => "gemv_g6_1",
                _ => "gemv_g6_4",
            };
            return self.launch(kernel, grid, 32 * warps, &params);
        }
        let (four, m) = (w.form == Form::Q4, w.matrix());
        let params = launch::Gemm { w: m, acts, tokens, pad: 0, e, jobs };
        if each == 16 {
            let kernel = if four { "few_q4" } else { "few_q8" };
            return self.launch(kernel, grid, 512, &params);
        }
        if each == 64 {
            let kernel = if four { "gemm_q4" } else { "gemm_q8" };
            return self.launch(kernel, gemm_grid, 256, &params);
        }
        let kernel = match (four, one) {
            (true, true) => "gemv_q4_1",
            (true, _) => "gemv_q4_4",
            (false, true) => "gemv_q8_1",
            (false, _) => "gemv_q8_4",
        };
        let params = launch::Gemv { w: m, acts, tokens, pad: 0, e, jobs };
        self.launch(kernel, grid, 32 * warps, &params);
    }
}
