"""Converts golden checkpoints to GGUF with llama.cpp's own converter.

For `converted_models_equal_their_originals` (tests/gguf/models.rs). Needs llama.cpp's sources, torch and transformers:

    python tests/golden/make_gguf.py LLAMA_CPP GOLDENS OUT [NAME ...]

Writes OUT/NAME.gguf in f32. The converter knows released models: it is made to skip what it checks about their
tokenizers, and to take configurations that leave defaults out. Its arithmetic on weights is left alone.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

# Models whose releases have layers for drafting, and these goldens none.
DRAFTING = ("glm4-moe", "qwen3-next", "qwen35")


def convert(llama: Path, folder: str, out: str, flags: list[str]) -> None:
    """Runs inside a process of its own: the converter's modules are patched."""
    import runpy

    sys.dont_write_bytecode = True
    sys.path[:0] = [str(llama), str(llama / "gguf-py")]
    import conversion.base as base
    import conversion.gpt2
    import conversion.stablelm
    import torch

    text = base.TextModel
    text.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    text._set_vocab_glm = text._set_vocab_gpt2
    sentencepiece = text._set_vocab_sentencepiece

    def vocabulary(self, *args, **kwargs):
        if (self.dir_model / "tokenizer.model").is_file():
            return sentencepiece(self, *args, **kwargs)
        tokenizer = json.loads((self.dir_model / "tokenizer.json").read_text())
        by_bytes = "ByteLevel" in json.dumps([tokenizer["pre_tokenizer"], tokenizer["decoder"]])
        return self._set_vocab_gpt2() if by_bytes else self._set_vocab_llama_hf()

    text._set_vocab_sentencepiece = vocabulary

    # transformers renames keys that the converter knows by their old names.
    load = base.ModelBase.load_hparams
    config = json.loads((Path(folder) / "config.json").read_text())
    base.ModelBase.load_hparams = staticmethod(
        lambda *args, **more: {**config, **load(*args, **more)}
    )

    # GPT-2's masks, which the converter means to leave out.
    names = conversion.gpt2.GPT2Model.filter_tensors
    conversion.gpt2.GPT2Model.filter_tensors = classmethod(
        lambda cls, item: None if item[0].endswith(".attn.bias") else names.__func__(cls, item)
    )

    # StableLM's norms of each head: the converter gathers them, then returns them from a generator.
    plain = conversion.stablelm.StableLMModel.modify_tensors
    norms = {}

    def modify(self, data, name, bid):
        if ".norms." not in name:
            yield from plain(self, data, name, bid)
            return
        stem = name.split(".norms.")[0]
        norms.setdefault(stem, []).append((int(name.split(".")[-2]), data))
        key = "num_attention_heads" if "q_layernorm" in name else "num_key_value_heads"
        if len(norms[stem]) == self.hparams[key]:
            stacked = torch.stack([data for _, data in sorted(norms[stem], key=lambda x: x[0])])
            yield from text.modify_tensors(self, stacked, f"{stem}.weight", bid)

    conversion.stablelm.StableLMModel.modify_tensors = modify

    sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", out, "--outtype", "f32", *flags]
    runpy.run_path(str(llama / "convert_hf_to_gguf.py"), run_name="__main__")


def main() -> None:
    if sys.argv[1] == "--one":
        return convert(Path(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:])
    llama, goldens, out = (Path(arg).resolve() for arg in sys.argv[1:4])
    for name in sys.argv[4:] or sorted(p.parent.name for p in goldens.glob("*/config.json")):
        flags = ["--no-mtp"] if name.startswith(DRAFTING) else []
        command = [sys.executable, __file__, "--one", llama, goldens / name, out / f"{name}.gguf"]
        log = out / f"{name}.log"
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        with log.open("w") as output:
            code = subprocess.run([*command, *flags], stdout=output, stderr=output, env=env)
        print(name, "ok" if code.returncode == 0 else log.read_text().strip().splitlines()[-1])


if __name__ == "__main__":
    main()
