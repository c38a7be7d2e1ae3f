//! Frequencies of rotary embeddings, and which layers and dimensions rotate.

use super::{attention, close, error, spec, windows};
use crate::model::spec::*;
use serde_json::{Value, json};

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
