//! What `quantization_config` may say.

use super::super::{Scheme, Spread};
use super::{error, json, spec};
use serde_json::Value;

fn with(base: &Value, key: &str, value: Value) -> Value {
    let mut said = base.clone();
    said[key] = value;
    json!({"quantization_config": said})
}

fn read(said: Value) -> super::super::Quantized {
    spec("LlamaForCausalLM", json!({"quantization_config": said})).quantized.unwrap()
}

fn gptq() -> Value {
    json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": true, "sym": false,
        "damp_percent": 0.01, "meta": {"quantizer": "x"}, "lm_head": false})
}

fn compressed() -> Value {
    json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "quantization_status": "compressed", "config_groups": {"group_0": {"targets": ["Linear"],
        "input_activations": null, "weights": {"num_bits": 4, "type": "int", "symmetric": true,
        "strategy": "group", "group_size": 32, "dynamic": false, "observer": "minmax"}}}})
}

#[test]
fn fields_that_are_not_understood_are_named() {
    let awq = json!({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "GEMM",
        "zero_point": true, "modules_to_not_convert": ["lm_head"]});
    let fp8 = json!({"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"});
    let bnb = json!({"quant_method": "bitsandbytes", "load_in_4bit": true});
    let group = |key: &str, value: Value| {
        let mut said = compressed();
        said["config_groups"]["group_0"][key] = value;
        json!({"quantization_config": said})
    };
    let weights = |key: &str, value: Value| {
        let mut said = compressed();
        said["config_groups"]["group_0"]["weights"][key] = value;
        json!({"quantization_config": said})
    };
    let modelopt = json!({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 16}}},
        "producer": {"name": "modelopt", "version": "0.33"}});
    for good in [&gptq(), &compressed(), &awq, &fp8, &bnb, &modelopt] {
        read(good.clone());
        let e = error("LlamaForCausalLM", with(good, "twist", json!(7)));
        assert_eq!(e, "config.json: quantization_config.twist: 7 is not understood");
    }
    let cases = [
        (with(&gptq(), "bits", json!(3)), "quantization_config.bits: found 3, only 4 and 8"),
        (with(&gptq(), "bits", json!(null)), "bits: found nothing, only 4 and 8"),
        (with(&gptq(), "group_size", json!(0)), "group_size: found 0, expected a positive"),
        (
            with(&gptq(), "checkpoint_format", json!("marlin")),
            "checkpoint_format: found \"marlin\"",
        ),
        (with(&gptq(), "format", json!(3)), "format: found 3, expected a string"),
        (
            with(&gptq(), "is_marlin_format", json!(true)),
            "is_marlin_format: found true, only false",
        ),
        (with(&gptq(), "pack_dtype", json!("int8")), "pack_dtype: found \"int8\", only \"int32\""),
        (with(&gptq(), "dynamic", json!({"-:(": {}})), "dynamic.-:(: found \"(\""),
        (
            with(&gptq(), "dynamic", json!({"x": {"rank": 3}})),
            "dynamic.x.rank: 3 is not understood",
        ),
        (with(&gptq(), "dynamic", json!({"x": 1})), "dynamic.x: found 1, expected an object"),
        (with(&awq, "version", json!("gemv")), "version: found \"gemv\", only \"gemm\""),
        (with(&awq, "zero_point", json!(false)), "zero_point: found false, only true"),
        (with(&awq, "modules_to_not_convert", json!("x")), "modules_to_not_convert: found \"x\""),
        (with(&fp8, "fmt", json!("e5m2")), "fmt: found \"e5m2\", only \"e4m3\""),
        (
            with(&fp8, "weight_block_size", json!([128])),
            "weight_block_size: found [128], expected two",
        ),
        (with(&bnb, "load_in_8bit", json!(true)), "load_in_4bit: found true, and load_in_8bit the"),
        (with(&bnb, "bnb_4bit_quant_storage", json!("bfloat16")), "bnb_4bit_quant_storage: found"),
        (with(&compressed(), "quantization_status", json!("frozen")), "quantization_status: found"),
        (
            with(&compressed(), "sparsity_config", json!({"format": "sparse-24-bitmask"})),
            "sparsity_config.format: found \"sparse-24-bitmask\", only \"dense\"",
        ),
        (
            with(&compressed(), "transform_config", json!({"R1": {}})),
            "transform_config: found an object, only {} is supported",
        ),
        (with(&compressed(), "format", json!("marlin-24")), "format: found \"marlin-24\" of int"),
        (group("targets", json!(["LlamaAttention"])), "targets: found \"LlamaAttention\", only"),
        (group("output_activations", json!({})), "output_activations: an object is not understood"),
        (group("weights", json!(null)), "config_groups.group_0.weights: found nothing"),
        (weights("num_bits", json!(2)), "weights.num_bits: found 2, only 4 and 8"),
        (weights("type", json!("float")), "of float weights of 4 bits"),
        (weights("dynamic", json!(true)), "weights.dynamic: found true, only false"),
        (weights("strategy", json!("tensor_group")), "strategy: found \"tensor_group\""),
        (weights("rotation", json!("x")), "weights.rotation: \"x\" is not understood"),
        (
            json!({"quantization_config": {"quant_method": "aqlm"}}),
            "quantized with \"aqlm\" are not",
        ),
        (
            with(&modelopt, "quant_algo", json!("MIXED_PRECISION")),
            "found \"MIXED_PRECISION\", only",
        ),
        (json!({"quantization_config": {"bits": 4, "group_size": 64}}), "as MLX writes them"),
        (json!({"quantization_config": {"bits": 4}}), "quantized with an unknown method are not"),
        (json!({"quantization_config": 4}), "quantization_config: found 4, expected an object"),
        (
            json!({"quantization_config": gptq(), "compression_config": compressed()}),
            "compression_config: found another description, expected what quantization_config says",
        ),
    ];
    // What recent versions write where there is nothing to say.
    let mut empty = compressed();
    for key in ["sparsity_config", "transform_config"] {
        empty[key] = json!({});
    }
    read(empty);
    for (more, expected) in cases {
        let e = error("LlamaForCausalLM", more);
        assert!(e.starts_with("config.json: ") && e.contains(expected), "{e}\n{expected}");
    }
    let conv = error(
        "GPT2LMHeadModel",
        json!({"quantization_config": gptq(), "n_embd": 64,
        "n_layer": 2, "n_head": 4, "n_positions": 64}),
    );
    assert!(conv.contains("quantized weights of GPT2LMHeadModel are not supported"), "{conv}");
}

#[test]
fn the_first_rule_that_fits_counts() {
    let mut said = gptq();
    said["checkpoint_format"] = json!("gptq_v2");
    said["dynamic"] = json!({
        "-:model\\.layers\\.0\\.": {},
        "+:.*down_proj": {"bits": 8, "group_size": -1},
        ".*proj": {"sym": true},
    });
    let q = read(said);
    let scheme = |bits, group| Some(Scheme::Gptq { bits, group, v2: true });
    for (module, expected) in [
        ("model.layers.0.mlp.down_proj", None),
        ("model.layers.10.mlp.down_proj", scheme(8, None)),
        ("model.layers.1.mlp.up_proj", scheme(4, Some(128))),
        ("lm_head", scheme(4, Some(128))),
    ] {
        assert_eq!(q.scheme(module).unwrap().cloned(), expected, "{module}");
    }

    let mut said = compressed();
    said["ignore"] = json!(["lm_head", "re:.*mlp\\.gate$"]);
    said["config_groups"]["a"] = json!({"targets": ["re:.*experts.*"], "format": "float-quantized",
        "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": "64x32"},
        "input_activations": {"num_bits": 8, "dynamic": true}});
    let q = read(said);
    let group = Scheme::Packed { bits: 4, spread: Spread::Group(32), symmetric: true };
    let block = Scheme::Float8 { spread: Spread::Block(64, 32) };
    for (module, expected) in [
        ("model.layers.0.mlp.gate", None),
        ("lm_head", None),
        ("model.lm_head_2", Some(&group)),
        ("model.layers.0.mlp.gate_proj", Some(&group)),
        ("model.layers.0.mlp.experts.1.gate_proj", Some(&block)),
    ] {
        assert_eq!(q.scheme(module).unwrap(), expected, "{module}");
    }
    assert_eq!(q.name(), "compressed-tensors: fp8 e4m3, blocks of 64 x 32; int4, groups of 32");

    let mut said = compressed();
    said["format"] = json!("mxfp4-pack-quantized");
    said["config_groups"]["group_0"]["weights"]["type"] = json!("float");
    assert_eq!(read(said.clone()).scheme("x").unwrap(), Some(&Scheme::Fp4));

    said["format"] = json!("nvfp4-pack-quantized");
    let weights = &mut said["config_groups"]["group_0"]["weights"];
    (weights["strategy"], weights["group_size"]) = (json!("tensor_group"), json!(16));
    assert_eq!(read(said).scheme("x").unwrap(), Some(&Scheme::Nvfp4 { modelopt: false }));

    let q = read(json!({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}));
    let float8 = Scheme::Float8 { spread: Spread::Tensor };
    assert_eq!(q.scheme("x").unwrap(), Some(&float8));

    let q = read(json!({"quant_method": "fp8", "modules_to_not_convert": ["lm_head", "mlp.gate"]}));
    assert_eq!(
        q.scheme("model.layers.0.mlp.gate_proj").unwrap(),
        Some(&Scheme::Float8 { spread: Spread::Tensor })
    );
    assert_eq!(q.scheme("model.layers.0.mlp.gate").unwrap(), None);
    assert_eq!(q.scheme("language_model.lm_head").unwrap(), None);
}
