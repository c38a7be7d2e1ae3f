//! Norms, the shape of layers, activations, multipliers of the dense families.

use super::*;

#[test]
fn multipliers() {
    let given = json!({"embedding_multiplier": 12, "attention_multiplier": 0.015625,
        "residual_multiplier": 0.22, "logits_scaling": 8.0});
    let granite = spec("GraniteForCausalLM", given);
    assert_eq!((granite.embed_scale, granite.residual_scale), (12.0, 0.22));
    assert_eq!((granite.logit_scale, attention(&granite.layers[0]).scale), (0.125, 0.015625));
    let absent = spec("GraniteForCausalLM", json!({}));
    assert_eq!((absent.embed_scale, absent.logit_scale, absent.residual_scale), (1.0, 1.0, 1.0));
    assert_eq!(attention(&absent.layers[0]).scale, 1.0);
    let e = error("GraniteForCausalLM", json!({"logits_scaling": 0}));
    assert!(e.starts_with("config.json: logits_scaling: found 0, expected a number from"), "{e}");
    let cohere = spec("CohereForCausalLM", json!({"logit_scale": 0.25}));
    assert_eq!(cohere.logit_scale, 0.25);
    assert_eq!(spec("CohereForCausalLM", json!({})).logit_scale, 0.0625);

    let text = "base = 'llama'\narchitectures = ['MyForCausalLM']\nembed_scale = { key = 'scale_emb' }\n\
        residual_depth = { key = 'scale_depth' }\nlogit_width = { key = 'dim_model_base' }\n\
        attn_clip = { key = 'clip_qkv' }\n";
    let given = json!({"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16, "clip_qkv": 8.0});
    let mini = Spec::new(&config("MyForCausalLM", given), Some(text)).unwrap();
    assert_eq!((mini.embed_scale, mini.residual_scale, mini.logit_scale), (12.0, 0.7, 0.25));
    assert_eq!(attention(&mini.layers[0]).clip, Some(8.0));
}

#[test]
fn norms_and_their_biases() {
    let has = |spec: &Spec, what: &str| {
        let layer = spec.layer_weights(0);
        spec.model_weights().iter().chain(&layer).any(|w| w.what == what)
    };
    let nemotron = spec("NemotronForCausalLM", json!({}));
    assert_eq!(nemotron.norm, Norm::LayerPlusOne);
    assert!(has(&nemotron, "norm_bias") && has(&nemotron, "attn_norm_bias"));
    assert!(!has(&nemotron, "attn_after_norm_bias") && !has(&nemotron, "gate"));
    let cohere = spec("CohereForCausalLM", json!({}));
    assert_eq!(cohere.norm, Norm::Layer);
    assert!(!has(&cohere, "norm_bias") && !has(&cohere, "ffn_norm") && !has(&cohere, "q_norm"));
    let olmo = spec("Olmo2ForCausalLM", json!({}));
    assert!(!has(&olmo, "attn_norm") && has(&olmo, "attn_after_norm") && has(&olmo, "q_norm"));
    let shape = |spec: &Spec, what: &str| {
        spec.layer_weights(0).into_iter().find(|w| w.what == what).unwrap().shape
    };
    assert_eq!((shape(&olmo, "q_norm"), shape(&olmo, "k_norm")), (vec![64], vec![32]));
    let cohere = spec("CohereForCausalLM", json!({"use_qk_norm": true}));
    assert_eq!((shape(&cohere, "q_norm"), shape(&cohere, "k_norm")), (vec![4, 16], vec![2, 16]));

    let text = "base = 'llama'\narchitectures = ['MyForCausalLM']\nnorm_bias = true";
    let config = config("MyForCausalLM", json!({}));
    let e = Spec::new(&config, Some(text)).unwrap_err().to_string();
    assert!(e.contains("bias on an rms norm"), "{e}");
    let text = format!("{text}\nnorm = 'layer'\nparallel = true\nnorms = ['attn', 'attn_after']");
    let e = Spec::new(&config, Some(&text)).unwrap_err().to_string();
    assert!(e.contains("norm of outputs in a parallel layer"), "{e}");
}

#[test]
fn parallel_layers() {
    let both = Norms { attn: true, attn_after: false, ffn: true, ffn_after: false };
    let one = Norms { ffn: false, ..both };
    let neox = |parallel: bool| {
        let given = json!({"use_parallel_residual": parallel, "num_key_value_heads": null});
        spec("GPTNeoXForCausalLM", given)
    };
    assert_eq!((neox(true).parallel, neox(true).norms), (true, both));
    assert_eq!((neox(false).parallel, neox(false).norms), (false, both));
    let lm =
        |parallel: bool| spec("StableLmForCausalLM", json!({"use_parallel_residual": parallel}));
    assert_eq!((lm(true).parallel, lm(true).norms), (true, one));
    assert_eq!((lm(false).parallel, lm(false).norms), (false, both));
    let phi = spec("PhiForCausalLM", json!({}));
    assert_eq!((phi.parallel, phi.norms, phi.head_bias, phi.act), (true, one, true, Act::GeluTanh));
    assert_eq!(phi.layers[0].ffn, Ffn::Plain(112));
    let e = error("PhiForCausalLM", json!({"qk_layernorm": true}));
    assert!(e.contains("qk_layernorm: true changes the model"), "{e}");
}

#[test]
fn activations() {
    let act = |name: &str| spec("Starcoder2ForCausalLM", json!({"hidden_act": name})).act;
    let expected = [
        ("gelu", Act::Gelu),
        ("gelu_new", Act::GeluTanh),
        ("gelu_fast", Act::GeluTanh),
        ("gelu_pytorch_tanh", Act::GeluTanh),
        ("silu", Act::Silu),
        ("relu2", Act::Relu2),
        ("xielu", Act::XIelu),
    ];
    for (name, expected) in expected {
        // xIELU has weights, which only Apertus names.
        let family = if name == "xielu" { "ApertusForCausalLM" } else { "Starcoder2ForCausalLM" };
        assert_eq!(spec(family, json!({"hidden_act": name})).act, expected, "{name}");
    }
    assert_eq!(act("swish"), Act::Silu);
    for name in ["relu", "quick_gelu", "xielu"] {
        let e = error("LlamaForCausalLM", json!({"hidden_act": name}));
        assert!(e.contains(&format!("activation {name:?} is not supported")), "{e}");
    }
    let e = error("Starcoder2ForCausalLM", json!({"hidden_act": "xielu"}));
    assert!(e.contains("names.xielu_alpha_p: found nothing"), "{e}");
}

#[test]
fn a_name_may_be_whole() {
    let apertus = spec("ApertusForCausalLM", json!({}));
    let names = apertus.names(|n| n == "model.embed_tokens.weight");
    assert_eq!(names.layer(2, "xielu_beta"), "model.layers.2.mlp.act_fn.beta");
    assert_eq!(names.layer(2, "up"), "model.layers.2.mlp.up_proj.weight");
    let number = apertus.layer_weights(0).into_iter().find(|w| w.what == "xielu_beta").unwrap();
    assert!(number.shape.is_empty());
}
