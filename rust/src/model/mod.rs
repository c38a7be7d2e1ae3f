//! A model: architecture as data (`spec`), weights, the one forward pass, the paged KV cache.

mod budget;
mod cache;
mod describe;
pub mod divergence;
pub mod export;
mod forward;
pub mod kv;
mod offload;
mod quantize;
mod sequence;
pub mod spec;
mod weights;

pub use crate::backend::{Draw, KvDtype, PAGE};
pub use budget::{Budget, Wish};
pub use describe::{CHUNK, Description, describe};
pub use forward::{Kv, Model};
pub use offload::{GpuLayers, Offload, Planned};
pub use quantize::{Quantize, Rule, Written, quantize};
pub use sequence::Sequence;

use crate::backend::Backend;
use crate::backend::cpu::{Cpu, Tiles};
use crate::file::{self, Checkpoint};
use crate::{Error, Result};
use spec::Spec;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Stands in a page table where a page was freed because no later position sees it.
pub const NO_PAGE: u32 = u32::MAX;

/// What a position needs of itself and those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sees {
    /// The keys and values of all.
    All,
    /// The keys and values of the last so many, its own included.
    Window(usize),
    /// The state that the one before it left: a recurrence over all, of a fixed size.
    State,
}

impl From<Option<usize>> for Sees {
    /// Of a window, if there is one.
    fn from(window: Option<usize>) -> Sees {
        window.map_or(Sees::All, Sees::Window)
    }
}

/// Layers that share a page table because they see the same positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvGroup {
    /// What a position needs.
    pub sees: Sees,
    /// Bytes of one page (of one whole state), all layers of the group together.
    pub page_bytes: usize,
}

/// Consecutive positions of one sequence in a batch.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// Their token ids; not empty.
    pub tokens: &'a [u32],
    /// Position of `tokens[0]`.
    pub start: usize,
    /// The prompt of its request has more than [`Forward::long_after`] tokens.
    pub long: bool,
    /// For each group: page ids of positions 64*i .. 64*i + 64, `NO_PAGE` where freed. For a group of states two:
    /// of the state before `start` (`NO_PAGE` where that is 0), and of the one that the last token leaves.
    pub pages: &'a [Vec<u32>],
    /// Which logits are asked for.
    pub wanted: Wanted,
}

/// The positions of a chunk whose logits are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// None: their keys and values are enough.
    None,
    /// Those of the last position.
    Last,
    /// Those of every position.
    All,
}

/// What a wanted row of logits comes to.
#[derive(Clone, Debug, PartialEq)]
pub enum Drawn {
    /// The token drawn from them.
    Token(u32),
    /// The logits, which are no numbers, allow no token, or are not drawn from where they are.
    Logits(Vec<f32>),
}

/// What the engine asks of a model.
pub trait Forward {
    /// Memory for keys, values and states.
    type Kv;
    /// Width of a row of logits.
    fn vocab(&self) -> usize;
    /// Positions the model was made for.
    fn context_length(&self) -> usize;
    /// Requests whose prompts have more tokens than this are computed otherwise from the first on
    /// (see [`spec::Long`]), and share no pages with others.
    fn long_after(&self) -> Option<usize> {
        None
    }
    /// Its page tables.
    fn kv_groups(&self) -> Vec<KvGroup>;
    /// Memory for this many pages of each group.
    fn new_kv(&self, pages: &[usize]) -> Result<Self::Kv>;
    /// Copies pages, one after the other.
    fn copy_pages(&self, kv: &mut Self::Kv, copies: &[kv::PageCopy]);
    /// Runs every chunk; the logits of the wanted rows, f32 [rows, vocab], in order. Looks at
    /// `interrupt` between layers: `Error::Interrupted` leaves the chunks' positions undefined, and
    /// the states before them as they were.
    fn forward(
        &self,
        kv: &mut Self::Kv,
        batch: &[Chunk<'_>],
        interrupt: &AtomicBool,
    ) -> Result<Vec<f32>>;
    /// As `forward`, and draws a token from each of the wanted rows where it is, if that can be done.
    fn forward_and_draw(
        &self,
        kv: &mut Self::Kv,
        batch: &[Chunk<'_>],
        _draws: &[Draw<'_>],
        interrupt: &AtomicBool,
    ) -> Result<Vec<Drawn>> {
        let logits = self.forward(kv, batch, interrupt)?;
        Ok(logits.chunks(self.vocab()).map(|row| Drawn::Logits(row.to_vec())).collect())
    }
}

/// How weights are kept in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Quantization {
    /// The bits that the file has.
    #[default]
    Auto,
    /// 4.5 bits a weight, int8 activations.
    Int4,
    /// 5.375 bits a weight, int8 activations.
    Int5,
    /// 6.625 bits a weight, int8 activations.
    Int6,
    /// 8.125 bits a weight, int8 activations.
    Int8,
    /// As stored, f32 arithmetic.
    None,
}

/// How to load a model.
#[derive(Clone)]
pub struct LoadOptions {
    /// How weights are kept.
    pub quantization: Quantization,
    /// Threads; `None` = as [`topology::auto`](crate::backend::cpu::topology::auto) says.
    pub threads: Option<usize>,
    /// How matrix products are cut.
    pub tiles: Tiles,
    /// The kernel set to use; `None` = the best one.
    pub isa: Option<String>,
    /// How keys and values are kept.
    pub kv_dtype: KvDtype,
    /// Where packed weights are kept for the next load; `None` = nowhere.
    pub cache_dir: Option<PathBuf>,
    /// The TOML text of a family to use instead of the one that ships for the architecture.
    pub family: Option<String>,
    /// Matrices are random and made on the device, whatever the file has: to measure with.
    pub random: bool,
    /// Called with the bytes packed so far and in all.
    pub progress: Option<Arc<dyn Fn(u64, u64) + Send + Sync>>,
}

impl Default for LoadOptions {
    fn default() -> LoadOptions {
        LoadOptions {
            quantization: Quantization::Auto,
            threads: None,
            tiles: Tiles::default(),
            isa: None,
            kv_dtype: KvDtype::F16,
            cache_dir: None,
            family: None,
            random: false,
            progress: None,
        }
    }
}

impl LoadOptions {
    fn report(&self, done: u64, total: u64) {
        if let Some(progress) = &self.progress {
            progress(done, total);
        }
    }
}

/// config.json is read up to this many bytes.
const MAX_CONFIG: u64 = 16 << 20;

/// The model in `folder`, or in the GGUF file that `folder` is or has: what it is, and its tensors, with their path.
fn open(folder: &Path, options: &LoadOptions) -> Result<(Spec, Checkpoint, PathBuf)> {
    let family = options.family.as_deref();
    if let Some(path) = file::gguf_at(folder)? {
        let checkpoint = Checkpoint::open(&path)?;
        let facts = spec::gguf::facts(&path, &checkpoint)?;
        return Ok((Spec::of_gguf(&path, &facts, family)?, checkpoint, path));
    }
    let path = folder.join("config.json");
    let mut config = file::read_json(&path, MAX_CONFIG)?.ok_or_else(|| {
        let path = path.display();
        let what = format!("{path}: no such file, expected a model folder or a GGUF file");
        Error::ModelNotFound(what)
    })?;
    quantize::original(&mut config)?;
    Ok((Spec::new(&config, family)?, Checkpoint::open(folder)?, folder.to_path_buf()))
}

/// Loads the model in `folder` onto the CPU, or the GGUF file that `folder` is or has.
pub fn load(folder: &Path, options: LoadOptions) -> Result<Model<Cpu>> {
    let opened = open(folder, &options)?;
    let cpu = cpu(&options)?;
    place(opened, cpu, options)
}

/// As [`load`], onto CUDA device `ordinal`, or the first that kernels run on.
#[cfg(feature = "cuda")]
pub fn load_cuda(
    folder: &Path,
    ordinal: Option<usize>,
    options: LoadOptions,
) -> Result<Model<crate::backend::cuda::Cuda>> {
    let opened = open(folder, &options)?;
    opened.0.runs_on_cuda()?;
    let cuda = open_cuda(ordinal, &options)?;
    place(opened, cuda, options)
}

/// CUDA device `ordinal`, or the first that kernels run on, with the CPU that `options` ask for.
#[cfg(feature = "cuda")]
pub fn open_cuda(
    ordinal: Option<usize>,
    options: &LoadOptions,
) -> Result<crate::backend::cuda::Cuda> {
    crate::backend::cuda::Cuda::new(ordinal, cpu(options)?)
}

/// As [`load`], onto a machine that is there: one that [`Offload`] has said the model fits.
pub fn load_onto<B: Backend>(folder: &Path, backend: B, options: LoadOptions) -> Result<Model<B>> {
    place(open(folder, &options)?, backend, options)
}

/// The CPU that `options` ask for.
fn cpu(options: &LoadOptions) -> Result<Cpu> {
    let threads = options.threads.unwrap_or_else(|| crate::backend::cpu::topology::auto().count);
    Cpu::new(threads, options.isa.as_deref())?.with_tiles(options.tiles)
}

fn place<B: Backend>(
    (spec, checkpoint, path): (Spec, Checkpoint, PathBuf),
    backend: B,
    options: LoadOptions,
) -> Result<Model<B>> {
    let (weights, note) = weights::load(&path, &checkpoint, &spec, &backend, &options)?;
    backend.finish()?;
    let kv_dtype = options.kv_dtype;
    let (groups, group_of) = forward::kv_groups(&spec, kv_dtype);
    Ok(Model { spec, backend, weights, kv_dtype, group_of, groups, note })
}
