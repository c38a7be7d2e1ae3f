//! Mixtures of experts as launches: who chooses whom, which rows meet which matrix, two products by jobs, the sums. Nothing
//! of it comes back to the CPU, so that a step of any choices is one graph.

use super::device::{Device, Memory};
use super::product::{FEW, Into};
use super::{Activation, Buf, Cuda, Expert, Form, Mat, Routing, Row, THREADS, launch};
use crate::backend::cuda_limits as limits;
use crate::kernels::Score;
use std::sync::Arc;

/// Room for one operation.
pub(super) struct Work {
    pub(super) memory: Memory,
    /// Rows in the order of the matrices that they meet, between the layers of experts, and behind them.
    pub(super) input: Buf,
    pub(super) hidden: Buf,
    pub(super) output: Buf,
}

impl Work {
    pub(super) fn new(device: &Arc<Device>) -> Work {
        let buf = || Buf::new(device);
        Work { memory: Memory::none(), input: buf(), hidden: buf(), output: buf() }
    }
}

impl Cuda {
    /// [`Backend::moe`](super::Backend::moe).
    pub(super) fn mixture(
        &self,
        how: &Routing,
        logits: &mut Buf,
        [correction, scales]: [Option<&Row>; 2],
        experts: &[Expert<&Mat, &Row>],
        (act, width): (Activation, usize),
        x: &Buf,
        out: &mut Buf,
    ) {
        assert!(logits.rows == x.rows && logits.width == experts.len());
        let (k, count) = (how.top_k, x.rows * how.top_k);
        if experts.len() > limits::EXPERTS || k > limits::CHOSEN {
            return self.device.refuse("more than 1024 experts, or 32 of a position,");
        }
        let quantized =
            experts.iter().all(|e| e.gate_up.form.is_quantized() && e.down.form.is_quantized());
        let each = match x.rows {
            1 => 1,
            _ if quantized && count > FEW * experts.len() => 64,
            _ => 4,
        };
        let most = if each == 1 { count } else { count / each + experts.len().min(count) };
        let mut work = self.work.lock().unwrap_or_else(|e| e.into_inner());
        let Work { memory, input, hidden, output } = &mut *work;
        self.device.grow(memory, 16 * (most + count));
        let list = memory.at;
        let chosen = list + 16 * most as u64;
        let (rows, places) = (chosen + 8 * count as u64, chosen + 12 * count as u64);
        let at = |row: Option<&Row>| row.map_or(0, |row| row.memory.at);
        let groups = how.groups;
        let params = launch::Route {
            logits: logits.at,
            correction: at(correction),
            scales: at(scales),
            chosen,
            experts: experts.len() as u32,
            k: k as u32,
            softmax: (how.score == Score::Softmax).into(),
            groups: groups.map_or(0, |g| g.count as u32),
            open: groups.map_or(0, |g| g.top_k as u32),
            by_two: groups.is_some_and(|g| g.by_two).into(),
            renormalise: how.renormalise.is_some().into(),
            more: how.renormalise.unwrap_or(0.0),
            scale: how.scale,
            pad: 0,
        };
        self.launch("route", [x.rows, 1, 1], 32, &params);
        logits.fresh.set(false);
        let params = launch::Arrange {
            chosen,
            jobs: list,
            rows,
            places,
            count: count as u32,
            k: k as u32,
            experts: experts.len() as u32,
            each: each as u32,
            most: most as u32,
            pad: 0,
        };
        self.launch("arrange", [1, 1, 1], limits::EXPERTS, &params);
        input.shape(count, x.width);
        self.gather(x.at, rows, input);
        hidden.shape(count, width);
        output.shape(count, x.width);
        out.shape(x.rows, x.width);
        let mats: Vec<_> = experts.iter().map(|e| (e.gate_up, e.gate_up_bias)).collect();
        let jobs = launch::Jobs { list, ..launch::Jobs::default() };
        self.by_jobs(&mats, input, (most, each), jobs, Into::Gate(act, width), hidden);
        let mats: Vec<_> = experts.iter().map(|e| (e.down, e.down_bias)).collect();
        let jobs = launch::Jobs { list, places, ..launch::Jobs::default() };
        self.by_jobs(&mats, hidden, (most, each), jobs, Into::Store, output);
        let params = launch::Combine {
            chosen,
            y: output.at,
            out: out.at,
            rows: x.rows as u32,
            width: x.width as u32,
            k: k as u32,
            pad: 0,
        };
        self.launch("combine", [(x.rows * x.width).div_ceil(THREADS), 1, 1], THREADS, &params);
    }

    /// Products of rows of `x` with the matrices that `jobs` names; of each form a launch.
    fn by_jobs(
        &self,
        mats: &[(&Mat, Option<&Row>)],
        x: &Buf,
        (blocks, each): (usize, usize),
        jobs: launch::Jobs,
        into: Into,
        out: &Buf,
    ) {
        let mut done: Vec<Form> = Vec::new();
        for &(w, _) in mats {
            if done.contains(&w.form) {
                continue;
            }
            done.push(w.form);
            let address = |mat: &Mat| if mat.form == w.form { mat.memory.at } else { 0 };
            let words = mats.iter().flat_map(|(mat, bias)| {
                assert!((mat.n, mat.k) == (w.n, w.k) && mat.k == x.width);
                [address(mat), bias.map_or(0, |bias| bias.memory.at)]
            });
            let jobs = launch::Jobs { mats: self.addresses(words), ..jobs };
            let e = Cuda::epilogue(w.n, None, into, out);
            let grid = ([blocks, w.n.div_ceil(32)], each);
            self.products(w, x, grid, jobs, e);
        }
        out.fresh.set(false);
    }

    /// Addresses where kernels of this step find them.
    pub(super) fn addresses(&self, all: impl Iterator<Item = u64>) -> u64 {
        let words: Vec<u32> = all.flat_map(|at| [at as u32, (at >> 32) as u32]).collect();
        self.device.input(&words)
    }
}
