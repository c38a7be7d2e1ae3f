//! Plans how each matrix is packed; packs them, or maps what was packed before.

use super::{Reader, Source, Weights};
use crate::backend::cpu::{Bytes, Cpu, Mat};
use crate::backend::{Backend, Blocks, Encoded, Form, Kept, NotFinite, Part, Parts, Place};
use crate::file::Checkpoint;
use crate::model::spec::{Slice, Spec};
use crate::model::{LoadOptions, Quantization, cache};
use crate::{Error, Result};
use std::path::Path;

/// One packed matrix to be: what it comes from.
#[derive(Debug)]
pub(in crate::model) struct Plan {
    parts: Vec<(Slice, usize)>,
    pub(in crate::model) n: usize,
    pub(in crate::model) k: usize,
    pub(in crate::model) form: Form,
    interleaved: bool,
    /// The tensor that holds it packed, where the checkpoint does.
    stored: Option<String>,
    /// Where it is used.
    pub(in crate::model) at: Place,
}

impl Plan {
    pub(in crate::model) fn bytes(&self) -> usize {
        self.form.bytes(self.n, self.k)
    }

    /// The tensor that holds it packed, where the checkpoint does.
    pub(super) fn stored(&self) -> Option<&str> {
        self.stored.as_deref()
    }

    /// What it is called where it is stored packed.
    pub(in crate::model) fn name(&self) -> String {
        format!("{}:{}", super::stored::key(&self.parts), self.form.name())
    }

    /// The tensors that its rows come from.
    pub(in crate::model) fn tensors(&self) -> impl Iterator<Item = &str> {
        self.parts.iter().map(|(place, _)| &place.tensor[..])
    }
}

impl Reader<'_> {
    /// How a matrix will be packed.
    fn plan(&self, quantization: Quantization, source: Source) -> Result<Plan> {
        let Source { mut parts, k, interleaved, exact } = source;
        let stored = self.stored.find(&parts);
        if let Some((name, form)) = &stored {
            self.as_stored(name, *form, quantization)?;
        }
        let mut form = stored.as_ref().map(|(_, form)| *form);
        let here = stored.is_none();
        for (place, _) in parts.iter_mut().filter(|_| here) {
            place.scheme = self.scheme(&place.tensor)?;
        }
        for (place, n) in parts.iter().filter(|_| here) {
            let (_, Part { stored, blocks, encoded, .. }) = self.part(place, *n, k)?;
            let kept = blocks.map(Blocks::kept).or(encoded.map(|encoded| encoded.kept()));
            // Columns, or pieces of rows: no block is one of the packed matrix.
            let rows = |e: &Encoded<'_>| {
                e.k == k && place.first.is_multiple_of(k) && place.row.is_multiple_of(k)
            };
            let cut = place.column != 1 || encoded.is_some_and(|e| !rows(&e));
            let kept = kept.map_or(stored, |kept| match kept {
                _ if cut => Form::Q8,
                Kept::Q4 => Form::Q4,
                Kept::Q8 => Form::Q8,
                Kept::Grouped(how) => Form::Grouped(how),
            });
            let wanted = match (quantization, kept) {
                (Quantization::None, Form::Grouped(how))
                    if encoded.is_none_or(|encoded| encoded.is_exact()) =>
                {
                    Form::GroupedFloat(how)
                }
                (Quantization::None, _) => stored,
                _ if exact => stored,
                (Quantization::Auto, _) | (_, Form::MXFP4) => kept,
                (Quantization::Int4, _) => Form::Q4,
                (Quantization::Int5, _) => Form::INT5,
                (Quantization::Int6, _) => Form::INT6,
                (Quantization::Int8, _) => Form::Q8,
            };
            let form = form.get_or_insert(wanted);
            if *form == wanted {
                continue;
            }
            if self.checkpoint.metadata().is_none() && self.spec.quantized.is_none() {
                return Err(Error::Unsupported(format!(
                    "tensor `{}`: found {}, but `{}` beside it is stored otherwise; use quantization=\"int8\"",
                    place.tensor,
                    stored.name(),
                    parts[0].0.tensor
                )));
            }
            // GGUF files mix types, and quantized checkpoints leave some matrices as they are: a form that holds both
            // exactly, or nearly.
            let exact = !form.is_quantized() && !wanted.is_quantized();
            let joined = match (*form, wanted) {
                (Form::Grouped(a), Form::Grouped(b)) => a.join(b).map(Form::Grouped),
                (Form::GroupedFloat(a), Form::GroupedFloat(b)) => a.join(b).map(Form::GroupedFloat),
                _ => None,
            };
            *form = joined.unwrap_or(if exact { Form::F32 } else { Form::Q8 });
        }
        let n = parts.iter().map(|(_, n)| n).sum::<usize>();
        let n = if interleaved { 2 * (n / 2).next_multiple_of(16) } else { n };
        let stored = stored.map(|(name, _)| name);
        let form = form.unwrap_or(Form::F32);
        Ok(Plan { parts, n, k, form, interleaved, stored, at: self.at.get() })
    }

    /// A plan to read rows as they are stored.
    pub(in crate::model) fn rows(&self, parts: Vec<(Slice, usize)>, k: usize) -> Result<Plan> {
        self.plan(Quantization::None, Source { parts, k, interleaved: false, exact: true })
    }

    /// Packs one matrix into `out`.
    pub(in crate::model) fn pack(&self, cpu: &Cpu, plan: &Plan, out: &mut [u8]) -> Result<()> {
        self.with_parts(plan, |parts| cpu.pack_into(plan.form, parts, out))
    }

    /// Gives `work` the stored rows of a matrix.
    pub(in crate::model) fn with_parts(
        &self,
        plan: &Plan,
        work: impl FnOnce(&Parts<'_>) -> std::result::Result<(), NotFinite>,
    ) -> Result<()> {
        let part = |(place, n): &(Slice, usize)| self.part(place, *n, plan.k);
        let sources: Vec<_> = plan.parts.iter().map(part).collect::<Result<_>>()?;
        // Columns of blocks: decoded once, not for each number.
        let columns = sources.iter().map(|(_, part)| {
            let blocks = part.blocks.filter(|_| part.column != 1);
            blocks.map(|blocks| super::decoded(blocks, part.bytes))
        });
        let columns: Vec<_> = columns.collect();
        let parts = sources.iter().zip(&columns).map(|((_, part), decoded)| match decoded {
            None => *part,
            Some(bytes) => Part { blocks: None, bytes, ..*part },
        });
        let parts = parts.collect();
        let parts = Parts { parts, k: plan.k, interleaved: plan.interleaved };
        work(&parts).map_err(|(p, row, column)| {
            let place = &plan.parts[p].0;
            if !matches!(plan.form, Form::INT5 | Form::INT6) {
                return self.not_finite(place, row, column);
            }
            let (at, form) = (place.index(row, column), plan.form.name());
            let what = format!("found a number near it that is not finite or too large for {form}");
            Error::format(self.folder, format!("tensor `{}`{at:?}: {what}", place.tensor))
        })?;
        sources.iter().flat_map(|(tensors, _)| tensors).for_each(|t| self.checkpoint.release(t));
        Ok(())
    }

    /// All matrices, in the order in which `weights` takes them and the cache keeps them.
    pub(in crate::model) fn plans(&self, quantization: Quantization) -> Result<Vec<Plan>> {
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
}

/// What the matrices of a model will take in memory.
pub(in crate::model) struct Sizes {
    /// The bytes of each form.
    pub(in crate::model) forms: Vec<(&'static str, u64)>,
    /// Bytes of the largest matrix.
    pub(in crate::model) largest: u64,
    /// Most outputs of a matrix, those over the vocabulary left out, and most inputs.
    pub(in crate::model) widest: (usize, usize),
    /// The bytes of each, and where it is used.
    pub(in crate::model) places: Vec<(Place, u64)>,
}

/// What the matrices will take in memory.
pub(in crate::model) fn sizes(
    folder: &Path,
    checkpoint: &Checkpoint,
    spec: &Spec,
    quantization: Quantization,
) -> Result<Sizes> {
    let reader = Reader::new(folder, checkpoint, spec);
    let plans = reader.plans(quantization)?;
    reader.refuse_unused(&plans)?;
    let places = plans.iter().map(|plan| (plan.at, plan.bytes() as u64)).collect();
    let mut sizes = Sizes { forms: Vec::new(), largest: 0, widest: (0, 0), places };
    for plan in plans {
        let (form, bytes) = (plan.form.name(), plan.bytes() as u64);
        match sizes.forms.iter_mut().find(|(name, _)| *name == form) {
            Some((_, sum)) => *sum += bytes,
            None => sizes.forms.push((form, bytes)),
        }
        sizes.largest = sizes.largest.max(bytes);
        let (n, k) = sizes.widest;
        sizes.widest = (if plan.n < spec.vocab { n.max(plan.n) } else { n }, k.max(plan.k));
    }
    Ok(sizes)
}

/// Reads, quantizes and packs all weights, or maps them, if `options.cache_dir` holds them packed; and puts them where
/// the back end wants them. Also what was not as wished, and no error.
pub(in crate::model) fn load<B: Backend>(
    folder: &Path,
    checkpoint: &Checkpoint,
    spec: &Spec,
    backend: &B,
    options: &LoadOptions,
) -> Result<(Weights<B::Mat, B::Row>, Option<String>)> {
    let reader = Reader::new(folder, checkpoint, spec);
    let plans = reader.plans(options.quantization)?;
    reader.refuse_unused(&plans)?;
    let (mats, note) = reader.matrices(&plans, backend, options)?;
    Ok((reader.join(backend, mats)?, note))
}

impl Reader<'_> {
    /// All weights, with these matrices.
    pub(in crate::model) fn join<B: Backend>(
        &self,
        backend: &B,
        mats: Vec<B::Mat>,
    ) -> Result<Weights<B::Mat, B::Row>> {
        let mut mats = mats.into_iter();
        self.weights(
            |values| backend.row(self.at.get(), values),
            |_| mats.next().ok_or(Error::Closed),
        )
    }

    /// The matrices of `plans`, and what was not as wished.
    pub(in crate::model) fn matrices<B: Backend>(
        &self,
        plans: &[Plan],
        backend: &B,
        options: &LoadOptions,
    ) -> Result<(Vec<B::Mat>, Option<String>)> {
        if options.random {
            let mats = plans.iter().map(|p| backend.random(p.form, p.n, p.k));
            return Ok((mats.collect::<Result<_>>()?, None));
        }
        let cpu = backend.packer();
        let placed = |mats: Vec<Mat>| {
            let mats = mats.into_iter().zip(plans);
            let mats = mats.map(|(mat, plan)| backend.place(plan.at, mat));
            Ok((mats.collect::<Result<_>>()?, None))
        };
        let total: u64 = plans.iter().map(|p| p.bytes() as u64).sum();
        let worth = total >= cache::WORTH && plans.iter().all(|p| p.stored.is_none());
        let dir = options.cache_dir.as_ref().filter(|_| worth);
        let mut cache = dir.map(|dir| cache::Cache::new(dir, self.checkpoint, plans));
        if let Some(mats) = cache.as_ref().and_then(|cache| cache.read(plans)) {
            options.report(total, total);
            return placed(mats);
        }
        // Straight to disk, then mapped; or, without a cache, into memory.
        if let Some(mut writer) = cache.as_mut().and_then(|cache| cache.writer()) {
            let (mut packed, mut last) = (Vec::new(), Vec::new());
            let mut done = 0;
            for plan in plans {
                packed.resize(plan.bytes(), 0);
                // One is packed while the one before it is written.
                let written = std::thread::scope(|scope| {
                    let writing = scope.spawn(|| writer.write(&last));
                    self.pack(cpu, plan, &mut packed)?;
                    Ok(writing.join().unwrap_or(false))
                })?;
                if !written {
                    break; // a full disk: without a cache, then
                }
                std::mem::swap(&mut packed, &mut last);
                done += plan.bytes() as u64;
                options.report(done, total);
            }
            writer.write(&last);
            drop((packed, last));
            if writer.finish()
                && let Some(mats) = cache.and_then(|cache| cache.read(plans))
            {
                return placed(mats);
            }
        }
        let note = dir.map(|dir| {
            format!(
                "the packed weights ({} MB) could not be kept in {}: the next load packs them again; weight_cache \
                 names another folder",
                total / 1_000_000,
                dir.display()
            )
        });
        let available = crate::backend::cpu::memory().available;
        let held = |p: &&Plan| p.stored.is_none() && backend.holds(p.at);
        let owned = plans.iter().filter(held).map(|p| p.bytes() as u64).sum();
        if owned > available {
            let what = format!(
                "packed weights, {}: give weight_cache a folder on a disk with room for them, from which they \
                 are mapped, or a quantization with fewer bits",
                match &options.cache_dir {
                    Some(dir) =>
                        format!("as the weight cache in {} cannot be written", dir.display()),
                    None => "without a weight cache".to_owned(),
                }
            );
            return Err(Error::OutOfMemory { what, requested: owned, available });
        }
        let mut done = 0;
        let mut mats = Vec::with_capacity(plans.len());
        for plan in plans {
            let mat = match &plan.stored {
                Some(name) => self.mapped(cpu, plan, name)?,
                None => {
                    let mut bytes = Bytes::zeroed(plan.bytes(), "packed weights")?;
                    self.pack(cpu, plan, bytes.get_mut())?;
                    Mat::new(plan.form, plan.n, plan.k, bytes)?
                }
            };
            mats.push(backend.place(plan.at, mat)?);
            done += plan.bytes() as u64;
            options.report(done, total);
        }
        Ok((mats, note))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Reader;
    use crate::file::{Checkpoint, read_json};
    use crate::model::Quantization;
    use crate::model::spec::Spec;
    use std::path::Path;

    /// Packed weights are found again by what their plans say.
    #[test]
    fn another_description_is_another_plan() {
        let folder = "tests/golden/quant-gptq-int4-g32-actorder-sym-a";
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let mut config = read_json(&folder.join("config.json"), 1 << 20).unwrap().unwrap();
        let mut plans = |format: &str| {
            config["quantization_config"]["checkpoint_format"] = format.into();
            let spec = Spec::new(&config, None).unwrap();
            let reader = Reader::new(&folder, &checkpoint, &spec);
            format!("{:?}", reader.plans(Quantization::Int8).unwrap())
        };
        assert_eq!(plans("gptq"), plans("gptq"));
        assert_ne!(plans("gptq"), plans("gptq_v2"));
    }
}
