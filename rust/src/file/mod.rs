//! Bytes on disk -> named, checked, memory-mapped tensors. Knows no model; never copies tensor data.

pub mod gguf;
pub mod gguf_writer;
mod inspect;
pub mod safetensors;
mod write;

pub use inspect::inspect;
pub use write::{Writer, partial};

use crate::quant::Blocks;
use crate::{Error, Result};
use memmap2::Mmap;
use serde_json::Value;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

/// The longest index file that is read.
const MAX_INDEX: u64 = 100_000_000;

/// Element type of a stored tensor, or the type of the blocks that a row is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
#[rustfmt::skip]
pub enum Dtype {
    F32, F16, BF16, F64, I8, U8, I16, U16, I32, U32, I64, U64, Bool, F8E4M3, F8E5M2, F8E8M0,
    Blocks(Blocks),
}

impl Dtype {
    /// Every element type of safetensors.
    #[rustfmt::skip]
    pub const ALL: [Dtype; 16] = {
        use Dtype::*;
        [F32, F16, BF16, F64, I8, U8, I16, U16, I32, U32, I64, U64, Bool, F8E4M3, F8E5M2, F8E8M0]
    };

    /// Bytes of one element or block.
    pub const fn size(self) -> usize {
        match self {
            Dtype::F64 | Dtype::I64 | Dtype::U64 => 8,
            Dtype::F32 | Dtype::I32 | Dtype::U32 => 4,
            Dtype::F16 | Dtype::BF16 | Dtype::I16 | Dtype::U16 => 2,
            Dtype::I8 | Dtype::U8 | Dtype::Bool => 1,
            Dtype::F8E4M3 | Dtype::F8E5M2 | Dtype::F8E8M0 => 1,
            Dtype::Blocks(blocks) => blocks.bytes(),
        }
    }

    /// Elements of a block; 1 where there are none.
    pub const fn block(self) -> usize {
        if let Dtype::Blocks(blocks) = self { blocks.weights() } else { 1 }
    }

    /// The type of the blocks, if it is of blocks.
    pub const fn blocks(self) -> Option<Blocks> {
        if let Dtype::Blocks(blocks) = self { Some(blocks) } else { None }
    }

    /// Its name in a safetensors file, or ggml's.
    pub const fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::BF16 => "BF16",
            Dtype::F64 => "F64",
            Dtype::I8 => "I8",
            Dtype::U8 => "U8",
            Dtype::I16 => "I16",
            Dtype::U16 => "U16",
            Dtype::I32 => "I32",
            Dtype::U32 => "U32",
            Dtype::I64 => "I64",
            Dtype::U64 => "U64",
            Dtype::Bool => "BOOL",
            Dtype::F8E4M3 => "F8_E4M3",
            Dtype::F8E5M2 => "F8_E5M2",
            Dtype::F8E8M0 => "F8_E8M0",
            Dtype::Blocks(blocks) => blocks.name(),
        }
    }

    fn from_name(name: &str) -> Option<Dtype> {
        Dtype::ALL.into_iter().find(|dtype| dtype.name() == name)
    }
}

/// One tensor of a file: checked, so `buffer[range]` holds exactly `shape` x `dtype`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: Dtype,
    /// Its dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Where its bytes lie in the file.
    pub range: Range<usize>,
}

/// A tensor inside a mapped file.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Its name in the checkpoint.
    pub name: &'a str,
    /// Its element type.
    pub dtype: Dtype,
    /// Its dimensions, outermost first.
    pub shape: &'a [usize],
    /// Its bytes, little-endian, row-major; exactly `shape` x `dtype` long. Not aligned.
    pub bytes: &'a [u8],
}

/// The memory-mapped tensors of a model folder.
///
/// The files must not change while it is open: if another program cuts one short, reading the lost part
/// kills the process (SIGBUS), as with every memory map.
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<Mapped>,
    tensors: Vec<(usize, Entry)>, // (index of its file, entry), in file order
    by_name: HashMap<String, usize>,
}

struct Mapped {
    name: String,
    map: Arc<Mmap>,
    modified: Option<SystemTime>,
    /// What a GGUF file says about itself; its tensors are with the others.
    gguf: Option<gguf::Header>,
}

impl Checkpoint {
    /// Opens one .safetensors or GGUF file, or a folder with model.safetensors, with shards and their
    /// model.safetensors.index.json, or with one GGUF model. Every range is checked here.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        let kind = fs::metadata(path).map_err(|e| match e.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory => Error::ModelNotFound(format!(
                "{}: no such file or folder, expected a model folder or a GGUF file",
                path.display()
            )),
            _ => Error::io(path, e),
        })?;
        let mut checkpoint = Checkpoint {
            path: path.to_path_buf(),
            files: Vec::new(),
            tensors: Vec::new(),
            by_name: HashMap::new(),
        };
        let (single, index) =
            (path.join("model.safetensors"), path.join("model.safetensors.index.json"));
        if !kind.is_dir() {
            match gguf_at(path)? {
                Some(path) => checkpoint.add_gguf(&path)?,
                None => checkpoint.add(path)?,
            }
        } else if single.exists() {
            checkpoint.add(&single)?;
        } else if let Some(json) = read_json(&index, MAX_INDEX)? {
            checkpoint.add_shards(&index, &json)?;
        } else if let Some(path) = gguf_at(path)? {
            checkpoint.add_gguf(&path)?;
        } else {
            return Err(nothing_to_open(path)?);
        }
        Ok(checkpoint)
    }

    /// Maps one file and adds its tensors.
    fn add(&mut self, path: &Path) -> Result<()> {
        let meta = fs::metadata(path).map_err(|e| Error::io(path, e))?;
        if !meta.is_file() {
            return Err(Error::format(path, "expected a regular file")); // opening a pipe would wait
        }
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        let map = Arc::new(map(&file).map_err(|e| Error::io(path, e))?);
        not_a_pointer(path, &map)?;
        let wrong = |what: String| Error::format(path, what);
        let (gguf, entries) = if named_gguf(path) || map.starts_with(b"GGUF") {
            let mut header = gguf::parse(&map).map_err(wrong)?;
            let entries = std::mem::take(&mut header.tensors);
            (Some(header), entries)
        } else {
            (None, safetensors::parse(&map).map_err(wrong)?)
        };
        for entry in entries {
            let next = self.tensors.len();
            if let Some(earlier) = self.by_name.insert(entry.name.clone(), next) {
                let what = match self.files.get(self.tensors[earlier].0) {
                    Some(other) => format!("tensor `{}` is also in {}", entry.name, other.name),
                    None => format!("tensor `{}` is there twice", entry.name),
                };
                return Err(Error::format(path, what));
            }
            self.tensors.push((self.files.len(), entry));
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.files.push(Mapped { name, map, modified: meta.modified().ok(), gguf });
        Ok(())
    }

    /// Adds a GGUF file with all its splits.
    fn add_gguf(&mut self, path: &Path) -> Result<()> {
        let split = Split::of(path);
        let count = split.as_ref().map_or(1, |split| split.count);
        for i in 0..count {
            let path = split.as_ref().map_or(path.to_path_buf(), |split| split.path(i));
            if !path.exists() {
                let what =
                    format!("split {} of {count} is not there; was the download complete?", i + 1);
                return Err(Error::format(path, what));
            }
            self.add(&path)?;
            let wrong = |what: String| Error::format(&path, what);
            let metadata = self.files.last().and_then(Mapped::metadata);
            let said = |key: &str| match metadata {
                Some(metadata) => metadata.read(key, "a count", gguf::Value::as_u64).map_err(wrong),
                None => Ok(None),
            };
            let own = said("split.count")?.unwrap_or(1).max(1);
            if own != count as u64 {
                let what = format!(
                    "key `split.count`: found {own}, but the file's name says {count}; a split is called \
                     NAME-00001-of-00002.gguf, and so on"
                );
                return Err(wrong(what));
            }
            let number = said("split.no")?.unwrap_or(0);
            if number != i as u64 {
                return Err(wrong(format!("key `split.no`: found {number}, expected {i}")));
            }
            let all = said("split.tensors.count")?.filter(|_| i + 1 == count);
            if let Some(all) = all.filter(|all| *all != self.tensors.len() as u64) {
                let found = self.tensors.len();
                let what = format!(
                    "key `split.tensors.count`: found {all}, but the splits have {found} tensors"
                );
                return Err(wrong(what));
            }
        }
        Ok(())
    }

    /// What a GGUF file (the first, if it is split) says about its model.
    pub fn metadata(&self) -> Option<gguf::Metadata<'_>> {
        self.files.first()?.metadata()
    }

    /// Adds the shards that `index` names, and checks that each tensor lies where it says.
    fn add_shards(&mut self, index: &Path, json: &Value) -> Result<()> {
        let wrong = |what: String| Error::format(index, what);
        let Some(weight_map) = json.get("weight_map").and_then(Value::as_object) else {
            return Err(wrong("expected an object `weight_map` of tensor to file".into()));
        };
        let mut promised = Vec::with_capacity(weight_map.len());
        for (tensor, file) in weight_map {
            match file.as_str() {
                // A name that leads out of the folder must not be opened; `:` and `\` do so on Windows.
                Some(file)
                    if !matches!(file, "" | "." | "..")
                        && !file.contains(['/', '\\', ':', '\0']) =>
                {
                    promised.push((tensor, file));
                }
                _ => {
                    return Err(wrong(format!(
                        "tensor `{tensor}`: found {file}, expected the plain name of a file in this folder"
                    )));
                }
            }
        }
        let mut shards: Vec<&str> = promised.iter().map(|&(_, file)| file).collect();
        shards.sort_unstable();
        shards.dedup();
        for shard in shards {
            let path = self.path.join(shard);
            if !path.exists() {
                return Err(wrong(format!(
                    "names {shard}, which is not in the folder; was the download complete?"
                )));
            }
            self.add(&path)?;
        }
        for (tensor, file) in promised {
            match self.by_name.get(tensor).map(|&i| self.files[self.tensors[i].0].name.as_str()) {
                Some(found) if found == file => {}
                Some(found) => {
                    return Err(wrong(format!(
                        "tensor `{tensor}`: found in {found}, expected in {file}"
                    )));
                }
                None => return Err(wrong(format!("tensor `{tensor}` is not in {file}"))),
            }
        }
        Ok(())
    }

    /// Names of all tensors, in file order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.iter().map(|(_, entry)| entry.name.as_str())
    }

    /// The tensor called `name`, if there is one.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let (file, entry) = &self.tensors[*self.by_name.get(name)?];
        Some(TensorView {
            name: &entry.name,
            dtype: entry.dtype,
            shape: &entry.shape,
            bytes: &self.files[*file].map[entry.range.clone()],
        })
    }

    /// The file that holds the tensor called `name`, and where in it.
    pub fn mapped(&self, name: &str) -> Option<(Arc<Mmap>, Range<usize>)> {
        let (file, entry) = &self.tensors[*self.by_name.get(name)?];
        Some((self.files[*file].map.clone(), entry.range.clone()))
    }

    /// The tensor called `name`, or an error that names it and the nearest names there are.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        self.get(name).ok_or_else(|| {
            let shared = |other: &str| {
                let start = name.bytes().zip(other.bytes()).take_while(|(a, b)| a == b).count();
                let end =
                    name.bytes().rev().zip(other.bytes().rev()).take_while(|(a, b)| a == b).count();
                start + end
            };
            let mut near: Vec<&str> = self.names().collect();
            near.sort_by_key(|other| std::cmp::Reverse(shared(other)));
            near.truncate(3);
            let near = if near.is_empty() {
                "it has none".into()
            } else {
                format!("nearest: {}", near.join(", "))
            };
            Error::format(&self.path, format!("no tensor `{name}`; {near}"))
        })
    }

    /// Tells the system that a tensor's bytes are not needed soon, so that reading a whole checkpoint does not
    /// fill the memory with it. They can still be read.
    pub fn release(&self, tensor: &TensorView<'_>) {
        #[cfg(not(unix))]
        let _ = tensor; // the system finds out by itself
        #[cfg(unix)]
        for Mapped { map, .. } in &self.files {
            let Some(at) = tensor.bytes.as_ptr().addr().checked_sub(map.as_ptr().addr()) else {
                continue;
            };
            if at + tensor.bytes.len() <= map.len() {
                // SAFETY: the map is of a file and read-only: dropped pages come back unchanged from it.
                let _ = unsafe {
                    let advice = memmap2::UncheckedAdvice::DontNeed;
                    map.unchecked_advise_range(advice, at, tensor.bytes.len())
                };
            }
        }
    }

    /// Total bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.map.len() as u64).sum()
    }

    /// A key of the content: file names, sizes, modification times, headers and sampled bytes.
    ///
    /// Files that were replaced, retrained or cut have another key. Not noticed: a file whose bytes were
    /// changed in place between the sampled pieces (16 of 64 KiB per file, the ends included) with its
    /// modification time set back. Copying a folder without its times changes the key.
    pub fn content_key(&self) -> [u8; 32] {
        const PIECE: usize = 64 << 10;
        const PIECES: usize = 16;
        let mut hash = blake3::Hasher::new_derive_key("ferrule 2026-11 checkpoint content key");
        for (i, file) in self.files.iter().enumerate() {
            hash.update(&(file.name.len() as u64).to_le_bytes());
            hash.update(file.name.as_bytes());
            hash.update(&(file.map.len() as u64).to_le_bytes());
            let since = file.modified.and_then(|t| t.duration_since(SystemTime::UNIX_EPOCH).ok());
            hash.update(&since.map_or(0, |t| t.as_nanos()).to_le_bytes());
            let of_file = self.tensors.iter().filter(|(owner, _)| *owner == i);
            let header = of_file.map(|(_, e)| e.range.start).min().unwrap_or(file.map.len());
            let (header, data) = file.map.split_at(header);
            hash.update(header);
            match data.len().checked_sub(PIECE) {
                Some(last) if data.len() > PIECES * PIECE => {
                    for piece in 0..PIECES {
                        // u128: the product overflows on 32-bit machines.
                        let at = (last as u128 * piece as u128 / (PIECES - 1) as u128) as usize;
                        hash.update(&data[at..at + PIECE]);
                    }
                }
                _ => _ = hash.update(data),
            }
        }
        *hash.finalize().as_bytes()
    }
}

/// Why a folder without safetensors cannot be opened; lists what is there.
fn nothing_to_open(folder: &Path) -> Result<Error> {
    let names = names(folder)?;
    let torch = |name: &&String| [".bin", ".pt", ".pth"].iter().any(|end| name.ends_with(end));
    let remedy = match names.iter().find(torch) {
        Some(name) => format!(
            "; convert {name} to safetensors (transformers: \
             AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder))"
        ),
        None => String::new(),
    };
    let found = match names.len() {
        0 => "nothing".to_owned(),
        1..=12 => names.join(", "),
        n => format!("{}, ... ({n} names)", names[..12].join(", ")),
    };
    let what = format!(
        "expected model.safetensors, model.safetensors.index.json or a GGUF file, found {found}{remedy}"
    );
    Ok(Error::format(folder, what))
}

impl Mapped {
    fn metadata(&self) -> Option<gguf::Metadata<'_>> {
        Some(gguf::Metadata::new(self.gguf.as_ref()?, &self.map))
    }
}

/// Where a split GGUF model lies: FOLDER/PREFIX-00001-of-00003.gguf, and so on.
struct Split {
    prefix: String,
    folder: PathBuf,
    count: usize,
}

impl Split {
    fn of(path: &Path) -> Option<Split> {
        let stem = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
        let (rest, count) = stem.rsplit_once("-of-")?;
        let (prefix, number) = rest.rsplit_once('-')?;
        let digits = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
        if !digits(number) || !digits(count) {
            return None;
        }
        let (number, count) = (number.parse::<usize>().ok()?, count.parse().ok()?);
        let folder = path.parent().unwrap_or(Path::new("")).to_path_buf();
        (1..=count).contains(&number).then(|| Split { prefix: prefix.to_owned(), folder, count })
    }

    fn path(&self, i: usize) -> PathBuf {
        self.folder.join(format!("{}-{:05}-of-{:05}.gguf", self.prefix, i + 1, self.count))
    }
}

/// The GGUF file that `path` is, or the only one (the first, if it is split) of a folder without safetensors. `None`:
/// there is none.
pub fn gguf_at(path: &Path) -> Result<Option<PathBuf>> {
    if !path.is_dir() {
        let magic = || {
            let mut start = [0; 4];
            let read = path.is_file()
                && File::open(path).is_ok_and(|mut f| f.read_exact(&mut start).is_ok());
            read && start == *b"GGUF"
        };
        return Ok((named_gguf(path) || magic()).then(|| path.to_path_buf()));
    }
    if ["model.safetensors", "model.safetensors.index.json"].iter().any(|n| path.join(n).exists()) {
        return Ok(None);
    }
    let mut found = Vec::new();
    for name in names(path)? {
        let file = path.join(&name);
        // mmproj-*: the vision or audio tower beside a model.
        if named_gguf(&file) && !name.starts_with("mmproj") && !name.starts_with('.') {
            found.push(Split::of(&file).map_or(file, |split| split.path(0)));
        }
    }
    found.sort_unstable();
    found.dedup();
    match found.len() {
        0 | 1 => Ok(found.pop()),
        n => {
            let names = found.iter().filter_map(|f| Some(f.file_name()?.to_string_lossy()));
            let names: Vec<_> = names.take(8).collect();
            let what = format!(
                "found {n} GGUF models ({}{}), expected one; give the path of the file",
                names.join(", "),
                if n > names.len() { ", ..." } else { "" }
            );
            Err(Error::format(path, what))
        }
    }
}

fn named_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
}

/// The names in a folder, sorted.
fn names(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for item in fs::read_dir(folder).map_err(|e| Error::io(folder, e))?.take(10_000) {
        let item = item.map_err(|e| Error::io(folder, e))?;
        names.push(item.file_name().to_string_lossy().into_owned());
    }
    names.sort_unstable();
    Ok(names)
}

/// Maps a whole file for reading. As with [`Checkpoint`], the file must not be cut short while it is mapped.
pub fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is read-only, and only bytes are read from it, for which any value is valid.
    unsafe { Mmap::map(file) }
}

/// Reads a file of at most `limit` bytes; `Ok(None)` if it is not there.
pub fn read(path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
    match fs::metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(path, e)),
        Ok(meta) if !meta.is_file() => return Err(Error::format(path, "expected a regular file")),
        Ok(_) => {}
    }
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let mut bytes = Vec::new();
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
    if bytes.len() as u64 > limit {
        return Err(Error::format(
            path,
            format!("found more than {limit} bytes, expected at most that"),
        ));
    }
    not_a_pointer(path, &bytes)?;
    Ok(Some(bytes))
}

/// What `git clone` leaves in place of a large file where Git LFS is not installed is an error with a remedy.
fn not_a_pointer(path: &Path, bytes: &[u8]) -> Result<()> {
    match bytes.starts_with(b"version https://git-lfs") {
        true => Err(Error::format(
            path,
            "is a Git LFS pointer, expected the file that it stands for: run `git lfs pull` in its folder, or \
             download it again",
        )),
        false => Ok(()),
    }
}

/// Reads a JSON file of at most `limit` bytes; `Ok(None)` if it is not there.
pub fn read_json(path: &Path, limit: u64) -> Result<Option<Value>> {
    let Some(bytes) = read(path, limit)? else { return Ok(None) };
    let json =
        serde_json::from_slice(&bytes).map_err(|e| Error::format(path, format!("JSON: {e}")))?;
    Ok(Some(json))
}
