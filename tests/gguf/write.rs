//! Writes GGUF files, right and wrong ones.

/// A file as it is put together: the parts of the header as bytes, so that any of them can be wrong.
#[derive(Clone, Default)]
pub(crate) struct Writer {
    pub(crate) items: Vec<Vec<u8>>,
    pub(crate) tensors: Vec<Vec<u8>>,
    pub(crate) data: Vec<u8>,
}

pub(crate) fn text(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes(), s.as_bytes()].concat()
}

/// A key, the number of its type, its value.
pub(crate) fn item(key: &str, kind: u32, value: impl AsRef<[u8]>) -> Vec<u8> {
    [&text(key), &kind.to_le_bytes()[..], value.as_ref()].concat()
}

pub(crate) fn list(kind: u32, len: u64, values: impl AsRef<[u8]>) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &len.to_le_bytes(), values.as_ref()].concat()
}

/// A tensor's description; the innermost dimension first, as GGUF has them.
pub(crate) fn tensor(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut bytes = text(name);
    bytes.extend((dims.len() as u32).to_le_bytes());
    dims.iter().for_each(|d| bytes.extend(d.to_le_bytes()));
    bytes.extend(kind.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

impl Writer {
    pub(crate) fn item(mut self, key: &str, kind: u32, value: impl AsRef<[u8]>) -> Writer {
        self.items.push(item(key, kind, value));
        self
    }

    pub(crate) fn u32(self, key: &str, value: u32) -> Writer {
        self.item(key, 4, value.to_le_bytes())
    }

    pub(crate) fn u16(self, key: &str, value: u16) -> Writer {
        self.item(key, 2, value.to_le_bytes())
    }

    pub(crate) fn text(self, key: &str, value: &str) -> Writer {
        self.item(key, 8, text(value))
    }

    pub(crate) fn texts(self, key: &str, values: &[&str]) -> Writer {
        let bytes: Vec<u8> = values.iter().flat_map(|v| text(v)).collect();
        self.item(key, 9, list(8, values.len() as u64, bytes))
    }

    /// A tensor with this data, after those there are.
    pub(crate) fn tensor(mut self, name: &str, dims: &[u64], kind: u32, data: &[u8]) -> Writer {
        self.data.resize(self.data.len().next_multiple_of(32), 0);
        self.tensors.push(tensor(name, dims, kind, self.data.len() as u64));
        self.data.extend(data);
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let counts = (self.tensors.len() as u64, self.items.len() as u64);
        self.with(*b"GGUF", 3, counts.0, counts.1)
    }

    pub(crate) fn with(&self, magic: [u8; 4], version: u32, tensors: u64, items: u64) -> Vec<u8> {
        let mut bytes = magic.to_vec();
        bytes.extend(version.to_le_bytes());
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(items.to_le_bytes());
        self.items.iter().chain(&self.tensors).for_each(|part| bytes.extend(part));
        if !self.tensors.is_empty() {
            bytes.resize(bytes.len().next_multiple_of(32), 0);
        }
        bytes.extend(&self.data);
        bytes
    }
}
