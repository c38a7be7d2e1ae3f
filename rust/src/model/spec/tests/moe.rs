//! Mixtures of experts: routing, shapes, and where each expert's weights lie.

use super::{config, error, spec, windows};
use crate::backend::{Groups, Routing, Score};
use crate::model::spec::*;
use serde_json::{Value, json};

#[test]
fn experts_of_each_family() {
    let moe = |spec: &Spec| -> Vec<Option<Moe>> {
        let moe = |layer: &Layer| match layer.ffn {
            Ffn::Moe(moe) => Some(moe),
            _ => None,
        };
        spec.layers.iter().map(moe).collect()
    };
    let mixtral = spec("MixtralForCausalLM", json!({}));
    let routing = Routing {
        top_k: 2,
        score: Score::Softmax,
        groups: None,
        renormalise: Some(0.0),
        scale: 1.0,
    };
    let expected = Moe {
        experts: 8,
        width: 112,
        routing,
        router_bias: false,
        correction: false,
        expert_bias: false,
        stored: Stored::Rows,
        shared: None,
    };
    assert_eq!(moe(&mixtral), [Some(expected); 4]);
    let names = mixtral.names(|n| n == "model.embed_tokens.weight");
    let weights = mixtral.layer_weights(1);
    let up = weights.iter().find(|w| w.what == "expert_up").unwrap();
    assert_eq!(up.shape, [8, 112, 64]);
    let w3 = "model.layers.1.block_sparse_moe.experts.7.w3.weight".to_owned();
    assert_eq!(mixtral.place(&names, 1, "expert_up", 7), Slice::whole(w3, vec![112, 64]));

    let sizes = json!({"num_experts": 6, "moe_intermediate_size": 48, "decoder_sparse_step": 2,
        "mlp_only_layers": [1], "shared_expert_intermediate_size": 96});
    let qwen2 = spec("Qwen2MoeForCausalLM", sizes.clone());
    let routing = Routing { top_k: 4, renormalise: None, ..routing };
    let shared = Some(Shared { width: 96, gate: true });
    let expected = Moe { experts: 6, width: 48, routing, shared, ..expected };
    assert_eq!(moe(&qwen2), [None, None, None, Some(expected)]);
    assert_eq!(qwen2.layers[0].ffn, Ffn::Dense(112));
    let with = |key: &str, value: Value| {
        let mut sizes = sizes.clone();
        sizes[key] = value;
        error("Qwen2MoeForCausalLM", sizes)
    };
    assert!(with("mlp_only_layers", json!([4])).contains("dense layers: found 4, expected"));
    assert!(with("num_experts_per_tok", json!(7)).contains("num_experts_per_tok: found 7"));
    assert!(with("use_sliding_window", json!(true)).contains("use_sliding_window"));

    let text = "base = 'qwen2'\narchitectures = ['MyForCausalLM']\n[moe]\nexperts = 8\ntop_k = 3\n\
        score = { key = 'scoring' }\ngroups = 4\ntop_groups = { key = 'n' }\n\
        group_score = { key = 'method', default = 'noaux_tc' }\nrenormalise = true\nsum_eps = 1e-6\n\
        shared_experts = { key = 'shared' }\ndense_first = 1\n[names]\nrouter = 'r'\n\
        expert_gate = 'g{e}'\nexpert_up = 'u{e}'\nexpert_down = 'd{e}'\n\
        shared_gate = 'sg'\nshared_up = 'su'\nshared_down = 'sd'";
    let read = |more: Value| Spec::new(&config("MyForCausalLM", more), Some(text));
    let spec = read(json!({"scoring": "sigmoid", "n": 2, "shared": 2})).unwrap();
    let found = moe(&spec);
    let groups = Some(Groups { count: 4, top_k: 2, by_two: true });
    assert_eq!((found[0], found[1].unwrap().routing.groups), (None, groups));
    assert_eq!(found[1].unwrap().routing.renormalise, Some(1e-6));
    assert_eq!(found[1].unwrap().shared, Some(Shared { width: 224, gate: false }));
    let greedy = read(json!({"scoring": "softmax", "method": "greedy"})).unwrap();
    assert_eq!(moe(&greedy)[3].unwrap().routing.groups, None);
    for (more, expected) in [
        (json!({"scoring": "tanh", "n": 2}), "router score \"tanh\""),
        (json!({"scoring": "softmax", "n": 1}), "4 groups, 1 chosen, for 3 of 8 experts"),
        (json!({"scoring": "softmax", "n": 5}), "n: found 5, expected a positive integer up to 4"),
        (json!({"scoring": "softmax", "method": "x"}), "a group score of \"x\""),
        (json!({"scoring": "softmax", "n": 2, "shared": -1}), "shared: found -1"),
    ] {
        let e = read(more).unwrap_err().to_string();
        assert!(e.contains(expected), "{e}");
    }
}

#[test]
fn gpt_oss_in_both_layouts() {
    let sizes = |more: Value| {
        let mut sizes = json!({"num_local_experts": 8, "intermediate_size": 96, "head_dim": 16});
        sizes.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        sizes
    };
    let kept = json!(["model.layers.*.self_attn", "lm_head"]);
    let said = json!({"quant_method": "mxfp4", "modules_to_not_convert": kept});
    let released = json!({"quantization_config": said});
    for (more, stored) in [(json!({}), Stored::Columns), (released, Stored::Mxfp4)] {
        let spec = spec("GptOssForCausalLM", sizes(more));
        let Ffn::Moe(moe) = &spec.layers[1].ffn else { panic!() };
        assert_eq!((moe.stored, moe.width, moe.routing.top_k), (stored, 96, 4));
        assert_eq!((spec.act, windows(&spec)[0]), (Act::ClampedSwiglu, Some(128)));
        let names = spec.names(|n| n == "model.embed_tokens.weight");
        let up = spec.place(&names, 3, "expert_up", 5);
        // Number (7, 11) of up is in row 15 (or column 15) of gate and up together.
        let index = if stored == Stored::Columns { [5, 11, 15] } else { [5, 15, 11] };
        assert_eq!(up.index(7, 11), index);
        let tensors: Vec<String> = up.tensors().into_iter().map(|(name, _)| name).collect();
        let stem = "model.layers.3.mlp.experts.gate_up_proj";
        match stored {
            Stored::Mxfp4 => {
                assert_eq!(tensors, [format!("{stem}_blocks"), format!("{stem}_scales")])
            }
            _ => assert_eq!(tensors, [stem]),
        }
        let bias = spec.place(&names, 3, "expert_gate_bias", 5);
        assert_eq!((bias.tensor, bias.shape), (format!("{stem}_bias"), vec![8, 192]));
        assert_eq!((bias.first, bias.row), (5 * 192, 2));
    }
    for (value, expected) in [
        (json!({"quant_method": "gptqx"}), "checkpoints quantized with \"gptqx\""),
        (json!({"quant_method": "mxfp4", "bits": 4}), "quantization_config.bits: not known"),
        (
            json!({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.1.mlp.experts"]}),
            "\"model.layers.1.mlp.experts\" is expected to be MXFP4",
        ),
    ] {
        let e = error("GptOssForCausalLM", sizes(json!({"quantization_config": value})));
        assert!(e.contains(expected), "{e}");
    }
    let narrow = sizes(json!({"intermediate_size": 80, "quantization_config": said}));
    assert!(error("GptOssForCausalLM", narrow).contains("multiples of 32"));
    let limit = sizes(json!({"swiglu_limit": 8.0}));
    assert!(error("GptOssForCausalLM", limit).contains("swiglu_limit: 8.0"));
    let other = json!({"quantization_config": {"quant_method": "mxfp4"}});
    assert!(error("LlamaForCausalLM", other).contains("checkpoints quantized with \"mxfp4\""));
}
