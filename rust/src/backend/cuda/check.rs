//! A test of the kernels where they run: the same operations on the device and on the CPU, bit by bit. For `ferrule doctor
//! --device cuda` and `benches/gpu.py`. Reads no file.

use super::Cuda;
use crate::Result;
use crate::backend::cpu::{self, Bytes};
use crate::backend::{
    Activation, Attention, Backend, Core, Expert, Form, HeadRows, Heads, KvDtype, KvLayer, Latent,
    Part, Parts, Place, QkNorm, Recurrent, Routing, Score, Span,
};
use crate::quant::Grouped;

/// Names and results of operations.
type Found = Vec<(String, Vec<f32>)>;

impl Cuda {
    /// How many operations were compared, and those whose results are not the CPU's.
    pub fn check(&self) -> Result<(usize, Vec<String>)> {
        let (here, there) = (operations(self)?, operations(self.packer())?);
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let pairs = here.iter().zip(&there);
        let different = pairs.filter(|((_, a), (_, b))| bits(a) != bits(b));
        Ok((there.len(), different.map(|((name, _), _)| name.clone()).collect()))
    }
}

/// Numbers that are always the same.
struct Random(u32);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.0 >> 8
    }
    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next() as f32 / (1 << 23) as f32 - 1.0).collect()
    }
}

/// A matrix; a grouped one of any codes and scales, all finite.
fn matrix<B: Backend>(
    b: &B,
    random: &mut Random,
    form: Form,
    [n, k]: [usize; 2],
    interleaved: bool,
) -> Result<B::Mat> {
    if matches!(form, Form::Grouped(_)) {
        let mut bytes = Bytes::zeroed(form.bytes(n, k), "a test")?;
        bytes.get_mut().fill_with(|| random.next() as u8 & 0x3f);
        return b.place(Place::End, cpu::Mat::new(form, n, k, bytes)?);
    }
    let n = if interleaved { n / 2 } else { n };
    let stored = if form.is_quantized() { Form::F32 } else { form };
    let number = |x: &f32| match stored {
        Form::F16 => half::f16::from_f32(*x).to_le_bytes().to_vec(),
        Form::Bf16 => half::bf16::from_f32(*x).to_le_bytes().to_vec(),
        _ => x.to_le_bytes().to_vec(),
    };
    let parts = if interleaved { 2 } else { 1 };
    let bytes: Vec<Vec<u8>> =
        (0..parts).map(|_| random.floats(n * k).iter().flat_map(number).collect()).collect();
    let parts = bytes.iter().map(|bytes| Part::floats(stored, n, k, bytes)).collect();
    let packed = b.pack(form, &Parts { parts, k, interleaved })?;
    packed.map_err(|_| crate::Error::Internal("random numbers".into()))
}

/// `rows` of activations: there is no other way to bring some to any machine.
fn rows<B: Backend>(b: &B, random: &mut Random, rows: usize, width: usize) -> Result<B::Buf> {
    let table = matrix(b, random, Form::F32, [rows, width], false)?;
    let mut out = b.buf();
    b.embed(&table, &(0..rows as u32).collect::<Vec<_>>(), 1.0, &mut out);
    Ok(out)
}

fn operations<B: Backend>(b: &B) -> Result<Found> {
    let (mut random, mut found) = (Random(1), Found::new());
    let grouped = [Grouped::Q4_K, Grouped::Q5_0, Grouped::Q6_K, Grouped::IQ4_XS, Grouped::MXFP4];
    let forms = [Form::Q4, Form::Q8, Form::Bf16, Form::F16, Form::F32];
    for form in forms.into_iter().chain(grouped.map(Form::Grouped)) {
        let [n, k] = [128, 544];
        let w = matrix(b, &mut random, form, [n, k], true)?;
        let bias = b.row(Place::End, &random.floats(n));
        for tokens in [1, 3, 20, 70] {
            let x = rows(b, &mut random, tokens, k)?;
            let (mut y, mut z) = (b.buf(), b.buf());
            b.linear(&w, Some(&bias), &x, &mut y);
            b.gated(&w, Some(&bias), Activation::Silu, n / 2, &x, &mut z);
            found.push((format!("{} product of {tokens}", form.name()), b.read(&y)));
            found.push((format!("{} gated product of {tokens}", form.name()), b.read(&z)));
        }
        let mut out = b.buf();
        b.embed(&w, &[0, n as u32 - 1], 0.5, &mut out);
        found.push((format!("{} embedding", form.name()), b.read(&out)));
    }
    let x = rows(b, &mut random, 5, 1056)?;
    let (gain, mut out) = (b.row(Place::End, &random.floats(1056)), b.buf());
    b.rms_norm(&x, &gain, 1e-5, &mut out);
    found.push(("norm".into(), b.read(&out)));
    b.layer_norm(&x, &gain, Some(&gain), 1e-5, &mut out);
    found.push(("layer norm".into(), b.read(&out)));
    for (dtype, name) in [(KvDtype::F32, "f32"), (KvDtype::F16, "f16"), (KvDtype::Int8, "int8")] {
        for head_dim in [64, 128] {
            attention(b, &mut random, dtype, name, head_dim, None, &mut found)?;
        }
        attention(b, &mut random, dtype, name, 576, Some(512), &mut found)?;
    }
    experts(b, &mut random, &mut found)?;
    heads(b, &mut random, &mut found)?;
    for delta in [false, true] {
        states(b, &mut random, delta, &mut found)?;
    }
    b.finish()?;
    Ok(found)
}

/// Mixtures: a row an expert, a few, many.
fn experts<B: Backend>(b: &B, random: &mut Random, found: &mut Found) -> Result<()> {
    let (count, hidden, width) = (6, 544, 64);
    let (score, renormalise) = (Score::Softmax, Some(0.0));
    let how = Routing { top_k: 3, score, groups: None, renormalise, scale: 1.0 };
    for form in [Form::Q4, Form::Bf16, Form::Grouped(Grouped::MXFP4)] {
        let mut all = Vec::new();
        for _ in 0..count {
            let gate_up = matrix(b, random, form, [2 * width, hidden], true)?;
            let down = matrix(b, random, form, [hidden, width], false)?;
            all.push(Expert::<B::Mat, B::Row> {
                gate_up,
                gate_up_bias: None,
                down,
                down_bias: None,
            });
        }
        let all: Vec<_> = all.iter().map(Expert::as_ref).collect();
        for tokens in [1, 4, 40] {
            let x = rows(b, random, tokens, hidden)?;
            let (mut logits, mut out) = (rows(b, random, tokens, count)?, b.buf());
            b.moe(&how, &mut logits, None, None, &all, Activation::Silu, width, &x, &mut out);
            found.push((format!("{} experts of {tokens}", form.name()), b.read(&out)));
        }
    }
    Ok(())
}

/// What latent attention reads and gives.
fn heads<B: Backend>(b: &B, random: &mut Random, found: &mut Found) -> Result<()> {
    let how = Latent { heads: 3, nope: 96, rope: 32, rank: 80 };
    let w = matrix(b, random, Form::Q8, [how.heads * how.rank, how.nope], false)?;
    let gain = b.row(Place::End, &random.floats(how.rank));
    for tokens in [1, 5, 20] {
        let q = rows(b, random, tokens, how.heads * (how.nope + how.rope))?;
        let (kv, mut out) = (rows(b, random, tokens, how.rank + how.rope)?, b.buf());
        b.latent_qk(&w, (&gain, 1e-6), &how, &q, &kv, &mut out);
        found.push((format!("queries and keys of latent attention, {tokens}"), b.read(&out)));
    }
    Ok(())
}

/// A prompt and a generated token of a layer with a state.
fn states<B: Backend>(b: &B, random: &mut Random, delta: bool, found: &mut Found) -> Result<()> {
    let h = Heads { heads: 4, groups: 2, tiled: false, key_dim: 128, value_dim: 64 };
    let how = Recurrent { width: 4, core: if delta { Core::DeltaNet(h) } else { Core::Mamba2(h) } };
    let channels = how.channels().1;
    let mut row = |n: usize| b.row(Place::End, &random.floats(n));
    let (taps, bias) = (row(4 * channels), row(channels));
    let norm = row(if delta { h.value_dim } else { h.values() });
    let skip = (!delta).then(|| row(4));
    let vectors = HeadRows { decay: row(4), dt_bias: row(4), skip, norm };
    let mut kept = b.states(&[(3, how.state())])?;
    for (start, len, table) in [(0, 30, [0, 1]), (30, 1, [1, 2])] {
        let spans = [Span { first_row: 0, len, start, table: &table }];
        let mut x = rows(b, random, len, how.projection())?;
        let rates = rows(b, random, len, how.rates())?;
        let (mut conv, mut out) = (b.buf(), b.buf());
        b.conv(&mut x, &how, &taps, Some(&bias), &mut kept, 0, &spans, &mut conv);
        let vectors = vectors.as_ref();
        b.recur(&x, &rates, &mut conv, &how, &vectors, 1e-5, &mut kept, 0, &spans, &mut out);
        let name = if delta { "delta net" } else { "Mamba 2" };
        found.push((format!("{name}, {len} at {start}"), b.read(&out)));
        b.finish()?;
    }
    Ok(())
}

/// A prompt in two parts, then a generated token that sees more than one chunk of keys.
fn attention<B: Backend>(
    b: &B,
    random: &mut Random,
    dtype: KvDtype,
    name: &str,
    head_dim: usize,
    latent: Option<usize>,
    found: &mut Found,
) -> Result<()> {
    let how = Attention {
        heads: if latent.is_some() { 4 } else { 8 },
        kv_heads: if latent.is_some() { 1 } else { 2 },
        head_dim,
        latent,
        scale: 0.2,
        clip: None,
        softcap: None,
        window: None,
        query_growth: None,
        queries_only: false,
        rope_interleaved: false,
    };
    let table: Vec<u32> = (0..12).rev().collect();
    let mut kv = b.kv(
        dtype,
        &[KvLayer { pages: 12, heads: how.kv_heads, head_dim, values: latent.is_none() }],
    )?;
    let gain = b.row(Place::End, &random.floats(head_dim));
    let inv_freq: Vec<f32> = (0..head_dim / 2).map(|i| 0.8f32.powi(i as i32)).collect();
    for (start, len) in [(0, 500), (500, 60), (560, 1)] {
        let spans = [Span { first_row: 0, len, start, table: &table }];
        let positions: Vec<u32> = (start..start + len).map(|p| p as u32).collect();
        let turned = b.rope_table(&positions, &vec![false; len], [&inv_freq; 2], 1.0);
        let mut qkv = rows(b, random, len, how.qkv_width())?;
        let (q, k) = (&gain, &gain);
        let norm =
            QkNorm { q, k, v: None, centred: false, full: false, after_rope: false, eps: 1e-6 };
        let mut out = b.buf();
        let norm = latent.is_none().then_some(norm);
        b.rotate_and_store(&mut qkv, &how, norm, Some(&turned), &mut kv, 0, &spans);
        if start == 0 {
            continue; // long, and only the keys and values are needed
        }
        b.attend(&qkv, &how, None, &kv, 0, &spans, &mut out);
        let what = format!("attention over {name}, heads of {head_dim}, {len} at {start}");
        found.push((what, b.read(&out)));
        b.finish()?;
    }
    Ok(())
}
