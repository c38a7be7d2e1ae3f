//! The safetensors header: 8 bytes of length, JSON, then the data without gaps. Checks every range once,
//! so that an [`Entry`] can be sliced without thought; never reads tensor data, never allocates more than
//! a small multiple of the header.

use super::{Dtype, Entry};
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use std::borrow::Cow;
use std::fmt;

/// The longest header that is read, as in the reference implementation.
const MAX_HEADER: u64 = 100_000_000;

/// The tensors of a whole safetensors file in the order of their data, or what is wrong with it.
pub fn parse(buffer: &[u8]) -> Result<Vec<Entry>, String> {
    let size = buffer.len();
    let Some((length, rest)) = buffer.split_first_chunk::<8>() else {
        return Err(format!("found {size} bytes, expected a safetensors file of at least 8 bytes"));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        return Err(format!(
            "header length: found {length}, expected at most {MAX_HEADER}; is this a safetensors file?"
        ));
    }
    let length = length as usize; // at most MAX_HEADER
    let Some((header, data)) = rest.split_at_checked(length) else {
        return Err(format!(
            "the header should have {length} bytes, but the file ends after {}; it is cut short",
            rest.len()
        ));
    };
    let header =
        str::from_utf8(header).map_err(|e| format!("header: found invalid UTF-8 ({e})"))?;

    let mut entries = Vec::new();
    let mut json = serde_json::Deserializer::from_str(header);
    let mut reader = Reader { entries: &mut entries, name: String::new(), problem: None };
    let read = reader.deserialize(&mut json).and_then(|()| json.end());
    if let Some(problem) = reader.problem {
        return Err(problem);
    }
    if let Err(e) = read {
        return Err(match reader.name.as_str() {
            "" => format!("header: {e}"),
            name => format!("header, tensor `{name}`: {e}"),
        });
    }

    entries.sort_by_key(|entry| (entry.range.start, entry.range.end));
    let mut end = 0;
    for Entry { name, range, .. } in &entries {
        if range.start != end {
            let wrong = if range.start < end { "overlaps the one before" } else { "leaves a gap" };
            return Err(format!(
                "tensor `{name}` {wrong}: found data offset {}, expected {end}",
                range.start
            ));
        }
        end = range.end;
    }
    if end != data.len() {
        return Err(format!(
            "the tensors take {end} bytes, but {} bytes follow the header{}",
            data.len(),
            if end > data.len() { "; the file is cut short" } else { "" }
        ));
    }
    let start = size - data.len();
    for entry in &mut entries {
        entry.range = start + entry.range.start..start + entry.range.end;
    }
    Ok(entries)
}

#[derive(Deserialize)]
struct Info<'a> {
    #[serde(borrow)]
    dtype: Cow<'a, str>,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

impl Info<'_> {
    /// The entry with its range still relative to the data.
    fn check(self, name: &str) -> Result<Entry, String> {
        let Info { dtype, shape, data_offsets: (start, end) } = self;
        let Some(dtype) = Dtype::from_name(&dtype) else {
            let known = Dtype::ALL.map(Dtype::name).join(", ");
            return Err(format!("tensor `{name}`: found dtype {dtype:?}, expected one of {known}"));
        };
        let bytes = (shape.iter().try_fold(dtype.size(), |n, &d| n.checked_mul(d)))
            .ok_or_else(|| format!("tensor `{name}`: shape {shape:?} overflows"))?;
        if end.checked_sub(start) != Some(bytes) {
            return Err(format!(
                "tensor `{name}`: found data offsets {start}..{end}, expected {bytes} bytes for \
                 shape {shape:?} of {}",
                dtype.name()
            ));
        }
        Ok(Entry { name: name.to_owned(), dtype, shape, range: start..end })
    }
}

/// Reads the header map by map entry, so that an error can name the tensor it concerns.
struct Reader<'a> {
    entries: &'a mut Vec<Entry>,
    name: String,
    problem: Option<String>,
}

impl<'de> DeserializeSeed<'de> for &mut Reader<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for &mut Reader<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key::<String>()? {
            self.name = name;
            if self.name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
            } else {
                match map.next_value::<Info<'de>>()?.check(&self.name) {
                    Ok(entry) => self.entries.push(entry),
                    Err(problem) => self.problem = Some(problem),
                }
                if self.problem.is_some() {
                    return Err(serde::de::Error::custom("stopped"));
                }
            }
            self.name.clear();
        }
        Ok(())
    }
}
