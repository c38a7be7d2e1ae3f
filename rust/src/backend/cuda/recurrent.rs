//! States of sequences on the device, and the layers that keep them as launches.

use super::device::{Device, Memory};
use super::{Buf, Cuda, HeadRows, Recurrent, Row, Span, THREADS, kv, launch};
use crate::Result;
use crate::backend::{Core, cuda_limits as limits};
use std::sync::Arc;

/// States of every layer: memory, and the f32 of one.
pub struct States {
    layers: Vec<(Memory, usize)>,
}

impl States {
    pub(super) fn new(device: &Arc<Device>, layers: &[(usize, usize)]) -> Result<States> {
        let layer = |&(count, size): &(usize, usize)| {
            if count == 0 {
                return Ok((Memory::none(), size));
            }
            let memory = device.alloc(count * size * 4)?;
            device.clear(&memory)?;
            Ok((memory, size))
        };
        if layers.iter().any(|(count, _)| *count > 0) {
            device.load(&["recurrent"])?;
        }
        Ok(States { layers: layers.iter().map(layer).collect::<Result<_>>()? })
    }
}

impl Cuda {
    /// [`Backend::conv`](super::Backend::conv).
    pub(super) fn convolve(
        &self,
        x: &Buf,
        how: &Recurrent,
        (taps, bias): (&Row, Option<&Row>),
        (states, layer): (&States, usize),
        spans: &[Span<'_>],
        out: &mut Buf,
    ) {
        let (first, channels) = how.channels();
        let (memory, size) = &states.layers[layer];
        out.shape(x.rows, channels);
        let params = launch::Conv {
            x: x.at,
            taps: taps.memory.at,
            bias: bias.map_or(0, |bias| bias.memory.at),
            states: memory.at,
            out: out.at,
            spans: kv::spans(&self.device, spans),
            row: x.width as u32,
            first: first as u32,
            channels: channels as u32,
            width: how.width as u32,
            size: *size as u32,
            gated: matches!(how.core, Core::Gated(_)).into(),
        };
        self.launch("conv", [x.rows, channels.div_ceil(THREADS), 1], THREADS, &params);
    }

    /// [`Backend::recur`](super::Backend::recur).
    pub(super) fn recurrence(
        &self,
        (x, rates): (&Buf, &Buf),
        conv: &mut Buf,
        how: &Recurrent,
        w: &HeadRows<&Row>,
        eps: f32,
        (states, layer): (&States, usize),
        spans: &[Span<'_>],
        out: &mut Buf,
    ) {
        let (Core::DeltaNet(h) | Core::Mamba2(h)) = how.core else {
            unreachable!("a gate has no heads");
        };
        if h.key_dim > limits::STATE_ROWS {
            return self.device.refuse("states of more than 256 rows");
        }
        let (rows, values) = (conv.rows, h.values());
        let delta = matches!(how.core, Core::DeltaNet(_));
        let mut work = self.work.lock().unwrap_or_else(|e| e.into_inner());
        self.device.grow(&mut work.memory, rows * h.heads * 8);
        let (memory, size) = &states.layers[layer];
        out.shape(rows, values);
        let params = launch::Recur {
            x: x.at,
            rates: rates.at,
            conv: conv.at,
            decay: w.decay.memory.at,
            dt_bias: w.dt_bias.memory.at,
            skip: w.skip.map_or(0, |skip| skip.memory.at),
            states: memory.at,
            scalars: work.memory.at,
            out: out.at,
            spans: kv::spans(&self.device, spans),
            heads: h.heads as u32,
            groups: h.groups as u32,
            tiled: h.tiled.into(),
            key_dim: h.key_dim as u32,
            value_dim: h.value_dim as u32,
            delta: delta.into(),
            x_row: x.width as u32,
            row: conv.width as u32,
            rates_row: rates.width as u32,
            size: *size as u32,
            conv_size: how.conv_state() as u32,
            count: rows as u32,
        };
        self.launch("rates", [rows, 1, 1], THREADS, &params);
        conv.fresh.set(false);
        self.launch("recur", [values / 16, spans.len(), 1], 64, &params);
        let norm = |pieces: usize| {
            let (at, shape) = ((out.at, values), [rows, pieces, values / pieces]);
            self.norm(at, at, shape, w.norm, None, (false, eps), None);
        };
        // A delta net norms what it has read and gates it; Mamba 2 gates, then norms.
        if delta {
            norm(h.heads);
        }
        self.launch("recur_gate", [(rows * values).div_ceil(THREADS), 1, 1], THREADS, &params);
        if !delta {
            norm(h.groups);
        }
        out.fresh.set(false);
    }
}
