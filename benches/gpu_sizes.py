"""How large everything is that benches/gpu.py does: on a device, and to try the script itself."""

from __future__ import annotations

from typing import NamedTuple

# [n, k] of the products of a layer, and of the head.
SHAPES = {
    "8B qkv": (6144, 4096),
    "8B o": (4096, 4096),
    "8B gate+up": (28672, 4096),
    "8B down": (4096, 14336),
    "8B head": (128256, 4096),
    "0.6B qkv": (4096, 1024),
    "0.6B gate+up": (6144, 1024),
    "0.6B down": (1024, 3072),
}


class Size(NamedTuple):
    """How large everything is."""

    shapes: dict[str, tuple[int, int]]
    tokens: tuple[int, ...]
    # [keys, sequences] of attention.
    behind: tuple[tuple[int, int], ...]
    copied: int
    samples: int
    # Bytes of all sets of a matrix at least: several times the L2 of an H200.
    caches: float
    # Models at most; of a model the prompt, and tokens generated.
    models: int | None
    prompt: int
    answer: int
    # Of a model with random weights: what of its shape is not its own, its context, tokens
    # generated at [depth, batch], prompts that are read, seconds of an energy's measurement at
    # least (the counter moves every 20 to 100 ms).
    config: dict[str, int]
    context: int
    generate: int
    generated: tuple[tuple[int, int], ...]
    deep: tuple[tuple[int, int], ...]
    read: tuple[int, ...]
    window: float


FULL = Size(
    shapes=SHAPES,
    tokens=(1, 8, 64, 512, 2, 4, 16, 32),
    behind=((1024, 1), (8192, 1), (32768, 1), (1024, 32), (8192, 8)),
    copied=1 << 30,
    samples=15,
    caches=4 * 50e6,
    models=None,
    prompt=150,
    answer=40,
    config={},
    context=10240,
    generate=128,
    generated=((0, 1), (0, 32), (1024, 1), (0, 8)),
    deep=((8192, 1), (1024, 8), (1024, 32), (8192, 8), (8192, 32)),
    read=(2048, 512, 8192),
    window=5.0,
)
SMALL = Size(
    shapes={"tiny": (96, 300)},
    tokens=(1, 9),
    behind=((70, 2),),
    copied=1 << 12,
    samples=2,
    caches=1.0,
    models=1,
    prompt=24,
    answer=3,
    config={
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 500,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    context=128,
    generate=4,
    generated=((0, 1), (0, 3)),
    deep=((70, 2),),
    read=(70,),
    window=0.1,
)
