//! The pages of keys and values on a device, and what a step says of them. The order within a page is at the head of
//! `kernels/attend.cuh`.

use super::device::{Device, Memory};
use super::launch;
use crate::Result;
use crate::backend::{KvDtype, KvLayer, PAGE, Span};
use std::sync::Arc;

/// Pages of keys and values of every layer.
pub struct Kv {
    layers: Vec<(Option<Memory>, launch::Pages)>,
    pub(super) dtype: KvDtype,
}

impl Kv {
    pub(super) fn new(device: &Arc<Device>, dtype: KvDtype, layers: &[KvLayer]) -> Result<Kv> {
        let (number, dtype_code, plain) = match dtype {
            KvDtype::F32 => (4, 0, "attend_f32"),
            KvDtype::F16 => (2, 1, "attend_f16"),
            KvDtype::Int8 => (1, 2, "attend_i8"),
        };
        // All that a step takes beside products.
        device.load(&["attention", "sample"])?;
        for l in layers.iter().filter(|l| l.pages > 0) {
            device.load(&[if l.values { plain } else { "attend_latent" }])?;
        }
        let layer = |l: &KvLayer| {
            let keys = PAGE * l.head_dim.next_multiple_of(16 / number) * number;
            let values = usize::from(l.values);
            let numbers = keys + values * PAGE * l.head_dim * number;
            let scales = if dtype == KvDtype::Int8 { (1 + values) * 4 * PAGE } else { 0 };
            let head = (numbers + scales).next_multiple_of(16);
            let page = head * l.heads;
            let mut pages = launch::Pages {
                bytes: 0,
                page: page as u32,
                head: head as u32,
                keys: keys as u32,
                numbers: numbers as u32,
                dtype: dtype_code,
                pad: 0,
            };
            if l.pages == 0 {
                return Ok((None, pages));
            }
            let memory = device.alloc(l.pages * page)?;
            device.clear(&memory)?;
            pages.bytes = memory.at;
            Ok((Some(memory), pages))
        };
        Ok(Kv { layers: layers.iter().map(layer).collect::<Result<_>>()?, dtype })
    }

    pub(super) fn pages(&self, layer: usize) -> launch::Pages {
        self.layers[layer].1
    }
}

/// The spans as the kernels read them: for each its first row, positions, first position and the place of its table;
/// the tables; the span of each row.
pub(super) fn spans(device: &Device, spans: &[Span<'_>]) -> launch::Spans {
    let mut words = Vec::new();
    let mut at = 0;
    for span in spans {
        words.extend([span.first_row, span.len, span.start, at].map(|n| n as u32));
        at += span.table.len();
    }
    let tables = words.len() as u32;
    words.extend(spans.iter().flat_map(|span| span.table));
    let of_row = words.len() as u32;
    // Rows of spans follow each other.
    words.extend(spans.iter().enumerate().flat_map(|(i, s)| std::iter::repeat_n(i as u32, s.len)));
    launch::Spans { words: device.input(&words), tables, of_row }
}
