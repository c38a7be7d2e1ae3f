//! Tests of layers with a state, of gated attention, and of what else their families brought.

use super::*;
use crate::backend::{Core, Heads};

fn recurrent(spec: &Spec) -> Vec<bool> {
    spec.layers.iter().map(|l| matches!(l.mixer, Mixer::Recurrent(_))).collect()
}

fn first(spec: &Spec) -> Recurrent {
    let Mixer::Recurrent(r) = spec.layers[0].mixer else { panic!("{:?}", spec.layers[0]) };
    r
}

fn names(spec: &Spec, l: usize) -> Vec<&'static str> {
    spec.layer_weights(l).into_iter().map(|w| w.what).collect()
}

#[test]
fn which_layers_have_a_state() {
    let at = |architecture, more| recurrent(&spec(architecture, more));
    let lfm2 = |more: Value| {
        let mut all = json!({"intermediate_size": 96, "block_multiple_of": 16});
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        at("Lfm2ForCausalLM", all)
    };
    assert_eq!(lfm2(json!({})), [false; 4]);
    assert_eq!(lfm2(json!({"full_attn_idxs": [0, 3]})), [false, true, true, false]);
    let types = json!({"layer_types": ["conv", "full_attention", "conv", "conv"]});
    assert_eq!(lfm2(types), [true, false, true, true]);
    assert_eq!(at("Qwen3_5ForCausalLM", json!({})), [true, true, true, false]);
    let every = json!({"full_attention_interval": 2});
    assert_eq!(at("Qwen3_5ForCausalLM", every), [true, false, true, false]);
    let granite = json!({"layer_types": ["mamba", "attention", "linear_attention", "attention"],
        "mamba_d_head": 64});
    assert_eq!(at("GraniteMoeHybridForCausalLM", granite), [true, false, true, false]);
}

#[test]
fn a_short_convolution() {
    let more = json!({"full_attn_idxs": [1], "conv_L_cache": 5, "conv_bias": true,
        "block_multiple_of": 32, "block_ffn_dim_multiplier": 1.5});
    let spec = spec("Lfm2ForCausalLM", more);
    let r = first(&spec);
    assert_eq!(
        (r.shape.core, r.shape.width, r.conv_bias, r.bias),
        (Core::Gated(64), 5, true, true)
    );
    // 4 * 64 f32 that the convolution remembers.
    assert_eq!((r.shape.projection(), r.shape.output(), r.shape.state()), (192, 64, 256));
    // 112 * 2 / 3 = 74, * 1.5 = 111, rounded up.
    assert_eq!(spec.layers[0].ffn, Ffn::Dense(128));
    let own = ["mix_in", "mix_in_bias", "conv", "conv_bias", "mix_out", "mix_out_bias"];
    assert!(own.iter().all(|what| names(&spec, 0).contains(what)));
    assert!(!names(&spec, 0).contains(&"q") && !names(&spec, 1).contains(&"conv"));
    let none = json!({"full_attn_idxs": [1], "block_ffn_dim_multiplier": null});
    let width = |more| super::spec("Lfm2ForCausalLM", more).layers[0].ffn.clone();
    assert_eq!(width(none), Ffn::Dense(74));
    let off = json!({"full_attn_idxs": [1], "block_auto_adjust_ff_dim": false});
    assert_eq!(width(off), Ffn::Dense(112));
}

#[test]
fn a_delta_net_and_its_gated_attention() {
    let more = json!({"head_dim": 32, "linear_num_value_heads": 6, "linear_num_key_heads": 3,
        "linear_key_head_dim": 20, "linear_value_head_dim": 16, "layer_types": null});
    let spec = spec("Qwen3_5ForCausalLM", more);
    let (r, h) =
        (first(&spec), Heads { heads: 6, groups: 3, tiled: false, key_dim: 20, value_dim: 16 });
    assert_eq!((r.shape.core, r.shape.width), (Core::DeltaNet(h), 4));
    assert_eq!((r.shape.projection(), r.shape.rates()), (2 * 60 + 2 * 96, 12));
    assert_eq!((r.shape.channels(), r.shape.output()), ((0, 216), 96));
    // Three positions of 216 channels are 648, in lines of 16: 656; and 6 * 20 * 16.
    assert_eq!(r.shape.state(), 656 + 1920);
    let a = attention(&spec.layers[3]);
    assert_eq!((a.gate, a.gate_width()), (Gate::Element, 128));
    assert_eq!(spec.ropes[0].inv_freq.len(), 4, "a quarter of the head");
    let held = spec.names(|_| true);
    let place = |l, what| spec.place(&held, l, what, 0);
    let (q, gate) = (place(3, "q"), place(3, "attn_gate"));
    assert_eq!((&q.tensor, &q.shape), (&gate.tensor, &vec![256, 64]));
    assert_eq!(place(0, "mix_v").first, 120 * 64);
    assert!(place(0, "a_log").tensor.ends_with("linear_attn.A_log"));
    let open = super::spec("Qwen3_5ForCausalLM", json!({"attn_output_gate": false}));
    assert_eq!(attention(&open.layers[3]).gate, Gate::None);
}

#[test]
fn mamba_layers_beside_attention_without_positions() {
    let more = json!({"layer_types": ["mamba", "mamba", "attention", "mamba"], "mamba_n_heads": 8,
        "mamba_d_head": 16, "mamba_d_state": 24, "mamba_n_groups": 2, "mamba_proj_bias": true});
    let granite = |kind: Value| {
        let mut more = more.clone();
        more["position_embedding_type"] = kind;
        more
    };
    let nope = spec("GraniteMoeHybridForCausalLM", granite(json!("nope")));
    let (r, h) =
        (first(&nope), Heads { heads: 8, groups: 2, tiled: false, key_dim: 24, value_dim: 16 });
    assert_eq!((r.shape.core, r.conv_bias, r.bias), (Core::Mamba2(h), true, true));
    assert_eq!((r.shape.projection(), r.shape.rates()), (256 + 96, 8));
    assert_eq!(r.shape.channels(), (128, 224));
    assert_eq!((attention(&nope.layers[2]).rope, nope.ropes.len()), (None, 0));
    assert!(names(&nope, 0).contains(&"skip"));
    assert_eq!(spec("GraniteMoeHybridForCausalLM", granite(json!(null))).ropes.len(), 0);
    let rope = spec("GraniteMoeHybridForCausalLM", granite(json!("rope")));
    assert_eq!(attention(&rope.layers[2]).rope, Some(0));
    let error = error("GraniteMoeHybridForCausalLM", granite(json!("alibi")));
    assert!(error.contains("\"alibi\" are not supported"), "{error}");
}

#[test]
fn proportional_rotation_keeps_the_whole_head() {
    let more = json!({"head_dim": 16, "layer_types": ["conv", "full_attention", "sliding_attention", "conv"],
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}});
    let spec = spec("Lfm3ForCausalLM", more);
    let full: Vec<f64> =
        (0..8).map(|i| if i < 4 { 1e6f64.powf(-f64::from(i) / 8.0) } else { 0.0 }).collect();
    close(&spec.ropes[0].inv_freq, &full);
    let local: Vec<f64> = (0..8).map(|i| 1e4f64.powf(-f64::from(i) / 8.0)).collect();
    close(&spec.ropes[1].inv_freq, &local);
    let a = attention(&spec.layers[2]);
    assert_eq!((a.gate, a.gate_width(), a.window, a.rope), (Gate::Head, 4, Some(256), Some(1)));
    assert!(spec.norms.attn_after && spec.norms.ffn_after);
}

#[test]
fn what_no_layer_with_a_state_has_is_an_error() {
    let lfm2 = |more| error("Lfm2ForCausalLM", more);
    let far = lfm2(json!({"full_attn_idxs": [0, 4]}));
    assert!(far.contains("found 4, expected indices below 4"), "{far}");
    let wide = lfm2(json!({"full_attn_idxs": [0], "conv_L_cache": 17}));
    assert!(
        wide.contains("conv_L_cache: found 17, expected a positive integer up to 16"),
        "{wide}"
    );
    let narrow = lfm2(json!({"full_attn_idxs": [0], "conv_L_cache": 1}));
    assert!(narrow.contains("the convolution: found 1, expected at least 2"), "{narrow}");
    let kind = lfm2(json!({"layer_types": vec!["mamba"; 4]}));
    assert!(kind.contains("layer_types[0]: \"mamba\" is not supported"), "{kind}");
    let qwen = |more| error("Qwen3_5ForCausalLM", more);
    let groups = qwen(json!({"linear_num_value_heads": 5, "linear_num_key_heads": 2}));
    assert!(groups.contains("found 5 heads in 2 groups"), "{groups}");
    let odd = qwen(json!({"linear_value_head_dim": 24}));
    assert!(odd.contains("heads of 128 x 24 are not supported"), "{odd}");
    assert!(qwen(json!({"attention_bias": true})).contains("attention_bias: true changes"));
    let act = qwen(json!({"hidden_act": "gelu"}));
    assert!(act.contains("activation \"gelu\" is not supported in layers with a state"), "{act}");
    let mamba = json!({"layer_types": vec!["mamba"; 4], "mamba_d_head": "auto"});
    let auto = error("GraniteMoeHybridForCausalLM", mamba);
    assert!(auto.contains("mamba_d_head: found \"auto\""), "{auto}");
    let limit =
        json!({"layer_types": vec!["mamba"; 4], "mamba_d_head": 16, "time_step_limit": [0.0, 1.0]});
    assert!(error("GraniteMoeHybridForCausalLM", limit).contains("time_step_limit"));
    let plain = error("Lfm3ForCausalLM", json!({"use_sandwich_norm": false}));
    assert!(plain.contains("use_sandwich_norm: false changes"), "{plain}");
    let text = "base = 'lfm3'\narchitectures = ['Lfm3ForCausalLM']\nqkv_bias = true";
    let biased = Spec::new(&config("Lfm3ForCausalLM", json!({})), Some(text)).unwrap_err();
    assert!(biased.to_string().contains("a bias on gated attention"), "{biased}");
}
