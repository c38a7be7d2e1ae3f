//! GGUF files, versions 2 and 3, little-endian: a header of typed key/value pairs, tensor descriptions, the data.
//! Checks every range once, so that an [`Entry`] can be sliced without thought; reads no tensor data. Lists and
//! texts stay in the file: what is allocated is a small multiple of the header, whatever the counts in it say.

use super::{Dtype, Entry};
use crate::quant::Blocks;
use std::collections::HashSet;
use std::fmt;
use std::ops::Range;

/// The longest name of a key or a tensor: GGUF's own limit for keys.
const MAX_NAME: usize = 65_535;
/// More pairs or tensors than any published file has; each costs more memory here than it takes in the file.
const MAX_COUNT: usize = 1 << 16;
/// The most dimensions of a tensor, as in ggml.
const MAX_DIMS: u32 = 4;
/// Where tensors lie, unless the file says otherwise: at multiples of this.
const ALIGNMENT: usize = 32;

/// The type of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
#[rustfmt::skip]
pub enum Kind { U8, I8, U16, I16, U32, I32, F32, Bool, Text, List, U64, I64, F64 }

impl Kind {
    /// Every type; its place is its number in a file.
    #[rustfmt::skip]
    const ALL: [(Kind, &str, usize); 13] = [
        (Kind::U8, "u8", 1), (Kind::I8, "i8", 1), (Kind::U16, "u16", 2), (Kind::I16, "i16", 2),
        (Kind::U32, "u32", 4), (Kind::I32, "i32", 4), (Kind::F32, "f32", 4), (Kind::Bool, "bool", 1),
        (Kind::Text, "text", 8), (Kind::List, "list", 12), (Kind::U64, "u64", 8), (Kind::I64, "i64", 8),
        (Kind::F64, "f64", 8),
    ];

    fn from_number(number: u32) -> Option<Kind> {
        Kind::ALL.get(number as usize).map(|(kind, ..)| *kind)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        Kind::ALL[self as usize].1
    }

    /// Bytes of a value; of a text or a list the least there can be.
    fn bytes(self) -> usize {
        Kind::ALL[self as usize].2
    }
}

/// A value of the metadata.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'a> {
    /// u8, u16, u32 or u64.
    Unsigned(u64),
    /// i8, i16, i32 or i64.
    Signed(i64),
    /// f32 or f64.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// UTF-8.
    Text(&'a str),
    /// Values of one type.
    List(List<'a>),
}

/// Values of one type, read from the file one by one.
#[derive(Clone, Copy, PartialEq)]
pub struct List<'a> {
    /// Their type; never a list.
    pub kind: Kind,
    /// How many there are.
    pub len: usize,
    bytes: &'a [u8],
}

impl fmt::Debug for List<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}; {}]", self.kind.name(), self.len)
    }
}

impl<'a> List<'a> {
    /// The values.
    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let (kind, mut cursor) = (self.kind, Cursor { bytes: self.bytes, at: 0 });
        // `parse` has read them all once, so that none fails here.
        std::iter::from_fn(move || cursor.value(kind).ok()).take(self.len)
    }
}

impl<'a> Value<'a> {
    /// A whole number that is not negative, of any integer type.
    pub fn as_u64(self) -> Option<u64> {
        match self {
            Value::Unsigned(x) => Some(x),
            Value::Signed(x) => u64::try_from(x).ok(),
            _ => None,
        }
    }

    /// A number of any type.
    pub fn as_f64(self) -> Option<f64> {
        match self {
            Value::Unsigned(x) => Some(x as f64),
            Value::Signed(x) => Some(x as f64),
            Value::Float(x) => Some(x),
            _ => None,
        }
    }

    /// A truth value.
    pub fn as_bool(self) -> Option<bool> {
        if let Value::Bool(x) = self { Some(x) } else { None }
    }

    /// A text.
    pub fn as_text(self) -> Option<&'a str> {
        if let Value::Text(x) = self { Some(x) } else { None }
    }

    /// A list.
    pub fn as_list(self) -> Option<List<'a>> {
        if let Value::List(x) = self { Some(x) } else { None }
    }
}

/// A key and where its value lies in the file.
#[derive(Clone, Debug)]
pub struct Item {
    /// Its name.
    pub key: String,
    /// The type of its value.
    pub kind: Kind,
    range: Range<usize>,
}

/// What a file says about itself.
#[derive(Debug)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// All keys, in file order.
    pub items: Vec<Item>,
    /// All tensors, in the order of their data.
    pub tensors: Vec<Entry>,
}

/// The metadata of an open file.
#[derive(Clone, Copy)]
pub struct Metadata<'a> {
    items: &'a [Item],
    bytes: &'a [u8],
}

impl<'a> Metadata<'a> {
    /// The metadata of a file: `bytes` is what `header` was parsed from.
    pub fn new(header: &'a Header, bytes: &'a [u8]) -> Metadata<'a> {
        Metadata { items: &header.items, bytes }
    }

    /// All keys with their values, in file order.
    pub fn iter(&self) -> impl Iterator<Item = (&'a Item, Value<'a>)> + use<'a> {
        let bytes = self.bytes;
        self.items.iter().filter_map(move |item| {
            let mut cursor = Cursor { bytes: bytes.get(item.range.clone())?, at: 0 };
            Some((item, cursor.value(item.kind).ok()?))
        })
    }

    /// The bytes of a value, as they are in the file.
    pub fn bytes(&self, item: &Item) -> &'a [u8] {
        &self.bytes[item.range.clone()]
    }

    /// The value of `key`, if there is one.
    pub fn get(&self, key: &str) -> Option<Value<'a>> {
        let at = self.items.iter().position(|item| item.key == key)?;
        Some(Metadata { items: &self.items[at..=at], ..*self }.iter().next()?.1)
    }

    /// The value of `key` as `read` takes it, or an error that says what was expected.
    pub fn read<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl Fn(Value<'a>) -> Option<T>,
    ) -> Result<Option<T>, String> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value)
            .map(Some)
            .ok_or_else(|| format!("key `{key}`: found {}, expected {expected}", shown(value)))
    }
}

/// A value in an error or a list: cut where it is long.
pub fn shown(value: Value<'_>) -> String {
    match value {
        Value::Unsigned(x) => x.to_string(),
        Value::Signed(x) => x.to_string(),
        Value::Float(x) => x.to_string(),
        Value::Bool(x) => x.to_string(),
        Value::Text(x) => quoted(x),
        Value::List(x) => format!("a list of {} {}", x.len, x.kind.name()),
    }
}

/// A name from the file, escaped and cut: it may hold anything.
fn quoted(name: &str) -> String {
    match name.char_indices().nth(80) {
        None => format!("{name:?}"),
        Some((at, _)) => format!("{:?}...", &name[..at]),
    }
}

/// Reads the front of a file; never beyond its end.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn rest(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, n: u64) -> Result<&'a [u8], String> {
        let found = usize::try_from(n).ok().and_then(|n| self.at.checked_add(n));
        let Some(bytes) = found.and_then(|end| self.bytes.get(self.at..end)) else {
            return Err(format!(
                "found {n} bytes announced at {}, expected at most the {} that follow; the file is broken or cut \
                 short",
                self.at,
                self.rest()
            ));
        };
        self.at += bytes.len();
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64)?);
        Ok(array)
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, String> {
        self.array().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Result<&'a str, String> {
        let length = self.u64()?;
        str::from_utf8(self.take(length)?).map_err(|e| format!("found invalid UTF-8 ({e})"))
    }

    /// A count of things that take at least `least` bytes each.
    fn count(&mut self, what: &str, least: usize, limit: usize) -> Result<usize, String> {
        let count = self.u64()?;
        let most = (self.rest() / least).min(limit);
        usize::try_from(count).ok().filter(|n| *n <= most).ok_or_else(|| {
            format!(
                "found {count} {what}, expected at most {most} in the {} bytes that follow",
                self.rest()
            )
        })
    }

    fn kind(&mut self) -> Result<Kind, String> {
        let number = self.u32()?;
        Kind::from_number(number).ok_or_else(|| {
            format!("found value type {number}, expected 0 to {}", Kind::ALL.len() - 1)
        })
    }

    fn value(&mut self, kind: Kind) -> Result<Value<'a>, String> {
        Ok(match kind {
            Kind::U8 => Value::Unsigned(self.array::<1>()?[0].into()),
            Kind::I8 => Value::Signed(i8::from_le_bytes(self.array()?).into()),
            Kind::U16 => Value::Unsigned(u16::from_le_bytes(self.array()?).into()),
            Kind::I16 => Value::Signed(i16::from_le_bytes(self.array()?).into()),
            Kind::U32 => Value::Unsigned(self.u32()?.into()),
            Kind::I32 => Value::Signed(i32::from_le_bytes(self.array()?).into()),
            Kind::U64 => Value::Unsigned(self.u64()?),
            Kind::I64 => Value::Signed(i64::from_le_bytes(self.array()?)),
            Kind::F32 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            Kind::F64 => Value::Float(f64::from_le_bytes(self.array()?)),
            Kind::Bool => match self.array::<1>()?[0] {
                x @ 0..=1 => Value::Bool(x == 1),
                x => return Err(format!("found {x}, expected a bool: 0 or 1")),
            },
            Kind::Text => Value::Text(self.text()?),
            Kind::List => {
                let kind = self.kind()?;
                if kind == Kind::List {
                    return Err("found a list of lists, expected a list of plain values".into());
                }
                let len = self.count("values", kind.bytes(), usize::MAX)?;
                let start = self.at;
                match kind {
                    // One by one: texts have lengths, and a bool may be wrong.
                    Kind::Text | Kind::Bool => {
                        for i in 0..len {
                            self.value(kind).map_err(|e| format!("value {i}: {e}"))?;
                        }
                    }
                    _ => _ = self.take((len * kind.bytes()) as u64)?, // `count` has checked it
                }
                Value::List(List { kind, len, bytes: &self.bytes[start..self.at] })
            }
        })
    }

    /// The name of a key or a tensor.
    fn name(&mut self) -> Result<&'a str, String> {
        let name = self.text()?;
        if name.is_empty() || name.len() > MAX_NAME {
            let found = name.len();
            return Err(format!("found a name of {found} bytes, expected 1 to {MAX_NAME}"));
        }
        Ok(name)
    }

    fn item(&mut self, i: usize) -> Result<Item, String> {
        let key = self.name().map_err(|e| format!("key {i}: {e}"))?;
        let named = |e| format!("key {}: {e}", quoted(key));
        let kind = self.kind().map_err(named)?;
        let start = self.at;
        self.value(kind).map_err(named)?;
        Ok(Item { key: key.to_owned(), kind, range: start..self.at })
    }

    /// A tensor's description; its range is still relative to the data.
    fn tensor(&mut self, i: usize, alignment: usize) -> Result<Entry, String> {
        let name = self.name().map_err(|e| format!("tensor {i}: {e}"))?;
        let wrong = |what: String| format!("tensor {}: {what}", quoted(name));
        let dims = self.u32().map_err(wrong)?;
        if dims > MAX_DIMS {
            return Err(wrong(format!("found {dims} dimensions, expected at most {MAX_DIMS}")));
        }
        let mut shape = Vec::with_capacity(dims as usize);
        for _ in 0..dims {
            let d = self.u64().map_err(wrong)?;
            shape.push(usize::try_from(d).map_err(|_| wrong(format!("dimension {d} overflows")))?);
        }
        let number = self.u32().map_err(wrong)?;
        let dtype = dtype(number).map_err(wrong)?;
        let row = shape.first().copied().unwrap_or(1);
        if row % dtype.block() != 0 {
            let (name, block) = (dtype.name(), dtype.block());
            return Err(wrong(format!(
                "found rows of {row}, expected a multiple of {block} for {name}"
            )));
        }
        // A zero anywhere would hide that the others overflow, so they are looked at without it.
        let product = |shape: &[usize]| {
            shape.iter().filter(|d| **d != 0).try_fold(1usize, |n, d| n.checked_mul(*d))
        };
        let bytes =
            product(&shape).and_then(|n| n.div_ceil(dtype.block()).checked_mul(dtype.size()));
        let bytes = bytes.ok_or_else(|| wrong(format!("dimensions {shape:?} overflow")))?;
        let bytes = if shape.contains(&0) { 0 } else { bytes };
        let offset = self.u64().map_err(wrong)?;
        let start = usize::try_from(offset).ok().filter(|at| at % alignment == 0);
        let range = start.and_then(|start| Some(start..start.checked_add(bytes)?));
        let range = range.ok_or_else(|| {
            wrong(format!(
                "found offset {offset}, expected a multiple of {alignment} within the file"
            ))
        })?;
        shape.reverse(); // GGUF has the innermost dimension first
        Ok(Entry { name: name.to_owned(), dtype, shape, range })
    }
}

/// ggml's numbers of element types that are not of blocks.
const PLAIN: [(u32, Dtype); 8] = [
    (0, Dtype::F32),
    (1, Dtype::F16),
    (24, Dtype::I8),
    (25, Dtype::I16),
    (26, Dtype::I32),
    (27, Dtype::I64),
    (28, Dtype::F64),
    (30, Dtype::BF16),
];

/// ggml's number of an element type. Panics if it has none.
pub(super) fn number(dtype: Dtype) -> u32 {
    let plain = || PLAIN.iter().find(|(_, plain)| *plain == dtype).map(|(number, _)| *number);
    dtype.blocks().map(Blocks::ggml).or_else(plain).expect("a type of ggml")
}

/// The element type with ggml's number `number`.
fn dtype(number: u32) -> Result<Dtype, String> {
    let plain = PLAIN.iter().find(|(n, _)| *n == number).map(|(_, dtype)| *dtype);
    let blocks = || Blocks::ALL.iter().find(|b| b.ggml() == number);
    plain.or_else(|| blocks().map(|b| Dtype::Blocks(*b))).ok_or_else(|| match number {
        4 | 5 | 31..=33 | 36..=38 => {
            format!("found type {number}, which ggml has given up; take a newer file of this model")
        }
        _ => {
            let names: Vec<_> = Blocks::ALL.iter().map(|b| b.name()).collect();
            let names = names.join(", ");
            format!("found type {number}, expected the number of F32, F16, BF16 or one of {names}")
        }
    })
}

/// The header of a whole file, or what is wrong with it.
pub fn parse(buffer: &[u8]) -> Result<Header, String> {
    let mut cursor = Cursor { bytes: buffer, at: 0 };
    let magic = buffer.first_chunk::<4>();
    if magic != Some(b"GGUF") {
        return Err(match magic {
            None => format!("found {} bytes, expected a GGUF file", buffer.len()),
            Some(found) => {
                format!("found {:?} at its start, expected GGUF", found.escape_ascii().to_string())
            }
        });
    }
    cursor.at = 4;
    let version = cursor.u32()?;
    match version {
        2 | 3 => {}
        1 => {
            return Err(
                "found GGUF version 1, expected 2 or 3; take a newer file of this model".into()
            );
        }
        _ if version & 0xffff == 0 && version != 0 => {
            return Err("found a big-endian GGUF file, expected a little-endian one".into());
        }
        _ => return Err(format!("found GGUF version {version}, expected 2 or 3")),
    }
    // Name, number of dimensions, type, offset; key, type, value.
    let tensor_count = cursor.count("tensors", 8 + 4 + 4 + 8, MAX_COUNT)?;
    let item_count = cursor.count("key/value pairs", 8 + 4 + 1, MAX_COUNT)?;
    let mut items: Vec<Item> = Vec::new();
    for i in 0..item_count {
        items.push(cursor.item(i)?);
    }
    if let Some(key) = twice(items.iter().map(|item| item.key.as_str())) {
        return Err(format!("key {} is there twice", quoted(key)));
    }
    let alignment = Metadata { items: &items, bytes: buffer }
        .read("general.alignment", "a power of two", |v| {
            v.as_u64().and_then(|x| usize::try_from(x).ok()).filter(|x| x.is_power_of_two())
        })?
        .unwrap_or(ALIGNMENT);
    let mut tensors: Vec<Entry> = Vec::new();
    for i in 0..tensor_count {
        tensors.push(cursor.tensor(i, alignment)?);
    }
    if let Some(name) = twice(tensors.iter().map(|entry| entry.name.as_str())) {
        return Err(format!("tensor {} is there twice", quoted(name)));
    }
    place(&mut tensors, cursor.at, alignment, buffer.len())?;
    Ok(Header { version, items, tensors })
}

/// Makes ranges relative to the file; they lie one after the other, each at the next multiple of the alignment.
fn place(
    tensors: &mut [Entry],
    header: usize,
    alignment: usize,
    size: usize,
) -> Result<(), String> {
    let overflow = || format!("alignment {alignment}: the data would begin or end beyond any file");
    let start = header.checked_next_multiple_of(alignment).ok_or_else(overflow)?;
    tensors.sort_by_key(|entry| (entry.range.start, entry.range.end));
    let mut next = 0usize;
    for Entry { name, range, .. } in tensors {
        if range.start != next {
            let wrong = if range.start < next { "overlaps the one before" } else { "leaves a gap" };
            let name = quoted(name);
            return Err(format!(
                "tensor {name} {wrong}: found offset {}, expected {next}",
                range.start
            ));
        }
        next = range.end.checked_next_multiple_of(alignment).ok_or_else(overflow)?;
        let ends = range.end.checked_add(start).ok_or_else(overflow)?;
        if ends > size {
            let name = quoted(name);
            return Err(format!(
                "tensor {name}: found data up to byte {ends} of a file of {size} bytes; the file is cut short"
            ));
        }
        *range = start + range.start..ends;
    }
    Ok(())
}

/// The first name that is there twice.
fn twice<'a>(names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let mut seen = HashSet::new();
    let mut names = names;
    names.find(|name| !seen.insert(*name))
}
