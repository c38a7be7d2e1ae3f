//! The fields of `quantization_config` that are understood, for each method. Reads none of them.

use crate::model::spec::config::{Object, shown};
use crate::{Error, Result};
use serde_json::Value;

/// What a field means here.
#[derive(Clone, Copy)]
pub(super) enum Field {
    /// It is read below.
    Read,
    /// It tells how the file was made or how other programs compute with it: no weight depends on it.
    Aside,
    /// It must be this, as JSON.
    Only(&'static str),
}
use Field::{Aside, Only, Read};

pub(super) type Fields = [(&'static str, Field)];

pub(super) const GPTQ: &Fields = &[
    ("bits", Read),
    ("group_size", Read),
    ("checkpoint_format", Read),
    ("format", Read), // newer name of the one before
    ("dynamic", Read),
    ("quant_method", Read),
    ("desc_act", Aside), // g_idx says it
    ("sym", Aside),      // qzeros say it
    ("lm_head", Aside),  // the tensors say it
    ("pack_dtype", Only("\"int32\"")),
    ("is_marlin_format", Only("false")),
    ("act_group_aware", Aside),
    ("backend", Aside),
    ("batch_size", Aside),
    ("block_name_to_quantize", Aside),
    ("cache_block_outputs", Aside),
    ("damp_auto_increment", Aside),
    ("damp_percent", Aside),
    ("dataset", Aside),
    ("disable_exllama", Aside),
    ("exllama_config", Aside),
    ("max_input_length", Aside),
    ("meta", Aside),
    ("method", Aside),
    ("model_file_base_name", Aside),
    ("model_name_or_path", Aside),
    ("model_seqlen", Aside),
    ("module_name_preceding_first_block", Aside),
    ("modules_in_block_to_quantize", Aside), // the tensors say it
    ("mse", Aside),
    ("pad_token_id", Aside),
    ("static_groups", Aside),
    ("tokenizer", Aside),
    ("true_sequential", Aside),
    ("use_cuda_fp16", Aside),
    ("use_exllama", Aside),
];
/// What a rule of GPTQModel's `dynamic` may say.
pub(super) const DYNAMIC: &Fields = &[
    ("bits", Read),
    ("group_size", Read),
    ("damp_percent", Aside),
    ("desc_act", Aside),
    ("mse", Aside),
    ("sym", Aside),
];
pub(super) const AWQ: &Fields = &[
    ("bits", Only("4")),
    ("group_size", Read),
    ("version", Only("\"gemm\"")),
    ("zero_point", Only("true")),
    ("modules_to_not_convert", Read),
    ("quant_method", Read),
    ("checkpoint_format", Only("\"gemm\"")), // as GPTQModel writes AWQ
    ("format", Only("\"gemm\"")),
    ("pack_dtype", Only("\"int32\"")),
    ("backend", Aside),
    ("desc_act", Aside),
    ("lm_head", Aside),
    ("meta", Aside),
    ("sym", Aside),
    ("do_fuse", Aside),
    ("exllama_config", Aside),
    ("fuse_max_seq_len", Aside),
    ("modules_to_fuse", Aside),
];
pub(super) const FP8: &Fields = &[
    ("weight_block_size", Read),
    ("modules_to_not_convert", Read),
    ("ignored_layers", Read),
    ("quant_method", Read),
    ("fmt", Only("\"e4m3\"")),
    ("activation_scheme", Aside),
    ("dequantize", Aside),
    ("modules_to_convert", Aside), // the tensors say it
    ("scale_fmt", Aside),          // likewise
];
pub(super) const FBGEMM: &Fields =
    &[("modules_to_not_convert", Read), ("quant_method", Read), ("activation_scale_ub", Aside)];
pub(super) const MODELOPT: &Fields = &[
    ("quant_algo", Read),
    ("quant_method", Read),
    ("config_groups", Aside), // the tensors say it
    ("exclude_modules", Aside),
    ("group_size", Aside),
    ("ignore", Aside),
    ("kv_cache_quant_algo", Aside), // as kv_cache_scheme below
    ("kv_cache_scheme", Aside),
    ("producer", Aside),
];
pub(super) const BITSANDBYTES: &Fields = &[
    ("load_in_4bit", Read),
    ("load_in_8bit", Read),
    ("llm_int8_skip_modules", Read),
    ("quant_method", Read),
    ("bnb_4bit_quant_storage", Only("\"uint8\"")),
    ("llm_int8_has_fp16_weight", Only("false")),
    ("_load_in_4bit", Aside),
    ("_load_in_8bit", Aside),
    ("bnb_4bit_compute_dtype", Aside),
    ("bnb_4bit_quant_type", Aside),       // the tensors have the map
    ("bnb_4bit_use_double_quant", Aside), // and show this
    ("llm_int8_enable_fp32_cpu_offload", Aside),
    ("llm_int8_threshold", Aside),
];
pub(super) const COMPRESSED: &Fields = &[
    ("config_groups", Read),
    ("format", Read),
    ("ignore", Read),
    ("sparsity_config", Read),
    ("quant_method", Read),
    ("quantization_status", Only("\"compressed\"")),
    ("global_compression_ratio", Aside),
    ("kv_cache_scheme", Aside), // keys and values are kept as kv_cache_dtype says, no coarser
    ("transform_config", Only("{}")),
    ("run_compressed", Aside),
    ("version", Aside),
];
pub(super) const COMPRESSED_GROUP: &Fields = &[
    ("targets", Read),
    ("weights", Read),
    ("format", Read),
    ("input_activations", Aside), // activations are int8, with scales of their own, or f32
];
pub(super) const COMPRESSED_WEIGHTS: &Fields = &[
    ("num_bits", Read),
    ("type", Read),
    ("symmetric", Read),
    ("strategy", Read),
    ("group_size", Read),
    ("block_structure", Read),
    ("dynamic", Only("false")),
    ("actorder", Aside), // weight_g_idx says it
    ("observer", Aside),
    ("observer_kwargs", Aside),
    ("scale_dtype", Aside),
    ("zp_dtype", Aside),
];

/// Checks that `object` has no field but those of `fields`.
pub(super) fn check(object: &Object<'_>, fields: &Fields) -> Result<()> {
    for key in object.keys() {
        let value = object.get(key).unwrap_or(&Value::Null);
        let label = object.label(key);
        match fields.iter().find(|(name, _)| *name == key) {
            Some((_, Read | Aside)) => {}
            Some((_, Only(only))) if value.to_string().to_lowercase() == *only => {}
            Some((_, Only(only))) => {
                return Err(Error::Unsupported(format!(
                    "config.json: {label}: found {}, only {only} is supported",
                    shown(value)
                )));
            }
            None => {
                return Err(Error::Unsupported(format!(
                    "config.json: {label}: {} is not understood",
                    shown(value)
                )));
            }
        }
    }
    Ok(())
}
