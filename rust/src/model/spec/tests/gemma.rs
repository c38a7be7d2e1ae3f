//! Tests of latent attention and of Gemma 3n and 4 as `Spec` reads them.

use super::{attention, close, error, spec};
use crate::model::spec::*;
use serde_json::{Value, json};

fn latent(spec: &Spec) -> Latent {
    let Mixer::Latent(latent) = spec.layers[1].mixer else { panic!("{:?}", spec.layers[1]) };
    latent
}

#[test]
fn latent_attention() {
    let small = json!({"kv_lora_rank": 32, "q_lora_rank": 48, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 16});
    let with = |more: Value| {
        let mut config = small.clone();
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config
    };
    let minicpm = spec("MiniCPM3ForCausalLM", with(json!({"dim_model_base": 32})));
    let a = latent(&minicpm);
    assert_eq!(
        (a.heads, a.q_rank, a.rank, a.nope, a.turned, a.value),
        (4, Some(48), 32, 16, 8, 16)
    );
    assert_eq!((a.scale, a.eps, minicpm.eps), ((1.0 / 24f64.sqrt()) as f32, 1e-6, 1e-5));
    assert_eq!((a.key_dim(), a.rope_interleaved, a.rope), (40, false, Some(0)));
    assert_eq!(minicpm.ropes[0].inv_freq.len(), 4);
    assert_eq!((minicpm.residual_scale, minicpm.logit_scale), (0.7, 0.5));

    let yarn = json!({"type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 64});
    let moe = json!({"num_experts_per_tok": 3, "q_lora_rank": null, "rope_scaling": yarn});
    let v2 = spec("DeepseekV2ForCausalLM", with(moe));
    let a = latent(&v2);
    let m = 0.1 * 0.707 * 40f64.ln() + 1.0;
    assert_eq!((a.q_rank, a.rope_interleaved), (None, true));
    assert_eq!(a.scale, (m * m / 24f64.sqrt()) as f32);
    assert_eq!(v2.ropes[0].scale, 1.0);
    let Ffn::Moe(moe) = v2.layers[1].ffn else { panic!("{:?}", v2.layers[1]) };
    assert_eq!((moe.experts, moe.routing.renormalise, moe.routing.groups), (64, None, None));
    let v3 = spec("DeepseekV3ForCausalLM", with(json!({})));
    assert_eq!(
        (latent(&v3).scale, v3.layers[0].ffn.clone()),
        (latent(&minicpm).scale, Ffn::Dense(112))
    );
    let Ffn::Moe(moe) = v3.layers[3].ffn else { panic!("{:?}", v3.layers[3]) };
    assert_eq!((moe.routing.top_k, moe.correction, moe.routing.scale), (8, true, 2.5));
    assert!(moe.routing.groups.is_some_and(|g| g.count == 8 && g.top_k == 4 && g.by_two));

    let e = error("MiniCPM3ForCausalLM", with(json!({"v_head_dim": 24})));
    assert!(e.contains("v_head_dim: found 24, expected a multiple of 16"), "{e}");
    let e = error(
        "DeepseekV2ForCausalLM",
        with(json!({"num_experts_per_tok": 3, "norm_topk_prob": true})),
    );
    assert!(e.contains("norm_topk_prob: true changes"), "{e}");
    let e = error("DeepseekV3ForCausalLM", with(json!({"attention_bias": true})));
    assert!(e.contains("attention_bias: true changes"), "{e}");
}

fn gemma4(more: Value) -> Value {
    let mut config = json!({"num_hidden_layers": 6, "head_dim": 16, "global_head_dim": 32,
        "sliding_window": 16, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 400,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention",
            "full_attention", "sliding_attention", "full_attention"]});
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

#[test]
fn gemma_4_differs_by_kind_of_layer() {
    let shared = json!({"num_kv_shared_layers": 3, "use_double_wide_mlp": true});
    let e2b = spec("Gemma4ForCausalLM", gemma4(shared));
    let of = |what: fn(&Attention) -> usize| -> Vec<usize> {
        e2b.layers.iter().map(|l| what(&attention(l))).collect()
    };
    assert_eq!(of(|a| a.head_dim), [16, 32, 16, 32, 16, 32]);
    assert_eq!(of(|a| a.kv_heads), [2; 6]);
    assert_eq!(of(|a| a.kv_of.unwrap_or(9)), [9, 9, 9, 1, 2, 1]);
    assert!(e2b.layers.iter().all(|l| attention(l).values == Values::Normed));
    let widths: Vec<_> = e2b.layers.iter().map(|l| l.ffn.clone()).collect();
    assert_eq!(widths[..3], [(); 3].map(|()| Ffn::Dense(112)));
    assert_eq!(widths[3..], [(); 3].map(|()| Ffn::Dense(224)));
    assert_eq!(
        (attention(&e2b.layers[0]).scale, e2b.norm, e2b.logit_softcap),
        (1.0, Norm::Rms, None)
    );
    let inputs = Some(Inputs { width: 16, vocab: 400 });
    assert_eq!(e2b.gemma, Some(Gemma { inputs, layer_scale: true, streams: None }));
    // A quarter of a full head's 16 pairs turn, with the frequencies of the whole head.
    let mut expected: Vec<f64> = (0..4).map(|i| 1e6f64.powf(-f64::from(i) / 16.0)).collect();
    expected.resize(16, 0.0);
    close(&e2b.ropes[0].inv_freq, &expected);
    let expected: Vec<f64> = (0..8).map(|i| 1e4f64.powf(-f64::from(i) / 8.0)).collect();
    close(&e2b.ropes[1].inv_freq, &expected);
    // Layers that share have no keys and values of their own, but releases may have the tensors.
    let names = e2b.names(|_| false);
    let k = |l: usize| format!("model.layers.{l}.self_attn.k_proj.weight");
    assert!(e2b.layer_weights(4).iter().all(|w| !["k", "v", "k_norm"].contains(&w.what)));
    assert_eq!(e2b.unused(&names, [k(2), k(4), k(6)].iter().map(String::as_str)), [k(6)]);

    let of_keys = json!({"attention_k_eq_v": true, "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 0, "layer_types": vec!["sliding_attention"; 6]});
    let large = spec("Gemma4ForCausalLM", gemma4(of_keys));
    assert_eq!(large.gemma, Some(Gemma { inputs: None, layer_scale: true, streams: None }));
    let (first, last) = (attention(&large.layers[0]), attention(&large.layers[5]));
    assert_eq!((first.window, first.kv_heads, first.values), (Some(16), 2, Values::Normed));
    assert_eq!((last.window, last.kv_heads, last.values), (None, 1, Values::NormedKeys));
    assert!(large.layer_weights(5).iter().all(|w| w.what != "v"));

    let experts = json!({"enable_moe_block": true, "num_experts": 6, "top_k_experts": 2,
        "moe_intermediate_size": 32});
    let moe = spec("Gemma4ForCausalLM", gemma4(experts));
    assert!(matches!(moe.layers[0].ffn, Ffn::Beside(112, Moe { experts: 6, width: 32, .. })));

    for (more, expected) in [
        (json!({"num_kv_shared_layers": 5}), "num_kv_shared_layers: found 5 of 6 layers"),
        (json!({"num_kv_shared_layers": 7}), "num_kv_shared_layers: found 7, expected"),
        (json!({"global_head_dim": 15}), "global_head_dim: found 15, expected an even"),
        (
            json!({"use_bidirectional_attention": "all"}),
            "use_bidirectional_attention: \"all\" changes",
        ),
        (
            json!({"attention_k_eq_v": true, "num_global_key_value_heads": 3}),
            "num_global_key_value_heads: found 4 heads and 3",
        ),
    ] {
        let e = error("Gemma4ForCausalLM", gemma4(more));
        assert!(e.contains(expected), "{e}\n{expected}");
    }
}

#[test]
fn gemma_3n_has_streams_and_sparse_layers() {
    let with = |more: Value| {
        let mut config = gemma4(json!({"num_kv_shared_layers": 2, "altup_num_inputs": 4,
            "laurel_rank": 8, "activation_sparsity_pattern": [0.95, 0.95, 0, 0.0, 0, 0],
            "intermediate_size": [96, 112, 96, 96, 96, 96], "rope_theta": 1e6,
            "query_pre_attn_scalar": 256}));
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config
    };
    let spec = spec("Gemma3nForCausalLM", with(json!({})));
    let cut = 1.644_853_5; // of 0.95 in f32
    let expected = [Ffn::Sparse(96, cut), Ffn::Sparse(112, cut), Ffn::Dense(96), Ffn::Dense(96)];
    let found: Vec<_> = spec.layers[..4].iter().map(|l| l.ffn.clone()).collect();
    assert_eq!(found, expected);
    assert_eq!(
        spec.gemma.unwrap().streams,
        Some(Streams { count: 4, laurel_rank: 8, clip: 120.0 })
    );
    let a = attention(&spec.layers[1]);
    assert_eq!((a.head_dim, a.scale, spec.logit_softcap), (16, 1.0, Some(30.0)));
    assert!(spec.ropes[0].inv_freq.iter().all(|f| *f > 0.0));
    for (more, expected) in [
        (
            json!({"activation_sparsity_pattern": null}),
            "activation_sparsity_pattern: found nothing",
        ),
        (
            json!({"activation_sparsity_pattern": [0.5]}),
            "activation_sparsity_pattern: found 1 entries",
        ),
        (
            json!({"activation_sparsity_pattern": vec![1.0; 6]}),
            "activation_sparsity_pattern: found 1.0",
        ),
        (json!({"altup_num_inputs": 9}), "altup_num_inputs: found 9 streams, 6 layers"),
        (json!({"hidden_size_per_layer_input": 0}), "altup_num_inputs: found 4 streams"),
        (json!({"altup_active_idx": 1}), "altup_active_idx: 1 changes"),
        (json!({"altup_correct_scale": false}), "altup_correct_scale: false changes"),
        (json!({"intermediate_size": [96]}), "intermediate_size: found 1 entries"),
        (json!({"intermediate_size": vec![0; 6]}), "intermediate_size: found 0, expected positive"),
    ] {
        let e = error("Gemma3nForCausalLM", with(more));
        assert!(e.contains(expected), "{e}\n{expected}");
    }
}
