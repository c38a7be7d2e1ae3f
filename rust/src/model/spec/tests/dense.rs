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
    assert!(e.contains("found biases on rms norms"), "{e}");
    let text = format!("{text}\nnorm = 'layer'\nparallel = true\nnorms = ['attn', 'attn_after']");
    let e = Spec::new(&config, Some(&text)).unwrap_err().to_string();
    assert!(e.contains("a norm of outputs in parallel layers"), "{e}");
    let text = text.replace("['attn', 'attn_after']", "[]");
    let e = Spec::new(&config, Some(&text)).unwrap_err().to_string();
    assert!(e.contains("parallel layers without a norm"), "{e}");
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
    let text = "base = 'minicpm3'\narchitectures = ['MyForCausalLM']\nparallel = true";
    let sizes = json!({"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8});
    let e = Spec::new(&config("MyForCausalLM", sizes), Some(text)).unwrap_err().to_string();
    assert!(e.contains("latent attention in parallel layers"), "{e}");
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
    let e = error("Starcoder2ForCausalLM", json!({"hidden_act": "clamped_swiglu"}));
    assert!(e.contains("is not supported"), "{e}");
    let e = error("Starcoder2ForCausalLM", json!({"hidden_act": "xielu"}));
    assert!(e.contains("names.xielu_alpha_p: found nothing"), "{e}");
}

#[test]
fn learned_positions() {
    let config = json!({"architectures": ["GPT2LMHeadModel"], "n_positions": 96, "n_ctx": 96,
        "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 400});
    let gpt2 = Spec::new(&config, None).unwrap();
    assert_eq!((gpt2.positions, gpt2.context_length, gpt2.ropes.len()), (Some(96), 96, 0));
    assert_eq!((attention(&gpt2.layers[0]).rope, &gpt2.layers[0].ffn), (None, &Ffn::Plain(256)));
    let mut wide = config.clone();
    wide["n_inner"] = json!(100);
    assert_eq!(Spec::new(&wide, None).unwrap().layers[0].ffn, Ffn::Plain(100));
    let mut other = config;
    other["scale_attn_by_inverse_layer_idx"] = json!(true);
    assert!(Spec::new(&other, None).unwrap_err().to_string().contains("scale_attn_by_inverse"));

    // Released files have no prefix, others do; the matrices are [in, out], q, k, v side by side.
    for prefix in ["", "transformer."] {
        let names = gpt2.names(|n| n == format!("{prefix}wte.weight"));
        assert_eq!(names.model("positions"), format!("{prefix}wpe.weight"));
        let tensor = format!("{prefix}h.1.attn.c_attn.weight");
        let (shape, column) = (vec![64, 192], 192);
        let whole = Slice { row: 1, column, ..Slice::whole(tensor, shape) };
        let key = gpt2.place(&names, 1, "k", 0);
        assert_eq!(key, Slice { first: 64, ..whole });
        assert_eq!(key.index(3, 5), [5, 67]);
        let bias = gpt2.place(&names, 1, "v_bias", 0);
        assert_eq!((bias.first, bias.row, bias.shape), (128, 1, vec![192]));
        let there = ["wpe.weight", "h.0.attn.bias", "h.0.attn.c_attn.bias", "h.0.attn.x.bias"];
        let there: Vec<String> = there.iter().map(|n| format!("{prefix}{n}")).collect();
        assert_eq!(gpt2.unused(&names, there.iter().map(String::as_str)), [&there[3][..]]);
    }
}

#[test]
fn norms_of_each_head_are_one_tensor_or_many() {
    let cohere = spec("CohereForCausalLM", json!({"use_qk_norm": true}));
    let names = cohere.names(|n| n == "model.embed_tokens.weight");
    let one = "model.layers.1.self_attn.q_norm.weight".to_owned();
    assert_eq!(cohere.places(&names, 1, "q_norm"), [Slice::whole(one, vec![4, 16])]);
    let lm = spec("StableLmForCausalLM", json!({"qk_layernorm": true, "num_key_value_heads": 2}));
    let names = lm.names(|n| n == "model.embed_tokens.weight");
    let each = |h| {
        let name = format!("model.layers.1.self_attn.k_layernorm.norms.{h}.weight");
        Slice::whole(name, vec![16])
    };
    assert_eq!(lm.places(&names, 1, "k_norm"), [each(0), each(1)]);
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
