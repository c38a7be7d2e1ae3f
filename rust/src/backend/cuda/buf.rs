//! Activations on the device, and the quantized copy of them that products read.

use super::device::{Device, Memory};
use super::{launch, pack};
use std::cell::{Cell, RefCell};
use std::sync::Arc;

/// Activations `[rows, width]` on the device.
pub struct Buf {
    pub(super) device: Arc<Device>,
    pub(super) memory: Memory,
    /// Where they are: in `memory`, or among a step's inputs.
    pub(super) at: u64,
    pub(super) rows: usize,
    pub(super) width: usize,
    /// The same, quantized, if `fresh`.
    pub(super) acts: RefCell<Memory>,
    pub(super) fresh: Cell<bool>,
}

impl Buf {
    pub(super) fn new(device: &Arc<Device>) -> Buf {
        Buf {
            device: device.clone(),
            memory: Memory::none(),
            at: 0,
            rows: 0,
            width: 0,
            acts: RefCell::new(Memory::none()),
            fresh: Cell::new(false),
        }
    }
    /// Makes room; the values are unspecified.
    pub(super) fn shape(&mut self, rows: usize, width: usize) {
        self.device.grow(&mut self.memory, rows * width * 4);
        (self.at, self.rows, self.width) = (self.memory.at, rows, width);
        self.fresh.set(false);
    }
    /// Blocks of 256 numbers of a row.
    pub(super) fn blocks(&self) -> usize {
        pack::groups(self.width).1
    }
    /// Where the quantized values go.
    pub(super) fn acts(&self) -> launch::Acts {
        let blocks = self.rows * self.blocks();
        let mut memory = self.acts.borrow_mut();
        self.device.grow(&mut memory, blocks * (256 + 16 + 4));
        let q = memory.at;
        launch::Acts { q, sums: q + blocks as u64 * 256, s: q + blocks as u64 * 272 }
    }
}
