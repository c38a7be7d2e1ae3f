"""Prints what the embedded models say and the bits of their logits, as JSON: to be compared.

usage: python same_bits.py [--logits] [KERNEL SET THAT MUST BE THE ONE IN USE]
Run on CPUs of several kinds, or under emulation, it must print the same. Without --logits numpy is
not needed, which refuses CPUs that this package does not: their bits are seen through
log-probabilities. With it the logits themselves are hashed, byte by byte.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from typing import Any

from ferrule import LLM, _core

PROMPTS = ["Once upon a time", "Tell me a story about a fox and a lantern."]
TOKENS = 12


def said(name: str, quantization: Any, kv: Any, logits: bool) -> dict[str, Any]:
    """Answers, greedy and drawn, and a hash of 100 log-probabilities of each token."""
    with LLM(name, quantization=quantization, kv_cache_dtype=kv, progress=False) as llm:
        fields: dict[str, Any] = {"max_tokens": TOKENS, "logprobs": 100, "ignore_eos": True}
        answers = llm.generate(PROMPTS, temperature=0, **fields)
        answers.append(llm.generate(PROMPTS[0], temperature=0.8, seed=7, **fields))
        bits = hashlib.sha256()
        for answer in answers:
            for entry in answer.logprobs or ():
                for top in entry.top:
                    bits.update(struct.pack("<If", top.token_id, top.logprob))
        if logits:
            ids = llm.tokenize(PROMPTS[1]) + answers[1].token_ids
            bits.update(llm.logits(ids).astype("<f4").tobytes())
        return {
            "texts": [answer.text for answer in answers],
            "ids": [answer.token_ids for answer in answers],
            "bits": bits.hexdigest(),
        }


def main() -> None:
    """Run it."""
    isa, wanted = _core.kernel_set(), [word for word in sys.argv[1:] if word != "--logits"]
    if wanted and isa != wanted[0]:
        raise SystemExit(f"the kernel set in use is {isa}, expected {wanted[0]}")
    logits = "--logits" in sys.argv
    forms = [("tales-1m", "none", "f32"), ("tales-4m", "int8", "f16"), ("tales-4m", "int4", "int8")]
    print(json.dumps({" ".join(form): said(*form, logits) for form in forms}, indent=1))


if __name__ == "__main__":
    main()
