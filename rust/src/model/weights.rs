//! From a checkpoint's tensors to packed weights. Formats and checkpoint names end here.

use super::cache;
use super::spec::{self, Act, Names, QkNorm, Spec};
use super::{LoadOptions, Quantization};
use crate::backend::cpu::{Bytes, Cpu, Mat};
use crate::backend::{Activation, Backend, Form, Part, Parts};
use crate::file::{Checkpoint, Dtype, TensorView};
use crate::{Error, Result};
use std::path::Path;

/// All weights of a model: matrices `M`, vectors `V`. Bias and norm exist where the family has them.
pub(super) struct Weights<M, V> {
    pub(super) embed: M,
    pub(super) positions: Option<M>,
    pub(super) layers: Vec<Layer<M, V>>,
    pub(super) norm: Norm<V>,
    /// `None`: the embedding is the head.
    pub(super) head: Option<M>,
    pub(super) head_bias: Option<V>,
}

/// The weights of a norm.
pub(super) struct Norm<V> {
    pub(super) gain: V,
    pub(super) bias: Option<V>,
}

/// The weights of one layer.
pub(super) struct Layer<M, V> {
    pub(super) attn_norm: Option<Norm<V>>,
    pub(super) mixer: Mixer<M, V>,
    pub(super) attn_after_norm: Option<Norm<V>>,
    pub(super) ffn_norm: Option<Norm<V>>,
    pub(super) ffn: Ffn<M, V>,
    pub(super) ffn_after_norm: Option<Norm<V>>,
}

/// As [`spec::Mixer`].
pub(super) enum Mixer<M, V> {
    Attention(Attention<M, V>),
}

/// As [`spec::Ffn`].
pub(super) enum Ffn<M, V> {
    Dense(Dense<M, V>),
}

/// The weights of attention.
pub(super) struct Attention<M, V> {
    pub(super) qkv: M,
    pub(super) qkv_bias: Option<V>,
    pub(super) qk_norms: Option<(V, V)>,
    pub(super) o: M,
    pub(super) o_bias: Option<V>,
}

/// The weights of a feed-forward network.
pub(super) struct Dense<M, V> {
    pub(super) act: Activation,
    /// Up alone, where there is no gate.
    pub(super) gate_up: M,
    pub(super) gate_up_bias: Option<V>,
    pub(super) down: M,
    pub(super) down_bias: Option<V>,
}

/// A matrix as the checkpoint has it: tensors and their rows, all with `k` inputs.
struct Source {
    parts: Vec<(String, usize)>,
    k: usize,
    interleaved: bool,
    /// Never quantized.
    exact: bool,
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
        self.values(name, &[n])
    }

    /// A small tensor as f32.
    fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let (tensor, stored) = self.tensor(name, shape)?;
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

    fn norm(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let mut gain = self.values(name, shape)?;
        if self.spec.norm.plus_one() {
            gain.iter_mut().for_each(|g| *g += 1.0);
        }
        Ok(gain)
    }

    /// How a matrix will be packed.
    fn plan(&self, quantization: Quantization, source: Source) -> Result<Plan> {
        let Source { parts, k, interleaved, exact } = source;
        let mut form = None;
        for (name, n) in &parts {
            let (tensor, stored) = self.tensor(name, &[*n, k])?;
            let wanted = match quantization {
                _ if exact => stored,
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
        let n = parts.iter().map(|(_, n)| n).sum::<usize>();
        let n = if interleaved { 2 * (n / 2).next_multiple_of(16) } else { n };
        let names = parts.into_iter().map(|(name, _)| name).collect();
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
        let mut plans = Vec::new();
        self.weights(
            |_| (),
            |source| {
                plans.push(self.plan(quantization, source)?);
                Ok(())
            },
        )?;
        Ok(plans)
    }

    /// All weights. `mat` makes a matrix, in one order always; `row` a vector: these are small, and read anew
    /// each time.
    fn weights<M, V>(
        &self,
        row: impl Fn(&[f32]) -> V,
        mut mat: impl FnMut(Source) -> Result<M>,
    ) -> Result<Weights<M, V>> {
        let s = self.spec;
        let mut one = |what: &str, n, exact| {
            let parts = vec![(self.names.model(what), n)];
            mat(Source { parts, k: s.hidden, interleaved: false, exact })
        };
        let embed = one("embed", s.vocab, false)?;
        let positions = s.positions.map(|n| one("positions", n, true)).transpose()?;
        let layers = (0..s.layers.len()).map(|l| self.layer(l, &row, &mut mat));
        let layers = layers.collect::<Result<_>>()?;
        let head = || {
            let parts = vec![(self.names.model("head"), s.vocab)];
            mat(Source { parts, k: s.hidden, interleaved: false, exact: false })
        };
        let head = (!s.tied).then(head).transpose()?;
        let vector = |what: &str, n| Ok(row(&self.vector(&self.names.model(what), n)?));
        let norm = Norm {
            gain: row(&self.norm(&self.names.model("norm"), &[s.hidden])?),
            bias: s.norm_bias.then(|| vector("norm_bias", s.hidden)).transpose()?,
        };
        let head_bias = s.head_bias.then(|| vector("head_bias", s.vocab)).transpose()?;
        Ok(Weights { embed, positions, layers, norm, head, head_bias })
    }

    fn layer<M, V>(
        &self,
        l: usize,
        row: &impl Fn(&[f32]) -> V,
        mat: &mut impl FnMut(Source) -> Result<M>,
    ) -> Result<Layer<M, V>> {
        let s = self.spec;
        let name = |what: &str| self.names.layer(l, what);
        let vector = |what: &str, n: usize| self.vector(&name(what), n);
        let bias = |exists: bool, what: &str, n: usize| -> Result<Option<V>> {
            exists.then(|| Ok(row(&vector(what, n)?))).transpose()
        };
        let norm = |exists: bool, what: &str, bias_what: &str| -> Result<Option<Norm<V>>> {
            let gain = || Ok(row(&self.norm(&name(what), &[s.hidden])?));
            let bias = || bias(s.norm_bias, bias_what, s.hidden);
            exists.then(|| Ok(Norm { gain: gain()?, bias: bias()? })).transpose()
        };
        let source = |parts: &[(&str, usize)], k, interleaved| Source {
            parts: parts.iter().map(|&(what, n)| (name(what), n)).collect(),
            k,
            interleaved,
            exact: false,
        };
        let mixer = match &s.layers[l].mixer {
            spec::Mixer::Attention(a) => {
                let (q, kv, d) = (a.q_width(), a.kv_width(), a.head_dim);
                let qkv_bias = || -> Result<V> {
                    let all = [vector("q_bias", q)?, vector("k_bias", kv)?, vector("v_bias", kv)?];
                    Ok(row(&all.concat()))
                };
                let gain = |what: &str, heads: usize| match s.qk_norm {
                    QkNorm::Head => self.norm(&name(what), &[d]),
                    QkNorm::EachHead => self.norm(&name(what), &[heads, d]),
                    QkNorm::Full | QkNorm::None => self.norm(&name(what), &[heads * d]),
                };
                let qk_norms = || -> Result<(V, V)> {
                    Ok((row(&gain("q_norm", a.heads)?), row(&gain("k_norm", a.kv_heads)?)))
                };
                Mixer::Attention(Attention {
                    qkv: mat(source(&[("q", q), ("k", kv), ("v", kv)], s.hidden, false))?,
                    qkv_bias: s.qkv_bias.then(qkv_bias).transpose()?,
                    qk_norms: (s.qk_norm != QkNorm::None).then(qk_norms).transpose()?,
                    o: mat(source(&[("o", s.hidden)], q, false))?,
                    o_bias: bias(s.o_bias, "o_bias", s.hidden)?,
                })
            }
        };
        let ffn = match s.layers[l].ffn {
            spec::Ffn::Dense(ffn) => {
                let gate_up_bias = || -> Result<V> {
                    Ok(row(&interleave(&vector("gate_bias", ffn)?, &vector("up_bias", ffn)?)))
                };
                Ffn::Dense(Dense {
                    act: self.activation(l)?,
                    gate_up: mat(source(&[("gate", ffn), ("up", ffn)], s.hidden, true))?,
                    gate_up_bias: s.mlp_bias.then(gate_up_bias).transpose()?,
                    down: mat(source(&[("down", s.hidden)], ffn, false))?,
                    down_bias: bias(s.mlp_bias, "down_bias", s.hidden)?,
                })
            }
            spec::Ffn::Plain(ffn) => Ffn::Dense(Dense {
                act: self.activation(l)?,
                gate_up: mat(source(&[("up", ffn)], s.hidden, false))?,
                gate_up_bias: bias(s.mlp_bias, "up_bias", ffn)?,
                down: mat(source(&[("down", s.hidden)], ffn, false))?,
                down_bias: bias(s.mlp_bias, "down_bias", s.hidden)?,
            }),
        };
        Ok(Layer {
            attn_norm: norm(s.norms.attn, "attn_norm", "attn_norm_bias")?,
            mixer,
            attn_after_norm: norm(s.norms.attn_after, "attn_after_norm", "attn_after_norm_bias")?,
            ffn_norm: norm(s.norms.ffn, "ffn_norm", "ffn_norm_bias")?,
            ffn,
            ffn_after_norm: norm(s.norms.ffn_after, "ffn_after_norm", "ffn_after_norm_bias")?,
        })
    }

    /// The activation of layer `l`.
    fn activation(&self, l: usize) -> Result<Activation> {
        Ok(match self.spec.act {
            Act::Silu => Activation::Silu,
            Act::Gelu => Activation::Gelu,
            Act::GeluTanh => Activation::GeluTanh,
            Act::Relu2 => Activation::Relu2,
            Act::XIelu => {
                let number = |what: &str, shape: &[usize]| -> Result<f32> {
                    Ok(self.values(&self.names.layer(l, what), shape)?[0])
                };
                let softplus =
                    |x: f32| x.max(0.0) + libm::log1p(libm::exp(-f64::from(x.abs()))) as f32;
                let beta = number("xielu_beta", &[])?;
                Activation::XIelu {
                    alpha_p: softplus(number("xielu_alpha_p", &[1])?),
                    alpha_n: beta + softplus(number("xielu_alpha_n", &[1])?),
                    beta,
                    eps: number("xielu_eps", &[])?,
                }
            }
        })
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
) -> Result<Weights<Mat, Vec<f32>>> {
    let checkpoint = Checkpoint::open(folder)?;
    let reader = Reader::new(folder, &checkpoint, spec)?;
    let plans = reader.plans(options.quantization)?;
    let joined = |mats: Vec<Mat>| {
        let mut mats = mats.into_iter();
        reader.weights(|values| cpu.row(values), |_| mats.next().ok_or(Error::Closed))
    };
    let total: u64 = plans.iter().map(|p| p.bytes() as u64).sum();
    let mut cache = match &options.cache_dir {
        Some(dir) if total >= cache::WORTH => Some(cache::Cache::new(dir, &checkpoint, &plans)),
        _ => None,
    };
    if let Some(mats) = cache.as_ref().and_then(|cache| cache.read(&plans)) {
        options.report(total, total);
        return joined(mats);
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
            return joined(mats);
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
    joined(mats)
}
