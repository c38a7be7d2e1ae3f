"""benches/compare.py and benches/peers.py: what they ask of other engines and read from them."""

import argparse
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benches"))
import compare
import peers


def fake(asked):
    """An engine: a second for the prompt, half a second for each token after the first."""

    def run(prompts, tokens):
        asked.append((prompts, tokens))
        return [10.0 + (i > 0) + max(0, i - 1) / 2 for i in range(tokens + 1)]

    return run


@pytest.mark.parametrize(
    ("test", "expected", "shape"),
    [
        ("pp512", 512.0, (1, 512, 1)),
        ("tg32@128x4", 8.0, (4, 128, 33)),
        ("tg32", 2.0, (1, 1, 33)),
    ],
)
def test_speeds(test, expected, shape):
    asked = []
    _, kind, tokens, depth, batch = compare.Test.parse(test)
    assert peers.speeds(fake(asked), kind, tokens, depth, batch or 1, 2) == [expected] * 2
    assert [(len(p), len(p[0]), n) for p, n in asked[1:]] == [shape] * 2
    first = [prompt[0] for prompts, _ in asked for prompt in prompts]
    assert len(set(first)) == len(first), "an engine's prefix cache could answer"


def arguments(**given):
    base = {"quantization": "int4", "gguf": [], "llama_bench": "no-such", "ik_bench": "no-such"}
    base["kv_cache_dtype"] = "f16"
    return argparse.Namespace(**base | {"peer": [], "repetitions": 1} | given)


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 100,
    "tie_word_embeddings": True,
}


def test_what_is_not_installed_is_named(capsys):
    lacking = ("openvino", "no-such-python:models")
    found = compare.engines(arguments(ferrule="ferrule", model="m", peer=[lacking]), CONFIG)
    assert [engine.name for engine in found] == ["ferrule int4"]
    lines = capsys.readouterr().err.splitlines()
    for name, peer in peers.PEERS.items():
        (line,) = [line for line in lines if line.startswith(f"left out: {name}: ")]
        assert peer.install in line
    assert len(lines) == len(peers.PEERS) + 2


def test_unknown_peer_is_an_error():
    with pytest.raises(SystemExit, match="expected openvino"):
        compare.engines(arguments(ferrule="f", model="m", peer=[("openvin", "p:m")]), CONFIG)


def test_ik_llama_cpp(monkeypatch):
    base = compare.Engine("x", 7, lambda *_: ["llama", "-m", "f", "-fa", "1", "-o", "json"], list)
    monkeypatch.setattr(compare, "llama_cpp", lambda *_: base)
    engine = compare.ik_llama_cpp(arguments(ik_bench="ik/llama-bench"), CONFIG, "pure", "f")
    deep, batch = map(compare.Test.parse, ("tg32@4096", "tg4@16x4"))
    assert "-p 0 -n 0 -gp 4096,32" in " ".join(engine.command(deep, 2))
    assert engine.command(batch, 2)[4:] == ["ik/llama-batched-bench", "-m", "f", "-fa", "1", "-rtr"]
    table = "|  PP |  TG |  B | N_KV | T_PP s | S_PP t/s | T_TG s | S_TG t/s | T s | S t/s |\n"
    table += "|-----|-----|\n| 16 | 4 | 4 | 32 | 2.668 | 6.00 | 11.200 | 1.43 | 13.8 | 2.31 |\n"
    assert engine.samples(table, batch) == [1.43]


def test_adapter_of_a_python_peer(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"12345")
    engine = compare.by_python(arguments(), "ctranslate2", "python9", str(tmp_path))
    assert engine.weight_bytes == 5
    command = engine.command(compare.Test.parse("tg32@128x4"), 2)
    assert command[0] == "python9"
    assert command[2:] == ["ctranslate2", str(tmp_path), "tg", "32", "128", "4", "2", "1"]
    assert engine.samples("a warning\n[1.5, 2.5]\n", compare.Test.parse("tg32")) == [1.5, 2.5]
