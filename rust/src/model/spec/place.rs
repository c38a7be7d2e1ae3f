//! Where a weight lies among a checkpoint's tensors. Never reads one.

use super::{Names, Scheme, Spec, Stored};

/// Where a weight is, or one expert's part of it: its number `(i, j)` is number `first + i * row + j * column` of a
/// tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// The tensor.
    pub tensor: String,
    /// Its shape, or that of the numbers that it stands for.
    pub shape: Vec<usize>,
    /// See above.
    pub first: usize,
    /// From a number to the one below it.
    pub row: usize,
    /// From a number to the one beside it.
    pub column: usize,
    /// The tensor is two: see [`Stored::Mxfp4`].
    pub mxfp4: bool,
    /// How it is stored, if it is quantized: the tensors then are others. A checkpoint's reader finds that out.
    pub scheme: Option<Scheme>,
}

impl Slice {
    /// A whole tensor.
    pub fn whole(tensor: String, shape: Vec<usize>) -> Slice {
        let row = shape.iter().skip(1).product();
        Slice { tensor, shape, first: 0, row, column: 1, mxfp4: false, scheme: None }
    }

    /// The checkpoint's tensors and their shapes.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (true, [rows @ .., k]) = (self.mxfp4, &self.shape[..]) else {
            return vec![(self.tensor.clone(), self.shape.clone())];
        };
        let with = |end: &[usize]| [rows, &[k / 32], end].concat();
        let name = |end| format!("{}{end}", self.tensor);
        vec![(name("_blocks"), with(&[16])), (name("_scales"), with(&[]))]
    }

    /// The indices of number `(i, j)` in the tensor.
    pub fn index(&self, i: usize, j: usize) -> Vec<usize> {
        let mut at = self.first + i * self.row + j * self.column;
        let mut index: Vec<usize> = Vec::new();
        for n in self.shape.iter().rev() {
            index.insert(0, at % n);
            at /= n;
        }
        index
    }
}

impl Spec {
    /// Where weight `what` of layer `l` is, or that of expert `e`, if experts have it, or of head `e`, if each head's is a
    /// tensor. Weights with one name are rows of one tensor, in the order of [`Spec::layer_weights`] one below the other,
    /// or as [`Stored`] says. Panics if the layer has no such weight.
    pub fn place(&self, names: &Names, l: usize, what: &str, e: usize) -> Slice {
        let name = names.model(what);
        let (of_experts, stored) = match self.layers[l].ffn.moe() {
            Some(moe) if what.starts_with("expert_") => (true, moe.stored),
            _ => (false, Stored::Rows),
        };
        let one_each = name.contains("{e}");
        let outer = usize::from(of_experts || one_each); // the dimension of experts or heads
        let (mut shape, mut before, mut rows, mut index, mut count) = (Vec::new(), 0, 0, 0, 0);
        for weight in self.layer_weights(l) {
            if weight.what == what {
                (before, index) = (rows, count);
                shape.clone_from(&weight.shape);
            }
            if names.model(weight.what) == name {
                rows += weight.shape.get(outer).unwrap_or(&1);
                count += 1;
            }
        }
        if shape.is_empty() {
            return Slice::whole(names.layer(l, what), shape); // a single number
        }
        let (experts, inner) = (&shape[..outer], &shape[outer + 1..]);
        let k: usize = inner.iter().product();
        let columns = stored == Stored::Columns || self.transposed && !of_experts;
        let turned = columns && !inner.is_empty();
        // Alternating rows, or blocks of them.
        let (step, before) =
            if stored != Stored::Rows && count > 1 { (count, index) } else { (1, before) };
        let (row, column) = if turned { (1, rows) } else { (k, 1) };
        let stacked = of_experts && !one_each;
        let matrix = if turned { vec![k, rows] } else { [&[rows], inner].concat() };
        Slice {
            tensor: name.replace("{l}", &l.to_string()).replace("{e}", &e.to_string()),
            shape: if stacked { [experts, &matrix].concat() } else { matrix },
            first: before * row + if stacked { e * rows * k } else { 0 },
            row: step * row,
            column,
            mxfp4: stored == Stored::Mxfp4 && !inner.is_empty(),
            scheme: None,
        }
    }

    /// All places of weight `what` of layer `l`: one, or one for each expert or head.
    pub fn places(&self, names: &Names, l: usize, what: &str) -> Vec<Slice> {
        let many = what.starts_with("expert_") || names.model(what).contains("{e}");
        let weight = self.layer_weights(l).into_iter().find(|w| many && w.what == what);
        let count = weight.map_or(1, |w| w.shape[0]);
        (0..count).map(|e| self.place(names, l, what, e)).collect()
    }
}
