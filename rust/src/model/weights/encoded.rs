//! The tensors of a quantized matrix, their types and shapes checked against what `quantization_config` says, as one
//! [`Encoded`]. Never decodes.

use super::Reader;
use crate::file::{Dtype, TensorView};
use crate::model::spec::{Scheme, Slice, Spread};
use crate::quant::{self, Encoded, Floats, Groups, Scaling};
use crate::{Error, Result};

/// Types of scales.
const FLOATS: &[Dtype] = &[Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F8E8M0];

/// Tensors of one module, taken one after the other.
struct Taken<'r, 'a> {
    reader: &'r Reader<'a>,
    module: &'r str,
    tensors: Vec<TensorView<'a>>,
}

impl<'a> Taken<'_, 'a> {
    fn name(&self, end: &str) -> String {
        format!("{}{end}", self.module)
    }

    fn bad(&self, end: &str, found: &str, expected: &str) -> Error {
        let what = format!("tensor `{}`: found {found}, expected {expected}", self.name(end));
        Error::format(self.reader.folder, what)
    }

    /// The tensor with this end of its name, of one of these types and shapes.
    fn take(&mut self, end: &str, types: &[Dtype], shapes: &[&[usize]]) -> Result<TensorView<'a>> {
        let tensor = self.reader.checkpoint.tensor(&self.name(end))?;
        if !types.contains(&tensor.dtype) || !shapes.contains(&tensor.shape) {
            let types: Vec<_> = types.iter().map(|dtype| dtype.name()).collect();
            let shapes: Vec<_> = shapes.iter().map(|shape| format!("{shape:?}")).collect();
            let found = format!("{} {:?}", tensor.dtype.name(), tensor.shape);
            let expected = format!("{} {}", types.join(" or "), shapes.join(" or "));
            return Err(self.bad(end, &found, &expected));
        }
        self.tensors.push(tensor);
        Ok(tensor)
    }

    /// The same, if it is there.
    fn optional(
        &mut self,
        end: &str,
        types: &[Dtype],
        shapes: &[&[usize]],
    ) -> Result<Option<&'a [u8]>> {
        match self.reader.checkpoint.get(&self.name(end)) {
            None => Ok(None),
            Some(_) => Ok(Some(self.take(end, types, shapes)?.bytes)),
        }
    }

    /// The groups that tensor `end` gives to columns, or else groups of `size`.
    fn groups(&mut self, end: &str, k: usize, size: usize) -> Result<Groups<'a>> {
        let Some(bytes) = self.optional(end, &[Dtype::I32], &[&[k]])? else {
            return Ok(Groups::Even(size));
        };
        let of = || bytes.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b));
        // -1 everywhere: not in use. As they lie: faster so.
        if of().all(|g| g == -1) || of().enumerate().all(|(j, g)| g as usize == j / size) {
            return Ok(Groups::Even(size));
        }
        let count = k.div_ceil(size);
        match of().position(|g| usize::try_from(g).map_or(true, |g| g >= count)) {
            None => Ok(Groups::Of(bytes)),
            Some(j) => {
                let found = format!("group {} for input {j}", of().nth(j).unwrap_or(-1));
                Err(self.bad(end, &found, &format!("groups from 0 to {}", count - 1)))
            }
        }
    }

    /// The scales in tensor `end`, with the zero points beside them if they have the same shape, and how many columns
    /// share one.
    fn scales(
        &mut self,
        end: &str,
        (n, k): (usize, usize),
        spread: Spread,
    ) -> Result<(Scaling<'a>, usize, Vec<usize>)> {
        let (rows, size) = match spread {
            Spread::Tensor => (n, k),
            Spread::Channel => (1, k),
            Spread::Group(size) => (1, size),
            Spread::Block(rows, columns) => (rows, columns),
        };
        let (tall, wide) = (n.div_ceil(rows), k.div_ceil(size));
        let single: [&[usize]; 3] = [&[], &[1], &[1, 1]];
        let (all, column) = ([tall, wide], [tall]);
        let mut shapes: Vec<&[usize]> = vec![&all];
        match spread {
            Spread::Tensor => shapes = single.to_vec(),
            Spread::Channel => shapes.push(&column),
            Spread::Group(_) | Spread::Block(..) => {}
        }
        let tensor = self.take(end, FLOATS, &shapes)?;
        let floats = floats(&tensor);
        let scales = Scaling { floats, rows, down: wide, right: 1, times: 1.0 };
        Ok((scales, size, tensor.shape.to_vec()))
    }
}

/// Its type is one of [`FLOATS`].
fn floats<'a>(tensor: &TensorView<'a>) -> Floats<'a> {
    match tensor.dtype {
        Dtype::F16 => Floats::F16(tensor.bytes),
        Dtype::BF16 => Floats::Bf16(tensor.bytes),
        Dtype::F8E8M0 => Floats::Power(tensor.bytes),
        _ => Floats::F32(tensor.bytes),
    }
}

impl<'a> Reader<'a> {
    /// How the matrix whose plain tensor would be `tensor` is stored, if it is quantized: the checkpoint's tensors
    /// decide; what they are, the configuration must say.
    pub(super) fn scheme(&self, tensor: &str) -> Result<Option<Scheme>> {
        let (Some(quantized), Some(module)) =
            (&self.spec.quantized, tensor.strip_suffix(".weight"))
        else {
            return Ok(None);
        };
        let there = |end: &str| self.checkpoint.get(&format!("{module}{end}"));
        let Some((mark, _)) = quantized.marks().find_map(|mark| Some((mark, there(mark)?))) else {
            return Ok(None);
        };
        let wrong = |what: String| {
            Err(Error::format(self.folder, format!("tensor `{module}{mark}`: {what}")))
        };
        let Some(scheme) = quantized.scheme(module)? else {
            return wrong(
                "found a quantized weight, but quantization_config says that this module is not quantized"
                    .to_owned(),
            );
        };
        if !scheme.marks().contains(&mark) {
            let expected = scheme.marks().join(" or ");
            return wrong(format!("found this, but quantization_config says {expected}"));
        }
        let packed = [".qweight", ".weight_packed"].contains(&mark);
        if packed && there(".weight").is_some() {
            return wrong(
                "found this and an unquantized `weight`, expected one of them".to_owned(),
            );
        }
        Ok(Some(scheme.clone()))
    }

    /// The tensors of a quantized matrix, and what they say.
    pub(super) fn encoded(
        &self,
        place: &Slice,
        scheme: &Scheme,
    ) -> Result<(Vec<TensorView<'a>>, Encoded<'a>)> {
        let &[n, k] = &place.shape[..] else {
            return Err(Error::Unsupported(format!(
                "tensor `{}`: quantized matrices of shape {:?} are not supported, only [out, in]",
                place.tensor, place.shape
            )));
        };
        let module = place.tensor.strip_suffix(".weight").unwrap_or(&place.tensor);
        let mut t = Taken { reader: self, module, tensors: Vec::new() };
        const I32: &[Dtype] = &[Dtype::I32];
        let mut encoded = match *scheme {
            Scheme::Gptq { bits, group, v2 } => {
                let each = 32 / bits as usize;
                let size = group.unwrap_or(k);
                let count = k.div_ceil(size);
                let words = t.take(".qweight", I32, &[&[k.div_ceil(each), n]])?.bytes;
                let zeros = t.take(".qzeros", I32, &[&[count, n.div_ceil(each)]])?.bytes;
                let scales = floats(&t.take(".scales", FLOATS, &[&[count, n]])?);
                let groups = t.groups(".g_idx", k, size)?;
                quant::gptq(bits, v2, (n, k), words, zeros, scales, groups)
            }
            Scheme::Awq { group } => {
                let size = group.unwrap_or(k);
                let (count, wide) = (k.div_ceil(size), n.div_ceil(8));
                let words = t.take(".qweight", I32, &[&[k, wide]])?.bytes;
                let zeros = t.take(".qzeros", I32, &[&[count, wide]])?.bytes;
                let scales = floats(&t.take(".scales", FLOATS, &[&[count, n]])?);
                quant::awq((n, k), words, zeros, scales, size)
            }
            Scheme::Packed { bits, spread, symmetric } => {
                let each = 32 / bits as usize;
                let words = t.take(".weight_packed", I32, &[&[n, k.div_ceil(each)]])?.bytes;
                let (scales, size, _) = t.scales(".weight_scale", (n, k), spread)?;
                let shape = t.take(".weight_shape", &[Dtype::I64, I32[0]], &[&[2]])?;
                let sides = shape.bytes.chunks(shape.dtype.size());
                let little = |b: &[u8]| b.iter().rev().fold(0u64, |x, &b| x << 8 | u64::from(b));
                let sides: Vec<u64> = sides.map(little).collect();
                if sides != [n as u64, k as u64] {
                    return Err(t.bad(
                        ".weight_shape",
                        &format!("{sides:?}"),
                        &format!("{:?}", [n, k]),
                    ));
                }
                let count = k.div_ceil(size);
                let zeros = t.optional(".weight_zero_point", I32, &[&[n.div_ceil(each), count]])?;
                if zeros.is_none() && !symmetric {
                    return Err(t.bad(".weight_zero_point", "nothing", "the zero points"));
                }
                let groups = t.groups(".weight_g_idx", k, size)?;
                quant::packed(bits, k, words, zeros, count, scales, groups)
            }
            Scheme::Fp4 => {
                let bytes = t.take(".weight_packed", &[Dtype::U8], &[&[n, k.div_ceil(2)]])?.bytes;
                let scale = t.take(".weight_scale", &[Dtype::U8], &[&[n, k.div_ceil(32)]])?.bytes;
                if !k.is_multiple_of(32) {
                    return Err(t.bad(
                        ".weight_packed",
                        &format!("{k} inputs"),
                        "a multiple of 32",
                    ));
                }
                quant::fp4(k, bytes, scale)
            }
            Scheme::Nvfp4 { modelopt } => {
                let (codes, all) = match modelopt {
                    true => (".weight", ".weight_scale_2"),
                    false => (".weight_packed", ".weight_global_scale"),
                };
                let bytes = t.take(codes, &[Dtype::U8], &[&[n, k.div_ceil(2)]])?.bytes;
                let shape = [n, k.div_ceil(16)];
                let scale = t.take(".weight_scale", &[Dtype::F8E4M3], &[&shape])?.bytes;
                if !k.is_multiple_of(16) {
                    return Err(t.bad(codes, &format!("{k} inputs"), "a multiple of 16"));
                }
                let times = t.take(all, &[Dtype::F32], &[&[], &[1]])?.bytes;
                let times = times.first_chunk().map_or(0.0, |b| f32::from_le_bytes(*b));
                if !(times.is_normal() && times > 0.0) {
                    return Err(t.bad(all, &times.to_string(), "a positive number"));
                }
                quant::nvfp4(k, bytes, scale, if modelopt { times } else { 1.0 / times })
            }
            Scheme::Int8 { spread, symmetric } => {
                let bytes = t.take(".weight", &[Dtype::I8], &[&[n, k]])?.bytes;
                let (scales, size, shape) = t.scales(".weight_scale", (n, k), spread)?;
                let zeros = t.optional(".weight_zero_point", &[Dtype::I8], &[&shape])?;
                if zeros.is_none() && !symmetric {
                    return Err(t.bad(".weight_zero_point", "nothing", "the zero points"));
                }
                quant::int8(k, bytes, zeros, scales, size)
            }
            Scheme::Float8 { spread } => {
                let bytes = t.take(".weight", &[Dtype::F8E4M3], &[&[n, k]])?.bytes;
                let ends = scheme.marks().iter();
                let ends: Vec<_> =
                    ends.filter(|&end| self.checkpoint.get(&t.name(end)).is_some()).collect();
                let [end] = ends[..] else {
                    return Err(t.bad(".weight_scale_inv", "also `weight_scale`", "one of both"));
                };
                let (scales, size, _) = t.scales(end, (n, k), spread)?;
                quant::float8(k, bytes, scales, size)
            }
            Scheme::Nibbles => nibbles(&mut t, n, k)?,
            Scheme::LlmInt8 => {
                let bytes = t.take(".weight", &[Dtype::I8], &[&[n, k]])?.bytes;
                let scb = t.take(".SCB", &[Dtype::F32], &[&[n]])?.bytes;
                let order = t.optional(".weight_format", &[Dtype::U8], &[&[], &[1]])?;
                if let Some(order) = order
                    && order != [0]
                {
                    return Err(t.bad(".weight_format", &format!("{order:?}"), "[0], rows"));
                }
                quant::llm_int8(k, bytes, scb)
            }
        };
        encoded.first = place.first;
        Ok((t.tensors, encoded))
    }
}

/// bitsandbytes in 4 bits: a tensor of JSON tells the rest.
fn nibbles<'a>(t: &mut Taken<'_, 'a>, n: usize, k: usize) -> Result<Encoded<'a>> {
    let numbers = n * k;
    let ends = ["nf4", "fp4"].map(|kind| format!(".weight.quant_state.bitsandbytes__{kind}"));
    let end = ends.iter().find(|end| t.reader.checkpoint.get(&t.name(end)).is_some());
    let end = end.unwrap_or(&ends[0]);
    let state = t.reader.checkpoint.tensor(&t.name(end))?;
    let wrong = |found: &str, expected: &str| t.bad(end, found, expected);
    let json: serde_json::Value = match state.bytes.len() {
        0..=10_000 => serde_json::from_slice(state.bytes)
            .map_err(|error| wrong(&error.to_string(), "JSON"))?,
        more => return Err(wrong(&format!("{more} bytes"), "at most 10000")),
    };
    let Some(object) = json.as_object() else { return Err(wrong("no object", "one")) };
    for (key, value) in object {
        let good = match key.as_str() {
            "quant_type" => value.as_str().is_some_and(|kind| end.ends_with(kind)),
            "shape" => *value == serde_json::json!([n, k]),
            "nested_dtype" => value == "float32",
            "blocksize" | "nested_blocksize" | "nested_offset" | "dtype" => true,
            _ => false,
        };
        if !good {
            let found = format!("{key}: {value}");
            return Err(wrong(&found, &format!("what is known of a matrix of shape {:?}", [n, k])));
        }
    }
    let size = |key: &str| {
        let size = object.get(key).and_then(serde_json::Value::as_u64);
        let size = size.filter(|size| (1..=1 << 20).contains(size));
        size.map(|size| size as usize)
            .ok_or_else(|| wrong(&format!("no {key}"), &format!("{key} from 1 to 1048576")))
    };
    let block = size("blocksize")?;
    let count = numbers.div_ceil(block);
    let nested = t.reader.checkpoint.get(&t.name(".weight.nested_absmax")).is_some();
    let nested = match nested {
        false => None,
        true => {
            let offset = object.get("nested_offset").and_then(serde_json::Value::as_f64);
            let offset = offset.ok_or_else(|| wrong("no nested_offset", "nested_offset"))?;
            Some((size("nested_blocksize")?, offset as f32))
        }
    };
    let half = numbers.div_ceil(2);
    let codes = t.take(".weight", &[Dtype::U8], &[&[half, 1], &[1, half], &[half]])?.bytes;
    let map = t.take(".weight.quant_map", &[Dtype::F32], &[&[16]])?.bytes;
    let absmax = match nested {
        None => Floats::F32(t.take(".weight.absmax", &[Dtype::F32], &[&[count]])?.bytes),
        Some((every, offset)) => Floats::Nested {
            codes: t.take(".weight.absmax", &[Dtype::U8], &[&[count]])?.bytes,
            map: t.take(".weight.nested_quant_map", &[Dtype::F32], &[&[256]])?.bytes,
            scales: t
                .take(".weight.nested_absmax", &[Dtype::F32], &[&[count.div_ceil(every)]])?
                .bytes,
            every,
            offset,
        },
    };
    Ok(quant::nibbles(numbers, codes, map, absmax, block))
}
