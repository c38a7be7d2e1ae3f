//! Writes a safetensors file, tensor by tensor: no tensor is kept.

use super::Dtype;
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// A name beside `out` that nobody has, for what becomes `out` when it is whole.
pub fn partial(out: &Path) -> Result<PathBuf> {
    let name = out
        .file_name()
        .ok_or_else(|| Error::parameter("out", out.display(), "the path of something to make"))?;
    let random = RandomState::new().build_hasher().finish();
    Ok(out.with_file_name(format!(".{}.{random:016x}.partial", name.to_string_lossy())))
}

/// A file whose tensors are known and come in their order.
pub struct Writer {
    file: BufWriter<File>,
    path: PathBuf,
    /// Bytes of the tensors that are to come, the last first.
    left: Vec<usize>,
}

impl Writer {
    /// Starts a file with these tensors. The first begins at a multiple of 64 bytes.
    pub fn new(path: &Path, tensors: &[(String, Dtype, Vec<usize>)]) -> Result<Writer> {
        let mut header = Map::new();
        header.insert("__metadata__".into(), json!({"format": "pt"}));
        let (mut at, mut left) = (0, Vec::new());
        for (name, dtype, shape) in tensors {
            let bytes = shape.iter().product::<usize>() * dtype.size();
            let entry =
                json!({"dtype": dtype.name(), "shape": shape, "data_offsets": [at, at + bytes]});
            header.insert(name.clone(), entry);
            left.push(bytes);
            at += bytes;
        }
        left.reverse();
        let mut header = Value::Object(header).to_string();
        while !(8 + header.len()).is_multiple_of(64) {
            header.push(' ');
        }
        let file = File::create_new(path).map_err(|e| Error::io(path, e))?;
        let file = BufWriter::with_capacity(1 << 20, file);
        let mut writer = Writer { file, path: path.to_path_buf(), left };
        writer.bytes(&(header.len() as u64).to_le_bytes())?;
        writer.bytes(header.as_bytes())?;
        Ok(writer)
    }

    /// The next tensor.
    pub fn tensor(&mut self, bytes: &[u8]) -> Result<()> {
        let expected = self.left.pop();
        assert_eq!(expected, Some(bytes.len()), "tensors come as they were announced");
        self.bytes(bytes)
    }

    /// The end: all bytes are on the disk.
    pub fn finish(mut self) -> Result<()> {
        assert!(self.left.is_empty(), "tensors come as they were announced");
        let synced = self.file.flush().and_then(|()| self.file.get_ref().sync_all());
        synced.map_err(|e| Error::io(&self.path, e))
    }

    fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|e| Error::io(&self.path, e))
    }
}
