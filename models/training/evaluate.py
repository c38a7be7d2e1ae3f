"""Measure the exported models in float32.

    python evaluate.py --out out        # writes eval.json and golden.json there

Perplexity and task accuracy on the held-out text (heldout_*, beside this file), agreement of
student and teacher, samples, and golden outputs for tests.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
MODELS = ["tales-4m", "tales-1m"]
LONG = 200
CHECKED = {"continue", "tell", "chat"}  # kinds without one right answer: perplexity only
PROMPTS = [
    "Once upon a time",
    "One rainy day, Nora lost her red kite.",
    "Near the river lived a shy otter.",
]
ASKED = [
    "Tell me a story about a fox and a lantern.",
    "What is 23 + 45?",
    "Give the name and the place as JSON. Tess was at the mill. She lost a blue hat.",
    "Is this happy or sad? Hugo played in the garden. Then Hugo broke a green cup by accident.",
    "Hello!",
]


def chat(tok, prompt):
    """The prompt as the first turn of a chat."""
    return tok.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )


@torch.no_grad()
def scores(model, rows, masks):
    """Mean loss over the masked targets of id lists, and the argmax at each target."""
    loss, count, picks = 0.0, 0, [None] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for i in range(0, len(rows), 16):
        idx = by_length[i : i + 16]
        width = max(len(rows[j]) for j in idx)
        x = torch.tensor([rows[j] + [1] * (width - len(rows[j])) for j in idx])
        logits = model(x).logits.float()
        for k, j in enumerate(idx):
            n = len(rows[j])
            y, m = x[k, 1:n], torch.tensor(masks[j][1:])
            nll = torch.nn.functional.cross_entropy(logits[k, : n - 1], y, reduction="none")
            loss += (nll * m).sum().item()
            count += int(m.sum())
            picks[j] = (logits[k, : n - 1].argmax(-1), m.bool())
    return loss / count, picks


@torch.no_grad()
def generate(model, tok, texts, n, **kw):
    """What the model says to each text, in at most n tokens."""
    out = [None] * len(texts)
    ids = [tok(t, add_special_tokens=False).input_ids for t in texts]
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for i in range(0, len(ids), 48):
        idx = by_length[i : i + 48]
        width = max(len(ids[j]) for j in idx)
        x = torch.tensor([[1] * (width - len(ids[j])) + ids[j] for j in idx])
        mask = torch.tensor([[0] * (width - len(ids[j])) + [1] * len(ids[j]) for j in idx])
        y = model.generate(input_ids=x, attention_mask=mask, max_new_tokens=n, pad_token_id=1, **kw)
        for k, j in enumerate(idx):
            out[j] = tok.decode(y[k, width:], skip_special_tokens=True).strip()
    return out


def main():
    """Run the command line."""
    ap = argparse.ArgumentParser()
    ap.add_argument("--out", default="out")
    ap.add_argument("--threads", type=int, default=2)
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    measure(args.out)


def accuracy(model, tok, tasks):
    """Right answers by kind of task, and two wrong ones of each kind."""
    asked = [t for t in tasks if t["kind"] not in CHECKED]
    prompts = [chat(tok, t["prompt"]) for t in asked]
    said = generate(model, tok, prompts, 64, do_sample=False, eos_token_id=[1, 5])
    right, wrong = defaultdict(list), defaultdict(list)
    for t, text in zip(asked, said, strict=True):
        ok = text == t["answer"].strip()
        right[t["kind"]].append(ok)
        if not ok and len(wrong[t["kind"]]) < 2:
            wrong[t["kind"]].append({"answer": t["answer"], "said": text})
    table = {kind: {"right": sum(v), "of": len(v)} for kind, v in sorted(right.items())}
    table["all"] = {"right": sum(map(sum, right.values())), "of": len(asked)}
    return table, wrong


def samples(model, tok, prompts):
    """What the model writes, greedy and at temperature 0.8."""
    torch.manual_seed(0)
    greedy = generate(model, tok, prompts, LONG, do_sample=False, eos_token_id=[1, 5])
    at = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "eos_token_id": [1, 5]}
    warm = generate(model, tok, prompts, LONG, do_sample=True, **at)
    return [
        {"prompt": p, "greedy": g, "t0.8": t} for p, g, t in zip(prompts, greedy, warm, strict=True)
    ]


@torch.no_grad()
def golden_outputs(model, ids):
    """Logits after the prompt, and 64 greedy ids that ignore the end."""
    x = torch.tensor([ids])
    y = model.generate(
        input_ids=x,
        attention_mask=torch.ones_like(x),
        max_new_tokens=64,
        min_new_tokens=64,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=1,
    )
    logits = model(x).logits[0, -1].float().tolist()
    return {
        "logits": [float(f"{v:.7g}") for v in logits],
        "greedy_ids": y[0, x.shape[1] :].tolist(),
    }


@torch.no_grad()
def drafting(student, golden):
    """How far the student foresees what the teacher writes (greedy): what drafting meets.

    Gives the share of tokens foreseen, and the tokens that a draft of 4 yields.
    """
    hits, runs = [], []
    for g in golden:
        start = len(g["input_ids"])
        ids = g["input_ids"] + g[MODELS[0]]["greedy_ids"]
        ends = (i for i in range(start, len(ids)) if ids[i] in (1, 5))
        stop = next(ends, len(ids) - 1) + 1
        pick = student(torch.tensor([ids[:stop]])).logits[0].argmax(-1).tolist()
        ok = [pick[i - 1] == ids[i] for i in range(start, stop)]
        hits += ok
        i = 0
        while i < len(ok):
            n = next((k for k in range(4) if i + k >= len(ok) or not ok[i + k]), 4)
            runs.append(n)
            i += n + 1
    return round(sum(hits) / len(hits), 4), round(sum(runs) / len(runs), 3)


def measure(out):
    """Write eval.json and golden.json."""
    began = time.time()
    tok = AutoTokenizer.from_pretrained(f"{out}/{MODELS[0]}")
    models = {
        m: AutoModelForCausalLM.from_pretrained(f"{out}/{m}", dtype=torch.float32).eval()
        for m in MODELS
    }

    def encode(text):
        return tok(text, add_special_tokens=False).input_ids

    tasks = [json.loads(line) for line in (HERE / "heldout_tasks.jsonl").read_text().splitlines()]
    texts = (HERE / "heldout_stories.txt").read_text().split("\n\n\n")
    stories = [encode("<|bos|>" + t)[:1024] for t in texts if t.strip()]
    head = [encode(chat(tok, t["prompt"])) for t in tasks]
    tail = [encode(t["answer"] + "<|end|>") for t in tasks]
    rows = [(h + t)[:1024] for h, t in zip(head, tail, strict=True)]
    marks = [([0] * len(h) + [1] * len(t))[:1024] for h, t in zip(head, tail, strict=True)]
    prompts = ["<|bos|>" + p for p in PROMPTS] + [chat(tok, q) for q in ASKED]
    golden = [{"prompt": p, "input_ids": encode(p)} for p in prompts]
    result = {"perplexity": {}, "accuracy": {}, "samples": {}, "mistakes": {}, "agreement": {}}
    picked = {}
    for name, model in models.items():
        story_loss, picked_stories = scores(model, stories, [[1] * len(r) for r in stories])
        answer_loss, picked_answers = scores(model, rows, marks)
        picked[name] = {"stories": picked_stories, "answers": picked_answers}
        result["perplexity"][name] = {
            "stories": round(math.exp(story_loss), 4),
            "answers": round(math.exp(answer_loss), 4),
            "story_loss": round(story_loss, 4),
            "answer_loss": round(answer_loss, 4),
        }
        result["accuracy"][name], result["mistakes"][name] = accuracy(model, tok, tasks)
        result["samples"][name] = samples(model, tok, prompts)
        for g in golden:
            g[name] = golden_outputs(model, g["input_ids"])
    teacher, student = (picked[m] for m in MODELS)
    for part in ("stories", "answers"):
        pairs = zip(teacher[part], student[part], strict=True)
        same = torch.cat([(a == b)[mask] for (a, mask), (b, _) in pairs]).float()
        result["agreement"][part] = round(same.mean().item(), 4)
    foreseen, accepted = drafting(models[MODELS[1]], golden)
    result["agreement"]["teacher_greedy_text"] = foreseen
    result["agreement"]["accepted_per_draft_of_4"] = accepted
    result["seconds"] = round(time.time() - began, 1)
    Path(out, "eval.json").write_text(json.dumps(result, indent=1))
    Path(out, "golden.json").write_text(json.dumps(golden))


if __name__ == "__main__":
    main()
