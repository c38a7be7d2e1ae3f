//! Writes a GGUF file, version 3, little-endian: header, then tensor by tensor, each at a multiple of 32. The file has
//! another name until it is whole. Never keeps a tensor.

use super::gguf::{self, Kind};
use super::{Checkpoint, Dtype, partial};
use crate::{Error, Result};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// Tensors begin at multiples of this.
const ALIGNMENT: usize = 32;

/// A value of the metadata that is to be written.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // GGUF's own types
pub enum Datum {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    U32s(Vec<u32>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    Bools(Vec<bool>),
    Texts(Vec<String>),
    /// As it was in another file.
    Copied(Kind, Vec<u8>),
}

impl Datum {
    /// Type and value.
    fn write(&self, out: &mut Vec<u8>) {
        fn list<T, const N: usize>(
            out: &mut Vec<u8>,
            kind: Kind,
            of: &[T],
            b: impl Fn(&T) -> [u8; N],
        ) {
            number(out, kind);
            out.extend((of.len() as u64).to_le_bytes());
            of.iter().for_each(|x| out.extend(b(x)));
        }
        fn number(out: &mut Vec<u8>, kind: Kind) {
            out.extend((kind as u32).to_le_bytes());
        }
        number(
            out,
            match self {
                Datum::U32(_) => Kind::U32,
                Datum::F32(_) => Kind::F32,
                Datum::Bool(_) => Kind::Bool,
                Datum::Text(_) => Kind::Text,
                Datum::Copied(kind, _) => *kind,
                _ => Kind::List,
            },
        );
        match self {
            Datum::U32(x) => out.extend(x.to_le_bytes()),
            Datum::F32(x) => out.extend(x.to_le_bytes()),
            Datum::Bool(x) => out.push(u8::from(*x)),
            Datum::Text(x) => text(out, x),
            Datum::U32s(x) => list(out, Kind::U32, x, |x| x.to_le_bytes()),
            Datum::I32s(x) => list(out, Kind::I32, x, |x| x.to_le_bytes()),
            Datum::F32s(x) => list(out, Kind::F32, x, |x| x.to_le_bytes()),
            Datum::Bools(x) => list(out, Kind::Bool, x, |x| [u8::from(*x)]),
            Datum::Texts(x) => {
                list(out, Kind::Text, &[] as &[u8], |x| [*x]);
                let at = out.len() - 8;
                out[at..].copy_from_slice(&(x.len() as u64).to_le_bytes());
                x.iter().for_each(|x| text(out, x));
            }
            Datum::Copied(_, bytes) => out.extend(bytes),
        }
    }
}

fn text(out: &mut Vec<u8>, x: &str) {
    out.extend((x.len() as u64).to_le_bytes());
    out.extend(x.as_bytes());
}

/// A tensor to be: name, type, shape with the outermost dimension first.
pub type Announced = (String, Dtype, Vec<usize>);

/// Bytes of it.
pub fn size((_, dtype, shape): &Announced) -> usize {
    shape.iter().product::<usize>() / dtype.block() * dtype.size()
}

/// The header of a file.
pub fn header(items: &[(String, Datum)], tensors: &[Announced]) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((items.len() as u64).to_le_bytes());
    for (key, value) in items {
        text(&mut out, key);
        value.write(&mut out);
    }
    let mut at = 0;
    for tensor @ (name, dtype, shape) in tensors {
        text(&mut out, name);
        out.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|d| out.extend((*d as u64).to_le_bytes()));
        out.extend(gguf::number(*dtype).to_le_bytes());
        out.extend((at as u64).to_le_bytes());
        at = (at + size(tensor)).next_multiple_of(ALIGNMENT);
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    out
}

/// A file whose tensors are known and come in their order.
pub struct GgufWriter {
    file: BufWriter<File>,
    /// What it is called until it is whole.
    own: PathBuf,
    path: PathBuf,
    /// Bytes of the tensors that are to come, the last first.
    left: Vec<usize>,
    finished: bool,
}

impl GgufWriter {
    /// Starts a file with these keys and tensors; it has its full length at once.
    pub fn new(
        path: &Path,
        items: &[(String, Datum)],
        tensors: &[Announced],
    ) -> Result<GgufWriter> {
        let own = partial(path)?;
        let header = header(items, tensors);
        let mut left: Vec<usize> = tensors.iter().map(size).collect();
        left.reverse();
        let io = |e| Error::io(&own, e);
        let file = File::create_new(&own).map_err(io)?;
        let mut writer = GgufWriter {
            file: BufWriter::with_capacity(1 << 20, file),
            own: own.clone(),
            path: path.to_path_buf(),
            left,
            finished: false,
        };
        let data: u64 = writer.left.iter().map(|n| n.next_multiple_of(ALIGNMENT) as u64).sum();
        writer.bytes(&header)?;
        writer.file.flush().map_err(io)?;
        writer.file.get_ref().set_len(header.len() as u64 + data).map_err(io)?;
        Ok(writer)
    }

    /// The file as it is so far, with zeros where tensors are to come.
    pub fn checkpoint(&mut self) -> Result<Checkpoint> {
        self.file.flush().map_err(|e| Error::io(&self.own, e))?;
        Checkpoint::open(&self.own)
    }

    /// The next tensor.
    pub fn tensor(&mut self, bytes: &[u8]) -> Result<()> {
        let expected = self.left.pop();
        assert_eq!(expected, Some(bytes.len()), "tensors come as they were announced");
        self.bytes(bytes)?;
        let zeros = bytes.len().next_multiple_of(ALIGNMENT) - bytes.len();
        self.bytes(&[0; ALIGNMENT][..zeros])
    }

    /// The end: all bytes are on the disk, and the file gets its name. Its length.
    pub fn finish(mut self) -> Result<u64> {
        assert!(self.left.is_empty(), "tensors come as they were announced");
        let io = |e| Error::io(&self.own, e);
        self.file.flush().and_then(|()| self.file.get_ref().sync_all()).map_err(io)?;
        let length = self.file.get_ref().metadata().map_err(io)?.len();
        fs::rename(&self.own, &self.path).map_err(|e| Error::io(&self.path, e))?;
        self.finished = true;
        Ok(length)
    }

    fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|e| Error::io(&self.own, e))
    }
}

impl Drop for GgufWriter {
    fn drop(&mut self) {
        if !self.finished {
            let _ = fs::remove_file(&self.own); // nothing better can be done
        }
    }
}
