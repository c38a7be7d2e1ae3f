//! Matrices on the device and products with them: which kernel, how rows and tokens are cut into blocks.

use super::{Activation, Buf, Cuda, Form, Mat, Row, THREADS, cpu, launch, pack};
use crate::quant::Grouped;
use crate::{Error, Result};

/// Tokens up to which a product reads weights token by token; beyond, tensor cores take 64 at once.
const FEW: usize = 8;
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

    pub(super) fn product(&self, w: &Mat, bias: Option<&Row>, x: &Buf, into: Into, out: &mut Buf) {
        assert_eq!(w.k, x.width);
        let act = |act: Activation| launch::Act::from(act);
        let (mode, width, act) = match into {
            Into::Store => (0, w.n, launch::Act::default()),
            Into::Add => (1, w.n, launch::Act::default()),
            Into::Act(a) => (2, w.n, act(a)),
            Into::Gate(a, width) => (3, width, act(a)),
        };
        match into {
            Into::Add => assert!(out.rows == x.rows && out.width == w.n),
            _ => out.shape(x.rows, width),
        }
        out.fresh.set(false);
        let e = launch::Epilogue {
            bias: bias.map_or(0, |bias| bias.memory.at),
            out: out.at,
            n: w.n as u32,
            width: width as u32,
            mode,
            act,
        };
        let (tokens, tiles) = (x.rows as u32, w.n.div_ceil(32));
        if !w.form.is_quantized() {
            let (kernel, each) = match (w.form, x.rows) {
                (Form::Bf16, 1) => ("gemv_bf16_1", 1),
                (Form::Bf16, _) => ("gemv_bf16_4", 4),
                (Form::F16, 1) => ("gemv_f16_1", 1),
                (Form::F16, _) => ("gemv_f16_4", 4),
                (_, 1) => ("gemv_f32_1", 1),
                _ => ("gemv_f32_4", 4),
            };
            let (w, k, form) = (w.memory.at, w.k as u32, pack::code(w.form));
            let params = launch::GemvFloat { w, x: x.at, k, tokens, form, pad: 0, e };
            return self.launch(kernel, [x.rows.div_ceil(each), tiles, 1], 32, &params);
        }
        let blocks = pack::groups(w.k).1;
        let matrix = w.matrix();
        let acts = self.quantized(x);
        if let Form::Grouped(how) = w.form {
            let params = launch::OfGrouped { w: w.grouped(how), acts, tokens, pad: 0, e };
            if x.rows > FEW {
                let grid = [x.rows.div_ceil(64), tiles.div_ceil(4), 1];
                return self.launch("gemm_grouped", grid, 256, &params);
            }
            let (kernel, each) = match (how.table().is_some(), how.high(), x.rows) {
                (true, _, 1) => ("gemv_gt_1", 1),
                (true, ..) => ("gemv_gt_4", 4),
                (_, 0, 1) => ("gemv_g4_1", 1),
                (_, 0, _) => ("gemv_g4_4", 4),
                (_, 1, 1) => ("gemv_g5_1", 1),
                (_, 1, _) => ("gemv_g5_4", 4),
                (.., 1) => ("gemv_g6_1", 1),
                _ => ("gemv_g6_4", 4),
            };
            let warps = blocks.clamp(each, 16);
            return self.launch(kernel, [x.rows.div_ceil(each), tiles, 1], 32 * warps, &params);
        }
        let four = w.form == Form::Q4;
        if x.rows > FEW {
            let kernel = if four { "gemm_q4" } else { "gemm_q8" };
            let params = launch::Gemm { w: matrix, acts, tokens, pad: 0, e };
            return self.launch(kernel, [x.rows.div_ceil(64), tiles.div_ceil(4), 1], 256, &params);
        }
        let (kernel, each) = match (four, x.rows) {
            (true, 1) => ("gemv_q4_1", 1),
            (true, _) => ("gemv_q4_4", 4),
            (false, 1) => ("gemv_q8_1", 1),
            (false, _) => ("gemv_q8_4", 4),
        };
        // A warp for each 256 inputs, and at least as many as tokens.
        let warps = blocks.clamp(each, 16);
        let params = launch::Gemv { w: matrix, acts, tokens, pad: 0, e };
        self.launch(kernel, [x.rows.div_ceil(each), tiles, 1], 32 * warps, &params);
    }
}
