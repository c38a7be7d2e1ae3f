//! From a checkpoint's tensors to packed weights. Formats and checkpoint names end here.

mod gemma;
mod latent;
mod recurrent;

pub(super) use gemma::{AltUp, Beside, Gemma, GemmaLayer};
pub(super) use latent::Latent;

use super::cache;
use super::spec::{self, Act, Gate, Names, QkNorm, Slice, Spec, Values};
use super::{LoadOptions, Quantization};
use crate::backend::cpu::{Bytes, Cpu, Mat};
use crate::backend::{Activation, Backend, Expert, Form, HeadRows, Kept, Part, Parts};
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
    pub(super) gemma: Option<Gemma<M, V>>,
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
    pub(super) gemma: Option<GemmaLayer<M, V>>,
}

/// As [`spec::Mixer`].
pub(super) enum Mixer<M, V> {
    Attention(Attention<M, V>),
    Latent(Latent<M, V>),
    Recurrent(Recurrent<M, V>),
}

/// As [`spec::Ffn`].
pub(super) enum Ffn<M, V> {
    Dense(Dense<M, V>),
    Moe(Moe<M, V>),
    Beside(Beside<M, V>),
}

/// The weights of attention.
pub(super) struct Attention<M, V> {
    /// Queries, keys and values, and the gate if there is one.
    pub(super) qkv: M,
    pub(super) qkv_bias: Option<V>,
    pub(super) qk_norms: Option<(V, V)>,
    /// Ones: values are divided by their root mean square alone.
    pub(super) v_norm: Option<V>,
    pub(super) sinks: Option<V>,
    pub(super) o: M,
    pub(super) o_bias: Option<V>,
}

/// The weights of a mixer with a state.
pub(super) struct Recurrent<M, V> {
    pub(super) input: M,
    pub(super) input_bias: Option<V>,
    /// `[width, channels]`.
    pub(super) taps: V,
    pub(super) conv_bias: Option<V>,
    pub(super) heads: Option<Heads<M, V>>,
    pub(super) out: M,
    pub(super) out_bias: Option<V>,
}

/// The weights of a recurrence over matrices.
pub(super) struct Heads<M, V> {
    /// The last part of the projection.
    pub(super) rates: M,
    pub(super) rates_bias: Option<V>,
    pub(super) rows: HeadRows<V>,
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

/// The weights of experts.
pub(super) struct Moe<M, V> {
    pub(super) act: Activation,
    pub(super) router: M,
    pub(super) router_bias: Option<V>,
    pub(super) correction: Option<V>,
    /// Multiplies the weights that the router gives.
    pub(super) scales: Option<V>,
    pub(super) experts: Vec<Expert<M, V>>,
    pub(super) shared: Option<Shared<M>>,
}

/// The weights of shared experts.
pub(super) struct Shared<M> {
    pub(super) gate_up: M,
    pub(super) down: M,
    /// One row.
    pub(super) router: Option<M>,
}

impl<M, V> Weights<M, V> {
    /// All matrices.
    pub(super) fn mats(&self) -> impl Iterator<Item = &M> {
        let layers = self
            .layers
            .iter()
            .flat_map(|layer| layer.mixer.mats().into_iter().chain(layer.ffn.mats()));
        let gemma = self.layers.iter().filter_map(|layer| layer.gemma.as_ref());
        let layers = layers.chain(gemma.flat_map(GemmaLayer::mats));
        let gemma = self.gemma.iter().flat_map(Gemma::mats);
        layers.chain([&self.embed]).chain(&self.positions).chain(&self.head).chain(gemma)
    }
}

impl<M, V> Mixer<M, V> {
    /// All matrices.
    fn mats(&self) -> Vec<&M> {
        match self {
            Mixer::Attention(a) => vec![&a.qkv, &a.o],
            Mixer::Recurrent(r) => {
                [&r.input, &r.out].into_iter().chain(r.heads.as_ref().map(|h| &h.rates)).collect()
            }
            Mixer::Latent(a) => {
                let mut mats = vec![&a.q, &a.kv_a, &a.o, &a.keys, &a.values];
                mats.extend(a.q_a.as_ref().map(|(q_a, _)| q_a));
                mats
            }
        }
    }
}

impl<M, V> Ffn<M, V> {
    /// All matrices, gate and up first.
    pub(super) fn mats(&self) -> Vec<&M> {
        match self {
            Ffn::Dense(dense) => dense.mats().into(),
            Ffn::Moe(moe) => moe.mats(),
            Ffn::Beside(both) => [&both.dense.mats(), &both.moe.mats()[..]].concat(),
        }
    }
}

impl<M, V> Dense<M, V> {
    fn mats(&self) -> [&M; 2] {
        [&self.gate_up, &self.down]
    }
}

impl<M, V> Moe<M, V> {
    fn mats(&self) -> Vec<&M> {
        let mut mats: Vec<&M> = self.experts.iter().flat_map(|e| [&e.gate_up, &e.down]).collect();
        if let Some(shared) = &self.shared {
            mats.extend([&shared.gate_up, &shared.down]);
            mats.extend(&shared.router);
        }
        mats.push(&self.router);
        mats
    }
}

/// A matrix as the checkpoint has it: places of rows and their number, all with `k` inputs.
struct Source {
    parts: Vec<(Slice, usize)>,
    k: usize,
    interleaved: bool,
    /// Never quantized: a small matrix whose errors would choose other experts.
    exact: bool,
}

/// One packed matrix to be: what it comes from.
#[derive(Debug)]
pub(super) struct Plan {
    parts: Vec<(Slice, usize)>,
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
    fn new(folder: &'a Path, checkpoint: &'a Checkpoint, spec: &'a Spec) -> Reader<'a> {
        let names = spec.names(|name| checkpoint.get(name).is_some());
        Reader { folder, checkpoint, spec, names }
    }

    /// An error if there are tensors that are no weights of the model. After `plans`: these have found every weight, so
    /// their number is bounded by the file.
    fn refuse_unused(&self) -> Result<()> {
        let unused = self.spec.unused(&self.names, self.checkpoint.names());
        match unused.first() {
            None => Ok(()),
            Some(first) => Err(Error::Unsupported(format!(
                "the checkpoint has {} tensors that {} does not have here, `{first}` first",
                unused.len(),
                self.spec.architecture
            ))),
        }
    }

    /// A tensor, its shape checked.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<TensorView<'a>> {
        let tensor = self.checkpoint.tensor(name)?;
        if tensor.shape != shape {
            let what =
                format!("tensor `{name}`: found shape {:?}, expected {shape:?}", tensor.shape);
            return Err(Error::format(self.folder, what));
        }
        Ok(tensor)
    }

    /// The tensors of a weight, their shapes and types checked. One, or two for MXFP4. Blocks are stored as F32.
    fn tensors(&self, place: &Slice) -> Result<(Vec<TensorView<'a>>, Form)> {
        let tensor = |(name, shape): (String, Vec<usize>)| self.tensor(&name, &shape);
        let tensors: Vec<_> = place.tensors().into_iter().map(tensor).collect::<Result<_>>()?;
        let mut stored = Form::Mxfp4;
        for tensor in &tensors {
            stored = match (tensor.dtype, place.mxfp4) {
                (Dtype::F32, false) => Form::F32,
                (Dtype::F16, false) => Form::F16,
                (Dtype::BF16, false) => Form::Bf16,
                (Dtype::Blocks(_), false) if place.column == 1 => Form::F32,
                (Dtype::U8, true) => Form::Mxfp4,
                (other, mxfp4) => {
                    return Err(Error::Unsupported(format!(
                        "tensor `{}`: found {}, expected {}",
                        tensor.name,
                        other.name(),
                        if mxfp4 { "U8" } else { "F32, F16 or BF16" }
                    )));
                }
            };
        }
        Ok((tensors, stored))
    }

    /// `n` rows of `k` numbers.
    fn part(&self, place: &Slice, n: usize, k: usize) -> Result<(Vec<TensorView<'a>>, Part<'a>)> {
        let (mut tensors, stored) = self.tensors(place)?;
        let numbers: usize = place.shape.iter().product();
        let end = place.first + (n - 1) * place.row + (k - 1) * place.column + 1;
        for tensor in &mut tensors {
            // Whole bytes of codes and whole exponents: rows of MXFP4 start and end with a group.
            let byte =
                |number: usize| number as u128 * tensor.bytes.len() as u128 / numbers as u128;
            tensor.bytes = &tensor.bytes[byte(place.first) as usize..byte(end) as usize];
        }
        let scales = tensors.get(1).map_or(&[][..], |scales| scales.bytes);
        let Slice { row, column, .. } = *place;
        let blocks = tensors[0].dtype.blocks();
        let part = Part { stored, blocks, n, bytes: tensors[0].bytes, row, column, scales };
        Ok((tensors, part))
    }

    /// A vector as f32.
    fn vector(&self, place: &Slice, n: usize) -> Result<Vec<f32>> {
        self.values(place, n, 1)
    }

    /// `n` rows of `k` numbers as f32.
    fn values(&self, place: &Slice, n: usize, k: usize) -> Result<Vec<f32>> {
        let (_, Part { stored, blocks, bytes, row, column, .. }) = self.part(place, n, k)?;
        let decoded: Vec<u8> = blocks.map_or(Vec::new(), |blocks| {
            let mut values = vec![0.0f32; bytes.len() / blocks.bytes() * blocks.weights()];
            blocks.decode(bytes, &mut values);
            values.iter().flat_map(|x| x.to_le_bytes()).collect()
        });
        let bytes = if blocks.is_some() { &decoded } else { bytes };
        let (words, halves) = (bytes.as_chunks().0, bytes.as_chunks().0);
        let value = |i: usize| {
            let at = i / k * row + i % k * column;
            match stored {
                Form::F32 => f32::from_le_bytes(words[at]),
                Form::F16 => half::f16::from_le_bytes(halves[at]).to_f32(),
                _ => half::bf16::from_le_bytes(halves[at]).to_f32(),
            }
        };
        let values: Vec<f32> = (0..n * k).map(value).collect();
        match values.iter().position(|x| !x.is_finite()) {
            None => Ok(values),
            Some(i) => Err(self.not_finite(place, i / k, i % k)),
        }
    }

    fn not_finite(&self, place: &Slice, i: usize, j: usize) -> Error {
        let (tensor, at) = (&place.tensor, place.index(i, j));
        let what = format!("tensor `{tensor}`{at:?}: found a number that is not finite");
        Error::format(self.folder, what)
    }

    fn norm(&self, place: &Slice, n: usize, k: usize) -> Result<Vec<f32>> {
        let mut gain = self.values(place, n, k)?;
        if self.spec.norm.plus_one() {
            gain.iter_mut().for_each(|g| *g += 1.0);
        }
        Ok(gain)
    }

    /// How a matrix will be packed.
    fn plan(&self, quantization: Quantization, source: Source) -> Result<Plan> {
        let Source { parts, k, interleaved, exact } = source;
        let mut form = None;
        for (place, _) in &parts {
            let (tensors, stored) = self.tensors(place)?;
            let blocks = tensors[0].dtype.blocks();
            let kept = blocks.map_or(stored, |blocks| match blocks.kept() {
                Kept::Q4 => Form::Q4,
                Kept::Q8 => Form::Q8,
                Kept::Mxfp4 => Form::Mxfp4,
            });
            let wanted = match quantization {
                Quantization::None if kept == Form::Mxfp4 => Form::Mxfp4Float,
                Quantization::None => stored,
                _ if exact => stored,
                _ if kept == Form::Mxfp4 => kept,
                Quantization::Int4 => Form::Q4,
                Quantization::Int8 => Form::Q8,
                Quantization::Auto => kept,
            };
            let form = form.get_or_insert(wanted);
            if *form == wanted {
                continue;
            }
            if self.checkpoint.metadata().is_none() {
                return Err(Error::Unsupported(format!(
                    "tensor `{}`: found {}, but `{}` beside it is stored otherwise; use quantization=\"int8\"",
                    place.tensor,
                    stored.name(),
                    parts[0].0.tensor
                )));
            }
            // GGUF files mix types: a form that holds both nearly, or exactly.
            let exact = !form.is_quantized() && !wanted.is_quantized();
            *form = if exact { Form::F32 } else { Form::Q8 };
        }
        let n = parts.iter().map(|(_, n)| n).sum::<usize>();
        let n = if interleaved { 2 * (n / 2).next_multiple_of(16) } else { n };
        Ok(Plan { parts, n, k, form: form.unwrap_or(Form::F32), interleaved })
    }

    /// Packs one matrix into `out`.
    fn pack(&self, cpu: &Cpu, plan: &Plan, out: &mut [u8]) -> Result<()> {
        let part = |(place, n): &(Slice, usize)| self.part(place, *n, plan.k);
        let sources: Vec<_> = plan.parts.iter().map(part).collect::<Result<_>>()?;
        let parts = sources.iter().map(|(_, part)| *part).collect();
        let parts = Parts { parts, k: plan.k, interleaved: plan.interleaved };
        cpu.pack_into(plan.form, &parts, out)
            .map_err(|(p, row, column)| self.not_finite(&plan.parts[p].0, row, column))?;
        sources.iter().flat_map(|(tensors, _)| tensors).for_each(|t| self.checkpoint.release(t));
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
        let whole = |what: &str, n, exact| {
            let place = Slice::whole(self.names.model(what), vec![n, s.hidden]);
            Source { parts: vec![(place, n)], k: s.hidden, interleaved: false, exact }
        };
        let embed = mat(whole("embed", s.vocab, false))?;
        let positions = s.positions.map(|n| mat(whole("positions", n, true))).transpose()?;
        let gemma = self.gemma(&row, &mut mat)?;
        let layers = (0..s.layers.len()).map(|l| self.layer(l, &row, &mut mat));
        let layers = layers.collect::<Result<_>>()?;
        let head = || mat(whole("head", s.vocab, false));
        let head = (!s.tied).then(head).transpose()?;
        let place = |what: &str, n| Slice::whole(self.names.model(what), vec![n]);
        let vector = |what: &str, n| Ok(row(&self.vector(&place(what, n), n)?));
        let norm = Norm {
            gain: row(&self.norm(&place("norm", s.hidden), s.hidden, 1)?),
            bias: s.norm_bias.then(|| vector("norm_bias", s.hidden)).transpose()?,
        };
        let head_bias = s.head_bias.then(|| vector("head_bias", s.vocab)).transpose()?;
        Ok(Weights { embed, positions, layers, norm, head, head_bias, gemma })
    }

    fn layer<M, V>(
        &self,
        l: usize,
        row: &impl Fn(&[f32]) -> V,
        mat: &mut impl FnMut(Source) -> Result<M>,
    ) -> Result<Layer<M, V>> {
        let s = self.spec;
        let place = |what: &str| s.place(&self.names, l, what, 0);
        let vector = |what: &str, n: usize| self.vector(&place(what), n);
        let bias = |exists: bool, what: &str, n: usize| -> Result<Option<V>> {
            exists.then(|| Ok(row(&vector(what, n)?))).transpose()
        };
        let norm = |exists: bool, what: &str, bias_what: &str| -> Result<Option<Norm<V>>> {
            let gain = || Ok(row(&self.norm(&place(what), s.hidden, 1)?));
            let bias = || bias(s.norm_bias, bias_what, s.hidden);
            exists.then(|| Ok(Norm { gain: gain()?, bias: bias()? })).transpose()
        };
        let source = |parts: &[(&str, usize)], k, interleaved| Source {
            parts: parts.iter().map(|&(what, n)| (place(what), n)).collect(),
            k,
            interleaved,
            exact: false,
        };
        let mixer = match &s.layers[l].mixer {
            spec::Mixer::Recurrent(r) => Mixer::Recurrent(self.recurrent(l, r, row, mat)?),
            spec::Mixer::Attention(a) => {
                let (q, kv, d) = (a.q_width(), a.kv_width(), a.head_dim);
                let parts = |what: [&str; 3]| match s.qkv_by_head {
                    false => what.map(&place).into_iter().zip([q, kv, kv]).collect(),
                    true => by_group(&place(what[0]), a.kv_heads, &[q / a.kv_heads, d, d]),
                };
                let mut qkv = parts(match a.values {
                    Values::NormedKeys => ["q", "k", "k"],
                    _ => ["q", "k", "v"],
                });
                if a.kv_of.is_some() {
                    qkv.truncate(1);
                }
                match a.gate {
                    Gate::None => {}
                    // One tensor has, for each head, its query and its gate.
                    Gate::Element if place("q").tensor == place("attn_gate").tensor => {
                        let mut both = by_group(&place("q"), a.heads, &[d, d]);
                        let gates = both.split_off(a.heads);
                        qkv = both.into_iter().chain(qkv.drain(1..)).chain(gates).collect();
                    }
                    Gate::Head | Gate::Element => qkv.push((place("attn_gate"), a.gate_width())),
                }
                let qkv = Source { parts: qkv, ..source(&[], s.hidden, false) };
                let qkv_bias = || -> Result<V> {
                    let parts = parts(["q_bias", "k_bias", "v_bias"]);
                    let all = parts.iter().map(|(rows, n)| self.vector(rows, *n));
                    Ok(row(&all.collect::<Result<Vec<_>>>()?.concat()))
                };
                let gain = |what: &str, heads: usize| match s.qk_norm {
                    QkNorm::Head => self.norm(&place(what), d, 1),
                    QkNorm::EachHead => {
                        let places = s.places(&self.names, l, what);
                        let each = heads / places.len();
                        let gains = places.iter().map(|place| self.norm(place, each, d));
                        Ok(gains.collect::<Result<Vec<_>>>()?.concat())
                    }
                    QkNorm::Full | QkNorm::None => self.norm(&place(what), heads * d, 1),
                };
                let qk_norms = || -> Result<(V, V)> {
                    let q = row(&gain("q_norm", a.heads)?);
                    let k = if a.kv_of.is_some() { "q_norm" } else { "k_norm" }; // or any: there are no keys
                    Ok((q, row(&gain(k, a.kv_heads)?)))
                };
                Mixer::Attention(Attention {
                    qkv: mat(qkv)?,
                    qkv_bias: s.qkv_bias.then(qkv_bias).transpose()?,
                    qk_norms: (s.qk_norm != QkNorm::None).then(qk_norms).transpose()?,
                    v_norm: (a.values != Values::Projected).then(|| row(&vec![1.0; d])),
                    sinks: bias(a.sinks, "sinks", a.heads)?,
                    o: mat(source(&[("o", s.hidden)], q, false))?,
                    o_bias: bias(s.o_bias, "o_bias", s.hidden)?,
                })
            }
            spec::Mixer::Latent(a) => Mixer::Latent(self.latent(l, a, row, mat)?),
        };
        let gated = |ffn: usize, mat: &mut dyn FnMut(Source) -> Result<M>| {
            let gate_up_bias = || -> Result<V> {
                Ok(row(&interleave(&vector("gate_bias", ffn)?, &vector("up_bias", ffn)?)))
            };
            Ok(Dense {
                act: self.activation(l)?,
                gate_up: mat(source(&[("gate", ffn), ("up", ffn)], s.hidden, true))?,
                gate_up_bias: s.mlp_bias.then(gate_up_bias).transpose()?,
                down: mat(source(&[("down", s.hidden)], ffn, false))?,
                down_bias: bias(s.mlp_bias, "down_bias", s.hidden)?,
            })
        };
        let ffn = match &s.layers[l].ffn {
            spec::Ffn::Moe(moe) => Ffn::Moe(self.moe(l, moe, row, mat)?),
            &spec::Ffn::Dense(ffn) | &spec::Ffn::Sparse(ffn, _) => Ffn::Dense(gated(ffn, mat)?),
            spec::Ffn::Beside(ffn, moe) => {
                let dense = gated(*ffn, mat)?;
                let moe = self.moe(l, moe, row, mat)?;
                Ffn::Beside(self.beside(l, dense, moe, row)?)
            }
            &spec::Ffn::Plain(ffn) => Ffn::Dense(Dense {
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
            gemma: self.gemma_layer(l, row, mat)?,
        })
    }

    /// The activation of layer `l`.
    fn activation(&self, l: usize) -> Result<Activation> {
        Ok(match self.spec.act {
            Act::Silu => Activation::Silu,
            Act::Gelu => Activation::Gelu,
            Act::GeluTanh => Activation::GeluTanh,
            Act::Relu2 => Activation::Relu2,
            Act::ClampedSwiglu => Activation::ClampedSwiglu,
            Act::XIelu => {
                let number = |what: &str| -> Result<f32> {
                    Ok(self.vector(&self.spec.place(&self.names, l, what, 0), 1)?[0])
                };
                let softplus =
                    |x: f32| x.max(0.0) + libm::log1p(libm::exp(-f64::from(x.abs()))) as f32;
                let beta = number("xielu_beta")?;
                Activation::XIelu {
                    alpha_p: softplus(number("xielu_alpha_p")?),
                    alpha_n: beta + softplus(number("xielu_alpha_n")?),
                    beta,
                    eps: number("xielu_eps")?,
                }
            }
        })
    }
}

/// The rows of one kind, then those of the next, where one tensor has for each group `sizes` rows of the kinds.
fn by_group(tensor: &Slice, groups: usize, sizes: &[usize]) -> Vec<(Slice, usize)> {
    let all: usize = sizes.iter().sum();
    let kinds = sizes.iter().scan(0, |at, &n| Some((std::mem::replace(at, *at + n), n)));
    let parts = kinds.flat_map(|(at, n)| {
        let first = move |g| tensor.first + (g * all + at) * tensor.row;
        (0..groups).map(move |g| (Slice { first: first(g), ..tensor.clone() }, n))
    });
    parts.collect()
}

impl Reader<'_> {
    fn moe<M, V>(
        &self,
        l: usize,
        moe: &spec::Moe,
        row: &impl Fn(&[f32]) -> V,
        mat: &mut impl FnMut(Source) -> Result<M>,
    ) -> Result<Moe<M, V>> {
        let (hidden, width) = (self.spec.hidden, moe.width);
        let place = |what: &str, e| self.spec.place(&self.names, l, what, e);
        let vector = |exists: bool, what: &str| -> Result<Option<V>> {
            exists.then(|| Ok(row(&self.vector(&place(what, 0), moe.experts)?))).transpose()
        };
        let mut source = |parts: Vec<(Slice, usize)>, k, exact| {
            let interleaved = parts.len() == 2;
            mat(Source { parts, k, interleaved, exact })
        };
        let router = source(vec![(place("router", 0), moe.experts)], hidden, true)?;
        let mut expert = |e: usize| -> Result<Expert<M, V>> {
            let bias = |what: &str, n| self.vector(&place(what, e), n);
            let gate_up_bias = || -> Result<V> {
                let gate = bias("expert_gate_bias", width)?;
                Ok(row(&interleave(&gate, &bias("expert_up_bias", width)?)))
            };
            let down_bias = || -> Result<V> { Ok(row(&bias("expert_down_bias", hidden)?)) };
            let gate_up = vec![(place("expert_gate", e), width), (place("expert_up", e), width)];
            Ok(Expert {
                gate_up: source(gate_up, hidden, false)?,
                gate_up_bias: moe.expert_bias.then(gate_up_bias).transpose()?,
                down: source(vec![(place("expert_down", e), hidden)], width, false)?,
                down_bias: moe.expert_bias.then(down_bias).transpose()?,
            })
        };
        let experts = (0..moe.experts).map(&mut expert).collect::<Result<_>>()?;
        let shared = |shared: spec::Shared| -> Result<Shared<M>> {
            let width = shared.width;
            let gate_up = vec![(place("shared_gate", 0), width), (place("shared_up", 0), width)];
            let gate = || vec![(place("shared_router", 0), 1)];
            Ok(Shared {
                gate_up: source(gate_up, hidden, false)?,
                down: source(vec![(place("shared_down", 0), hidden)], width, false)?,
                router: shared.gate.then(|| source(gate(), hidden, true)).transpose()?,
            })
        };
        Ok(Moe {
            act: self.activation(l)?,
            router,
            router_bias: vector(moe.router_bias, "router_bias")?,
            correction: vector(moe.correction, "router_correction")?,
            scales: vector(
                matches!(self.spec.layers[l].ffn, spec::Ffn::Beside(..)),
                "router_scale",
            )?,
            experts,
            shared: moe.shared.map(shared).transpose()?,
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

/// What the weights will take in memory: the bytes of each form.
pub(super) fn sizes(
    folder: &Path,
    checkpoint: &Checkpoint,
    spec: &Spec,
    quantization: Quantization,
) -> Result<Vec<(&'static str, u64)>> {
    let reader = Reader::new(folder, checkpoint, spec);
    let plans = reader.plans(quantization)?;
    reader.refuse_unused()?;
    let mut sizes: Vec<(&str, u64)> = Vec::new();
    for plan in plans {
        let (form, bytes) = (plan.form.name(), plan.bytes() as u64);
        match sizes.iter_mut().find(|(name, _)| *name == form) {
            Some((_, sum)) => *sum += bytes,
            None => sizes.push((form, bytes)),
        }
    }
    Ok(sizes)
}

/// Reads, quantizes and packs all weights; or maps them, if `options.cache_dir` holds them packed.
pub(super) fn load(
    folder: &Path,
    checkpoint: &Checkpoint,
    spec: &Spec,
    cpu: &Cpu,
    options: &mut LoadOptions,
) -> Result<Weights<Mat, Vec<f32>>> {
    let reader = Reader::new(folder, checkpoint, spec);
    let plans = reader.plans(options.quantization)?;
    reader.refuse_unused()?;
    let joined = |mats: Vec<Mat>| {
        let mut mats = mats.into_iter();
        reader.weights(|values| cpu.row(values), |_| mats.next().ok_or(Error::Closed))
    };
    let total: u64 = plans.iter().map(|p| p.bytes() as u64).sum();
    let mut cache = match &options.cache_dir {
        Some(dir) if total >= cache::WORTH => Some(cache::Cache::new(dir, checkpoint, &plans)),
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
