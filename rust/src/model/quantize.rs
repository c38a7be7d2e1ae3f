//! Writes a model with its weights quantized and packed: `ferrule quantize`. The folder is made beside its place and
//! renamed at the end, so that what is there is whole. docs/FORMAT.md describes it. Never changes the source.

mod calibrate;
mod mixed;

use super::weights::{FORMS, Plan, Reader};
use super::{LoadOptions, MAX_CONFIG, Quantization};
use crate::backend::Form;
use crate::backend::cpu::{Bytes, Cpu, topology};
use crate::file::{self, Dtype, Writer};
use crate::{Error, Result};
use calibrate::Observer;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// Of config.json's `quantization_config`, here.
pub(super) const METHOD: &str = "ferrule";
/// Of the layout. Changes when old readers could misread new files.
const VERSION: u64 = 1;
/// Files that hold weights, or say where they are: not copied.
const WEIGHTS: [&str; 11] = [
    ".safetensors",
    ".index.json",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ot",
    ".npz",
];
/// Files larger than this are not copied either.
const MAX_COPY: u64 = 512 << 20;

/// Matrices with a tensor whose name fits a pattern, in which `*` stands for any text, take another form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The pattern.
    pub pattern: String,
    /// Int4, Int5, Int6, Int8, or None: as stored.
    pub form: Quantization,
}

/// How to quantize.
pub struct Quantize {
    /// The form of all matrices but those of `rules`.
    pub format: Quantization,
    /// With Int4 and a calibration: matrices get more bits, where that lessens the divergence most, up to so many a
    /// weight in all.
    pub bits: Option<f64>,
    /// The first that fits decides.
    pub rules: Vec<Rule>,
    /// Token ids of a text like those that the model will see, cut into contexts.
    pub calibration: Vec<Vec<u32>>,
    /// As for loading.
    pub load: LoadOptions,
}

/// What was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Written {
    /// Bytes of the weights file.
    pub bytes: u64,
    /// Bytes of the packed matrices times 8 over the parameters.
    pub bits_per_weight: f64,
    /// Bytes of each form.
    pub forms: Vec<(&'static str, u64)>,
    /// How the source was quantized before.
    pub source: Option<String>,
}

/// What a quantized folder's config.json was before: its `quantization_config`, if it is ours, is replaced by that of
/// the source.
pub(super) fn original(config: &mut Value) -> Result<()> {
    let bad = |what: String| {
        Error::format(
            "config.json",
            format!("quantization_config (quant_method \"{METHOD}\"): {what}"),
        )
    };
    let Some(found) = config.get("quantization_config") else { return Ok(()) };
    if found.get("quant_method").and_then(Value::as_str) != Some(METHOD) {
        return Ok(());
    }
    let version = found.get("version").unwrap_or(&Value::Null);
    if version.as_u64() != Some(VERSION) {
        return Err(bad(format!(
            "version: found {version}, expected {VERSION}; use a newer ferrule"
        )));
    }
    let known =
        ["quant_method", "version", "format", "bits", "rules", "calibration_tokens", "source"];
    let fields = found.as_object().into_iter().flatten().map(|(name, _)| name);
    if let Some(name) = fields.into_iter().find(|name| !known.contains(&name.as_str())) {
        return Err(bad(format!("{name}: not known; use a newer ferrule")));
    }
    let source = found.get("source").filter(|source| !source.is_null()).cloned();
    let Some(config) = config.as_object_mut() else { return Ok(()) };
    match source {
        Some(source) => config.insert("quantization_config".into(), source),
        None => config.remove("quantization_config"),
    };
    Ok(())
}

/// Quantizes the model in `folder` into the new folder `out`. `progress` is told what is done, how far, of how much.
/// Ends with `Error::Interrupted`, leaving nothing, soon after `stop`.
pub fn quantize(
    folder: &Path,
    out: &Path,
    how: Quantize,
    stop: &AtomicBool,
    progress: &(dyn Fn(&'static str, u64, u64) + Sync),
) -> Result<Written> {
    let Quantize { format, bits, rules, calibration, load } = how;
    let (spec, checkpoint, path) = super::open(folder, &load)?;
    if checkpoint.metadata().is_some() {
        let what = "is a GGUF file, which holds its own quantization; take the model's safetensors checkpoint";
        return Err(Error::Unsupported(format!("{}: {what}", path.display())));
    }
    let config = file::read_json(&path.join("config.json"), MAX_CONFIG)?.unwrap_or_default();
    let before = config.get("quantization_config").cloned();
    let source =
        before.as_ref().map(|b| b["quant_method"].as_str().unwrap_or("unknown").to_owned());
    if source.as_deref() == Some(METHOD) {
        let what = "was made by `ferrule quantize`; take the model that it was made from";
        return Err(Error::Unsupported(format!("{}: {what}", path.display())));
    }
    let vacant = match fs::read_dir(out) {
        Err(_) => fs::symlink_metadata(out).is_err(),
        Ok(mut entries) => entries.next().is_none(),
    };
    if !vacant {
        return Err(Error::parameter("out", out.display(), "a path where nothing is"));
    }
    let threads = load.threads.unwrap_or_else(|| topology::auto().count);
    let cpu = Cpu::new(threads, load.isa.as_deref())?;
    let reader = Reader::new(&path, &checkpoint, &spec);
    let (mut plans, free) = planned(&reader, format, &rules)?;
    reader.refuse_unused(&plans)?;
    let parameters = spec.parameters().0.max(1);
    if let Some(bits) = bits {
        mixed::check(bits, format, calibration.is_empty(), &plans, parameters)?;
    }
    let mut observer = match calibration.is_empty() {
        true => None,
        false => Some(Observer::new(&reader, &spec, &load, &calibration, stop, progress)?),
    };
    let packer = Packer { reader: &reader, cpu: &cpu, stop, progress };
    let mut ready = Vec::new();
    if let Some(bits) = bits {
        ready = packer.mix(&mut plans, &free, bits, parameters, &mut observer)?;
    }

    let partial = Partial::new(out)?;
    copy(&path, &partial.0)?;
    let tokens: usize = calibration.iter().map(Vec::len).sum();
    let mut config = config;
    config["quantization_config"] = json!({
        "quant_method": METHOD,
        "version": VERSION,
        "format": if bits.is_some() { "mixed" } else { name(format) },
        "rules": rules.iter().map(|r| json!([r.pattern, name(r.form)])).collect::<Vec<_>>(),
        "calibration_tokens": tokens,
        "source": before.unwrap_or_default(),
    });
    if let Some(bits) = bits {
        config["quantization_config"]["bits"] = json!(bits);
    }
    let text = serde_json::to_vec_pretty(&config).map_err(|e| Error::Internal(e.to_string()))?;
    let place = partial.0.join("config.json");
    fs::write(&place, text).map_err(|e| Error::io(&place, e))?;

    let mut tensors: Vec<(String, Dtype, Vec<usize>)> = Vec::new();
    for plan in &plans {
        let size = plan.form.row_block_bytes(plan.k);
        tensors.push((plan.name(), Dtype::U8, vec![plan.bytes() / size, size]));
    }
    let vectors = reader.vectors();
    for name in &vectors {
        let tensor = checkpoint.tensor(name)?;
        tensors.push((name.clone(), tensor.dtype, tensor.shape.to_vec()));
    }
    let file = partial.0.join("model.safetensors");
    let mut writer = Writer::new(&file, &tensors)?;
    let total: u64 = plans.iter().map(|p| p.bytes() as u64).sum();
    let (mut done, mut forms) = (0, Vec::<(&str, u64)>::new());
    ready.resize(plans.len(), None);
    let rest: Vec<usize> = (0..plans.len()).filter(|&i| ready[i].is_none()).collect();
    for (i, plan) in plans.iter().enumerate() {
        let bytes = match ready[i].take() {
            Some(bytes) => bytes,
            None => {
                packer.pack(&rest[rest.partition_point(|&r| r < i)..], &plans, &mut observer)?
            }
        };
        let buffer = bytes.get();
        writer.tensor(buffer)?;
        done += buffer.len() as u64;
        match forms.iter_mut().find(|(form, _)| *form == plan.form.name()) {
            Some((_, bytes)) => *bytes += buffer.len() as u64,
            None => forms.push((plan.form.name(), buffer.len() as u64)),
        }
        progress("quantizing", done, total);
    }
    for name in &vectors {
        writer.tensor(checkpoint.tensor(name)?.bytes)?;
    }
    writer.finish()?;
    let bytes = fs::metadata(&file).map_err(|e| Error::io(&file, e))?.len();
    partial.finish(out)?;
    let bits_per_weight = 8.0 * total as f64 / parameters as f64;
    Ok(Written { bytes, bits_per_weight, forms, source })
}

/// Packs matrices, with their inputs in mind where these are known.
struct Packer<'a> {
    reader: &'a Reader<'a>,
    cpu: &'a Cpu,
    stop: &'a AtomicBool,
    progress: &'a (dyn Fn(&'static str, u64, u64) + Sync),
}

impl Packer<'_> {
    /// Matrix `wanted[0]`; the others are those that will be asked for next.
    fn pack(
        &self,
        wanted: &[usize],
        plans: &[Plan],
        observer: &mut Option<Observer<'_>>,
    ) -> Result<Bytes> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        let plan = &plans[wanted[0]];
        let sums = match observer {
            Some(observer) if mixed::rounds(plan.form) => observer.sums(wanted, plans)?,
            _ => None,
        };
        let mut bytes = Bytes::zeroed(plan.bytes(), "a packed matrix")?;
        match sums {
            Some(sums) => self.reader.with_parts(plan, |parts| {
                self.cpu.pack_knowing(plan.form, parts, sums, bytes.get_mut())
            })?,
            None => self.reader.pack(self.cpu, plan, bytes.get_mut())?,
        }
        Ok(bytes)
    }
}

/// The matrices in the forms that they are to have, and which of them have it of `format`.
fn planned(
    reader: &Reader<'_>,
    format: Quantization,
    rules: &[Rule],
) -> Result<(Vec<Plan>, Vec<usize>)> {
    let mut plans = reader.plans(format)?;
    let mut others: Vec<(Quantization, Vec<Plan>)> = Vec::new();
    let mut used = vec![false; rules.len()];
    let mut free = Vec::new();
    for i in 0..plans.len() {
        let fits =
            |rule: &Rule| plans[i].tensors().any(|name| super::spec::matches(&rule.pattern, name));
        let Some(r) = rules.iter().position(fits) else {
            free.push(i);
            continue;
        };
        used[r] = true;
        let form = rules[r].form;
        if !others.iter().any(|(known, _)| *known == form) {
            others.push((form, reader.plans(form)?));
        }
        let (_, other) =
            others.iter_mut().find(|(known, _)| *known == form).ok_or(Error::Closed)?;
        std::mem::swap(&mut plans[i], &mut other[i]);
    }
    if let Some(r) = used.iter().position(|used| !used) {
        let expected = "a pattern that fits the name of a weight";
        return Err(Error::parameter("rules", format!("{:?}", rules[r].pattern), expected));
    }
    for plan in &mut plans {
        plan.form = match plan.form {
            // Where activations are f32, the same bytes are called otherwise.
            Form::GroupedFloat(_) | Form::Grouped(_) if plan.form.name() == Form::MXFP4.name() => {
                Form::MXFP4
            }
            form if FORMS.contains(&form) => form,
            _ => {
                let first = plan.tensors().next().unwrap_or_default();
                return Err(Error::Unsupported(format!(
                    "tensor `{first}`: found weights that were quantized before, which are not written as they are; \
                     use int8 or int4, or load the source"
                )));
            }
        };
    }
    Ok((plans, free))
}

fn name(format: Quantization) -> &'static str {
    match format {
        Quantization::Auto => "auto",
        Quantization::Int4 => "int4",
        Quantization::Int5 => "int5",
        Quantization::Int6 => "int6",
        Quantization::Int8 => "int8",
        Quantization::None => "none",
    }
}

/// Copies what is beside the weights: tokenizer, templates, licence.
fn copy(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from).map_err(|e| Error::io(from, e))? {
        let path = entry.map_err(|e| Error::io(from, e))?.path();
        let Some(name) = path.file_name().map(|name| name.to_string_lossy().into_owned()) else {
            continue;
        };
        let small = fs::metadata(&path).is_ok_and(|m| m.is_file() && m.len() <= MAX_COPY);
        if small && !WEIGHTS.iter().any(|end| name.ends_with(end)) && name != "config.json" {
            fs::copy(&path, to.join(&name)).map_err(|e| Error::io(&path, e))?;
        }
    }
    Ok(())
}

/// A folder that is removed unless it was finished.
struct Partial(PathBuf);

impl Partial {
    /// Beside `out`, so that it can be renamed.
    fn new(out: &Path) -> Result<Partial> {
        let path = file::partial(out)?;
        fs::create_dir_all(&path).map_err(|e| Error::io(&path, e))?;
        Ok(Partial(path))
    }

    /// Puts it in its place, which is free or an empty folder.
    fn finish(self, out: &Path) -> Result<()> {
        let _ = fs::remove_dir(out); // only if it is there and empty
        fs::rename(&self.0, out).map_err(|e| Error::io(out, e))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0); // not there any more where it was renamed
    }
}
