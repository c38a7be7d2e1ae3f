//! How long products take on a device, by its own clock. For `benches/gpu.py`; nothing else calls it.

use super::device::Memory;
use super::{Buf, Cuda, Into, Mat, pack};
use crate::backend::{Attention, Backend, Form, KvDtype, KvLayer, PAGE, Part, Parts, Span};
use crate::{Error, Result};

impl Cuda {
    /// Microseconds of one product of `tokens` rows with an `[n, k]` matrix, and the bytes of the matrix: for each of
    /// `samples` the mean over `sets` different matrices, which together should be several times the cache. The numbers
    /// are random.
    pub fn time_product(
        &self,
        form: Form,
        [n, k, tokens]: [usize; 3],
        sets: usize,
        samples: usize,
    ) -> Result<(Vec<f32>, usize)> {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        let x: Vec<f32> = (0..tokens * k).map(|_| f32::from(next()) / 128.0 - 1.0).collect();
        let x = self.upload(&x, k);
        let mats: Vec<Mat> = (0..sets).map(|_| self.random(form, n, k)).collect::<Result<_>>()?;
        let bytes = mats[0].memory.bytes;
        let mut out = Buf::new(&self.device);
        let mut all = || {
            for w in &mats {
                self.product(w, None, &x, Into::Store, &mut out);
            }
        };
        // Twice before the clock runs: launch by launch, then as a graph.
        for _ in 0..2 {
            all();
            self.device.finish()?;
        }
        let mut times = Vec::with_capacity(samples);
        for _ in 0..samples {
            times.push(self.device.timed(&mut all)? * 1000.0 / sets as f32);
        }
        Ok((times, bytes))
    }

    /// Microseconds of attention of one generated token of each of `sequences` with `keys` positions behind it, and the
    /// bytes of keys and values that it reads; for each sample the mean over `sets` layers.
    pub fn time_attention(
        &self,
        dtype: KvDtype,
        [heads, kv_heads, head_dim]: [usize; 3],
        [sequences, keys]: [usize; 2],
        sets: usize,
        samples: usize,
    ) -> Result<(Vec<f32>, usize)> {
        let how = Attention {
            heads,
            kv_heads,
            head_dim,
            latent: None,
            scale: 0.1,
            clip: None,
            softcap: None,
            window: None,
            query_growth: None,
            queries_only: false,
            rope_interleaved: false,
        };
        let each = (keys + 1).div_ceil(PAGE);
        let layer = KvLayer { pages: each * sequences, heads: kv_heads, head_dim, values: true };
        let mut kv = self.kv(dtype, &vec![layer; sets])?;
        // Pages of the sequences take turns, as they do where all grow at once.
        let table = |s| (0..each).map(|p| (p * sequences + s) as u32).collect::<Vec<u32>>();
        let tables: Vec<_> = (0..sequences).map(table).collect();
        let spans: Vec<_> = tables
            .iter()
            .enumerate()
            .map(|(first_row, table)| Span { first_row, len: 1, start: keys, table })
            .collect();
        let row: Vec<f32> =
            (0..sequences * how.qkv_width()).map(|i| (i % 97) as f32 / 97.0).collect();
        let (mut qkv, mut out) = (self.upload(&row, how.qkv_width()), Buf::new(&self.device));
        let mut all = || {
            for layer in 0..sets {
                self.rotate(&mut qkv, &how, None, None, &mut kv, layer, &spans);
                self.attention(&qkv, &how, None, &kv, layer, &spans, &mut out);
            }
        };
        for _ in 0..2 {
            all();
            self.device.finish()?;
        }
        let times = (0..samples).map(|_| Ok(self.device.timed(&mut all)? * 1000.0 / sets as f32));
        let bytes = sequences * each * layer.page_bytes(dtype);
        Ok((times.collect::<Result<_>>()?, bytes))
    }

    /// A random matrix made on the device: 32 rows that come again and again.
    pub(super) fn random(&self, form: Form, n: usize, k: usize) -> Result<Mat> {
        let (n, mut state) = (n.max(1), (n + k) as u32);
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // About 0.02, as weights are.
            ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * 0.035
        };
        // Of a grouped form any numbers of int4 do: the time does not depend on them.
        let made = if matches!(form, Form::Grouped(_)) { Form::Q4 } else { form };
        let stored = if made.is_quantized() { Form::F32 } else { made };
        let rows: Vec<u8> = (0..32 * k)
            .flat_map(|_| match stored {
                Form::F16 => half::f16::from_f32(next()).to_le_bytes().to_vec(),
                Form::Bf16 => half::bf16::from_f32(next()).to_le_bytes().to_vec(),
                _ => next().to_le_bytes().to_vec(),
            })
            .collect();
        let parts = vec![Part::floats(stored, 32, k, &rows)];
        let parts = Parts { parts, k, interleaved: false };
        let packed = self.packer().pack(made, &parts)?;
        let packed = packed.map_err(|_| Error::Internal("random numbers".into()))?;
        let mut tile = vec![0; pack::bytes(made, 32, k).unwrap_or(0)];
        pack::tiles(made, k, packed.bytes(), &mut tile);
        let bytes = pack::bytes(form, n, k).ok_or_else(|| {
            Error::Unsupported(format!("{} weights do not run on CUDA yet", form.name()))
        })?;
        let memory = self.device.alloc(bytes)?;
        let mut done = tile.len().min(bytes);
        self.device.upload(memory.at, &tile[..done]);
        while done < bytes {
            let more = done.min(bytes - done);
            self.device.copy(memory.at + done as u64, memory.at, more);
            done += more;
        }
        Ok(Mat { form, n, k, memory })
    }

    /// Microseconds of copies of `bytes` on the device, each of which reads and writes them.
    pub fn time_copy(&self, bytes: usize, samples: usize) -> Result<Vec<f32>> {
        let (from, to): (Memory, Memory) = (self.device.alloc(bytes)?, self.device.alloc(bytes)?);
        self.device.clear(&from)?;
        let copy = || self.device.copy(to.at, from.at, bytes);
        copy();
        (0..samples).map(|_| Ok(self.device.timed(&mut || copy())? * 1000.0)).collect()
    }
}
