//! Tests of `Spec` on small configurations.

use super::family::{FAMILIES, Family, Format};
use super::gemma::GemmaFacts;
use super::moe::MoeFacts;
use super::names::{WEIGHTS, matches};
use super::recurrent::RecurrentFacts;
use super::*;
use serde_json::{Value, json};

mod dense;
mod gemma;
mod moe;
mod quantized;
mod recurrent;
mod rope;

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
