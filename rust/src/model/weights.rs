//! From a checkpoint's tensors to packed weights. Formats and checkpoint names end here.

use super::cache;
use super::spec::{Names, Norm, QkNorm, Spec};
use super::{LoadOptions, Quantization};
use crate::backend::cpu::{Bytes, Cpu, Mat};
use crate::backend::{Backend, Form, Part, Parts};
use crate::file::{Checkpoint, Dtype, TensorView};
use crate::{Error, Result};
use std::path::Path;

/// The weights of one layer. Bias and norm exist where the family has them.
pub(super) struct Layer<B: Backend> {
    pub(super) attn_norm: Option<B::Row>,
    pub(super) qkv: B::Mat,
    pub(super) qkv_bias: Option<B::Row>,
    pub(super) qk_norms: Option<(B::Row, B::Row)>,
    pub(super) o: B::Mat,
    pub(super) o_bias: Option<B::Row>,
    pub(super) attn_after_norm: Option<B::Row>,
    pub(super) ffn_norm: Option<B::Row>,
    pub(super) gate_up: B::Mat,
    pub(super) gate_up_bias: Option<B::Row>,
    pub(super) down: B::Mat,
    pub(super) down_bias: Option<B::Row>,
    pub(super) ffn_after_norm: Option<B::Row>,
}

/// All weights of a model.
pub(super) struct Weights<B: Backend> {
    pub(super) embed: B::Mat,
    pub(super) layers: Vec<Layer<B>>,
    pub(super) norm: B::Row,
    /// `None`: the embedding is the head.
    pub(super) head: Option<B::Mat>,
}

/// One packed matrix to be: the checkpoint's tensors it comes from.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) names: Vec<String>,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) form: Form,
    interleaved: bool,
}

impl Plan {
    pub(super) fn bytes(&self) -> usize {
        self.form.bytes(self.n, self.k)
    }
}

/// A checkpoint read as one family says.
struct Reader<'a> {
    folder: &'a Path,
    checkpoint: &'a Checkpoint,
    spec: &'a Spec,
    names: Names,
}

impl<'a> Reader<'a> {
    fn new(folder: &'a Path, checkpoint: &'a Checkpoint, spec: &'a Spec) -> Result<Reader<'a>> {
        let names = spec.names(|name| checkpoint.get(name).is_some());
        let unused = spec.unused(&names, checkpoint.names());
        if let Some(first) = unused.first() {
            return Err(Error::Unsupported(format!(
                "the checkpoint has {} tensors that {} does not have here, `{first}` first",
                unused.len(),
                spec.architecture
            )));
        }
        Ok(Reader { folder, checkpoint, spec, names })
    }

    /// The tensor of a weight, its shape and type checked.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<(TensorView<'a>, Form)> {
        let tensor = self.checkpoint.tensor(name)?;
        if tensor.shape != shape {
            let what =
                format!("tensor `{name}`: found shape {:?}, expected {shape:?}", tensor.shape);
            return Err(Error::format(self.folder, what));
        }
        let stored = match tensor.dtype {
            Dtype::F32 => Form::F32,
            Dtype::F16 => Form::F16,
            Dtype::BF16 => Form::Bf16,
            other => {
                return Err(Error::Unsupported(format!(
                    "tensor `{name}`: found {}, expected F32, F16 or BF16",
                    other.name()
                )));
            }
        };
        Ok((tensor, stored))
    }

    /// A vector as f32.
    fn vector(&self, name: &str, n: usize) -> Result<Vec<f32>> {
        let (tensor, stored) = self.tensor(name, &[n])?;
        let values: Vec<f32> = match stored {
            Form::F32 => {
                tensor.bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
            }
            Form::F16 => {
                let halves = tensor.bytes.as_chunks().0.iter();
                halves.map(|&b| half::f16::from_le_bytes(b).to_f32()).collect()
            }
            _ => {
                let halves = tensor.bytes.as_chunks().0.iter();
                halves.map(|&b| half::bf16::from_le_bytes(b).to_f32()).collect()
            }
        };
        match values.iter().position(|x| !x.is_finite()) {
            None => Ok(values),
            Some(i) => Err(self.not_finite(name, &format!("[{i}]"))),
        }
    }

    fn not_finite(&self, name: &str, at: &str) -> Error {
        let what = format!("tensor `{name}`{at}: found a number that is not finite");
        Error::format(self.folder, what)
    }

    fn norm(&self, name: &str, n: usize) -> Result<Vec<f32>> {
        let mut gain = self.vector(name, n)?;
        if self.spec.norm == Norm::RmsPlusOne {
            gain.iter_mut().for_each(|g| *g += 1.0);
        }
        Ok(gain)
    }

    /// What a matrix is made of; all parts have `k` inputs.
    fn plan(
        &self,
        quantization: Quantization,
        parts: &[(String, usize)],
        k: usize,
        interleaved: bool,
    ) -> Result<Plan> {
        let mut form = None;
        for (name, n) in parts {
            let (tensor, stored) = self.tensor(name, &[*n, k])?;
            let wanted = match quantization {
                Quantization::Int4 => Form::Q4,
                Quantization::Int8 => Form::Q8,
                Quantization::Auto | Quantization::None => stored,
            };
            if *form.get_or_insert(wanted) != wanted {
                return Err(Error::Unsupported(format!(
                    "tensor `{name}`: found {}, but `{}` beside it is stored otherwise; use quantization=\"int8\"",
                    tensor.dtype.name(),
                    parts[0].0
                )));
            }
        }
        let names = parts.iter().map(|(name, _)| name.clone()).collect();
        let n = parts.iter().map(|(_, n)| n).sum::<usize>();
        let n = if interleaved { 2 * (n / 2).next_multiple_of(16) } else { n };
        Ok(Plan { names, n, k, form: form.unwrap_or(Form::F32), interleaved })
    }

    /// Packs one matrix into `out`.
    fn pack(&self, cpu: &Cpu, plan: &Plan, out: &mut [u8]) -> Result<()> {
        let tensors: Vec<TensorView<'a>> =
            plan.names.iter().map(|name| self.checkpoint.tensor(name)).collect::<Result<_>>()?;
        let part = |t: &TensorView<'a>| {
            let stored = match t.dtype {
                Dtype::F32 => Form::F32,
                Dtype::F16 => Form::F16,
                _ => Form::Bf16, // `plan` has checked
            };
            Part { stored, n: t.shape[0], bytes: t.bytes }
        };
        let parts = tensors.iter().map(part).collect();
        let parts = Parts { parts, k: plan.k, interleaved: plan.interleaved };
        cpu.pack_into(plan.form, &parts, out).map_err(|(p, row, column)| {
            self.not_finite(&plan.names[p], &format!("[{row}, {column}]"))
        })?;
        tensors.iter().for_each(|t| self.checkpoint.release(t));
        Ok(())
    }

    /// All matrices, in the order in which `weights` takes them and the cache keeps them.
    fn plans(&self, quantization: Quantization) -> Result<Vec<Plan>> {
        let s = self.spec;
        let (q, kv) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
        let plan = |parts: &[(String, usize)], k, interleaved| {
            self.plan(quantization, parts, k, interleaved)
        };
        let mut plans = vec![plan(&[(self.names.model("embed"), s.vocab)], s.hidden, false)?];
        for l in 0..s.layers.len() {
            let name = |what, n| (self.names.layer(l, what), n);
            plans.push(plan(&[name("q", q), name("k", kv), name("v", kv)], s.hidden, false)?);
            plans.push(plan(&[name("o", s.hidden)], q, false)?);
            plans.push(plan(&[name("gate", s.ffn), name("up", s.ffn)], s.hidden, true)?);
            plans.push(plan(&[name("down", s.hidden)], s.ffn, false)?);
        }
        if !s.tied {
            plans.push(plan(&[(self.names.model("head"), s.vocab)], s.hidden, false)?);
        }
        Ok(plans)
    }

    /// Joins the matrices with the vectors, which are small and read anew each time.
    fn weights(&self, cpu: &Cpu, mats: Vec<Mat>) -> Result<Weights<Cpu>> {
        let s = self.spec;
        let mut mats = mats.into_iter();
        let mut mat = || mats.next().ok_or(Error::Closed);
        let embed = mat()?;
        let mut layers = Vec::with_capacity(s.layers.len());
        for l in 0..s.layers.len() {
            let norm = |exists: bool, what: &str, n: usize| -> Result<Option<Vec<f32>>> {
                let read = || Ok(cpu.row(&self.norm(&self.names.layer(l, what), n)?));
                exists.then(read).transpose()
            };
            let vector = |what: &str, n: usize| self.vector(&self.names.layer(l, what), n);
            let qkv_bias = || -> Result<Vec<f32>> {
                let (q, kv) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
                Ok([vector("q_bias", q)?, vector("k_bias", kv)?, vector("v_bias", kv)?].concat())
            };
            let gate_up_bias = || -> Result<Vec<f32>> {
                Ok(interleave(&vector("gate_bias", s.ffn)?, &vector("up_bias", s.ffn)?))
            };
            let heads = s.qk_norm == QkNorm::Head;
            let q_norm = norm(heads, "q_norm", s.head_dim)?;
            let k_norm = norm(heads, "k_norm", s.head_dim)?;
            layers.push(Layer {
                attn_norm: norm(s.norms.attn, "attn_norm", s.hidden)?,
                qkv: mat()?,
                qkv_bias: s.qkv_bias.then(qkv_bias).transpose()?,
                qk_norms: q_norm.zip(k_norm),
                o: mat()?,
                o_bias: s.o_bias.then(|| vector("o_bias", s.hidden)).transpose()?,
                attn_after_norm: norm(s.norms.attn_after, "attn_after_norm", s.hidden)?,
                ffn_norm: norm(s.norms.ffn, "ffn_norm", s.hidden)?,
                gate_up: mat()?,
                gate_up_bias: s.mlp_bias.then(gate_up_bias).transpose()?,
                down: mat()?,
                down_bias: s.mlp_bias.then(|| vector("down_bias", s.hidden)).transpose()?,
                ffn_after_norm: norm(s.norms.ffn_after, "ffn_after_norm", s.hidden)?,
            });
        }
        let norm = self.norm(&self.names.model("norm"), s.hidden)?;
        let head = if s.tied { None } else { Some(mat()?) };
        Ok(Weights { embed, layers, norm: cpu.row(&norm), head })
    }
}

/// Sixteen of `a`, sixteen of `b`, and so on, padded with zeros: as [`Parts::interleaved`] orders rows.
fn interleave(a: &[f32], b: &[f32]) -> Vec<f32> {
    let mut out = Vec::with_capacity(2 * a.len().next_multiple_of(16));
    for (a, b) in a.chunks(16).zip(b.chunks(16)) {
        for part in [a, b] {
            out.extend_from_slice(part);
            out.extend(std::iter::repeat_n(0.0, 16 - part.len()));
        }
    }
    out
}

/// Reads, quantizes and packs all weights; or maps them, if `options.cache_dir` holds them packed.
pub(super) fn load(
    folder: &Path,
    spec: &Spec,
    cpu: &Cpu,
    options: &mut LoadOptions,
) -> Result<Weights<Cpu>> {
    let checkpoint = Checkpoint::open(folder)?;
    let reader = Reader::new(folder, &checkpoint, spec)?;
    let plans = reader.plans(options.quantization)?;
    let total: u64 = plans.iter().map(|p| p.bytes() as u64).sum();
    let mut cache = match &options.cache_dir {
        Some(dir) if total >= cache::WORTH => Some(cache::Cache::new(dir, &checkpoint, &plans)),
        _ => None,
    };
    if let Some(mats) = cache.as_ref().and_then(|cache| cache.read(&plans)) {
        options.report(total, total);
        return reader.weights(cpu, mats);
    }
    // Straight to disk, one matrix in memory at a time, then mapped; or, without a cache, into memory.
    if let Some(mut writer) = cache.as_mut().and_then(|cache| cache.writer(&plans)) {
        let mut done = 0;
        let mut buffer = Vec::new();
        for plan in &plans {
            buffer.clear();
            buffer.resize(plan.bytes(), 0);
            reader.pack(cpu, plan, &mut buffer)?;
            if !writer.write(&buffer) {
                break; // a full disk: without a cache, then
            }
            done += plan.bytes() as u64;
            options.report(done, total);
        }
        drop(buffer);
        if writer.finish()
            && let Some(mats) = cache.and_then(|cache| cache.read(&plans))
        {
            return reader.weights(cpu, mats);
        }
    }
    let mut done = 0;
    let mut mats = Vec::with_capacity(plans.len());
    for plan in &plans {
        let mut bytes = Bytes::zeroed(plan.bytes(), "packed weights")?;
        reader.pack(cpu, plan, bytes.get_mut())?;
        mats.push(Mat::new(plan.form, plan.n, plan.k, bytes)?);
        done += plan.bytes() as u64;
        options.report(done, total);
    }
    reader.weights(cpu, mats)
}
