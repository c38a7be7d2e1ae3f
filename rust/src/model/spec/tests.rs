//! Tests of `Spec` on small configurations.

use super::family::{FAMILIES, Family, Format};
use super::gemma::GemmaFacts;
use super::moe::MoeFacts;
use super::names::{WEIGHTS, matches};
use super::recurrent::RecurrentFacts;
use super::*;
use crate::backend::{Groups, Routing, Score};
use serde_json::{Value, json};

mod dense;
mod gemma;
mod quantized;
mod recurrent;

fn config(architecture: &str, more: Value) -> Value {
    let mut config = json!({"architectures": [architecture], "hidden_size": 64, "intermediate_size": 112,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 400});
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

fn spec(architecture: &str, more: Value) -> Spec {
    Spec::new(&config(architecture, more), None).unwrap()
}

fn error(architecture: &str, more: Value) -> String {
    Spec::new(&config(architecture, more), None).unwrap_err().to_string()
}

fn attention(layer: &Layer) -> Attention {
    let Mixer::Attention(a) = layer.mixer else { panic!("{:?}", layer.mixer) };
    a
}

fn windows(spec: &Spec) -> Vec<Option<usize>> {
    spec.layers.iter().map(|l| attention(l).window).collect()
}

fn close(found: &[f32], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (f, e) in found.iter().zip(expected) {
        assert!((f64::from(*f) - e).abs() <= 3e-7 * e, "{found:?} {expected:?}");
    }
}

#[test]
fn every_file_is_a_family_and_no_model_type_of_an_architecture_is_claimed_twice() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/models/families");
    let mut files: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
        .collect();
    let mut listed: Vec<&str> = FAMILIES.iter().map(|(name, _)| *name).collect();
    files.sort();
    listed.sort();
    assert_eq!(files, listed);
    let pairs = |family: Family| -> Vec<(String, String)> {
        let pair = |a: &String, t: &String| (a.clone(), t.clone());
        let types = |a| family.model_types.iter().map(move |t| pair(a, t));
        family.architectures.iter().flat_map(types).collect()
    };
    let all =
        FAMILIES.iter().flat_map(|(n, t)| pairs(Family::parse(t, n, Format::Config).unwrap()));
    let mut all: Vec<(String, String)> = all.collect();
    all.sort();
    let count = all.len();
    all.dedup();
    assert_eq!(all.len(), count);
}

#[test]
fn the_readme_lists_every_field_and_every_weight() {
    let readme = concat!(env!("CARGO_MANIFEST_DIR"), "/models/README.md");
    let readme = std::fs::read_to_string(readme).unwrap();
    let mut unknown = serde_json::from_value::<Family>(json!({"": 0})).unwrap_err().to_string();
    unknown += &serde_json::from_value::<MoeFacts>(json!({"": 0})).unwrap_err().to_string();
    let recurrent = serde_json::from_value::<RecurrentFacts>(json!({"": 0}));
    unknown += &recurrent.unwrap_err().to_string();
    unknown += &serde_json::from_value::<GemmaFacts>(json!({"": 0})).unwrap_err().to_string();
    let fields = unknown.split('`').skip(3).step_by(2).filter(|field| !field.is_empty());
    let mut count = 0;
    for name in fields.chain(WEIGHTS.iter().copied()).chain(["base"]) {
        assert!(
            readme.contains(&format!("`{name}`")),
            "models/README.md does not explain `{name}`"
        );
        count += 1;
    }
    assert!(count > 40, "{unknown}");
}

#[test]
fn llama_defaults_are_those_of_its_class() {
    let spec =
        spec("LlamaForCausalLM", json!({"num_key_value_heads": null, "sliding_window": null}));
    let a = attention(&spec.layers[0]);
    assert_eq!((a.kv_heads, a.head_dim, spec.context_length), (4, 16, 2048));
    assert_eq!((spec.eps, a.scale, spec.embed_scale), (1e-6, 0.25, 1.0));
    assert_eq!(
        (spec.tied, spec.qkv_bias, spec.o_bias, spec.mlp_bias),
        (false, false, false, false)
    );
    assert_eq!((spec.act, spec.norm, spec.qk_norm), (Act::Silu, Norm::Rms, QkNorm::None));
    assert_eq!(windows(&spec), [None; 4]);
    let expected: Vec<f64> = (0..8).map(|i| 10000f64.powf(-f64::from(i) / 8.0)).collect();
    close(&spec.ropes[0].inv_freq, &expected);
    assert_eq!((spec.ropes.len(), spec.ropes[0].scale), (1, 1.0));
}

#[test]
fn linear_and_llama3_scaling() {
    let linear = json!({"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 1e5});
    let expected: Vec<f64> = (0..8).map(|i| 1e5f64.powf(-f64::from(i) / 8.0) / 4.0).collect();
    close(&spec("LlamaForCausalLM", linear).ropes[0].inv_freq, &expected);

    // theta 500000, head_dim 16, factor 8, low 1, high 4, original 64: by hand from the rule
    let plain = |i: i32| 5e5f64.powf(-f64::from(i) / 8.0);
    let wave = |i: i32| 2.0 * std::f64::consts::PI / plain(i);
    assert!(wave(0) < 16.0 && wave(1) > 16.0 && wave(1) < 64.0 && wave(2) > 64.0);
    let smooth = (64.0 / wave(1) - 1.0) / 3.0;
    let middle = (1.0 - smooth) * plain(1) / 8.0 + smooth * plain(1);
    let mut expected = vec![plain(0), middle];
    expected.extend((2..8).map(|i| plain(i) / 8.0));
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
    let old = spec("LlamaForCausalLM", json!({"rope_theta": 5e5, "rope_scaling": llama3}));
    close(&old.ropes[0].inv_freq, &expected);

    // both spellings, and both at once, are the same model
    let mut params = llama3.clone();
    params["rope_theta"] = json!(5e5);
    let new = spec("LlamaForCausalLM", json!({"rope_parameters": params}));
    let both = json!({"rope_theta": 5e5, "rope_parameters": params, "rope_scaling": llama3});
    assert_eq!(old, new);
    assert_eq!(old, spec("LlamaForCausalLM", both));
    let e = error("LlamaForCausalLM", json!({"rope_theta": 1e4, "rope_parameters": params}));
    assert!(e.contains("rope_theta: found 500000 and 10000"), "{e}");
    let e = error(
        "LlamaForCausalLM",
        json!({"rope_theta": 5e5, "rope_parameters": params,
        "rope_scaling": {"type": "linear", "factor": 2}}),
    );
    assert!(e.contains("another embedding than rope_scaling says"), "{e}");
}

#[test]
fn yarn_scaling() {
    let yarn = |more: Value| {
        let mut params =
            json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64});
        params.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        spec(
            "Qwen2ForCausalLM",
            json!({"rope_theta": 1e6, "max_position_embeddings": 64,
            "rope_scaling": params}),
        )
    };
    let found = yarn(json!({}));
    // dim(32) = 16 ln(64 / 64 pi) / (2 ln 1e6) < 0 -> 0; dim(1) = 1.344 -> 2: pairs 0, 1, 2 ramp 0, 1/2, 1
    let plain = |i: i32| 1e6f64.powf(-f64::from(i) / 8.0);
    let mut expected = vec![plain(0), plain(1) * (0.5 + 0.5 / 4.0)];
    expected.extend((2..8).map(|i| plain(i) / 4.0));
    close(&found.ropes[0].inv_freq, &expected);
    assert_eq!(found.ropes[0].scale, (0.1 * 4f64.ln() + 1.0) as f32);
    assert_eq!(found.context_length, 256);
    // without rounding of the bounds
    let bound = 16.0 * (64.0 / (2.0 * std::f64::consts::PI)).ln() / (2.0 * 1e6f64.ln());
    expected[1] = plain(1) * (1.0 - 1.0 / bound + 1.0 / bound / 4.0);
    close(&yarn(json!({"truncate": false})).ropes[0].inv_freq, &expected);
    assert_eq!(yarn(json!({"attention_factor": 1.5})).ropes[0].scale, 1.5);
    assert_eq!(yarn(json!({"mscale": 1.0, "mscale_all_dim": 1.0})).ropes[0].scale, 1.0);
    assert_eq!(yarn(json!({"mscale": 1.0, "mscale_all_dim": 0.0})).ropes[0], found.ropes[0]);
}

#[test]
fn windows_of_each_family() {
    let mistral = spec("MistralForCausalLM", json!({"sliding_window": 16}));
    assert_eq!(windows(&mistral), [Some(16); 4]);
    let nemo = spec("MistralForCausalLM", json!({"sliding_window": null, "head_dim": 24}));
    assert_eq!((windows(&nemo), attention(&nemo.layers[0]).head_dim), (vec![None; 4], 24));
    let off = json!({"sliding_window": 16, "use_sliding_window": false, "max_window_layers": 1});
    assert_eq!(windows(&spec("Qwen2ForCausalLM", off)), [None; 4]);
    let on = json!({"sliding_window": 16, "use_sliding_window": true, "max_window_layers": 3});
    assert_eq!(windows(&spec("Qwen2ForCausalLM", on)), [None, None, None, Some(16)]);
    let gemma2 = spec("Gemma2ForCausalLM", json!({"sliding_window": 16}));
    assert_eq!(windows(&gemma2), [Some(16), None, Some(16), None]);
    let types = json!({"sliding_window": 8, "layer_types":
        ["full_attention", "sliding_attention", "full_attention", "full_attention"]});
    assert_eq!(windows(&spec("Gemma2ForCausalLM", types)), [None, Some(8), None, None]);
}

#[test]
fn gemma_facts() {
    let gemma2 = spec(
        "Gemma2ForCausalLM",
        json!({"query_pre_attn_scalar": 64, "attn_logit_softcapping": null}),
    );
    let a = attention(&gemma2.layers[0]);
    assert_eq!((a.softcap, gemma2.logit_softcap), (None, Some(30.0)));
    assert_eq!((a.scale, gemma2.embed_scale), (0.125, 8.0));
    assert_eq!((gemma2.act, gemma2.norm, gemma2.tied), (Act::GeluTanh, Norm::RmsPlusOne, true));
    let all = Norms { attn: true, attn_after: true, ffn: true, ffn_after: true };
    assert_eq!(gemma2.norms, all);

    let gemma3 = spec(
        "Gemma3ForCausalLM",
        json!({"sliding_window": 16, "sliding_window_pattern": 3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    );
    assert_eq!((attention(&gemma3.layers[0]).softcap, gemma3.logit_softcap), (None, None));
    let layers: Vec<_> =
        gemma3.layers.iter().map(|l| (attention(l).window, attention(l).rope.unwrap())).collect();
    assert_eq!(layers, [(Some(16), 1), (Some(16), 1), (None, 0), (Some(16), 1)]);
    let frequency = |theta: f64, i: f64| theta.powf(-i / 128.0);
    close(&gemma3.ropes[0].inv_freq[2..3], &[frequency(1e6, 2.0) / 8.0]);
    close(&gemma3.ropes[1].inv_freq[2..3], &[frequency(1e4, 2.0)]);
    let new = spec(
        "Gemma3ForCausalLM",
        json!({"sliding_window": 16, "_sliding_window_pattern": 3,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
    );
    assert_eq!(gemma3, new);
}

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

#[test]
fn a_wrapper_reads_its_text_part() {
    let config = json!({"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
        "vision_config": {}, "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 34,
        "hidden_size": 2560}});
    let spec = Spec::new(&config, None).unwrap();
    let a = attention(&spec.layers[0]);
    assert_eq!((spec.hidden, a.heads, a.kv_heads, a.head_dim), (2560, 8, 4, 256));
    assert_eq!((spec.vocab, spec.layers.len(), spec.context_length), (262_208, 34, 131_072));
    assert_eq!((attention(&spec.layers[5]).window, a.window), (None, Some(4096)));
    for root in ["language_model.model.", "model.language_model."] {
        let names = spec.names(|n| n == format!("{root}embed_tokens.weight"));
        assert_eq!(names.layer(7, "q"), format!("{root}layers.7.self_attn.q_proj.weight"));
        let there = [names.model("norm"), "vision_tower.x.bias".into(), names.layer(34, "q")];
        let unused = spec.unused(&names, there.iter().map(String::as_str));
        assert_eq!(unused, [names.layer(34, "q")]);
    }
    let bad = json!({"architectures": ["Gemma3ForConditionalGeneration"], "text_config":
        {"num_attention_heads": "x"}});
    let e = Spec::new(&bad, None).unwrap_err().to_string();
    assert!(
        e.starts_with("config.json: text_config.num_attention_heads: found \"x\", expected a"),
        "{e}"
    );
    let other = json!({"architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {"model_type": "gemma9"}});
    assert!(Spec::new(&other, None).unwrap_err().to_string().contains("gemma9"));
}

#[test]
fn names_are_those_of_the_checkpoint() {
    let spec = spec("Qwen2ForCausalLM", json!({}));
    let names = spec.names(|n| n == "model.embed_tokens.weight");
    assert_eq!(names.model("embed"), "model.embed_tokens.weight");
    assert_eq!(names.model("head"), "lm_head.weight");
    assert_eq!(names.layer(3, "q_bias"), "model.layers.3.self_attn.q_proj.bias");
    let tensors = [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.o_proj.bias",
        "model.layers.4.self_attn.q_proj.bias",
        "lm_head.weight",
    ];
    let unused = ["model.layers.0.self_attn.o_proj.bias", "model.layers.4.self_attn.q_proj.bias"];
    assert_eq!(spec.unused(&names, tensors), unused);
}

#[test]
fn errors_say_what_where_and_what_was_expected() {
    let cases = [
        (
            json!({"hidden_size": "x"}),
            "config.json: hidden_size: found \"x\", expected a positive integer",
        ),
        (
            json!({"vocab_size": null}),
            "config.json: vocab_size: found nothing, expected a positive integer",
        ),
        (
            json!({"num_hidden_layers": 1e5 as u64}),
            "config.json: num_hidden_layers: found 100000, expected",
        ),
        (
            json!({"num_key_value_heads": 3}),
            "config.json: num_key_value_heads: found 4 heads and 3",
        ),
        (json!({"head_dim": 15}), "config.json: head_dim: found 15, expected an even number"),
        (
            json!({"hidden_size": 66}),
            "config.json: num_attention_heads: found 4 with hidden size 66",
        ),
        (json!({"hidden_act": "xielu"}), "config.json: activation \"xielu\" is not supported"),
        (
            json!({"rms_norm_eps": 0}),
            "config.json: rms_norm_eps: found 0, expected a number from 1e-12 to 1e0",
        ),
        (json!({"rope_theta": -1.0}), "config.json: rope_theta: found -1.0, expected"),
        (
            json!({"rope_scaling": {"type": "ntk"}}),
            "config.json: rope_scaling.rope_type: \"ntk\" is not supported",
        ),
        (
            json!({"rope_scaling": {"type": "linear"}}),
            "config.json: rope_scaling.factor: found nothing",
        ),
        (
            json!({"rope_scaling": {"type": "linear", "rope_type": "yarn"}}),
            "config.json: rope_scaling.rope_type: found \"yarn\" but",
        ),
        (
            json!({"rope_parameters": {"llama_4_scaling_beta": 0.1}}),
            "config.json: rope_parameters.llama_4_scaling_beta is not",
        ),
        (
            json!({"rope_scaling": "linear"}),
            "config.json: rope_scaling: found \"linear\", expected an object",
        ),
        (json!({"sliding_window": 4096}), "config.json: sliding_window: 4096 changes the model"),
        (json!({"num_experts": 8}), "config.json: num_experts: 8 changes the model"),
        (json!({"partial_rotary_factor": 0.5}), "config.json: partial_rotary_factor: 0.5 changes"),
        (
            json!({"layer_types": ["full_attention"]}),
            "config.json: layer_types: found 1 entries, expected 4",
        ),
        (json!({"layer_types": [1, 2, 3, 4]}), "config.json: layer_types[0]: 1 is not supported"),
        (
            json!({"tie_word_embeddings": 1}),
            "config.json: tie_word_embeddings: found 1, expected true or",
        ),
        (
            json!({"model_type": "arcee"}),
            "config.json: model_type: found \"arcee\", but architecture Llama",
        ),
        (
            json!({"quantization_config": {"quant_method": "aqlm"}}),
            "config.json: quantization_config.quant_method: checkpoints quantized with \"aqlm\"",
        ),
        (json!({"architectures": []}), "config.json: architectures: found [], expected a list"),
        (
            json!({"architectures": ["LlamaForCausallm"]}),
            "config.json: architecture \"LlamaForCausallm\" is not known; the nearest known are LlamaForCausalLM",
        ),
    ];
    for (more, expected) in cases {
        let e = error("LlamaForCausalLM", more);
        assert!(e.starts_with(expected), "{e}\n{expected}");
    }
    let sliding = json!({"layer_types": vec!["sliding_attention"; 4]});
    assert!(error("LlamaForCausalLM", sliding.clone()).contains("layer_types[0]: found \"sliding"));
    assert!(error("MistralForCausalLM", sliding).contains("layer_types"));
    assert!(error("Qwen2ForCausalLM", json!({"attention_bias": true})).contains("attention_bias"));
    let two = json!({"sliding_window": 16, "sliding_window_size": 32});
    assert!(
        error("Gemma2ForCausalLM", two).contains("sliding_window_size: found 32, expected what")
    );
    assert!(Spec::new(&json!([]), None).is_err());
    let fine = json!({"partial_rotary_factor": 1.0, "num_experts": null, "sliding_window": null,
        "use_cache": true, "unsloth_fixed": true, "attention_bias": false, "clip_qkv": null});
    spec("LlamaForCausalLM", fine);
}

#[test]
fn a_family_can_be_given_as_text() {
    let text = "base = 'llama'\narchitectures = ['MyForCausalLM']\nqk_norm = 'head'\n\
        norms = ['attn_after', 'ffn_after']\ntied = { default = true }\n\
        [names]\nq_norm = '{model}layers.{l}.qn'\nk_norm = ['{model}a.{l}', '{model}layers.{l}.kn']\n\
        attn_after_norm = '{model}layers.{l}.an'\nffn_after_norm = '{model}layers.{l}.fn'";
    let config = config("MyForCausalLM", json!({"model_type": "mine"}));
    let spec = Spec::new(&config, Some(text)).unwrap();
    assert!(spec.tied && !spec.norms.attn && spec.norms.ffn_after);
    let names = spec.names(|n| ["embed_tokens.weight", "layers.0.kn.weight"].contains(&n));
    assert_eq!(names.layer(1, "k_norm"), "layers.1.kn.weight");
    let error = |text: &str| Spec::new(&config, Some(text)).unwrap_err().to_string();
    assert!(error("base = 'lama'").contains("base: found \"lama\""));
    assert!(error("base = 'llama'").contains("architectures"));
    assert!(error("base = 'llama'\narchitectures = ['X']").contains("the family given is for X"));
    assert!(error(&text.replace("qk_norm", "qk_nrom")).contains("unknown field `qk_nrom`"));
    assert!(error(&text.replace("q_norm", "q_nrom")).contains("names.q_nrom: found this name"));
    assert!(error(&text.replace("q_norm = '", "k_norm2 = '")).contains("names.k_norm2"));
    assert!(error(&text.replace("default", "defautl")).contains("found `defautl`"));
    assert!(error("x = [").contains("family given"));
}

#[test]
fn patterns() {
    assert!(matches("a.*", "a.b") && !matches("a.*", "b.a.") && matches("*", ""));
    assert!(matches("*.inv_freq", "x.inv_freq") && !matches("*.inv_freq", "x.inv_freq.y"));
    assert!(
        matches("a*b*c", "a-b-b-c")
            && !matches("a*b*c", "a-c")
            && matches("a", "a")
            && !matches("a", "ab")
    );
    assert!(!matches("ab*b", "ab"));
}

#[test]
fn longrope_has_two_sets_of_frequencies() {
    let factors = |f: f64| -> Vec<f64> { (0..6).map(|i| f + f64::from(i)).collect() };
    let config = |more: Value| {
        let mut config = json!({"max_position_embeddings": 256, "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 64, "rope_scaling":
            {"type": "longrope", "short_factor": factors(1.0), "long_factor": factors(3.0)}});
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config
    };
    let model = spec("Phi3ForCausalLM", config(json!({})));
    let rope = &model.ropes[0];
    let by = |f: f64| -> Vec<f64> {
        let one = |i: i32| 10000f64.powf(-f64::from(i) / 6.0) / (f + f64::from(i));
        (0..6).map(one).collect()
    };
    close(&rope.inv_freq, &by(1.0));
    let long = rope.long.as_ref().unwrap();
    close(&long.inv_freq, &by(3.0));
    assert_eq!((long.after, model.long_after(), model.context_length), (64, Some(64), 256));
    assert_eq!(rope.scale, (1.0 + 4f64.ln() / 64f64.ln()).sqrt() as f32);
    // One set where both are the same; errors where they don't fit.
    let same = json!({"type": "su", "short_factor": factors(1.0), "long_factor": factors(1.0)});
    let same = spec("Phi3ForCausalLM", config(json!({"rope_scaling": same})));
    assert_eq!((same.long_after(), same.ropes[0].scale), (None, rope.scale));
    let e = error("Phi3ForCausalLM", config(json!({"partial_rotary_factor": 1.0})));
    assert!(e.contains("rope_scaling.short_factor: found [") && e.contains("8 positive"), "{e}");
    let e = error("Phi3ForCausalLM", config(json!({"partial_rotary_factor": 0.1})));
    assert!(e.contains("1 rotating dimensions of 16"), "{e}");
    let inside = json!({"type": "longrope", "short_factor": factors(1.0), "long_factor":
        factors(3.0), "original_max_position_embeddings": 32});
    let e = error("Phi3ForCausalLM", config(json!({"rope_scaling": inside})));
    assert!(e.contains("original_max_position_embeddings: found 32, expected 64"), "{e}");
}

#[test]
fn dynamic_scaling_is_a_larger_base_with_alpha_and_nothing_within_the_context_without() {
    let plain = spec("HunYuanDenseV1ForCausalLM", json!({}));
    assert!(plain.qk_norm_after_rope);
    let dynamic = |params: Value| json!({"rope_scaling": params});
    let alpha = dynamic(json!({"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "mscale": 1.0}));
    let alpha = spec("HunYuanDenseV1ForCausalLM", alpha);
    let base = 10000.0 * 1000f64.powf(16.0 / 14.0);
    let expected: Vec<f64> = (0..8).map(|i| base.powf(-f64::from(i) / 8.0)).collect();
    close(&alpha.ropes[0].inv_freq, &expected);
    let ntk = spec("LlamaForCausalLM", dynamic(json!({"type": "dynamic", "factor": 4.0})));
    assert_eq!((&ntk.ropes, ntk.context_length), (&plain.ropes, 2048));
    let both = dynamic(json!({"type": "dynamic", "alpha": 1000.0, "factor": 2.0}));
    let e = error("HunYuanDenseV1ForCausalLM", both);
    assert!(e.contains("rope_scaling.factor: found 2 beside alpha, expected 1"), "{e}");
}

#[test]
fn layers_with_and_without_positions() {
    let ropes = |spec: &Spec| -> Vec<Option<usize>> {
        spec.layers.iter().map(|layer| attention(layer).rope).collect()
    };
    let smollm3 = |more: Value| spec("SmolLM3ForCausalLM", more);
    assert_eq!(ropes(&smollm3(json!({}))), [Some(0), Some(0), Some(0), None]);
    let list = json!({"no_rope_layers": [0, 1, 0, 1, 1], "no_rope_layer_interval": 4});
    assert_eq!(ropes(&smollm3(list)), [None, Some(0), None, Some(0)]);
    let e = error("SmolLM3ForCausalLM", json!({"no_rope_layers": [0, 1, 2, 1]}));
    assert!(e.contains("found 2, expected 0 or 1"), "{e}");
    let e = error("SmolLM3ForCausalLM", json!({"no_rope_layers": [0, 1]}));
    assert!(e.contains("found 2 entries"), "{e}");

    let types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"];
    let exaone = |more: Value| spec("Exaone4ForCausalLM", more);
    let hybrid = exaone(json!({"sliding_window": 8, "layer_types": types,
        "sliding_window_pattern": "LG"}));
    assert_eq!(ropes(&hybrid), [Some(0), None, Some(0), None]);
    let window = exaone(json!({"sliding_window": 8, "layer_types": vec!["full_attention"; 4]}));
    assert_eq!(ropes(&window), [None; 4]);
    let full = exaone(json!({"sliding_window": null, "sliding_window_pattern": null}));
    assert_eq!((ropes(&full), windows(&full)), (vec![Some(0); 4], vec![None; 4]));

    let granite = |more: Value| spec("GraniteSWAForCausalLM", more);
    let own = granite(json!({"layer_rope_theta": [0, 1e4, 5e5, 1e4], "rope_theta": 7.0}));
    assert_eq!(ropes(&own), [None, Some(0), Some(1), Some(0)]);
    assert_eq!(windows(&own), [None, Some(128), Some(128), Some(128)]);
    close(&own.ropes[1].inv_freq[1..2], &[5e5f64.powf(-1.0 / 8.0)]);
    assert_eq!(ropes(&granite(json!({}))), [Some(0); 4]);
    assert!(attention(&own.layers[0]).sinks);
    let e = error("GraniteSWAForCausalLM", json!({"layer_rope_theta": [0, 0.5, 1, 1]}));
    assert!(e.contains("the base of layer 1: found 0.5, expected 0 or"), "{e}");
    let e = error("GraniteSWAForCausalLM", json!({"layer_rope_theta": [1]}));
    assert!(e.contains("found 1 bases"), "{e}");
}

#[test]
fn a_part_of_the_head_rotates() {
    let dims = |architecture: &str, more: Value| {
        let spec = spec(architecture, more);
        let rope = &spec.ropes[0];
        (2 * rope.inv_freq.len(), attention(&spec.layers[0]).rope_interleaved)
    };
    assert_eq!(dims("Glm4ForCausalLM", json!({})), (64, true));
    assert_eq!(dims("Glm4ForCausalLM", json!({"partial_rotary_factor": 0.25})), (32, true));
    let inside = |factor: f64| {
        json!({"rope_parameters": {"rope_type": "default",
        "rope_theta": 1e4, "partial_rotary_factor": factor}})
    };
    assert_eq!(dims("Glm4ForCausalLM", inside(0.25)), (32, true));
    assert_eq!(dims("LlamaForCausalLM", inside(1.0)), (16, false));
    let e = error("LlamaForCausalLM", inside(0.5));
    assert!(e.contains("rope_parameters.partial_rotary_factor: found 0.5, but 1 of each"), "{e}");
    let mut both = inside(0.25);
    both["partial_rotary_factor"] = json!(0.5);
    assert!(error("Glm4ForCausalLM", both).contains("found 0.25, but 0.5 of each head"));
}

#[test]
fn a_wrapper_may_hold_models_of_several_types() {
    let wrapper = |text: Value| {
        Spec::new(
            &json!({"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3",
                "text_config": config("", text)}),
            None,
        )
    };
    let yarn = json!({"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "mscale": 1.0,
        "mscale_all_dim": 1.0, "original_max_position_embeddings": 64, "llama_4_scaling_beta": 0.1});
    let three = wrapper(json!({"model_type": "ministral3", "rope_parameters": yarn})).unwrap();
    assert_eq!(attention(&three.layers[0]).query_growth, Some((0.1, 64)));
    let small = wrapper(json!({"model_type": "mistral"})).unwrap();
    assert_eq!(attention(&small.layers[0]).query_growth, None);
    let e = wrapper(json!({"model_type": "mistral", "rope_parameters": yarn})).unwrap_err();
    assert!(e.to_string().contains("llama_4_scaling_beta is not supported"), "{e}");
    let e = wrapper(json!({"model_type": "ministral3"})).unwrap_err().to_string();
    assert!(e.contains("text_config.rope_parameters.llama_4_scaling_beta: found nothing"), "{e}");
    let e = wrapper(json!({"model_type": "ministral4"})).unwrap_err().to_string();
    assert!(e.contains("found \"ministral4\""), "{e}");
}
