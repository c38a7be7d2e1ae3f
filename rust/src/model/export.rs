//! Writes a model as a GGUF file, each weight in a type of ggml. The file has another name until it is whole. What it
//! says of the model is read again before any weight is written. Never changes the source; knows no tokenizer.

use super::spec::{Mixer, Names, Said, Slice, Spec, gguf};
use super::weights::Reader;
use super::{LoadOptions, MAX_CONFIG, Written, quantize};
use crate::backend::Core;
use crate::backend::cpu::{Cpu, topology};
use crate::file::gguf_writer::{Announced, Datum, GgufWriter, size};
use crate::file::{self, Checkpoint, Dtype};
use crate::quant::Blocks;
use crate::{Error, Result};
use serde_json::Value;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// Types that weights can be written in, and llama.cpp's number for a file of mostly them.
pub const TYPES: [(Dtype, u32); 12] = [
    (Dtype::F32, 0),
    (Dtype::F16, 1),
    (Dtype::BF16, 32),
    (Dtype::Blocks(Blocks::Q8_0), 7),
    (Dtype::Blocks(Blocks::Q6_K), 18),
    (Dtype::Blocks(Blocks::Q5_K), 16),
    (Dtype::Blocks(Blocks::Q5_1), 9),
    (Dtype::Blocks(Blocks::Q5_0), 8),
    (Dtype::Blocks(Blocks::Q4_K), 14),
    (Dtype::Blocks(Blocks::Q4_1), 3),
    (Dtype::Blocks(Blocks::Q4_0), 2),
    (Dtype::Blocks(Blocks::IQ4_NL), 25),
];

/// The type with this name, in any case.
pub fn named(name: &str) -> Option<Dtype> {
    TYPES.iter().map(|(dtype, _)| *dtype).find(|dtype| dtype.name().eq_ignore_ascii_case(name))
}

/// How to write a file.
pub struct Export {
    /// The type of matrices, but of the head and those of `rules`.
    pub format: Dtype,
    /// Matrices with a tensor, in the source or in the file, whose name fits a pattern have another type; the first that
    /// fits decides.
    pub rules: Vec<(String, Dtype)>,
    /// As for loading.
    pub load: LoadOptions,
}

/// The keys of a tokenizer for this architecture and so many tokens, and of whatever else is not about weights.
pub type Tokens<'a> = dyn Fn(&str, usize) -> Result<Vec<(String, Datum)>> + 'a;

/// One tensor of the file.
struct Tensor {
    announced: Announced,
    /// What it is made of, one below the other; none: it is copied from the source.
    segments: Vec<Segment>,
}

/// Rows of the source.
struct Segment {
    what: &'static str,
    parts: Vec<(Slice, usize)>,
    k: usize,
    /// Width of a head and of its part that turns, whose rows go into another order.
    turned: Option<(usize, usize)>,
}

impl Segment {
    fn rows(&self) -> usize {
        self.parts.iter().map(|(_, n)| n).sum()
    }

    /// The row that row `r` of the file is: pairs that turn are neighbours there.
    fn source(&self, r: usize) -> usize {
        match self.turned {
            Some((d, turned)) if r % d < turned => {
                let i = r % d;
                r - i + i / 2 + i % 2 * (turned / 2)
            }
            _ => r,
        }
    }
}

/// Writes the model in `folder` (or the GGUF file that it is or has) as the new GGUF file `out`. `progress` is told what
/// is done, how far, of how much. Ends with `Error::Interrupted`, leaving nothing, soon after `stop`.
pub fn export(
    folder: &Path,
    out: &Path,
    how: Export,
    tokens: &Tokens<'_>,
    stop: &AtomicBool,
    progress: &(dyn Fn(&'static str, u64, u64) + Sync),
) -> Result<Written> {
    let Export { format, rules, load } = how;
    if out.symlink_metadata().is_ok() {
        return Err(Error::parameter("out", out.display(), "a path where nothing is"));
    }
    let (spec, checkpoint, path) = super::open(folder, &load)?;
    let reader = Reader::new(&path, &checkpoint, &spec);
    let plans = reader.plans(super::Quantization::None)?;
    reader.refuse_unused(&plans)?;
    let names = reader.names();
    let config = file::read_json(&path.join("config.json"), MAX_CONFIG);
    let config =
        if checkpoint.metadata().is_none() { config?.unwrap_or_default() } else { Value::Null };
    let source = config
        .get("quantization_config")
        .map(|c| c["quant_method"].as_str().unwrap_or("unknown").to_owned());
    if source.as_deref() == Some(quantize::METHOD) {
        let what = "was made by `ferrule quantize`; take the model that it was made from";
        return Err(Error::Unsupported(format!("{}: {what}", path.display())));
    }
    let threads = load.threads.unwrap_or_else(|| topology::auto().count);
    let cpu = Cpu::new(threads, load.isa.as_deref())?;

    // With layers one by one only where that is needed: not every reader of GGUF takes such lists.
    let xielu = reader.xielu()?;
    let family = load.family.as_deref();
    let (mut first, mut tokenizer) = (None, Vec::new());
    for by_layer in [false, true] {
        let said = match checkpoint.metadata() {
            Some(_) => copied(&checkpoint, &spec, names)?,
            None => match spec.to_gguf(names, &config, family, by_layer, xielu.as_deref()) {
                Ok(said) => said,
                Err(error) => {
                    first.get_or_insert(error);
                    continue;
                }
            },
        };
        let mut items = vec![
            ("general.architecture".to_owned(), Datum::Text(said.architecture.clone())),
            ("general.file_type".to_owned(), Datum::U32(number(format))),
            ("general.quantization_version".to_owned(), Datum::U32(2)),
        ];
        if checkpoint.metadata().is_none() {
            let name = path.canonicalize().unwrap_or(path.clone());
            let name = name.file_name().unwrap_or_default().to_string_lossy().into_owned();
            items.insert(1, ("general.type".to_owned(), Datum::Text("model".to_owned())));
            items.insert(2, ("general.name".to_owned(), Datum::Text(name)));
        }
        items.extend(said.items.iter().cloned());
        if checkpoint.metadata().is_none() {
            if tokenizer.is_empty() {
                tokenizer = tokens(&said.architecture, spec.vocab)?;
            }
            items.extend(tokenizer.iter().cloned());
        }
        let (tensors, unused) = match tensors(&spec, names, &said, &checkpoint, (format, &rules)) {
            Ok(tensors) => tensors,
            Err(error) => {
                let error = spec.is_said(&said.spec).err().unwrap_or(error);
                first.get_or_insert(error);
                continue;
            }
        };
        if let Some(rule) = unused {
            let expected = "a pattern that fits the name of a matrix";
            return Err(Error::parameter("rules", format!("{rule:?}"), expected));
        }
        let announced: Vec<Announced> = tensors.iter().map(|t| t.announced.clone()).collect();
        let mut writer = GgufWriter::new(out, &items, &announced)?;
        // Vectors that say how to rotate come first.
        for ((_, values), tensor) in said.vectors.iter().zip(&tensors) {
            debug_assert!(tensor.segments.is_empty());
            let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            writer.tensor(&bytes)?;
        }
        let written = {
            let checkpoint = writer.checkpoint()?;
            let facts = gguf::facts(out, &checkpoint)?;
            Spec::of_gguf(out, &facts, if config.is_null() { family } else { None })
        };
        match written.and_then(|written| spec.is_said(&written)) {
            Ok(()) => {}
            Err(error) => {
                first.get_or_insert(error);
                continue;
            }
        }
        let mut written = Written { bytes: 0, bits_per_weight: 0.0, forms: Vec::new(), source };
        write(
            &reader,
            &cpu,
            &checkpoint,
            &said,
            &tensors[said.vectors.len()..],
            &mut writer,
            stop,
            &mut written,
            progress,
        )?;
        written.bytes = writer.finish()?;
        let bytes: u64 = written.forms.iter().map(|(_, bytes)| bytes).sum();
        written.bits_per_weight = 8.0 * bytes as f64 / spec.parameters().0.max(1) as f64;
        return Ok(written);
    }
    Err(first.unwrap_or(Error::Closed))
}

fn number(format: Dtype) -> u32 {
    TYPES.iter().find(|(dtype, _)| *dtype == format).map_or(0, |(_, number)| *number)
}

/// What a GGUF file says, to be said again.
fn copied(checkpoint: &Checkpoint, spec: &Spec, names: &Names) -> Result<Said> {
    let metadata = checkpoint.metadata().ok_or(Error::Closed)?;
    let (mut items, mut architecture) = (Vec::new(), String::new());
    for (item, value) in metadata.iter() {
        if item.key == "general.architecture" {
            architecture = value.as_text().unwrap_or_default().to_owned();
        }
        // Of this file, not of the model.
        const OWN: [&str; 4] = [
            "general.architecture",
            "general.file_type",
            "general.quantization_version",
            "general.alignment",
        ];
        if !OWN.contains(&&item.key[..]) && !item.key.starts_with("split.") {
            items.push((item.key.clone(), Datum::Copied(item.kind, metadata.bytes(item).to_vec())));
        }
    }
    let vectors = spec.ignored(checkpoint.names()).map(|name| {
        let tensor = checkpoint.tensor(name)?;
        let values = tensor.bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b));
        match tensor.dtype {
            Dtype::F32 => Ok((name.to_owned(), values.collect())),
            _ => Err(Error::Unsupported(format!(
                "tensor `{name}`: found {}, expected F32",
                tensor.dtype.name()
            ))),
        }
    });
    let vectors = vectors.collect::<Result<_>>()?;
    Ok(Said { architecture, items, vectors, spec: spec.clone(), names: names.clone() })
}

/// The tensors of the file, vectors that are no weights first, and a pattern of the rules that fits none.
fn tensors<'r>(
    spec: &Spec,
    names: &Names,
    said: &Said,
    checkpoint: &Checkpoint,
    (format, rules): (Dtype, &'r [(String, Dtype)]),
) -> Result<(Vec<Tensor>, Option<&'r str>)> {
    let vector = |(name, values): &(String, Vec<f32>)| Tensor {
        announced: (name.clone(), Dtype::F32, vec![values.len()]),
        segments: Vec::new(),
    };
    let unsaid = |what: &str| {
        let what = format!("GGUF has another layout of `{what}`");
        Error::Unsupported(format!("{}: {what}", spec.architecture))
    };
    // Tensors that have the rows of each head, or group, together are copied whole.
    for (a, b) in [("q", "attn_gate"), ("mix_q", "mix_z"), ("mix_b", "mix_a")] {
        let one =
            |names: &Names| [a, b].iter().all(|w| names.has(w)) && names.model(a) == names.model(b);
        if one(names) != one(&said.names) {
            return Err(unsaid(a));
        }
    }
    let mut all: Vec<(Tensor, Vec<usize>)> = Vec::new();
    let layers = (0..spec.layers.len()).map(Some);
    for l in std::iter::once(None).chain(layers) {
        let weights = l.map_or_else(|| spec.model_weights(), |l| spec.layer_weights(l));
        for weight in weights {
            let what = weight.what;
            if what.starts_with("xielu_") && !said.names.has(what) {
                continue; // in the metadata
            }
            let whole = |names: &Names| vec![Slice::whole(names.model(what), weight.shape.clone())];
            let places = |spec: &Spec, names: &Names| match l {
                Some(l) => spec.places(names, l, what),
                None => whole(names),
            };
            let (from, to) = (places(spec, names), places(&said.spec, &said.names));
            // Without the dimension of experts, or of heads that are tensors of their own.
            let inner = |names: &Names| {
                let outer = what.starts_with("expert_") || names.model(what).contains("{e}");
                &weight.shape[usize::from(outer)..]
            };
            let k: usize = inner(&said.names).iter().skip(1).product();
            let rows = inner(names).iter().product::<usize>() / k;
            let each = from.len() / to.len().max(1);
            for (place, from) in to.iter().zip(from.chunks(each.max(1))) {
                if place.column != 1 || place.row != k || each * to.len() != from.len() * to.len() {
                    return Err(unsaid(what));
                }
                let parts = match l.map(|l| &spec.layers[l].mixer) {
                    Some(Mixer::Attention(a)) if spec.qkv_by_head => {
                        super::weights::of_heads(&from[0], what, a, rows)
                    }
                    _ => from.iter().map(|place| (place.clone(), rows)).collect(),
                };
                let turned = l.and_then(|l| turned(spec, &said.spec, l, what));
                let segment = Segment { what, parts, k, turned };
                let at = place.first;
                match all.iter_mut().find(|(t, _)| t.announced.0 == place.tensor) {
                    Some((tensor, firsts)) => {
                        let before = firsts.partition_point(|first| *first < at);
                        firsts.insert(before, at);
                        tensor.segments.insert(before, segment);
                    }
                    None => {
                        // Dimensions of 1 inside are none there.
                        let mut shape = place.shape.clone();
                        shape.retain(|n| *n != 1 || place.shape.len() < 3);
                        let mamba = matches!(l.map(|l| &spec.layers[l].mixer), Some(Mixer::Recurrent(r))
                            if matches!(r.shape.core, Core::Mamba2(_)));
                        // One number for each head, as columns; a single number.
                        if shape.is_empty() || mamba && ["a_log", "skip"].contains(&what) {
                            shape.push(1);
                        }
                        let announced = (place.tensor.clone(), Dtype::F32, shape);
                        all.push((Tensor { announced, segments: vec![segment] }, vec![at]));
                    }
                }
            }
        }
    }
    let mut used = vec![false; rules.len()];
    let mut tensors: Vec<Tensor> = said.vectors.iter().map(vector).collect();
    for (mut tensor, _) in all {
        let (name, _, shape) = &tensor.announced;
        let stored = checkpoint.get(name).filter(|_| checkpoint.metadata().is_some());
        let shape = stored.map_or(&shape[..], |stored| stored.shape).to_vec();
        let numbers: usize = tensor.segments.iter().map(|s| s.rows() * s.k).sum();
        if numbers != shape.iter().product::<usize>() {
            return Err(unsaid(name));
        }
        let mut dtype = Dtype::F32;
        if is_matrix(&tensor.segments, &shape) {
            let sources = || tensor.segments.iter().flat_map(|s| &s.parts).map(|(p, _)| &p.tensor);
            let fits = |(pattern, _): &(String, Dtype)| {
                std::iter::once(name).chain(sources()).any(|n| super::spec::matches(pattern, n))
            };
            let rule = rules.iter().position(fits);
            let head =
                tensor.segments.iter().any(|s| s.what == "head" || s.what == "embed" && spec.tied);
            let wanted = match rule {
                Some(r) => {
                    used[r] = true;
                    rules[r].1
                }
                // As llama.cpp has it: the logits come straight from the head.
                None if head && width(format) < width(Q6_K) => Q6_K,
                None => format,
            };
            dtype = fitting(wanted, *shape.last().unwrap_or(&1));
        } else if let Some(stored) = stored.filter(|stored| stored.dtype.blocks().is_none()) {
            dtype = stored.dtype;
        }
        tensor.announced.1 = dtype;
        tensor.announced.2 = shape;
        if stored.is_some_and(|stored| stored.dtype == dtype) {
            tensor.segments.clear(); // as it is
        }
        tensors.push(tensor);
    }
    let unused = used.iter().position(|used| !used).map(|r| &rules[r].0[..]);
    Ok((tensors, unused))
}

const Q6_K: Dtype = Dtype::Blocks(Blocks::Q6_K);

/// Of 256 numbers, in bytes.
fn width(dtype: Dtype) -> usize {
    256 / dtype.block() * dtype.size()
}

/// Whether a tensor takes the type that is asked for: no vector, no router, nothing that is small and added up often.
fn is_matrix(segments: &[Segment], shape: &[usize]) -> bool {
    let small = |what: &str| {
        ["router", "shared_router", "positions", "conv", "mix_a", "mix_b"].contains(&what)
            || what.starts_with("altup_")
            || what.starts_with("laurel_")
            || what.ends_with("norm")
            || what.ends_with("_bias")
    };
    shape.len() > 1 && !segments.iter().any(|segment| small(segment.what))
}

/// The type, or where rows are no whole blocks the nearest that fits, as llama.cpp has it.
fn fitting(dtype: Dtype, k: usize) -> Dtype {
    let smaller = match dtype.blocks() {
        _ if k.is_multiple_of(dtype.block()) => return dtype,
        Some(Blocks::Q4_K) => Dtype::Blocks(Blocks::Q5_0),
        Some(Blocks::Q5_K) => Dtype::Blocks(Blocks::Q5_1),
        Some(Blocks::Q6_K) => Dtype::Blocks(Blocks::Q8_0),
        _ => return Dtype::F16,
    };
    if k.is_multiple_of(smaller.block()) { smaller } else { Dtype::F16 }
}

/// Width of a head and of its part that turns, where pairs are half a rotation apart in the source and neighbours in
/// the file.
fn turned(spec: &Spec, written: &Spec, l: usize, what: &str) -> Option<(usize, usize)> {
    let (Mixer::Attention(a), Mixer::Attention(b)) =
        (&spec.layers[l].mixer, &written.layers[l].mixer)
    else {
        return None;
    };
    let moved = ["q", "k", "q_bias", "k_bias"].contains(&what);
    let rope = spec.ropes.get(a.rope.unwrap_or(0))?;
    (moved && !a.rope_interleaved && b.rope_interleaved)
        .then_some((a.head_dim, 2 * rope.inv_freq.len()))
}

/// Writes the tensors.
fn write(
    reader: &Reader<'_>,
    cpu: &Cpu,
    checkpoint: &Checkpoint,
    said: &Said,
    tensors: &[Tensor],
    writer: &mut GgufWriter,
    stop: &AtomicBool,
    written: &mut Written,
    progress: &(dyn Fn(&'static str, u64, u64) + Sync),
) -> Result<()> {
    let total: u64 = tensors.iter().map(|t| size(&t.announced) as u64).sum();
    let mut done = 0;
    let mut buffer = Vec::new();
    for tensor in tensors {
        let (name, dtype, shape) = &tensor.announced;
        let bytes = size(&tensor.announced);
        if tensor.segments.is_empty() {
            writer.tensor(checkpoint.tensor(name)?.bytes)?;
        } else {
            buffer.clear();
            buffer.resize(bytes, 0);
            let mut at = 0;
            for segment in &tensor.segments {
                if stop.load(Ordering::Relaxed) {
                    return Err(Error::Interrupted);
                }
                let bytes = segment.rows() * segment.k / dtype.block() * dtype.size();
                fill(reader, cpu, said, name, *dtype, segment, &mut buffer[at..at + bytes])?;
                at += bytes;
            }
            writer.tensor(&buffer)?;
        }
        if shape.len() > 1 {
            match written.forms.iter_mut().find(|(form, _)| *form == dtype.name()) {
                Some((_, sum)) => *sum += bytes as u64,
                None => written.forms.push((dtype.name(), bytes as u64)),
            }
        }
        done += bytes as u64;
        progress("writing", done, total);
    }
    Ok(())
}

/// The rows of a segment.
fn fill(
    reader: &Reader<'_>,
    cpu: &Cpu,
    said: &Said,
    name: &str,
    dtype: Dtype,
    segment: &Segment,
    out: &mut [u8],
) -> Result<()> {
    let (plus_one, decay) = reader.changes(&said.spec, segment.what);
    let (rows, k) = (segment.rows(), segment.k);
    let plan = reader.rows(segment.parts.clone(), k)?;
    let (bad, large) = (std::sync::Mutex::new(None), AtomicBool::new(false));
    reader.with_parts(&plan, |parts| {
        cpu.fill(k / dtype.block() * dtype.size(), rows, out, |r, out| {
            let mut values = vec![0.0; k];
            if let Err(at) = parts.row(segment.source(r), &mut values) {
                bad.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(at);
                return;
            }
            if plus_one {
                values.iter_mut().for_each(|x| *x += 1.0);
            }
            if decay {
                values.iter_mut().for_each(|x| *x = -libm::expf(*x));
            }
            if !encode(dtype, &values, out) {
                large.store(true, Ordering::Relaxed);
            }
        });
        bad.into_inner().unwrap_or_else(|e| e.into_inner()).map_or(Ok(()), Err)
    })?;
    if large.into_inner() {
        let what = format!("found a number too large for {}; use bf16 or f32", dtype.name());
        return Err(Error::Unsupported(format!("tensor `{name}`: {what}")));
    }
    Ok(())
}

/// False: a number does not fit.
fn encode(dtype: Dtype, x: &[f32], out: &mut [u8]) -> bool {
    let mut fits = true;
    match dtype {
        Dtype::Blocks(blocks) => return blocks.encode(x, out),
        Dtype::F16 => {
            for (x, out) in x.iter().zip(out.as_chunks_mut::<2>().0) {
                let half = half::f16::from_f32(*x);
                fits &= half.is_finite();
                *out = half.to_le_bytes();
            }
        }
        Dtype::BF16 => {
            for (x, out) in x.iter().zip(out.as_chunks_mut::<2>().0) {
                let half = half::bf16::from_f32(*x);
                fits &= half.is_finite();
                *out = half.to_le_bytes();
            }
        }
        _ => {
            for (x, out) in x.iter().zip(out.as_chunks_mut::<4>().0) {
                *out = x.to_le_bytes();
            }
        }
    }
    fits
}
