//! How many of a model's layers a CUDA device holds: decided from headers, before anything is loaded. The first layers
//! stay on the CPU, the last ones and the head go to the device: then a step crosses once, and the large head is where
//! the bandwidth is. Touches no device.

use super::budget::size;
use super::describe::{CHUNK, activations};
use super::{LoadOptions, PAGE, Quantization, Sees, forward, kv, open, weights};
use crate::backend::Place;
use crate::{Error, Result};
use std::path::Path;

/// Positions of keys and values that a plan leaves room for on the device, unless a context is asked for.
const POSITIONS: usize = 4096;

/// How many layers are asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GpuLayers {
    /// As many as fit.
    #[default]
    Auto,
    /// So many, or an error.
    Count(usize),
}

/// What the parts of a model take in bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Offload {
    /// Weights of each layer, and its keys and values.
    layers: Vec<(u64, u64)>,
    /// Weights before the first layer that the CPU can keep.
    begin: u64,
    /// Weights after the last layer; an embedding that is the head is one of them.
    end: u64,
    /// Of `end`, what the CPU needs, too.
    both: u64,
    /// Activations of one chunk and logits.
    working: u64,
    /// Positions of keys and values that were counted.
    positions: usize,
}

/// What goes onto the device.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    /// Layers on the device.
    pub gpu_layers: usize,
    /// Layers.
    pub layers: usize,
    /// The first layer on the device; `None`: all of the model is.
    pub border: Option<usize>,
    /// Bytes it takes there, keys and values counted as far as the plan has to.
    pub needed: u64,
    /// Bytes of weights in the computer's memory.
    pub held: u64,
    /// Of the bytes of all pages, what those on the device take.
    pub kv_share: f64,
}

impl Planned {
    /// Bytes that all keys and values may take, if those of the device get `device` and the others `cpu`.
    pub fn kv_bytes(&self, device: u64, cpu: u64) -> u64 {
        let of = |bytes: u64, share: f64| if share > 0.0 { bytes as f64 / share } else { f64::MAX };
        of(device, self.kv_share).min(of(cpu, 1.0 - self.kv_share)) as u64
    }
}

impl Offload {
    /// What the model in `folder` takes, if the CUDA back end has kernels for all of it; with a context of so many
    /// positions, and so many bytes for all keys and values, if that is said.
    pub fn new(
        folder: &Path,
        options: &LoadOptions,
        context: Option<usize>,
        kv_bytes: Option<u64>,
    ) -> Result<Offload> {
        let (spec, checkpoint, path) = open(folder, options)?;
        spec.runs_on_cuda()?;
        let sizes = weights::sizes(&path, &checkpoint, &spec, options.quantization)?;
        let kept = |form: &str| ["grouped", "mxfp4"].contains(&form);
        if options.quantization == Quantization::None
            && let Some((form, _)) = sizes.forms.iter().find(|(form, _)| kept(form))
        {
            return Err(Error::Unsupported(format!(
                "{form} weights with quantization=\"none\" do not run on CUDA yet; use quantization=\"auto\""
            )));
        }
        let at = |wanted: Place| -> u64 {
            sizes.places.iter().filter(|(at, _)| *at == wanted).map(|(_, bytes)| bytes).sum()
        };
        let positions = context.unwrap_or(POSITIONS).min(spec.context_length).max(PAGE);
        let page = |layer: &super::spec::Layer| {
            let sees = match &layer.mixer {
                super::spec::Mixer::Attention(how) => Sees::from(how.window),
                _ => Sees::All,
            };
            let (paged, (states, size)) = forward::kv_layer(layer, 1);
            let pages = kv::pages_for(sees, positions, CHUNK) * paged.pages;
            // A sequence is worth four states.
            (pages * paged.page_bytes(options.kv_dtype) + 4 * states * size * size_of::<f32>())
                as u64
        };
        let mut pages: Vec<u64> = spec.layers.iter().map(page).collect();
        if let Some(bytes) = kv_bytes {
            let all = pages.iter().sum::<u64>().max(1);
            for page in &mut pages {
                *page = (u128::from(bytes) * u128::from(*page) / u128::from(all)) as u64;
            }
        }
        let layers = pages.into_iter().enumerate().map(|(l, kv)| (at(Place::Layer(l)), kv));
        let both = at(Place::Both);
        Ok(Offload {
            layers: layers.collect(),
            begin: at(Place::Begin),
            end: at(Place::End) + both,
            both,
            working: activations(&spec, sizes.widest),
            positions,
        })
    }

    /// The last `count` layers and the head on the device; `whole`: what comes before the first layer, too.
    fn with(&self, count: usize, whole: bool) -> Planned {
        let border = self.layers.len() - count;
        let (cpu, device) = self.layers.split_at(border);
        let weights =
            |layers: &[(u64, u64)]| layers.iter().map(|(weights, _)| weights).sum::<u64>();
        let kv = |layers: &[(u64, u64)]| layers.iter().map(|(_, kv)| kv).sum::<u64>();
        let (begin, held) = match whole {
            true => (self.begin, 0),
            false => (0, self.begin + self.both + weights(cpu)),
        };
        Planned {
            gpu_layers: count,
            layers: self.layers.len(),
            border: (!whole).then_some(border),
            needed: begin + self.end + weights(device) + kv(device) + self.working,
            held,
            kv_share: kv(device) as f64 / kv(&self.layers).max(1) as f64,
        }
    }

    /// What goes onto a device with `free` bytes; with `shared` its memory is the computer's, and all counts once.
    pub fn plan(&self, wanted: GpuLayers, free: u64, shared: bool) -> Result<Planned> {
        let all = self.layers.len();
        let needed = |plan: &Planned| match shared {
            true => self.with(all, true).needed.max(plan.needed),
            false => plan.needed,
        };
        let fits = |plan: &Planned| needed(plan) <= free;
        let best = |count| {
            let whole = self.with(count, count == all);
            if count == all && !fits(&whole) { self.with(count, false) } else { whole }
        };
        let most = (1..=all).rev().map(best).find(fits);
        let plan = match wanted {
            GpuLayers::Auto => most.clone().unwrap_or_else(|| best(1)),
            GpuLayers::Count(count) if (1..=all).contains(&count) => best(count),
            GpuLayers::Count(count) => {
                let expected = format!("1 to {all}, or \"auto\"; device=\"cpu\" uses none");
                return Err(Error::parameter("gpu_layers", count, expected));
            }
        };
        if fits(&plan) {
            return Ok(plan);
        }
        let least = match most {
            None => "not one layer fits: use device=\"cpu\"".to_owned(),
            Some(most) => format!("gpu_layers={} fits, and \"auto\" finds it", most.gpu_layers),
        };
        let (weights, kv) = self.layers[all - plan.gpu_layers..]
            .iter()
            .fold((self.end, 0), |(w, k), layer| (w + layer.0, k + layer.1));
        Err(Error::OutOfMemory {
            what: format!(
                "{} of {all} layers on the CUDA device: {} of weights with the head, {} of keys and values of {} \
                 positions, {} of activations; {least}, or take fewer bits (quantization=\"int4\") or a shorter \
                 context_length",
                plan.gpu_layers,
                size(weights),
                size(kv),
                self.positions,
                size(self.working),
            ),
            requested: needed(&plan),
            available: free,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1_000_000;

    /// Ten layers of 100 MB with 10 MB of keys and values, an embedding of 50 MB and a head of 60 MB.
    fn model(tied: bool) -> Offload {
        Offload {
            layers: vec![(100 * MB, 10 * MB); 10],
            begin: if tied { 0 } else { 50 * MB },
            end: 60 * MB,
            both: if tied { 60 * MB } else { 0 },
            working: 5 * MB,
            positions: 4096,
        }
    }

    #[test]
    fn as_many_layers_as_fit_go_onto_the_device() {
        let auto = |free| model(false).plan(GpuLayers::Auto, free, false);
        let whole = auto(1215 * MB).unwrap();
        assert_eq!((whole.gpu_layers, whole.border, whole.held), (10, None, 0));
        // One byte less: the embedding stays.
        let plan = auto(1215 * MB - 1).unwrap();
        assert_eq!((plan.gpu_layers, plan.border, plan.held), (10, Some(0), 50 * MB));
        let plan = auto(1165 * MB - 1).unwrap();
        assert_eq!((plan.gpu_layers, plan.border, plan.held), (9, Some(1), 150 * MB));
        assert_eq!(plan.needed, 1055 * MB);
        assert_eq!(plan.kv_bytes(900, 50), 500);
        assert_eq!(plan.kv_bytes(90, 50), 100);
        assert_eq!(auto(175 * MB).unwrap().gpu_layers, 1);
        let Err(Error::OutOfMemory { what, requested, available }) = auto(175 * MB - 1) else {
            panic!()
        };
        assert_eq!((requested, available), (175 * MB, 175 * MB - 1));
        assert!(what.contains("1 of 10 layers") && what.contains("not one layer fits"), "{what}");
    }

    #[test]
    fn a_number_that_does_not_fit_is_an_error_with_the_one_that_does() {
        let asked = |count| model(true).plan(GpuLayers::Count(count), 615 * MB, false);
        let plan = asked(5).unwrap();
        // The tied embedding is on both sides.
        assert_eq!((plan.border, plan.held, plan.needed), (Some(5), 560 * MB, 615 * MB));
        let Err(Error::OutOfMemory { what, requested, .. }) = asked(6) else { panic!() };
        assert_eq!(requested, 725 * MB);
        for part in ["6 of 10", "660.0 MB of weights", "60.0 MB of keys", "gpu_layers=5 fits"] {
            assert!(what.contains(part), "{what}");
        }
        for count in [0, 11] {
            assert!(matches!(asked(count), Err(Error::InvalidParameter { .. })), "{count}");
        }
    }

    #[test]
    fn memory_that_is_shared_counts_once_and_gains_nothing_by_a_split() {
        let on = |wanted, free| model(false).plan(wanted, free, true);
        assert_eq!(on(GpuLayers::Auto, 1215 * MB).unwrap().border, None);
        assert!(on(GpuLayers::Auto, 1215 * MB - 1).is_err());
        assert_eq!(on(GpuLayers::Count(3), 1215 * MB).unwrap().border, Some(7));
        assert!(on(GpuLayers::Count(3), 1215 * MB - 1).is_err());
    }
}
