//! Which rotary embedding each layer has: base, scaling and part of the head, from a family and one `config.json`.
//! Never rotates anything.

use super::build::{MAX_HEAD_DIM, MAX_POSITIONS};
use super::config::{Facts, Object, bad, shown};
use super::family::{Fact, Family};
use super::rope::Base;
use super::{Rope, RopeOn};
use crate::{Error, Result};

/// What base a rotary embedding may have.
const THETA: (f64, f64) = (1.0, 1e18);

/// The rotary embeddings of a model.
pub(super) struct Ropes {
    pub(super) all: Vec<Rope>,
    /// For each layer an index into `all`; `None`: the layer's queries and keys carry no position.
    pub(super) of: Vec<Option<usize>>,
    /// The context that scaling reaches, where it says so.
    pub(super) reach: Option<usize>,
}

/// What the embeddings of one model have in common.
struct Reader<'a> {
    family: &'a Family,
    facts: &'a Facts<'a>,
    /// Widths of a head on full and on sliding layers.
    head_dims: [usize; 2],
    max_position: usize,
}

impl Ropes {
    /// No embedding in any layer.
    pub(super) fn none(layers: usize) -> Ropes {
        Ropes { all: Vec::new(), of: vec![None; layers], reach: None }
    }

    /// `windows` are those of the layers.
    pub(super) fn read(
        family: &Family,
        facts: &Facts<'_>,
        head_dims: [usize; 2],
        max_position: usize,
        windows: &[Option<usize>],
    ) -> Result<Ropes> {
        let reader = Reader { family, facts, head_dims, max_position };
        let mut ropes = match facts.list(&family.rope_theta_layers)? {
            Some(thetas) => reader.by_layer(thetas, windows.len())?,
            None => reader.by_type(windows)?,
        };
        let mut after = ropes.all.iter().filter_map(|r| r.long.as_ref()).map(|long| long.after);
        let first = after.next();
        if after.any(|other| Some(other) != first) {
            let expected = "one value for all layers";
            return Err(bad("original_max_position_embeddings", "several values", expected));
        }
        let slides = facts.count(&family.window, MAX_POSITIONS)?.is_some();
        let skipped = reader.skipped(windows.len())?;
        for ((rope, window), skipped) in ropes.of.iter_mut().zip(windows).zip(skipped) {
            let here = match family.rope_on {
                RopeOn::All => true,
                RopeOn::Sliding => window.is_some(),
                RopeOn::SlidingIfAny => window.is_some() || !slides,
            };
            if !here || skipped {
                *rope = None;
            }
        }
        Ok(ropes)
    }
}

impl<'a> Reader<'a> {
    /// Base and part of the head. The base is outside of `params` (old spelling), inside (new) or both; two that
    /// disagree are an error.
    fn base(&self, params: Option<&Object<'_>>, fact: &Fact, head_dim: usize) -> Result<Base<'a>> {
        let outside = self.facts.need_number(fact, THETA.0, THETA.1);
        let inside = match params {
            Some(params) => params.number_in("rope_theta", THETA.0, THETA.1)?,
            None => None,
        };
        if let (Some(inside), Some(outside)) = (inside, self.facts.given(fact))
            && outside.as_f64() != Some(inside)
        {
            return Err(bad("rope_theta", &format!("{inside} and {outside}"), "one value"));
        }
        let theta = match inside {
            Some(theta) => theta,
            None => outside?,
        };
        self.with_theta(params, theta, head_dim)
    }

    fn with_theta(
        &self,
        params: Option<&Object<'_>>,
        theta: f64,
        head_dim: usize,
    ) -> Result<Base<'a>> {
        Ok(Base {
            dim: rotary_dim(self.family, self.facts, params, head_dim)?,
            theta,
            max_position: self.max_position,
            original: self.facts.count(&self.family.original_context, MAX_POSITIONS)?,
            honoured: &self.family.honoured,
        })
    }

    /// One embedding for full layers, perhaps another for sliding ones.
    fn by_type(&self, windows: &[Option<usize>]) -> Result<Ropes> {
        let Reader { family, facts, head_dims: [full_dim, local_dim], .. } = *self;
        let (mut full, mut local, mut reach) = (Vec::new(), Vec::new(), None);
        let own_local = !family.rope_theta_local.key.is_empty();
        let local_theta = if own_local { &family.rope_theta_local } else { &family.rope_theta };
        for params in facts.objects(&family.rope_scaling)? {
            let per_type = params.map.values().any(serde_json::Value::is_object);
            if per_type && let Some(key) = params.keys().find(|k| !k.ends_with("_attention")) {
                let found = "a key beside layer types".to_owned();
                return Err(params.bad(key, found, "layer types only"));
            }
            let full_params =
                if per_type { params.object("full_attention")? } else { Some(params.clone()) };
            if let Some(p) = full_params {
                let (rope, to) = self.base(Some(&p), &family.rope_theta, full_dim)?.scaled(&p)?;
                reach = reach.max(to);
                full.push(rope);
            }
            if per_type && let Some(p) = params.object("sliding_attention")? {
                local.push(self.base(Some(&p), local_theta, local_dim)?.scaled(&p)?.0);
            }
        }
        if full.is_empty() {
            full.push(self.base(None, &family.rope_theta, full_dim)?.unscaled());
        }
        if local.is_empty() && own_local {
            local.push(self.base(None, local_theta, local_dim)?.unscaled());
        }
        for all in [&mut full, &mut local] {
            if all.windows(2).any(|two| two[0] != two[1]) {
                let found = "another embedding than rope_scaling says";
                return Err(bad("rope_parameters", found, "the same"));
            }
            all.truncate(1);
        }
        if local == full {
            local.clear();
        }
        full.append(&mut local);
        let last = full.len() - 1;
        let of = windows.iter().map(|window| Some(if window.is_some() { last } else { 0 }));
        Ok(Ropes { of: of.collect(), all: full, reach })
    }

    /// One base for each layer; 0: the layer has no embedding.
    fn by_layer(&self, thetas: &[serde_json::Value], layers: usize) -> Result<Ropes> {
        let params = self.facts.objects(&self.family.rope_scaling)?;
        let mut ropes = Ropes { all: Vec::new(), of: Vec::new(), reach: None };
        if thetas.len() != layers {
            let found = format!("{} bases of rotary embeddings", thetas.len());
            return Err(bad("the layers", &found, &format!("{layers}")));
        }
        for (l, theta) in thetas.iter().enumerate() {
            let value = theta.as_f64().filter(|t| *t == 0.0 || (THETA.0..=THETA.1).contains(t));
            let Some(value) = value else {
                let label = format!("the base of layer {l}");
                return Err(bad(&label, &shown(theta), "0 or a number from 1 to 1e18"));
            };
            if value == 0.0 {
                ropes.of.push(None);
                continue;
            }
            let base = self.with_theta(params.first(), value, self.head_dims[0])?;
            let (rope, reach) = match params.first() {
                Some(params) => base.scaled(params)?,
                None => (base.unscaled(), None),
            };
            ropes.reach = ropes.reach.max(reach);
            let known = ropes.all.iter().position(|r| *r == rope);
            ropes.of.push(Some(known.unwrap_or(ropes.all.len())));
            if known.is_none() {
                ropes.all.push(rope);
            }
        }
        Ok(ropes)
    }

    /// The layers that the file leaves without an embedding, by a list or by an interval.
    fn skipped(&self, layers: usize) -> Result<Vec<bool>> {
        let Some(list) = self.facts.list(&self.family.rope_layers)? else {
            let every = self.facts.count(&self.family.nope_every, usize::MAX)?;
            return Ok((1..=layers).map(|l| every.is_some_and(|n| l % n == 0)).collect());
        };
        if list.len() < layers {
            let found = format!("{} entries that say which layers rotate", list.len());
            return Err(bad("the layers", &found, &format!("{layers}")));
        }
        let skipped = |v: &serde_json::Value| match v.as_u64() {
            Some(x @ 0..=1) => Ok(x == 0),
            _ => Err(bad("a layer's rotation", &shown(v), "0 or 1")),
        };
        list[..layers].iter().map(skipped).collect()
    }
}

/// How many dimensions of a head rotate.
fn rotary_dim(
    family: &Family,
    facts: &Facts<'_>,
    params: Option<&Object<'_>>,
    head_dim: usize,
) -> Result<usize> {
    const KEY: &str = "partial_rotary_factor";
    if let Some(params) = params
        && params.text("rope_type")? == Some("proportional")
    {
        return Ok(head_dim); // the factor is one of frequencies
    }
    let outside = facts.number(&family.rotary_factor, f64::MIN_POSITIVE, 1.0)?;
    let inside = match params {
        Some(params) => params.number_in(KEY, f64::MIN_POSITIVE, 1.0)?,
        None => None,
    };
    let other = match facts.given(&family.rotary_factor) {
        Some(given) => given.as_f64(),
        None if family.rotary_factor.key.is_empty() => Some(1.0), // the family rotates whole heads
        None => inside,
    };
    if let (Some(inside), Some(params)) = (inside, params)
        && Some(inside) != other
    {
        return Err(Error::Unsupported(format!(
            "config.json: {}: found {inside}, but {} of each head rotates here",
            params.label(KEY),
            other.unwrap_or(1.0)
        )));
    }
    let part = (head_dim as f64 * inside.or(outside).unwrap_or(1.0)) as usize;
    let dim = facts.count(&family.rotary_dim, MAX_HEAD_DIM)?.unwrap_or(part);
    if dim == 0 || dim > head_dim || dim % 2 != 0 {
        let found = format!("{dim} rotating dimensions of {head_dim}");
        return Err(bad(KEY, &found, "an even part of the head"));
    }
    Ok(dim)
}
