//! Packed weights on disk: the second load of a model is a memory map.
//!
//! One file for a model and a quantization, named by the hash of all that the packed bytes depend on: the
//! checkpoint's content key, the version of the packed order, the matrices and their forms. A writer fills a file
//! of its own and renames it into place, so readers never see a part and two writers do not disturb each other.
//! Trouble here is never an error: without a cache the weights are packed in memory.
//!
//! ```text
//! "ferrule packed 2" (16 bytes) | key (32) | length of all (8) | 8 zero bytes | matrices, each at a multiple of 64
//! ```

use super::weights::Plan;
use crate::backend::cpu::{Bytes, Mat};
use crate::file::{self, Checkpoint};
use std::fs::{self, File};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Changes whenever the packed order, a form or a quantizer does.
const MAGIC: &[u8; 16] = b"ferrule packed 2";
/// Bytes before the first matrix.
const HEADER: usize = 64;
/// Models whose packed weights are smaller are quicker packed than looked up (what fuzzing reads is always looked up).
pub(super) const WORTH: u64 = if cfg!(fuzzing) { 0 } else { 64 << 20 };

/// The place of one model's packed weights.
pub(super) struct Cache {
    path: PathBuf,
    header: [u8; HEADER],
    length: u64,
}

impl Cache {
    pub(super) fn new(dir: &Path, checkpoint: &Checkpoint, plans: &[Plan]) -> Cache {
        let mut hasher = blake3::Hasher::new();
        hasher.update(MAGIC).update(&checkpoint.content_key());
        hasher.update(format!("{plans:?}").as_bytes());
        let key = hasher.finalize();
        let length = plans.iter().fold(HEADER as u64, |at, p| at + p.bytes() as u64);
        let mut header = [0; HEADER];
        header[..16].copy_from_slice(MAGIC);
        header[16..48].copy_from_slice(key.as_bytes());
        header[48..56].copy_from_slice(&length.to_le_bytes());
        Cache { path: dir.join(format!("{}.ferrule", key.to_hex())), header, length }
    }

    /// The matrices, if they are there and whole.
    pub(super) fn read(&self, plans: &[Plan]) -> Option<Vec<Mat>> {
        let file = File::open(&self.path).ok()?;
        if !file.metadata().is_ok_and(|m| m.is_file() && m.len() == self.length) {
            return None;
        }
        let map = file::map(&file).ok()?;
        if map.get(..HEADER)? != self.header {
            return None;
        }
        let map = Arc::new(map);
        let mut at = HEADER;
        let mat = |plan: &Plan| {
            let range = at..at + plan.bytes();
            at = range.end;
            Mat::new(plan.form, plan.n, plan.k, Bytes::Mapped(map.clone(), range)).ok()
        };
        plans.iter().map(mat).collect()
    }

    /// A file of one's own to fill; `None` if that can't be had.
    pub(super) fn writer(&self) -> Option<Writer> {
        let dir = self.path.parent()?;
        fs::create_dir_all(dir).ok()?;
        sweep(dir);
        // A name that no other writer has, in this process or another, on this machine or one that shares the disk.
        let random = RandomState::new().build_hasher().finish();
        let own = self.path.with_extension(format!("{random:016x}.tmp"));
        let mut file = BufWriter::with_capacity(1 << 20, File::create_new(&own).ok()?);
        let good = file.write_all(&self.header).is_ok();
        Some(Writer { file, own, path: self.path.clone(), good, renamed: false })
    }
}

/// Removes what writers that died have left a day ago or earlier.
fn sweep(dir: &Path) {
    const DAY: Duration = Duration::from_secs(24 * 60 * 60);
    let Ok(entries) = fs::read_dir(dir) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        let ours = name.is_some_and(|name| name.ends_with(".tmp") && name.len() == 64 + 1 + 16 + 4);
        let age = fs::metadata(&path).and_then(|m| m.modified()).map(|t| t.elapsed());
        if ours && matches!(age, Ok(Ok(age)) if age > DAY) {
            let _ = fs::remove_file(path); // another process may have been faster
        }
    }
}

/// A cache file that grows.
pub(super) struct Writer {
    file: BufWriter<File>,
    own: PathBuf,
    path: PathBuf,
    good: bool,
    renamed: bool,
}

impl Writer {
    /// Appends bytes. `false`: the cache can't be written, now or before.
    pub(super) fn write(&mut self, bytes: &[u8]) -> bool {
        self.good = self.good && self.file.write_all(bytes).is_ok();
        self.good
    }

    /// Puts the file in its place, if all could be written.
    pub(super) fn finish(mut self) -> bool {
        self.good = self.good && self.file.flush().is_ok();
        self.renamed = self.good && fs::rename(&self.own, &self.path).is_ok();
        self.renamed
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.renamed {
            let _ = fs::remove_file(&self.own); // nothing better can be done
        }
    }
}
