//! From a checkpoint's tensors to packed weights. Formats and checkpoint names end here.

mod encoded;
mod exported;
mod gemma;
mod latent;
mod load;
mod moe;
mod recurrent;
mod stored;

pub(super) use exported::of_heads;
pub(super) use gemma::{AltUp, Beside, Gemma, GemmaLayer};
pub(super) use latent::Latent;
pub(super) use load::{Plan, load, sizes};
pub(super) use moe::Moe;
pub(super) use stored::FORMS;

use super::spec::{self, Act, Gate, Names, QkNorm, Slice, Spec, Values};
use crate::backend::{Activation, Blocks, Form, HeadRows, Part, Place};
use crate::file::{Checkpoint, Dtype, TensorView};
use crate::{Error, Result};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashSet};
use std::path::Path;
use stored::Stored;

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

/// A matrix as the checkpoint has it: places of rows and their number, all with `k` inputs.
struct Source {
    parts: Vec<(Slice, usize)>,
    k: usize,
    interleaved: bool,
    /// Never quantized: a small matrix whose errors would choose other experts.
    exact: bool,
}

/// A checkpoint read as one family says.
pub(super) struct Reader<'a> {
    folder: &'a Path,
    checkpoint: &'a Checkpoint,
    spec: &'a Spec,
    names: Names,
    stored: Stored<'a>,
    /// Tensors of which numbers were read one by one: vectors.
    read: RefCell<BTreeSet<String>>,
    /// What `weights` reads now.
    at: Cell<Place>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(folder: &'a Path, checkpoint: &'a Checkpoint, spec: &'a Spec) -> Reader<'a> {
        let stored = Stored::new(checkpoint);
        let has = |name: &str| checkpoint.get(name).is_some() || stored.has(name);
        let names = spec.names(|name| {
            let module = spec.quantized.as_ref().zip(name.strip_suffix(".weight"));
            has(name)
                || module.is_some_and(|(q, module)| {
                    q.marks().any(|mark| has(&format!("{module}{mark}")))
                })
        });
        Reader {
            folder,
            checkpoint,
            spec,
            names,
            stored,
            read: RefCell::default(),
            at: Cell::new(Place::Begin),
        }
    }

    /// An error if there are tensors that are no weights of the model. After `plans`: these have found every weight, so
    /// their number is bounded by the file.
    pub(super) fn refuse_unused(&self, plans: &[Plan]) -> Result<()> {
        let stored: HashSet<&str> = plans.iter().filter_map(Plan::stored).collect();
        let names = self.checkpoint.names().filter(|name| !stored.contains(name));
        let mut unused = self.spec.unused(&self.names, names);
        // AutoGPTQ once wrote a bias of zeros for each matrix.
        let zeros = |name: &&str| {
            let tensor = self.checkpoint.get(name).filter(|_| name.ends_with(".bias"));
            tensor.is_some_and(|tensor| tensor.bytes.iter().all(|&byte| byte == 0))
        };
        unused.retain(|name| self.spec.quantized.is_none() || !zeros(name));
        match unused.first() {
            None => Ok(()),
            Some(first) => Err(Error::Unsupported(format!(
                "the checkpoint has {} tensors that {} does not have here, `{first}` first",
                unused.len(),
                self.spec.architecture
            ))),
        }
    }

    /// The tensors of all vectors, once `weights` has been called.
    pub(super) fn vectors(&self) -> Vec<String> {
        self.read.borrow().iter().cloned().collect()
    }

    /// A tensor, its shape checked.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<TensorView<'a>> {
        let tensor = self.checkpoint.tensor(name)?;
        // In GGUF files dimensions of 1 come and go.
        let ones = self.checkpoint.metadata().is_none();
        let plain = |shape: &[usize]| shape.iter().copied().filter(|&n| ones || n != 1).collect();
        let (found, expected): (Vec<usize>, Vec<usize>) = (plain(tensor.shape), plain(shape));
        if found != expected {
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
        let mut stored = Form::MXFP4;
        for tensor in &tensors {
            stored = match (tensor.dtype, place.mxfp4) {
                (Dtype::F32, false) => Form::F32,
                (Dtype::F16, false) => Form::F16,
                (Dtype::BF16, false) => Form::Bf16,
                (Dtype::Blocks(_), false) => Form::F32,
                (Dtype::U8, true) => Form::MXFP4,
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
        if let Some(scheme) = &place.scheme {
            let (tensors, encoded) = self.encoded(place, scheme)?;
            let part = Part::floats(Form::F32, n, k, &[]);
            let Slice { row, column, .. } = *place;
            return Ok((tensors, Part { encoded: Some(encoded), row, column, ..part }));
        }
        let (mut tensors, stored) = self.tensors(place)?;
        let numbers: usize = place.shape.iter().product();
        let end = place.first + (n - 1) * place.row + (k - 1) * place.column + 1;
        let blocks = tensors[0].dtype.blocks();
        if let Some(blocks) = blocks
            && [place.first, end].iter().any(|at| !at.is_multiple_of(blocks.weights()))
        {
            return Err(Error::Unsupported(format!(
                "tensor `{}`: found {}, of which a part is needed that is not whole blocks",
                place.tensor,
                blocks.name()
            )));
        }
        for tensor in &mut tensors {
            // Whole bytes of codes and whole exponents: rows of MXFP4 start and end with a group.
            let byte =
                |number: usize| number as u128 * tensor.bytes.len() as u128 / numbers as u128;
            tensor.bytes = &tensor.bytes[byte(place.first) as usize..byte(end) as usize];
        }
        let scales = tensors.get(1).map_or(&[][..], |scales| scales.bytes);
        let Slice { row, column, .. } = *place;
        let bytes = tensors[0].bytes;
        let part = Part { stored, blocks, encoded: None, n, bytes, row, column, scales };
        Ok((tensors, part))
    }

    /// A vector as f32.
    fn vector(&self, place: &Slice, n: usize) -> Result<Vec<f32>> {
        self.values(place, n, 1)
    }

    /// `n` rows of `k` numbers as f32.
    fn values(&self, place: &Slice, n: usize, k: usize) -> Result<Vec<f32>> {
        let (tensors, part) = self.part(place, n, k)?;
        self.read.borrow_mut().extend(tensors.iter().map(|t| t.name.to_owned()));
        let decoded = part.blocks.map(|blocks| decoded(blocks, part.bytes));
        let bytes = decoded.as_deref().unwrap_or(part.bytes);
        let Part { stored, row, column, .. } = part;
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
        self.at.set(if s.tied { Place::Both } else { Place::Begin });
        let embed = mat(whole("embed", s.vocab, false))?;
        self.at.set(Place::Begin);
        let positions = s.positions.map(|n| mat(whole("positions", n, true))).transpose()?;
        let gemma = self.gemma(&row, &mut mat)?;
        let layers = (0..s.layers.len()).map(|l| {
            self.at.set(Place::Layer(l));
            self.layer(l, &row, &mut mat)
        });
        let layers = layers.collect::<Result<_>>()?;
        self.at.set(Place::End);
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
                let [alpha_p, alpha_n, beta, eps] = match &self.spec.xielu {
                    Some(all) => all[l],
                    None => [
                        number("xielu_alpha_p")?,
                        number("xielu_alpha_n")?,
                        number("xielu_beta")?,
                        number("xielu_eps")?,
                    ],
                };
                let softplus =
                    |x: f32| x.max(0.0) + libm::log1p(libm::exp(-f64::from(x.abs()))) as f32;
                Activation::XIelu {
                    alpha_p: softplus(alpha_p),
                    alpha_n: beta + softplus(alpha_n),
                    beta,
                    eps,
                }
            }
        })
    }
}

/// The numbers of blocks, as F32.
fn decoded(blocks: Blocks, bytes: &[u8]) -> Vec<u8> {
    let mut values = vec![0.0f32; bytes.len() / blocks.bytes() * blocks.weights()];
    blocks.decode(bytes, &mut values);
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
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

/// Sixteen of `a`, sixteen of `b`, and so on, padded with zeros: as [`Parts::interleaved`](crate::backend::Parts::interleaved) orders rows.
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
