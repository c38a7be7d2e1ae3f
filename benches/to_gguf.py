"""Writes the small trained models as GGUF, so that llama.cpp can be measured on them.

    python benches/to_gguf.py FOLDER OUT.gguf [--f32]

For Llama and GPT-2 checkpoints with a byte-level or a SentencePiece-like BPE tokenizer.json, as
tales-*, stories260K and ts-instruct-3m-chat; no general converter (that is llama.cpp's own).
Matrices are F16, or F32 with --f32; vectors F32. Needs numpy and gguf.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

LLAMA = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GPT2 = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--f32", action="store_true")
    args = parser.parse_args()
    config = json.loads((args.folder / "config.json").read_text())
    tensors = dict(read(args.folder / "model.safetensors"))
    writer = gguf.GGUFWriter(args.out, config["model_type"])
    made = gpt2(config, tensors, writer) if "n_embd" in config else llama(config, tensors, writer)
    vocabulary(args.folder, writer, config)
    for name, value in made:
        half = value.ndim == 2 and not args.f32
        writer.add_tensor(name, value.astype(np.float16 if half else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors as f32."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        start, end = (8 + length + at for at in entry["data_offsets"])
        raw = data[start:end]
        if entry["dtype"] == "BF16":
            value = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            kind = {"F32": np.float32, "F16": np.float16}[entry["dtype"]]
            value = np.frombuffer(raw, kind).astype(np.float32)
        yield name, value.reshape(entry["shape"])


def llama(config: dict[str, Any], tensors: dict[str, np.ndarray], writer: Any) -> Any:
    """Facts and tensors of a Llama."""
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    yield "token_embd.weight", tensors["model.embed_tokens.weight"]
    yield "output_norm.weight", tensors["model.norm.weight"]
    if not config["tie_word_embeddings"]:
        yield "output.weight", tensors["lm_head.weight"]
    for i in range(config["num_hidden_layers"]):
        for theirs, name in LLAMA.items():
            value = tensors[f"model.layers.{i}.{theirs}.weight"]
            if name in ("attn_q", "attn_k"):
                n = heads if name == "attn_q" else kv
                # llama.cpp turns neighbouring pairs, Hugging Face halves.
                value = value.reshape(n, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
            yield f"blk.{i}.{name}.weight", value


def gpt2(config: dict[str, Any], tensors: dict[str, np.ndarray], writer: Any) -> Any:
    """Facts and tensors of a GPT-2."""
    writer.add_context_length(config["n_ctx"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_block_count(config["n_layer"])
    writer.add_feed_forward_length(config["n_inner"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    prefix = "transformer." if "transformer.wte.weight" in tensors else ""
    yield "token_embd.weight", tensors[f"{prefix}wte.weight"]
    yield "position_embd.weight", tensors[f"{prefix}wpe.weight"]
    for kind in ("weight", "bias"):
        yield f"output_norm.{kind}", tensors[f"{prefix}ln_f.{kind}"]
        for i in range(config["n_layer"]):
            for theirs, name in GPT2.items():
                value = tensors[f"{prefix}h.{i}.{theirs}.{kind}"]
                yield f"blk.{i}.{name}.{kind}", value.T.copy() if value.ndim == 2 else value


def vocabulary(folder: Path, writer: Any, config: dict[str, Any]) -> None:
    """The tokenizer."""
    read = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids, merges = read["model"]["vocab"], read["model"]["merges"]
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in merges]
    special = {token["content"]: token["id"] for token in read["added_tokens"]}
    names = {i: name for name, i in (ids | special).items()}
    size = config["vocab_size"]
    tokens = [names.get(i, f"[PAD{i}]") for i in range(size)]
    kinds = [gguf.TokenType.NORMAL] * size
    for i in range(size):
        if i not in names:
            kinds[i] = gguf.TokenType.UNUSED
        elif names[i] in special:
            kinds[i] = gguf.TokenType.CONTROL
    if read["model"].get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        scores = [-1e6] * size
        for rank, (a, b) in enumerate(merges):
            if a + b in ids:
                scores[ids[a + b]] = -float(rank)
        for i, token in enumerate(tokens):
            if token.startswith("<0x") and token.endswith(">"):
                kinds[i] = gguf.TokenType.BYTE
        writer.add_token_scores(scores)
    else:
        writer.add_tokenizer_model("gpt2")
        splits = "Regex" in json.dumps(read["pre_tokenizer"])
        writer.add_tokenizer_pre("qwen2" if splits else "gpt-2")
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    eos = config["eos_token_id"]
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(eos[0] if isinstance(eos, list) else eos)
    writer.add_add_bos_token("SpecialToken" in json.dumps(read["post_processor"]))


if __name__ == "__main__":
    main()
