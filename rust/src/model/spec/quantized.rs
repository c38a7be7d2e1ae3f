//! `quantization_config` of a `config.json`: how each matrix of a quantized checkpoint is stored. Every field is read,
//! or known to change no weight, or an error. Which matrices are quantized the checkpoint's tensors say; here is how.
//! Never reads a tensor.

mod fields;

use super::config::{Object, bad, shown};
use crate::{Error, Result};
use fancy_regex::Regex;
use fields::{
    AWQ, BITSANDBYTES, COMPRESSED, COMPRESSED_GROUP, COMPRESSED_WEIGHTS, DYNAMIC, FBGEMM, FP8,
    GPTQ, MODELOPT, check,
};
use serde_json::Value;

/// What `quantization_config` says.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantized {
    /// `quant_method`.
    pub method: &'static str,
    /// In the order in which they are asked; the first that fits a module counts. `None`: it is not quantized.
    rules: Vec<(Modules, Option<Scheme>)>,
}

/// How a matrix `[n, k]` is stored; `crate::quant` has the formats.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// `quant::gptq`.
    Gptq {
        /// 4 or 8.
        bits: u32,
        /// Inputs that share a scale; `None`: all.
        group: Option<usize>,
        /// `checkpoint_format`.
        v2: bool,
    },
    /// `quant::awq`.
    Awq {
        /// Inputs that share a scale; `None`: all.
        group: Option<usize>,
    },
    /// `quant::packed`.
    Packed {
        /// 4 or 8.
        bits: u32,
        /// What shares a scale.
        spread: Spread,
        /// There are no zero points.
        symmetric: bool,
    },
    /// `quant::int8`.
    Int8 {
        /// What shares a scale.
        spread: Spread,
        /// There are no zero points.
        symmetric: bool,
    },
    /// `quant::float8`.
    Float8 {
        /// What shares a scale.
        spread: Spread,
    },
    /// `quant::fp4`.
    Fp4,
    /// `quant::nvfp4`.
    Nvfp4 {
        /// In ModelOpt's tensors, not compressed-tensors'.
        modelopt: bool,
    },
    /// `quant::nibbles`.
    Nibbles,
    /// `quant::llm_int8`.
    LlmInt8,
}

/// Which weights share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spread {
    /// All.
    Tensor,
    /// Those of an output.
    Channel,
    /// Those of an output and so many inputs side by side.
    Group(usize),
    /// Those of so many outputs and inputs.
    Block(usize, usize),
}

impl Scheme {
    /// Ends of the names of tensors of which one is there if a module is stored so: its `weight` is no plain one.
    pub fn marks(&self) -> &'static [&'static str] {
        match self {
            Scheme::Gptq { .. } | Scheme::Awq { .. } => &[".qweight"],
            Scheme::Packed { .. } | Scheme::Fp4 | Scheme::Nvfp4 { modelopt: false } => {
                &[".weight_packed"]
            }
            Scheme::Nvfp4 { modelopt: true } => &[".weight_scale_2"],
            Scheme::Int8 { .. } => &[".weight_scale"],
            Scheme::Float8 { .. } => &[".weight_scale", ".weight_scale_inv"],
            Scheme::Nibbles => &[".weight.quant_map"],
            Scheme::LlmInt8 => &[".SCB"],
        }
    }

    /// As shown to users.
    fn name(&self) -> String {
        let group = |group: &Option<usize>| match group {
            Some(size) => Spread::Group(*size).name(),
            None => Spread::Channel.name(),
        };
        match self {
            Scheme::Gptq { bits, group: g, .. } => format!("int{bits}, {}", group(g)),
            Scheme::Awq { group: g } => format!("int4, {}", group(g)),
            Scheme::Packed { bits, spread, .. } => format!("int{bits}, {}", spread.name()),
            Scheme::Int8 { spread, .. } => format!("int8, {}", spread.name()),
            Scheme::Float8 { spread } => format!("fp8 e4m3, {}", spread.name()),
            Scheme::Fp4 => "mxfp4".to_owned(),
            Scheme::Nvfp4 { .. } => "nvfp4".to_owned(),
            Scheme::Nibbles => "4 bits, blocks counted through all rows".to_owned(),
            Scheme::LlmInt8 => format!("int8, {}", Spread::Channel.name()),
        }
    }
}

impl Spread {
    fn name(self) -> String {
        match self {
            Spread::Tensor => "one scale for a matrix".to_owned(),
            Spread::Channel => "one scale for an output".to_owned(),
            Spread::Group(size) => format!("groups of {size}"),
            Spread::Block(rows, columns) => format!("blocks of {rows} x {columns}"),
        }
    }
}

/// Which modules a rule is for.
#[derive(Clone, Debug)]
enum Modules {
    All,
    /// This one, and those in it, also where the name lacks its beginning.
    Named(String),
    /// Those whose name starts so, as Python's `re.match` sees it.
    Matching(String, Box<Regex>),
}

impl PartialEq for Modules {
    fn eq(&self, other: &Modules) -> bool {
        match (self, other) {
            (Modules::All, Modules::All) => true,
            (Modules::Named(a), Modules::Named(b)) => a == b,
            (Modules::Matching(a, _), Modules::Matching(b, _)) => a == b,
            _ => false,
        }
    }
}

impl Modules {
    fn matching(pattern: &str, label: &str) -> Result<Modules> {
        match Regex::new(&format!("^(?:{pattern})")) {
            Ok(regex) => Ok(Modules::Matching(pattern.to_owned(), Box::new(regex))),
            Err(error) => {
                Err(bad(label, &format!("{pattern:?} ({error})"), "a regular expression"))
            }
        }
    }

    fn fit(&self, module: &str) -> Result<bool> {
        Ok(match self {
            Modules::All => true,
            Modules::Named(name) => {
                let inside = |at: usize, end: usize| {
                    (at == 0 || module[..at].ends_with('.'))
                        && (end == module.len() || module[end..].starts_with('.'))
                };
                module.match_indices(name.as_str()).any(|(at, found)| inside(at, at + found.len()))
            }
            Modules::Matching(pattern, regex) => regex.is_match(module).map_err(|error| {
                bad("quantization_config", &format!("{pattern:?} ({error})"), "an easier pattern")
            })?,
        })
    }
}

impl Quantized {
    /// Reads the object that describes the quantization.
    pub(super) fn read(o: &Object<'_>) -> Result<Quantized> {
        let method = o.text("quant_method")?;
        let (method, rules) = match method {
            Some("gptq") => ("gptq", gptq(o)?),
            Some("awq") => {
                check(o, AWQ)?;
                ("awq", listed(o, &["modules_to_not_convert"], Scheme::Awq { group: group(o)? })?)
            }
            Some("fp8") => {
                check(o, FP8)?;
                let spread = match o.get("weight_block_size") {
                    None => Spread::Tensor,
                    Some(block) => self::block(o, "weight_block_size", block)?,
                };
                let lists = ["modules_to_not_convert", "ignored_layers"];
                ("fp8", listed(o, &lists, Scheme::Float8 { spread })?)
            }
            Some("fbgemm_fp8") => {
                check(o, FBGEMM)?;
                let scheme = Scheme::Float8 { spread: Spread::Channel };
                ("fbgemm_fp8", listed(o, &["modules_to_not_convert"], scheme)?)
            }
            Some("bitsandbytes") => {
                check(o, BITSANDBYTES)?;
                let [four, eight] = ["load_in_4bit", "load_in_8bit"]
                    .map(|key| o.flag(key).map(|flag| flag.unwrap_or(false)));
                let scheme = match (four?, eight?) {
                    (true, false) => Scheme::Nibbles,
                    (false, true) => Scheme::LlmInt8,
                    (both, _) => {
                        let found = format!("{both}, and load_in_8bit the same");
                        return Err(o.bad("load_in_4bit", found, "one of both"));
                    }
                };
                ("bitsandbytes", listed(o, &["llm_int8_skip_modules"], scheme)?)
            }
            Some("compressed-tensors") => ("compressed-tensors", compressed(o)?),
            Some("modelopt") => {
                check(o, MODELOPT)?;
                let scheme = match o.text("quant_algo")? {
                    Some("NVFP4") => Scheme::Nvfp4 { modelopt: true },
                    Some("FP8") => Scheme::Float8 { spread: Spread::Tensor },
                    other => {
                        return Err(Error::Unsupported(format!(
                            "config.json: {}: found {:?}, only \"NVFP4\" and \"FP8\" are supported",
                            o.label("quant_algo"),
                            other.unwrap_or("nothing")
                        )));
                    }
                };
                ("modelopt", vec![(Modules::All, Some(scheme))])
            }
            None if o.get("bits").is_some() && o.get("group_size").is_some() => {
                return Err(Error::Unsupported(format!(
                    "config.json: {}: found nothing, but bits and group_size, as MLX writes them: its checkpoints are not \
                     supported; take the model's unquantized checkpoint, or a GGUF file",
                    o.label("quant_method")
                )));
            }
            other => {
                return Err(Error::Unsupported(format!(
                    "config.json: {}: checkpoints quantized with {} are not supported, only gptq, awq, \
                     compressed-tensors, modelopt, fp8, fbgemm_fp8, bitsandbytes, and mxfp4 in GPT-OSS; take the \
                     model's unquantized checkpoint, or one of these",
                    o.label("quant_method"),
                    other.map_or("an unknown method".to_owned(), |method| format!("{method:?}")),
                )));
            }
        };
        Ok(Quantized { method, rules })
    }

    /// How a quantized module is stored; `None`: it should not be quantized.
    pub fn scheme(&self, module: &str) -> Result<Option<&Scheme>> {
        for (modules, scheme) in &self.rules {
            if modules.fit(module)? {
                return Ok(scheme.as_ref());
            }
        }
        Ok(None)
    }

    /// Whether a tensor is one of a weight's, which is quantized, or belongs to it: its name is that of the weight
    /// up to `.weight`, and this more.
    pub fn belongs(&self, more: &str) -> bool {
        let known: &[&str] = match self.method {
            "gptq" => &[".qweight", ".qzeros", ".scales", ".g_idx"],
            "awq" => &[".qweight", ".qzeros", ".scales"],
            "bitsandbytes" => &[
                ".weight.absmax",
                ".weight.quant_map",
                ".weight.nested_absmax",
                ".weight.nested_quant_map",
                ".weight.quant_state.bitsandbytes__nf4",
                ".weight.quant_state.bitsandbytes__fp4",
                ".SCB",
                ".weight_format",
            ],
            // The scales of activations are not needed: theirs are found for each token.
            _ => &[
                ".weight_packed",
                ".weight_scale",
                ".weight_scale_inv",
                ".weight_scale_2",
                ".weight_global_scale",
                ".input_global_scale",
                ".weight_shape",
                ".weight_zero_point",
                ".weight_g_idx",
                ".input_scale",
                ".input_scale_ub",
                ".input_zero_point",
                ".activation_scale",
            ],
        };
        known.contains(&more)
    }

    /// Tensors that are scales of a cache of keys and values: that is kept as the caller says.
    pub fn of_cache(&self, tensor: &str) -> bool {
        ["compressed-tensors", "modelopt"].contains(&self.method)
            && [".k_scale", ".v_scale"].iter().any(|end| tensor.ends_with(end))
    }

    /// As shown to users.
    pub fn name(&self) -> String {
        let mut all: Vec<String> = Vec::new();
        for scheme in self.rules.iter().filter_map(|(_, scheme)| scheme.as_ref()) {
            let name = scheme.name();
            if !all.contains(&name) {
                all.push(name);
            }
        }
        format!("{}: {}", self.method, all.join("; "))
    }

    /// Marks of all schemes: see [`Scheme::marks`].
    pub fn marks(&self) -> impl Iterator<Item = &'static str> {
        let schemes = self.rules.iter().filter_map(|(_, scheme)| scheme.as_ref());
        schemes.flat_map(|scheme| scheme.marks().iter().copied())
    }
}

/// Rules for one scheme everywhere but in the modules that lists of names name.
fn listed(o: &Object<'_>, keys: &[&str], scheme: Scheme) -> Result<Vec<(Modules, Option<Scheme>)>> {
    let mut rules = Vec::new();
    for key in keys {
        let names = texts(o, key)?.into_iter();
        rules.extend(names.map(|name| (Modules::Named(name.to_owned()), None)));
    }
    rules.push((Modules::All, Some(scheme)));
    Ok(rules)
}

/// A list of strings; none, if there is no list.
fn texts<'a>(o: &Object<'a>, key: &str) -> Result<Vec<&'a str>> {
    let Some(value) = o.get(key) else { return Ok(Vec::new()) };
    let all: Option<Vec<&str>> =
        value.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
    let all = all.filter(|all| all.iter().all(|text| !text.is_empty()));
    all.ok_or_else(|| o.bad(key, shown(value), "a list of names"))
}

/// Inputs that share a scale; `None`: all.
fn group(o: &Object<'_>) -> Result<Option<usize>> {
    match o.get("group_size") {
        Some(Value::Number(n)) if n.as_i64() == Some(-1) => Ok(None),
        Some(value) => match value.as_u64().filter(|n| (1..=1 << 20).contains(n)) {
            Some(n) => Ok(Some(n as usize)),
            None => {
                Err(o.bad("group_size", shown(value), "a positive integer up to 1048576, or -1"))
            }
        },
        None => Err(o.missing("group_size")),
    }
}

/// 4 or 8.
fn bits(o: &Object<'_>, key: &str) -> Result<u32> {
    match o.get(key).and_then(Value::as_u64) {
        Some(bits @ (4 | 8)) => Ok(bits as u32),
        _ => {
            let found = o.get(key).map_or("nothing".to_owned(), shown);
            Err(Error::Unsupported(format!(
                "config.json: {}: found {found}, only 4 and 8 are supported",
                o.label(key)
            )))
        }
    }
}

/// Rows and columns of a block: a list, or "128x128".
fn block(o: &Object<'_>, key: &str, value: &Value) -> Result<Spread> {
    let sides: Vec<u64> = match value {
        Value::Array(list) => list.iter().filter_map(Value::as_u64).collect(),
        Value::String(text) => text.split('x').filter_map(|side| side.parse().ok()).collect(),
        _ => Vec::new(),
    };
    match sides[..] {
        [rows @ 1..=0x10_0000, columns @ 1..=0x10_0000] => {
            Ok(Spread::Block(rows as usize, columns as usize))
        }
        _ => Err(o.bad(key, shown(value), "two positive integers up to 1048576")),
    }
}

fn gptq(o: &Object<'_>) -> Result<Vec<(Modules, Option<Scheme>)>> {
    check(o, GPTQ)?;
    let [old, new] = [o.text("checkpoint_format")?, o.text("format")?];
    if let (Some(old), Some(new)) = (old, new)
        && old != new
    {
        return Err(o.bad(
            "format",
            format!("{new:?}"),
            &format!("what checkpoint_format says, {old:?}"),
        ));
    }
    let v2 = match old.or(new) {
        None | Some("gptq") => false,
        Some("gptq_v2") => true,
        Some(other) => {
            return Err(Error::Unsupported(format!(
                "config.json: {}: found {other:?}, only \"gptq\" and \"gptq_v2\" are supported",
                o.label("checkpoint_format")
            )));
        }
    };
    let (all_bits, all_group) = (bits(o, "bits")?, group(o)?);
    let mut rules = Vec::new();
    // GPTQModel: the first pattern that fits a module's name changes some numbers, or leaves it out.
    if let Some(dynamic) = o.object("dynamic")? {
        for (pattern, value) in dynamic.map {
            let label = dynamic.label(pattern);
            if let Some(pattern) = pattern.strip_prefix("-:") {
                rules.push((Modules::matching(pattern, &label)?, None));
                continue;
            }
            let modules = Modules::matching(pattern.strip_prefix("+:").unwrap_or(pattern), &label)?;
            let Value::Object(map) = value else {
                return Err(bad(&label, &shown(value), "an object"));
            };
            let own = Object { map, path: format!("{label}.") };
            check(&own, DYNAMIC)?;
            let bits = if own.get("bits").is_some() { bits(&own, "bits")? } else { all_bits };
            let group = if own.get("group_size").is_some() { group(&own)? } else { all_group };
            rules.push((modules, Some(Scheme::Gptq { bits, group, v2 })));
        }
    }
    rules.push((Modules::All, Some(Scheme::Gptq { bits: all_bits, group: all_group, v2 })));
    Ok(rules)
}

fn compressed(o: &Object<'_>) -> Result<Vec<(Modules, Option<Scheme>)>> {
    check(o, COMPRESSED)?;
    if let Some(sparse) = o.object("sparsity_config")? {
        match sparse.text("format")? {
            None | Some("dense") => {}
            Some(other) => {
                return Err(Error::Unsupported(format!(
                    "config.json: {}: found {other:?}, only \"dense\" is supported: take a checkpoint that is \
                     not stored sparsely",
                    sparse.label("format")
                )));
            }
        }
    }
    // A target that is a name or a pattern counts before one that is a class.
    let (mut rules, mut classes) = (Vec::new(), Vec::new());
    let named = |target: &str, label: &str| match target.strip_prefix("re:") {
        Some(pattern) => Modules::matching(pattern, label),
        None => Ok(Modules::Named(target.to_owned())),
    };
    for target in texts(o, "ignore")? {
        rules.push((named(target, &o.label("ignore"))?, None));
    }
    let groups = o.object("config_groups")?.ok_or_else(|| o.missing("config_groups"))?;
    for key in groups.keys() {
        let own = groups.object(key)?.ok_or_else(|| groups.missing(key))?;
        check(&own, COMPRESSED_GROUP)?;
        let scheme = compressed_scheme(o, &own)?;
        for target in texts(&own, "targets")? {
            if target == "Linear" {
                classes.push((Modules::All, Some(scheme.clone())));
            } else if target.starts_with("re:") || target.contains('.') || target == "lm_head" {
                rules.push((named(target, &own.label("targets"))?, Some(scheme.clone())));
            } else {
                return Err(Error::Unsupported(format!(
                    "config.json: {}: found {target:?}, only \"Linear\", names and patterns of modules are supported",
                    own.label("targets")
                )));
            }
        }
    }
    match classes.len() {
        0 | 1 => rules.append(&mut classes),
        n => return Err(groups.bad("targets", format!("\"Linear\" {n} times"), "one")),
    }
    Ok(rules)
}

fn compressed_scheme(top: &Object<'_>, own: &Object<'_>) -> Result<Scheme> {
    let o = own.object("weights")?.ok_or_else(|| own.missing("weights"))?;
    check(&o, COMPRESSED_WEIGHTS)?;
    let group = match o.get("group_size") {
        Some(_) => group(&o)?,
        None => None,
    };
    let format = own.text("format")?.or(top.text("format")?).unwrap_or("nothing");
    let spread = match (o.text("strategy")?, group) {
        (Some("tensor"), None) => Spread::Tensor,
        (Some("channel"), None) => Spread::Channel,
        // Groups, and one more scale for the matrix.
        (Some("tensor_group"), Some(16)) if format == "nvfp4-pack-quantized" => Spread::Group(16),
        (Some("group") | None, Some(size)) => Spread::Group(size),
        (Some("block"), None) => match o.get("block_structure") {
            Some(sides) => block(&o, "block_structure", sides)?,
            None => return Err(o.missing("block_structure")),
        },
        (None, None) if o.get("group_size").is_some() => Spread::Channel,
        (None, None) => Spread::Tensor,
        (strategy, _) => {
            return Err(Error::Unsupported(format!(
                "config.json: {}: found {:?} with group_size {}, only tensor, channel, block, and group with a size \
                 are supported",
                o.label("strategy"),
                strategy.unwrap_or("nothing"),
                o.get("group_size").map_or("null".to_owned(), shown),
            )));
        }
    };
    let (bits, kind) = (bits(&o, "num_bits")?, o.text("type")?.unwrap_or("int"));
    let symmetric = o.flag("symmetric")?.unwrap_or(true);
    match (format, kind, bits, spread) {
        ("pack-quantized", "int", _, Spread::Channel | Spread::Group(_)) => {
            Ok(Scheme::Packed { bits, spread, symmetric })
        }
        ("mxfp4-pack-quantized", "float", 4, Spread::Group(32)) if symmetric => Ok(Scheme::Fp4),
        ("nvfp4-pack-quantized", "float", 4, Spread::Group(16)) if symmetric => {
            Ok(Scheme::Nvfp4 { modelopt: false })
        }
        ("int-quantized" | "naive-quantized", "int", 8, _) => {
            Ok(Scheme::Int8 { spread, symmetric })
        }
        ("float-quantized" | "naive-quantized", "float", 8, _) if symmetric => {
            Ok(Scheme::Float8 { spread })
        }
        _ => Err(Error::Unsupported(format!(
            "config.json: {}: found {format:?} of {kind} weights of {bits} bits, {}{}; supported are pack-quantized \
             int of 4 and 8 bits (channel, group), int-quantized int8, float-quantized fp8, mxfp4-pack-quantized, and nvfp4-pack-quantized",
            top.label("format"),
            spread.name(),
            if symmetric { "" } else { ", asymmetric" },
        ))),
    }
}
