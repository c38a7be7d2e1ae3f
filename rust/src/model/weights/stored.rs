//! Matrices that a checkpoint holds in the packed order (`kernels::layout`): what `ferrule quantize` writes. They are
//! mapped as they lie, and checked: kernels count on values that a packer would write.
//!
//! Such a tensor has the type U8 and the shape `[row blocks, bytes of a row block]`. Its name is the names of the
//! tensors that its rows come from, joined by `+`, then `:` and the form. Where it begins with a later number of its
//! first tensor than the first (one expert of several, say), that is `@` and the number, before the form.

use super::load::Plan;
use super::{Reader, Slice};
use crate::backend::Form;
use crate::backend::cpu::{Bytes, Cpu, Mat};
use crate::file::{Checkpoint, Dtype};
use crate::model::Quantization;
use crate::{Error, Result};
use std::collections::{HashMap, HashSet};

/// The forms that are stored.
pub(in crate::model) const FORMS: [Form; 8] =
    [Form::Q4, Form::INT5, Form::INT6, Form::Q8, Form::Bf16, Form::F16, Form::F32, Form::MXFP4];

/// The packed matrices of a checkpoint.
pub(super) struct Stored<'a> {
    /// Name without the form -> name, form.
    matrices: HashMap<&'a str, (&'a str, Form)>,
    /// The tensors that they come from.
    tensors: HashSet<&'a str>,
}

impl<'a> Stored<'a> {
    pub(super) fn new(checkpoint: &'a Checkpoint) -> Stored<'a> {
        let mut stored = Stored { matrices: HashMap::new(), tensors: HashSet::new() };
        for tensor in checkpoint.names().filter_map(|name| checkpoint.get(name)) {
            let Some((key, form)) = tensor.name.rsplit_once(':') else { continue };
            let form = FORMS.into_iter().find(|known| known.name() == form);
            if let (Some(form), Dtype::U8) = (form, tensor.dtype) {
                stored.matrices.insert(key, (tensor.name, form));
                let tensors = key.rsplit_once('@').map_or(key, |(tensors, _)| tensors);
                stored.tensors.extend(tensors.split('+'));
            }
        }
        stored
    }

    /// Whether rows of this tensor are in a matrix.
    pub(super) fn has(&self, tensor: &str) -> bool {
        self.tensors.contains(tensor)
    }

    /// Name and form of the matrix of these parts.
    pub(super) fn find(&self, parts: &[(Slice, usize)]) -> Option<(String, Form)> {
        if self.matrices.is_empty() {
            return None;
        }
        let (name, form) = self.matrices.get(&key(parts)[..])?;
        Some(((*name).to_owned(), *form))
    }
}

/// What a packed matrix is called, without its form.
pub(super) fn key(parts: &[(Slice, usize)]) -> String {
    let mut names: Vec<&str> = parts.iter().map(|(place, _)| &place.tensor[..]).collect();
    let mut seen = HashSet::new();
    names.retain(|name| seen.insert(*name));
    let first = parts.first().map_or(0, |(place, _)| place.first);
    match first {
        0 => names.join("+"),
        first => format!("{}@{first}", names.join("+")),
    }
}

impl Reader<'_> {
    /// An error if the stored form is not the one asked for.
    pub(super) fn as_stored(&self, name: &str, form: Form, wanted: Quantization) -> Result<()> {
        let fits = match wanted {
            Quantization::Auto => true,
            Quantization::Int4 => matches!(form, Form::Q4 | Form::MXFP4),
            Quantization::Int5 => matches!(form, Form::INT5 | Form::MXFP4),
            Quantization::Int6 => matches!(form, Form::INT6 | Form::MXFP4),
            Quantization::Int8 => matches!(form, Form::Q8 | Form::MXFP4),
            Quantization::None => false,
        };
        // Routers are floats whatever is asked for.
        if fits || !form.is_quantized() {
            return Ok(());
        }
        Err(Error::Unsupported(format!(
            "tensor `{name}` was stored by `ferrule quantize`: found {}, which is loaded with quantization=\"auto\" only; \
             for another form take the model that it was made from",
            form.name()
        )))
    }

    /// A matrix where it lies in the file.
    pub(super) fn mapped(&self, cpu: &Cpu, plan: &Plan, name: &str) -> Result<Mat> {
        let wrong = |what: String| Error::format(self.folder, format!("tensor `{name}`: {what}"));
        let (map, range) = self.checkpoint.mapped(name).ok_or(Error::Closed)?;
        if range.len() != plan.bytes() {
            let (found, expected) = (range.len(), plan.bytes());
            let (n, k, form) = (plan.n, plan.k, plan.form.name());
            let what = format!("found {found} bytes, expected {expected} ({form}, [{n}, {k}])");
            return Err(wrong(what));
        }
        if !range.start.is_multiple_of(64) {
            let found = range.start;
            return Err(wrong(format!("found at byte {found}, expected a multiple of 64")));
        }
        let mat = Mat::new(plan.form, plan.n, plan.k, Bytes::Mapped(map, range))?;
        if !cpu.is_valid(&mat) {
            let what = "found values that no packer writes; the file is damaged";
            return Err(wrong(what.into()));
        }
        Ok(mat)
    }
}
