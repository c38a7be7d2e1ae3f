"""Write a model with random weights in the shape of a released one: speed does not need the rest.

    python benches/random_model.py llama-3.2-1b DIR                  # a Hugging Face folder, bf16
    python benches/random_model.py llama-3.2-1b --gguf FILE          # the same shape, F16
    python benches/random_model.py gpt-oss-20b DIR                   # 13.8 GB, experts in MXFP4

Weights are normal with standard deviation 0.02 (experts in MXFP4 have random codes of about that
deviation), norms are 1, biases 0. One block of random numbers is repeated (its length is prime, so
that rows differ). The tokenizer is that of models/tales-4m: too small for the vocabulary, but
valid. The GGUF file has no vocabulary, only its size. Needs numpy, and gguf for --gguf.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

TOKENIZER = Path(__file__).parent.parent / "models" / "tales-4m"
BLOCK = 4_194_301  # prime

_LLAMA3 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
_ROPE3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
# config.json of the released models.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _LLAMA3
    | {
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "rope_scaling": {"factor": 32.0} | _ROPE3,
        "tie_word_embeddings": True,
        "transformers_version": "4.45.0.dev0",
    },
    "llama-3.1-8b": _LLAMA3
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "rope_scaling": {"factor": 8.0} | _ROPE3,
        "tie_word_embeddings": False,
        "transformers_version": "4.43.0.dev0",
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 200002,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "output_router_logits": False,
        "pad_token_id": 199999,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "transformers_version": "4.55.0.dev0",
        "use_cache": True,
        "vocab_size": 201088,
    },
}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path, nargs="?", help="a Hugging Face folder to write")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="an F16 GGUF file to write")
    parser.add_argument(
        "--sparse", action="store_true", help="matrices are holes in the file: zeros, of no size"
    )
    args = parser.parse_args()
    if not (args.folder or args.gguf):
        parser.error("expected a folder, or --gguf FILE")
    config = SHAPES[args.shape]
    if args.gguf and config["model_type"] == "gpt_oss":
        parser.error("--gguf is not there for this shape")
    block = np.random.default_rng(0).normal(0, 0.02, BLOCK).astype(np.float32)
    if args.folder:
        write_folder(config, block, args.folder, args.sparse)
    if args.gguf:
        write_gguf(config, block, args.gguf, args.sparse)


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Each tensor of a llama or qwen3: its name, its name in a GGUF file, its shape."""
    hidden, ffn, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    dim = head_dim(config)
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    yield "model.embed_tokens.weight", "token_embd.weight", (vocab, hidden)
    for i in range(config["num_hidden_layers"]):
        layer = {
            ("input_layernorm", "attn_norm"): (hidden,),
            ("self_attn.q_proj", "attn_q"): (q, hidden),
            ("self_attn.k_proj", "attn_k"): (kv, hidden),
            ("self_attn.v_proj", "attn_v"): (kv, hidden),
            ("self_attn.o_proj", "attn_output"): (hidden, q),
            ("post_attention_layernorm", "ffn_norm"): (hidden,),
            ("mlp.gate_proj", "ffn_gate"): (ffn, hidden),
            ("mlp.up_proj", "ffn_up"): (ffn, hidden),
            ("mlp.down_proj", "ffn_down"): (hidden, ffn),
        }
        if config["model_type"] == "qwen3":
            layer[("self_attn.q_norm", "attn_q_norm")] = (dim,)
            layer[("self_attn.k_norm", "attn_k_norm")] = (dim,)
        for (name, gguf_name), shape in layer.items():
            yield f"model.layers.{i}.{name}.weight", f"blk.{i}.{gguf_name}.weight", shape
    yield "model.norm.weight", "output_norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", "output.weight", (vocab, hidden)


def stored(config: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Each tensor of a Hugging Face folder: its name, its type, its shape."""
    if config["model_type"] == "gpt_oss":
        yield from gpt_oss(config)
    else:
        for name, _, shape in tensors(config):
            yield name, "BF16", shape


def gpt_oss(config: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Each tensor of a gpt-oss with MXFP4 experts: its name, its type, its shape."""
    hidden, ffn, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    dim, experts = head_dim(config), config["num_local_experts"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    yield "model.embed_tokens.weight", "BF16", (vocab, hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        yield f"{layer}input_layernorm.weight", "BF16", (hidden,)
        linear = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
        for name, shape in (linear | {"o_proj": (hidden, q)}).items():
            yield f"{layer}self_attn.{name}.weight", "BF16", shape
            yield f"{layer}self_attn.{name}.bias", "BF16", shape[:1]
        yield f"{layer}self_attn.sinks", "BF16", (config["num_attention_heads"],)
        yield f"{layer}post_attention_layernorm.weight", "BF16", (hidden,)
        yield f"{layer}mlp.router.weight", "BF16", (experts, hidden)
        yield f"{layer}mlp.router.bias", "BF16", (experts,)
        for name, rows, k in (("gate_up_proj", 2 * ffn, hidden), ("down_proj", hidden, ffn)):
            yield f"{layer}mlp.experts.{name}_blocks", "U8", (experts, rows, k // 32, 16)
            yield f"{layer}mlp.experts.{name}_scales", "U8", (experts, rows, k // 32)
            yield f"{layer}mlp.experts.{name}_bias", "BF16", (experts, rows)
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (vocab, hidden)


def head_dim(config: dict[str, Any]) -> int:
    """Width of an attention head."""
    size: int = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return size


def write_folder(
    config: dict[str, Any], block: np.ndarray, folder: Path, sparse: bool = False
) -> None:
    """Write config.json, model.safetensors and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in stored(config):
        begin, end = end, end + {"BF16": 2, "U8": 1}[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # Upper half of the float, rounded to the nearest.
    bf16 = ((block.view(np.uint32) + 0x8000) >> 16).astype("<u2")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        at = 0
        codes = np.random.default_rng(1).integers(0, 256, BLOCK, np.uint8)
        for name, _, shape in stored(config):
            if name.endswith("norm.weight"):
                np.full(shape, 0x3F80, "<u2").tofile(file)  # 1.0
            elif name.endswith(("bias", "sinks")):
                np.zeros(shape, "<u2").tofile(file)
            elif name.endswith("_scales"):
                np.full(shape, 120, np.uint8).tofile(file)  # 2^-7
            elif sparse:
                file.seek(math.prod(shape) * (1 if name.endswith("_blocks") else 2), 1)
            else:
                block = codes if name.endswith("_blocks") else bf16
                at = _write_repeated(file, block, at, math.prod(shape))
        file.truncate(8 + len(text) + end)
    print(f"{folder}: {(8 + len(text) + end) / 1e9:.2f} GB", file=sys.stderr)


def _write_repeated(file: BinaryIO, block: np.ndarray, at: int, count: int) -> int:
    """Write `count` numbers of the endless repetition of `block` from `at`; gives the new `at`."""
    while count:
        part = block[at : at + count]
        part.tofile(file)
        count -= len(part)
        at = (at + len(part)) % len(block)
    return at


class _Hole(NamedTuple):
    """What GGUFWriter asks of an array, as a hole in the file."""

    nbytes: int

    def tofile(self, file: BinaryIO) -> None:
        """Skip them."""
        file.seek(self.nbytes, 1)


def write_gguf(config: dict[str, Any], block: np.ndarray, path: Path, sparse: bool = False) -> None:
    """Write the F16 GGUF file."""
    import gguf

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, config["model_type"])
    dim = head_dim(config)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("none")
    f16 = block.astype(np.float16)
    named = [(name, shape) for _, name, shape in tensors(config)]
    for name, shape in named:
        kind = np.dtype(np.float32 if len(shape) == 1 else np.float16)
        writer.add_tensor_info(name, shape, kind, math.prod(shape) * kind.itemsize)
    scaling = config["rope_scaling"]
    if scaling:
        factors = _rope_factors(scaling, config["rope_theta"], dim)
        kind = factors.dtype
        writer.add_tensor_info("rope_freqs.weight", factors.shape, kind, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    at = 0
    for _, shape in named:
        count = math.prod(shape)
        if len(shape) == 1:
            writer.write_tensor_data(np.ones(shape, np.float32))
        elif sparse:
            writer.write_tensor_data(_Hole(2 * count))
        else:
            writer.write_tensor_data(np.resize(np.roll(f16, -at), count))
            at = (at + count) % len(f16)
    if scaling:
        writer.write_tensor_data(factors)
    writer.close()
    print(f"{path}: {path.stat().st_size / 1e9:.2f} GB", file=sys.stderr)


def _rope_factors(scaling: dict[str, Any], theta: float, dim: int) -> np.ndarray:
    """What llama.cpp divides each rotary frequency by, for rope_type "llama3"."""
    frequency = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / scaling["factor"] + smooth)).astype(np.float32)


if __name__ == "__main__":
    main()
