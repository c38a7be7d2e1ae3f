//! `Spec` from outside: every golden checkpoint of a known family has exactly the weights that its `Spec` says,
//! and no mutation of a valid configuration makes it panic.

mod goldens;

use ferrule::file::read_json;
use ferrule::model::spec::{Ffn, Mixer, Spec};
use ferrule::model::{LoadOptions, describe};
use goldens::goldens;
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Of a quantized golden: its tensors are not those that the family names.
fn of_other_tensors(name: &str) -> bool {
    name.starts_with("quant-") && name != "quant-gpt-oss-mxfp4-a"
}

fn shapes(folder: &Path) -> BTreeMap<String, Vec<usize>> {
    let mut shapes = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.starts_with("model") && name.ends_with(".safetensors") {
            let bytes = std::fs::read(&path).unwrap();
            for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
                shapes.insert(name, view.shape().to_vec());
            }
        }
    }
    shapes
}

#[test]
fn golden_checkpoints_have_the_weights_of_their_spec() {
    let shared = std::env::var_os("FERRULE_SHARED");
    for folder in goldens() {
        let name = folder.file_name().unwrap().to_string_lossy();
        if of_other_tensors(&name) {
            continue;
        }
        let folder = match &shared {
            Some(shared) => Path::new(shared).join("goldens").join(&*name),
            None => folder.clone(),
        };
        let config = std::fs::read(folder.join("config.json")).unwrap();
        let config: Value = serde_json::from_slice(&config).unwrap();
        let spec = Spec::new(&config, None).unwrap_or_else(|e| panic!("{name}: {e}"));
        let shapes = shapes(&folder);
        let names = spec.names(|n| shapes.contains_key(n));
        let mut used = BTreeSet::new();
        let mut check = |tensor: String, shape: &[usize]| {
            assert_eq!(shapes.get(&tensor).map(Vec::as_slice), Some(shape), "{name}: {tensor}");
            used.insert(tensor);
        };
        for weight in spec.model_weights() {
            check(names.model(weight.what), &weight.shape);
        }
        for l in 0..spec.layers.len() {
            let mut covered: BTreeMap<(String, usize), usize> = BTreeMap::new();
            for weight in spec.layer_weights(l) {
                let places = spec.places(&names, l, weight.what);
                let part = weight.shape.iter().product::<usize>() / places.len();
                for place in places {
                    place.tensors().into_iter().for_each(|(tensor, shape)| check(tensor, &shape));
                    let all: usize = place.shape.iter().product();
                    *covered.entry((place.tensor, all)).or_default() += part;
                }
            }
            for ((tensor, all), numbers) in covered {
                assert_eq!(numbers, all, "{name}: parts of {tensor}");
            }
        }
        assert_eq!(spec.unused(&names, shapes.keys().map(String::as_str)), [""; 0], "{name}");
        let Some(golden) = read_json(&folder.join("golden.json"), 1 << 30).unwrap() else {
            assert_eq!(shared, None, "{name} has no golden.json"); // those in the repository have none
            continue;
        };
        let ignored = golden["ignored_tensors"].as_array().into_iter().flatten();
        used.extend(ignored.map(|tensor| tensor.as_str().unwrap().to_owned()));
        assert_eq!(used.len(), shapes.len(), "{name}: every tensor is used or ignored");
    }
}

#[test]
fn quantized_checkpoints_have_no_tensor_that_is_not_known() {
    let Some(shared) = std::env::var_os("FERRULE_SHARED") else {
        println!("skipped: FERRULE_SHARED does not point at the shared folder");
        return;
    };
    let expected = [
        ("awq-int4-g128-a", "awq: int4, groups of 128"),
        ("awq-int4-g32-a", "awq: int4, groups of 32"),
        ("bnb-nf4-a", "bitsandbytes: 4 bits, blocks counted through all rows"),
        ("bnb-nf4-double-a", "bitsandbytes: 4 bits, blocks counted through all rows"),
        ("ct-fp8-dynamic-a", "compressed-tensors: fp8 e4m3, one scale for an output"),
        ("ct-fp8-static-a", "compressed-tensors: fp8 e4m3, one scale for a matrix"),
        ("ct-w4a16-g128-a", "compressed-tensors: int4, groups of 128"),
        ("ct-w4a16-g32-actorder-a", "compressed-tensors: int4, groups of 32"),
        ("ct-w4a16-g32-asym-a", "compressed-tensors: int4, groups of 32"),
        ("ct-w8a16-channel-a", "compressed-tensors: int8, one scale for an output"),
        ("ct-w8a8-int8-a", "compressed-tensors: int8, one scale for an output"),
        ("fp8-block-a", "fp8: fp8 e4m3, blocks of 128 x 128"),
        ("fp8-block-moe-a", "fp8: fp8 e4m3, blocks of 128 x 128"),
        ("fp8-static-ministral-a", "fp8: fp8 e4m3, one scale for a matrix"),
        ("gptq-int4-channel-a", "gptq: int4, one scale for an output"),
        ("gptq-int4-g128-actorder-asym-a", "gptq: int4, groups of 128"),
        ("gptq-int4-g128-sym-a", "gptq: int4, groups of 128"),
        ("gptq-int4-g32-actorder-sym-a", "gptq: int4, groups of 32"),
        ("gptq-int4-g32-asym-a", "gptq: int4, groups of 32"),
        ("gptq-int8-g128-a", "gptq: int8, groups of 128"),
        ("gptq-moe-int4-g128-a", "gptq: int4, groups of 128"),
        ("gptq-v2-int4-g32-asym-a", "gptq: int4, groups of 32"),
    ];
    for (name, quantization) in expected {
        let folder = Path::new(&shared).join("goldens").join(format!("quant-{name}"));
        let options = LoadOptions::default();
        let found = describe(&folder, &options).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(found.quantization.as_deref(), Some(quantization), "{name}");
    }
    let tested = goldens();
    let all = std::fs::read_dir(Path::new(&shared).join("goldens")).unwrap();
    let name = |entry: std::fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
    for name in all.map(|entry| name(entry.unwrap())) {
        let known = expected.iter().any(|(end, _)| name.strip_prefix("quant-") == Some(end));
        // gguf-*: config.json is only there for the reference program
        let other = name.starts_with("gguf-") || name == "README.md";
        let plain = !of_other_tensors(&name) && tested.iter().any(|path| path.ends_with(&name));
        assert!(known || other || plain, "{name} is not tested");
    }
}

fn configs() -> Vec<Value> {
    let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
    let size = |architecture: &str| {
        json!({"architectures": [architecture], "hidden_size": 64, "intermediate_size": 112,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 400, "rms_norm_eps": 1e-5, "max_position_embeddings": 512})
    };
    let with = |architecture: &str, more: Value| {
        let mut config = size(architecture);
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config
    };
    vec![
        with("LlamaForCausalLM", json!({"rope_theta": 5e5, "rope_scaling": scaling})),
        with("MistralForCausalLM", json!({"sliding_window": 16, "head_dim": 24})),
        with(
            "Qwen2ForCausalLM",
            json!({"use_sliding_window": true, "max_window_layers": 2,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}),
        ),
        with(
            "Gemma3ForCausalLM",
            json!({"query_pre_attn_scalar": 32, "sliding_window_pattern": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
        ),
        with(
            "Glm4MoeForCausalLM",
            json!({"n_routed_experts": 12, "moe_intermediate_size": 48, "n_group": 4, "topk_group": 2,
            "num_experts_per_tok": 3, "n_shared_experts": 2, "routed_scaling_factor": 2.5}),
        ),
        with(
            "GptOssForCausalLM",
            json!({"num_local_experts": 8, "intermediate_size": 96, "head_dim": 16,
            "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}),
        ),
        with(
            "GPTNeoXForCausalLM",
            json!({"rotary_pct": 0.25, "rotary_emb_base": 10000, "use_parallel_residual": false}),
        ),
        with(
            "StableLmForCausalLM",
            json!({"use_parallel_residual": true, "qk_layernorm": true, "partial_rotary_factor": 0.5}),
        ),
        with(
            "GraniteForCausalLM",
            json!({"attention_multiplier": 0.0625, "embedding_multiplier": 12, "logits_scaling": 8,
            "residual_multiplier": 0.22}),
        ),
        json!({"architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_layer": 2, "n_head": 4,
            "n_inner": null, "n_positions": 160, "vocab_size": 400}),
        json!({"architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": {"head_dim": 16, "num_hidden_layers": 6, "rope_scaling": scaling}}),
        with(
            "Lfm2ForCausalLM",
            json!({"full_attn_idxs": [1], "block_multiple_of": 16, "conv_L_cache": 3}),
        ),
        with(
            "Qwen3_5ForCausalLM",
            json!({"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 12,
            "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4, "full_attention_interval": 2}),
        ),
        with(
            "GraniteMoeHybridForCausalLM",
            json!({"layer_types": ["mamba", "attention", "mamba", "mamba"], "mamba_n_heads": 4,
            "mamba_n_groups": 2, "mamba_d_state": 16, "mamba_d_head": 16, "mamba_d_conv": 4}),
        ),
        with(
            "MiniCPM3ForCausalLM",
            json!({"kv_lora_rank": 32, "q_lora_rank": 48, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
            "v_head_dim": 16, "rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 1.0,
            "mscale_all_dim": 1.0, "original_max_position_embeddings": 64}}),
        ),
        with(
            "Gemma4ForCausalLM",
            json!({"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "num_kv_shared_layers": 2, "use_double_wide_mlp": true, "enable_moe_block": true, "num_experts": 6,
            "top_k_experts": 2, "moe_intermediate_size": 32, "attention_k_eq_v": true, "global_head_dim": 32}),
        ),
        with(
            "Gemma3nForCausalLM",
            json!({"num_kv_shared_layers": 1, "activation_sparsity_pattern": [0.95, 0, 0, 0],
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]}),
        ),
    ]
}

fn value() -> impl Strategy<Value = Value> {
    let big = u64::MAX;
    prop_oneof![
        Just(json!(null)),
        any::<bool>().prop_map(|x| json!(x)),
        any::<i64>().prop_map(|x| json!(x)),
        (0..200u64).prop_map(|x| json!(x)),
        prop::num::f64::ANY.prop_map(|x| json!(x)),
        prop::sample::select(vec![json!(0), json!(-1), json!(big), json!(1e300), json!(1e-300)]),
        prop::sample::select(vec![json!("x"), json!(""), json!([]), json!({}), json!([[]])]),
        prop::sample::select(vec!["default", "linear", "llama3", "yarn", "silu", "full_attention"])
            .prop_map(|x| json!(x)),
    ]
}

/// Puts `new` (or nothing) at the `at`-th value of `config`, counted depth first.
fn mutate(config: &mut Value, at: &mut usize, new: &Option<Value>) -> bool {
    let children: Vec<String> = match config {
        Value::Object(map) => map.keys().cloned().collect(),
        Value::Array(list) => (0..list.len()).map(|i| i.to_string()).collect(),
        _ => return false,
    };
    for child in children {
        if *at == 0 {
            match (config, new) {
                (Value::Object(map), Some(new)) => drop(map.insert(child, new.clone())),
                (Value::Object(map), None) => drop(map.remove(&child)),
                (Value::Array(list), Some(new)) => {
                    list[child.parse::<usize>().unwrap()] = new.clone()
                }
                (Value::Array(list), None) => drop(list.remove(child.parse().unwrap())),
                _ => unreachable!(),
            }
            return true;
        }
        *at -= 1;
        let next = match config {
            Value::Object(map) => &mut map[&child],
            Value::Array(list) => &mut list[child.parse::<usize>().unwrap()],
            _ => unreachable!(),
        };
        if mutate(next, at, new) {
            return true;
        }
    }
    false
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_mutated_config_is_right_or_an_error(
        which in 0..configs().len(),
        edits in prop::collection::vec((0..30usize, prop::option::of(value())), 1..4),
    ) {
        let mut config = configs()[which].clone();
        for (mut at, new) in edits {
            mutate(&mut config, &mut at, &new);
        }
        if let Ok(spec) = Spec::new(&config, None) {
            prop_assert!(!spec.layers.is_empty() && spec.eps > 0.0);
            let names = spec.names(|_| false);
            for (l, layer) in spec.layers.iter().enumerate() {
                let turning = match &layer.mixer {
                    Mixer::Attention(a) => {
                        prop_assert!(a.heads % a.kv_heads == 0 && a.head_dim % 2 == 0);
                        prop_assert!(a.window != Some(0));
                        Some((a.scale, a.rope, a.head_dim))
                    }
                    Mixer::Latent(a) => {
                        prop_assert!([a.rank, a.nope, a.value].iter().all(|n| n % 16 == 0));
                        Some((a.scale, a.rope, a.turned))
                    }
                    Mixer::Recurrent(r) => {
                        prop_assert!((2..=16).contains(&r.shape.width) && r.shape.state() > 0);
                        prop_assert!(r.shape.state() < usize::MAX / 1024);
                        None
                    }
                };
                if let Some((scale, rope, turned)) = turning {
                    prop_assert!(scale > 0.0 && scale.is_finite());
                    if let Some(rope) = rope.map(|rope| &spec.ropes[rope]) {
                        prop_assert!(!rope.inv_freq.is_empty());
                        prop_assert!(rope.inv_freq.len() * 2 <= turned && rope.scale.is_finite());
                        prop_assert!(rope.inv_freq.iter().all(|f| f.is_finite()));
                    }
                }
                if let Ffn::Moe(moe) = &layer.ffn {
                    let how = moe.routing;
                    prop_assert!((1..=moe.experts).contains(&how.top_k) && how.scale > 0.0);
                    if let Some(groups) = how.groups {
                        prop_assert!(moe.experts % groups.count == 0 && groups.top_k <= groups.count);
                        prop_assert!(how.top_k <= moe.experts / groups.count * groups.top_k);
                    }
                }
                for weight in spec.layer_weights(l) {
                    let name = names.layer(l, weight.what);
                    let whole = !name.replace("{e}", "").contains(['!', '{']);
                    prop_assert!(whole && !name.is_empty());
                    prop_assert!(weight.shape.iter().all(|d| *d > 0));
                }
            }
        }
    }

    #[test]
    fn a_mutated_family_is_right_or_an_error(
        cut in 0..200usize,
        at in 0..200usize,
        text in "[a-z_={}\\[\\]\"\\n0-9. ]{0,12}",
    ) {
        let mut family = "base = \"llama\"\narchitectures = [\"LlamaForCausalLM\"]\nqk_norm = \"head\"\n\
            tied = { key = \"tie\", default = true }\n[names]\nq_norm = \"{model}{l}.q\"\nk_norm = [\"k\"]\n"
            .to_owned();
        let at = at.min(family.len());
        family.replace_range(at..(at + cut / 10).min(family.len()), &text);
        if let Ok(spec) = Spec::new(&configs()[0], Some(&family)) {
            let names = spec.names(|_| false);
            prop_assert_eq!(spec.unused(&names, ["not a tensor of it"]).len(), 1);
        }
    }
}

#[test]
fn the_configs_that_are_mutated_are_valid() {
    for config in configs() {
        Spec::new(&config, None).unwrap();
    }
}
