"""Train the two embedded models on corpus.py's text: tales-4m, and tales-1m distilled from it.

    python train.py prepare --docs 60000          # corpus -> tokenizer -> tokens.bin
    python train.py train --steps 2296            # resumes from run/last.pt if it is there

Both models see the same batches. The teacher learns from the text (cross-entropy); the student,
in the same step, from the teacher's distribution (KL) and the text. Training in one loop means
the teacher's forward pass is paid once, and that a run cut short still leaves a matching pair.
Matrices are trained with Muon, embeddings and norms with AdamW. The learning rates (warm-up,
plateau, linear decay) follow the steps done, or with --minutes the time worked.
"""

import argparse
import json
import math
import os
import random
import time

import corpus
import numpy as np
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

SPECIAL = ["<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
VOCAB, CONTEXT = 2048, 1024
SHAPES = {
    "tales-4m": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    "tales-1m": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(texts):
    """Byte-level BPE; digits stand alone, so that sums are learnable."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=[AddedToken(s, special=True, normalized=False) for s in SPECIAL],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tok.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 0)]
    )
    return tok


def save_tokenizer(tok, folder):
    """Write tokenizer.json and tokenizer_config.json."""
    os.makedirs(folder, exist_ok=True)
    tok.save(f"{folder}/tokenizer.json")
    special = {
        str(i): {
            "content": s,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "single_word": False,
            "special": True,
        }
        for i, s in enumerate(SPECIAL)
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "pad_token": "<|eos|>",
        "add_bos_token": True,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": special,
        "chat_template": CHAT_TEMPLATE,
    }
    with open(f"{folder}/tokenizer_config.json", "w") as f:
        json.dump(config, f, indent=2)


def encode(tok, texts):
    """The documents as one stream of ids: <|bos|> text <|eos|> ..."""
    out = []
    for i in range(0, len(texts), 2000):
        for enc in tok.encode_batch(texts[i : i + 2000]):
            out.append(np.array([*enc.ids, 1], dtype=np.uint16))
    return np.concatenate(out)


def prepare(args):
    """Write the tokenizer, the training ids and the ids to validate on."""
    os.makedirs(args.run, exist_ok=True)
    rng = random.Random(args.seed)
    docs = [corpus.document(rng, "train") for _ in range(args.docs)]
    if not os.path.exists(f"{args.run}/tokenizer.json"):
        save_tokenizer(build_tokenizer(docs[:20000]), args.run)
    tok = Tokenizer.from_file(f"{args.run}/tokenizer.json")
    encode(tok, docs).tofile(f"{args.run}/tokens.bin")
    stories, chats = random.Random(900_002), random.Random(900_003)
    encode(tok, [corpus.story(stories, "heldout")[0] for _ in range(250)]).tofile(
        f"{args.run}/val_stories.bin"
    )
    encode(tok, [corpus.chat_text(corpus.task(chats, "heldout")[1:]) for _ in range(500)]).tofile(
        f"{args.run}/val_chat.bin"
    )
    n = os.path.getsize(f"{args.run}/tokens.bin") // 2
    print(f"{len(docs)} documents, {sum(map(len, docs))} characters, {n} tokens")


def build(name):
    """A model with random weights."""
    config = LlamaConfig(
        **SHAPES[name],
        vocab_size=VOCAB,
        max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_range=0.02,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(config)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Newton-Schulz), matrices of one shape together."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                shapes.setdefault(tuple(p.shape), []).append(p)
            for (rows, cols), ps in shapes.items():
                for p in ps:
                    buf = self.state[p].setdefault("m", torch.zeros_like(p))
                    buf.lerp_(p.grad, 1 - group["momentum"])
                x = torch.stack([p.grad.lerp(self.state[p]["m"], group["momentum"]) for p in ps])
                x = x.mT if rows > cols else x
                x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
                for _ in range(5):
                    a = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                x = (x.mT if rows > cols else x).float()
                for p, u in zip(ps, x, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(u, alpha=-group["lr"] * max(1, rows / cols) ** 0.5)


def optimizers(model, lr_muon, lr_adam):
    """Muon for the matrices, AdamW for the rest."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        Muon(matrices, lr_muon),
        torch.optim.AdamW(rest, lr=lr_adam, betas=(0.9, 0.97), weight_decay=0.0),
    ]


def logits_of(model, x):
    """Logits of ids [batch, length], computed in bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        return model(x).logits


@torch.no_grad()
def validate(nets, run):
    """Losses of the models on the held-out stories and chats."""
    out = {}
    for part in ("stories", "chat"):
        data = np.fromfile(f"{run}/val_{part}.bin", dtype=np.uint16)[: 24 * 512 + 1].astype(
            np.int64
        )
        x, y = torch.from_numpy(data[:-1]).view(-1, 512), torch.from_numpy(data[1:])
        for name, net in nets.items():
            out[f"{name} {part}"] = round(
                functional.cross_entropy(logits_of(net, x).float().flatten(0, 1), y).item(), 4
            )
    return out


def save(nets, opts, state, run):
    """Write all that a later run needs to go on."""
    blob = dict(
        nets={k: n.state_dict() for k, n in nets.items()},
        opts=[[o.state_dict() for o in os_] for os_ in opts],
        **state,
    )
    torch.save(blob, f"{run}/last.pt.tmp")
    os.replace(f"{run}/last.pt.tmp", f"{run}/last.pt")


def export(nets, run, out):
    """Write bf16 weights in the Hugging Face layout, with the tokenizer beside them."""
    for name, net in nets.items():
        half = build(name)
        half.load_state_dict(net.state_dict())
        half.to(torch.bfloat16).save_pretrained(f"{out}/{name}")
        os.chmod(f"{out}/{name}/model.safetensors", 0o644)
        save_tokenizer(Tokenizer.from_file(f"{run}/tokenizer.json"), f"{out}/{name}")
        with open(f"{out}/{name}/config.json") as f:
            config = json.load(f) | {
                "rope_theta": 10000.0,
                "torch_dtype": "bfloat16",
                "use_cache": True,
                "eos_token_id": [1, 5],
            }
        generation = {
            "bos_token_id": 0,
            "eos_token_id": [1, 5],
            "pad_token_id": 1,
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.95,
            "max_new_tokens": 256,
        }
        for file, content in (("config.json", config), ("generation_config.json", generation)):
            with open(f"{out}/{name}/{file}", "w") as f:
                json.dump(content, f, indent=2)
                f.write("\n")


def train(args):
    """Train both models in one loop, then export them."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    nets = {name: build(name) for name in SHAPES}
    teacher, student = nets.values()
    opts = [optimizers(teacher, 0.02, 4e-3), optimizers(student, 0.02, 6e-3)]
    base = [[g["lr"] for o in os_ for g in o.param_groups] for os_ in opts]
    state = {"step": 0, "worked": 0.0, "at": 0, "tokens": 0}
    if os.path.exists(f"{args.run}/last.pt"):
        blob = torch.load(f"{args.run}/last.pt", weights_only=False)
        for name, net in nets.items():
            net.load_state_dict(blob["nets"][name])
        for os_, sds in zip(opts, blob["opts"], strict=True):
            for o, sd in zip(os_, sds, strict=True):
                o.load_state_dict(sd)
        state = {k: blob.get(k, v) for k, v in state.items()}
    data = np.fromfile(f"{args.run}/tokens.bin", dtype=np.uint16)
    saved, progress = time.time(), 0.0
    while progress < 1:
        began, before, sums, n = time.time(), state["worked"], np.zeros(3), 0
        while n < args.chunk and progress < 1:
            state["worked"] = before + time.time() - began
            progress = max(
                state["worked"] / 60 / args.minutes if args.minutes else 0,
                state["step"] / args.steps if args.steps else 0,
            )
            scale = min(1, (state["step"] + 1) / 40) * max(0.02, min(1, (1 - progress) / 0.6))
            for os_, lrs in zip(opts, base, strict=True):
                for g, lr in zip((g for o in os_ for g in o.param_groups), lrs, strict=True):
                    g["lr"] = lr * scale
            length = 1024 if progress > 0.85 else 512
            size = args.batch * 512
            if state["at"] + size + 1 > len(data):
                state["at"] = random.Random(state["step"]).randrange(length)
            span = torch.from_numpy(data[state["at"] : state["at"] + size + 1].astype(np.int64))
            x, y = span[:-1].view(-1, length), span[1:]
            log_t = functional.log_softmax(logits_of(teacher, x).flatten(0, 1).float(), -1)
            loss_t = functional.nll_loss(log_t, y)
            loss_t.backward()
            # The student sees half of the batch: the teacher needs the time more.
            half, log_t = size // 2, log_t.detach()[: size // 2]
            log_s = functional.log_softmax(
                logits_of(student, x[: len(x) // 2]).flatten(0, 1).float(), -1
            )
            kl = functional.kl_div(log_s, log_t, log_target=True, reduction="batchmean")
            ce = functional.nll_loss(log_s, y[:half])
            mix = min(0.9, state["step"] / 200)  # an untrained teacher has nothing to say
            (mix * kl + (1 - mix) * ce).backward()
            for net, os_ in zip(nets.values(), opts, strict=True):
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                for o in os_:
                    o.step()
                    o.zero_grad(set_to_none=True)
            state["step"] += 1
            state["at"] += size
            state["tokens"] += size
            sums += [loss_t.item(), ce.item(), kl.item()]
            n += 1
        state["worked"] = before + time.time() - began
        row = {
            "step": state["step"],
            "tokens": state["tokens"],
            "at": time.strftime("%H:%M:%S"),
            "worked": round(state["worked"], 1),
            "lr_scale": round(scale, 3),
            "teacher": round(sums[0] / n, 4),
            "student": round(sums[1] / n, 4),
            "kl": round(sums[2] / n, 4),
        }
        if time.time() - saved > 150 or progress >= 1:
            row |= validate(nets, args.run)
        assert math.isfinite(row["teacher"])
        if "tales-4m chat" in row:
            save(nets, opts, state, args.run)
            saved = time.time()
        with open(f"{args.run}/log.jsonl", "a") as log:
            log.write(json.dumps(row) + "\n")
    save(nets, opts, state, args.run)
    export(nets, args.run, args.out)


def main():
    """Run the command line."""
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("what", choices=["prepare", "train", "export"])
    ap.add_argument("--run", default="run")
    ap.add_argument("--out", default="out")
    ap.add_argument("--docs", type=int, default=60000)
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--minutes", type=float, default=0)
    ap.add_argument("--steps", type=int, default=2296)
    ap.add_argument("--batch", type=int, default=16)
    ap.add_argument("--chunk", type=int, default=20)
    ap.add_argument("--threads", type=int, default=2)
    args = ap.parse_args()
    if args.what == "export":
        blob = torch.load(f"{args.run}/last.pt", weights_only=False)
        nets = {name: build(name) for name in SHAPES}
        for name, net in nets.items():
            net.load_state_dict(blob["nets"][name])
        export(nets, args.run, args.out)
    elif args.what == "prepare":
        prepare(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
