//! Packs matrices whose inputs are known: each weight makes up for the errors of those before it. Slow; never at load.

use super::{Cpu, Form, NotFinite, Parts};
use crate::kernels::layout::{self, ROWS};
use crate::quant::{BLOCK, BlockQ4, BlockQ8, Feedback};
use std::sync::Mutex;

impl Cpu {
    /// As [`Cpu::pack_into`], with the sums `[blocks][256][256]` over the inputs that [`Inputs`](super::Inputs) has.
    pub fn pack_knowing(
        &self,
        form: Form,
        parts: &Parts<'_>,
        sums: &[f32],
        out: &mut [u8],
    ) -> Result<(), NotFinite> {
        if !matches!(form, Form::Q4 | Form::Q8) {
            return self.pack_into(form, parts, out);
        }
        let (n, k) = (parts.n(), parts.k);
        let feedback = Feedback::new(sums, k);
        let bad: Mutex<Option<NotFinite>> = Mutex::new(None);
        self.fill(form.row_block_bytes(k), n.div_ceil(ROWS), out, |rb, out| {
            let mut rows = vec![0.0f32; ROWS * k];
            for (r, row) in rows.chunks_mut(k).enumerate() {
                if let Err(at) = parts.row(rb * ROWS + r, row) {
                    let mut bad = bad.lock().unwrap_or_else(|e| e.into_inner());
                    *bad = Some(bad.map_or(at, |other| other.min(at)));
                    return;
                }
            }
            let mut done = 0;
            for b in 0..k.div_ceil(BLOCK) {
                let columns = b * BLOCK..k.min((b + 1) * BLOCK);
                let bytes = form.row_block_bytes(columns.len());
                let out = &mut out[done..done + bytes];
                let row = |r: usize| &rows[r * k..][columns.clone()];
                if form == Form::Q4 {
                    let mut block = [BlockQ4::ZERO; ROWS];
                    for (r, block) in block.iter_mut().enumerate() {
                        *block = feedback.q4(b, row(r));
                    }
                    layout::pack_q4(&block, out);
                } else {
                    let mut block = [BlockQ8::ZERO; ROWS];
                    for (r, block) in block.iter_mut().enumerate() {
                        *block = feedback.q8(b, row(r));
                    }
                    layout::pack_q8(&block, out);
                }
                done += bytes;
            }
        });
        bad.into_inner().unwrap_or_else(|e| e.into_inner()).map_or(Ok(()), Err)
    }
}
