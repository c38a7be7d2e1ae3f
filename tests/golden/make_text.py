"""Copies the tokenizer and chat goldens of a few families from the shared goldens into tests/golden/text/.

usage: python make_text.py SHARED/goldens
"""

import json
import shutil
import sys
from pathlib import Path

# One for each kind of tokenizer: SentencePiece with prepended space and byte fallback, Metaspace,
# gemma (spaces replaced, no prefix), byte-level BPE with BOS, with NFC, with tokens that swallow
# white space, with digits apart.
KINDS = ["llama2-a", "mistral-a", "gemma3-a", "llama31-a", "qwen3-a", "phi3-a", "smollm3-a"]

if __name__ == "__main__":
    goldens, out = Path(sys.argv[1]), Path(__file__).parent / "text"
    for kind in KINDS:
        (out / kind).mkdir(parents=True, exist_ok=True)
        for name in (
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "chat_template.jinja",
        ):
            if (goldens / kind / name).exists():
                shutil.copyfile(goldens / kind / name, out / kind / name)
        tokenizer = json.loads((goldens / kind / "golden.json").read_text(encoding="utf-8"))[
            "tokenizer"
        ]
        golden = {"tokenizer": {"texts": tokenizer["texts"], "chat": tokenizer["chat"]}}
        text = json.dumps(golden, ensure_ascii=False, separators=(",", ":"))
        (out / kind / "golden.json").write_text(text + "\n", encoding="utf-8")
