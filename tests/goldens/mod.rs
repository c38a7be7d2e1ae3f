//! Checkpoints with the logits that transformers gave for them.

use std::path::{Path, PathBuf};

/// Golden folders of the supported families: those in the repository, and all if `FERRULE_SHARED` is set.
pub(crate) fn goldens() -> Vec<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut all: Vec<PathBuf> = [
        "llama31-a",
        "mistral-a",
        "qwen25-a",
        "qwen3-a",
        "gemma3-a",
        "phi4-mini-a",
        "granite-swa-a",
        "lfm3-a",
        "qwen35-a",
        "phi2-a",
        "quant-gpt-oss-mxfp4-a",
        "quant-gptq-int4-g32-actorder-sym-a",
        "quant-ct-w4a16-g32-asym-a",
        "quant-bnb-nf4-double-a",
        "quant-fp8-block-moe-a",
        "deepseek-v3-a",
        "gemma3n-a",
    ]
    .iter()
    .map(|name| own.join(name))
    .collect();
    match std::env::var_os("FERRULE_SHARED") {
        Some(shared) => all.extend(
            [
                "llama2-a",
                "llama32-a",
                "llama-bias-a",
                "llama-linear-rope-a",
                "mistral-nemo-a",
                "mistral-small31-a",
                "qwen25-swa-a",
                "qwen25-yarn-a",
                "gemma2-a",
                "gemma2-b",
                "gemma3-mm-a",
                "olmo2-a",
                "starcoder2-a",
                "arcee-a",
                "apertus-a",
                "granite4-dense-a",
                "nemotron-a",
                "gpt2-a",
                "pythia-a",
                "pythia-b",
                "stablelm-a",
                "stablelm-b",
                "command-r-a",
                "cohere2-a",
                "phi4-a",
                "glm4-a",
                "ernie45-a",
                "seed-oss-a",
                "mixtral-a",
                "qwen2-moe-a",
                "qwen3-moe-a",
                "qwen3-moe-b",
                "olmoe-a",
                "gpt-oss-a",
                "glm4-moe-a",
                "granite3-moe-a",
                "granite3-a",
                "minicpm3-a",
                "deepseek-v2-lite-a",
                "gemma4-31b-a",
                "gemma4-e2b-a",
                "gemma4-mm-a",
                "gemma4-moe-a",
                "lfm2-a",
                "lfm2-moe-a",
                "qwen3-next-a",
                "granite4-h-a",
                "phi3-a",
                "phi3-b",
                "smollm3-a",
                "exaone4-a",
                "exaone4-b",
                "hunyuan-dense-a",
                "olmo3-a",
                "ministral3-a",
                "quant-awq-int4-g128-a",
                "quant-awq-int4-g32-a",
                "quant-bnb-nf4-a",
                "quant-ct-fp8-dynamic-a",
                "quant-ct-fp8-static-a",
                "quant-ct-w4a16-g128-a",
                "quant-ct-w4a16-g32-actorder-a",
                "quant-ct-w8a16-channel-a",
                "quant-ct-w8a8-int8-a",
                "quant-fp8-block-a",
                "quant-fp8-static-ministral-a",
                "quant-gptq-int4-channel-a",
                "quant-gptq-int4-g128-actorder-asym-a",
                "quant-gptq-int4-g128-sym-a",
                "quant-gptq-int4-g32-asym-a",
                "quant-gptq-int8-g128-a",
                "quant-gptq-moe-int4-g128-a",
                "quant-gptq-v2-int4-g32-asym-a",
            ]
            .iter()
            .map(|name| Path::new(&shared).join("goldens").join(name)),
        ),
        None => {
            println!("FERRULE_SHARED is not set: only the goldens in the repository are tested")
        }
    }
    all
}
