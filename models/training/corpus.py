"""A seeded generator of small-world English: stories and instruction chats.

    python corpus.py train --docs 120000 --seed 1 --out corpus.jsonl
    python corpus.py heldout --seed 900001 --out .       # heldout_stories.txt, heldout_tasks.jsonl

Everything the demo models learn is written by this program; no outside text is used.
Held-out data uses other seeds and other combinations: held() splits (name, thing) pairs, sums,
and (fact, phrasing) pairs in two sets, of which training only ever sees one.
"""

import argparse
import json
import random
import re

from plots import STORIES
from stories import Place, Who, an, cap, cast, held, mini, say, story, title
from words import (
    ANIMALS,
    BOYS,
    DAYS,
    FAR,
    GIRLS,
    MONTHS,
    OPPOSITES,
    SPECIES,
    SYSTEM,
    THINGS,
    UNKNOWN,
    VERBS,
    WORDS,
)


def add_sub(rng, split):
    """A sum or difference of numbers below 100."""
    while True:
        a, b = rng.randint(0, 99), rng.randint(0, 99)
        if rng.random() < 0.35:
            a, b = rng.randint(0, 20), rng.randint(0, 10)
        op = rng.choice("+-")
        if (a + b < 100 if op == "+" else a >= b) and held(op, min(a, b), max(a, b)) == (
            split == "heldout"
        ):
            break
    r = a + b if op == "+" else a - b
    word = "plus" if op == "+" else "minus"
    q = rng.choice(
        [
            f"What is {a} {op} {b}?",
            f"{a} {op} {b} =",
            f"How much is {a} {word} {b}?",
            f"Calculate {a} {op} {b}.",
            f"{a} {word} {b}?",
        ]
    )
    return "add" if op == "+" else "subtract", q, str(r), ()


def word_problem(rng, split):
    """A sum told as a small scene."""
    a, b = Who(rng), Who(rng)
    x, y, o = (
        rng.randint(2, 20),
        rng.randint(1, 9),
        rng.choice(["apples", "shells", "nuts", "stones", "eggs", "buttons", "coins"]),
    )
    if rng.random() < 0.5:
        q, r = (
            f"{a} has {x} {o}. {b} gives {a.him} {y} more. How many {o} does {a} have now?",
            x + y,
        )
    else:
        x = x + y
        q, r = f"{a} has {x} {o}. {a.He} gives {y} to {b}. How many {o} does {a} have left?", x - y
    return "word_problem", q, f"{a} has {r} {o}.", (x, y, o)


def count(rng, split):
    """Counting up or down, or counting words."""
    k = rng.randint(0, 2)
    if k == 0:
        a, n = rng.randint(1, 60), rng.randint(3, 9)
        return (
            "count",
            f"Count from {a} to {a + n}.",
            ", ".join(map(str, range(a, a + n + 1))),
            (a, n),
        )
    if k == 1:
        items = [
            rng.choice(WORDS[w])
            for w in [rng.choice(list(WORDS))]
            for _ in range(rng.randint(2, 8))
        ]
        return (
            "count",
            f"How many words are in this list: {', '.join(items)}?",
            str(len(items)),
            tuple(items),
        )
    a, n = rng.randint(5, 60), rng.randint(2, 5)
    return (
        "count",
        f"Count backwards from {a} to {a - n}.",
        ", ".join(map(str, range(a, a - n - 1, -1))),
        (a, n),
    )


def order(rng, split):
    """Days, months, numbers, opposites: what comes where."""
    k = rng.randint(0, 4)
    if k == 0:
        seq, name = rng.choice([(DAYS, "day"), (MONTHS, "month")])
        i, n, s = rng.randrange(len(seq)), rng.randint(1, 3), rng.choice([1, -1])
        how = ("comes" if n == 1 else f"is {n} {name}s") + (" after" if s > 0 else " before")
        return "order", f"Which {name} {how} {seq[i]}?", seq[(i + s * n) % len(seq)], (seq[i], how)
    if k == 1:
        ns = rng.sample(range(1, 100), 3)
        return (
            "order",
            f"Put these numbers in order, smallest first: {', '.join(map(str, ns))}.",
            ", ".join(map(str, sorted(ns))),
            tuple(ns),
        )
    if k == 2:
        a, b = rng.sample(range(1, 100), 2)
        return "order", f"Which is bigger, {a} or {b}?", str(max(a, b)), (a, b)
    if k == 3:
        a, b = rng.choice(OPPOSITES).split()
        a, b = rng.choice([(a, b), (b, a)])
        f = rng.choice(
            [
                "What is the opposite of {}?",
                "Give the opposite of the word {}.",
                "The opposite of {} is what?",
            ]
        )
        return "opposite", f.format(a), cap(b) + ".", (f, a)
    xs = rng.sample(rng.choice([GIRLS, BOYS, THINGS]), 3)
    return "order", f"Which word comes first in this list: {', '.join(xs)}?", xs[0], tuple(xs)


def animals(rng, split):
    """A question about an animal fact."""
    k = rng.choice(list(ANIMALS))
    home, food, does, legs, colour = ANIMALS[k]
    f, a = rng.choice(
        [
            ("Where does {} live?", f"{cap(an(k))} lives {home}."),
            ("Where can I find {}?", f"You can find {an(k)} {home}."),
            ("What does {} eat?", f"{cap(an(k))} eats {food}."),
            ("What food does {} like?", f"{cap(an(k))} likes {food}."),
            ("How many legs does {} have?", f"{cap(an(k))} has {legs} legs."),
            ("What colour is {}?", f"{cap(an(k))} is {colour}."),
            ("What does {} do?", f"{cap(an(k))} {does}."),
            ("Tell me about {}.", f"{cap(an(k))} lives {home}, eats {food} and {does}."),
        ]
    )
    return "animals", f.format(an(k)), a, (f, k)


def category(rng, split):
    """Which kind of thing a word is."""
    c = rng.choice(list(WORDS))
    w = rng.choice(WORDS[c])
    f = rng.choice(
        [
            "Is {} an animal, a toy, a food, a place, a colour or clothing?",
            "Which group does the word {} belong to: animal, toy, food, place, colour or clothing?",
            "Classify this word as animal, toy, food, place, colour or clothing: {}",
        ]
    )
    return "classify", f.format(w), cap(c) + ".", (f, w)


def mood(rng, split):
    """Whether a small story is happy or sad."""
    t, e = mini(rng, split)
    q = rng.choice(
        [
            "Is this happy or sad? {}",
            "{} Is this story happy or sad?",
            "Classify the mood of this text as happy or sad: {}",
        ]
    )
    return "mood", q.format(t), cap(e["mood"]) + ".", ()


def extract(rng, split):
    """Facts of a small story, as JSON."""
    t, e = mini(rng, split)
    fields = {
        "name": e["a"].name,
        "place": e["p"].n,
        "object": e["o"].n,
        "colour": e["o"].colour or "none",
        "mood": e["mood"],
        "friend": e["b"].name,
    }
    names = rng.choice(
        [
            ["name", "place"],
            ["name", "place"],
            ["name", "object"],
            ["object", "colour"],
            ["name", "object", "place"],
            ["name", "mood"],
            ["name", "friend"],
        ]
    )
    if len(names) == 2:
        listed = f"the {names[0]} and the {names[1]}"
    else:
        listed = "the name, the object and the place"
    q = rng.choice(
        ["Give {} as JSON. {}", "Extract {} as JSON: {}", "Read this and give {} as JSON.\n{}"]
    )
    return "json", q.format(listed, t), json.dumps({n: fields[n] for n in names}), ()


def mini_qa(rng, split):
    """A question about a small story."""
    t, e = mini(rng, split)
    qa = [
        ("Who is this story about?", f"It is about {e['a']}."),
        ("Where was {a}?", "{a} was {p.at}."),
        ("Which thing is in the story?", "It is {o.an}."),
        ("Who was with {a}?", "{b} was with {a}."),
    ]
    if e["o"].colour:
        qa.append(("What colour was the {o.n}?", f"The {e['o'].n} was {e['o'].colour}."))
    q, a = rng.choice(qa)
    return (
        "story_qa",
        rng.choice(["{}\n\n{}", "Read this story. {} {}"]).format(t, q.format(**e)),
        a.format(**e),
        (),
    )


def rewrite(rng, split):
    """A sentence to be changed in a given way."""
    a, b, p = Who(rng), Who(rng), Place(rng)
    v = rng.choice(VERBS)
    k = rng.randint(0, 4)
    s = f"{a} {v[0]} {p.at}."
    q, r = [
        (f"Rewrite in the past tense: {s}", f"{a} {v[1]} {p.at}."),
        (f"Make this a question: {s}", f"Does {a.name} {v[2]} {p.at}?"),
        (f"Say that this is not true: {s}", f"{a} does not {v[2]} {p.at}."),
        (f"Rewrite with {b} instead of {a}: {s}", f"{b} {v[0]} {p.at}."),
        (f"Repeat this: {s}", s),
    ][k]
    return "rewrite", q, r, (a.name, v[2], p.n)


def full_qa(rng, split):
    """A question about a full story."""
    t, e = story(rng, split, short=True)
    q, a = rng.choice(STORIES[e["schema"]][2])
    return (
        "story_qa_long",
        rng.choice(["{}\n\n{}", "Read the story and answer. {}\n\n{}"]).format(t, say(rng, q, e)),
        say(rng, a, e),
        (),
    )


def summary(rng, split):
    """A full story to be told in one sentence."""
    t, e = story(rng, split, short=True)
    return (
        "summary",
        rng.choice(
            [
                "Summarise this story in one sentence.\n\n{}",
                "{}\n\nSum this up in one sentence.",
                "What is this story about, in one sentence? {}",
            ]
        ).format(t),
        say(rng, STORIES[e["schema"]][1], e),
        (),
    )


def go_on(rng, split):
    """A story to be continued."""
    t, _ = story(rng, split, short=True)
    cut = [m.end() for m in re.finditer(r"[.!?] (?=[A-Z])", t)]
    i = cut[min(len(cut) - 1, rng.randint(1, 4))]
    return (
        "continue",
        rng.choice(
            ["Continue this story: {}", "How does this story go on? {}", "Finish this story.\n\n{}"]
        ).format(t[:i].strip()),
        t[i:].strip(),
        (),
    )


def ask_story(rng, split):
    """A wish for a story about something."""
    thing, kind = rng.choice(THINGS), rng.choice(SPECIES)
    if rng.random() < 0.3:
        t, e = story(rng, split, short=rng.random() < 0.5)
        return (
            "tell",
            rng.choice(
                [
                    "Tell me a story.",
                    "Write a short story.",
                    "Please tell me a bedtime story.",
                    f"Tell me a story about {e['a']}.",
                    f"Write a story about {e['a']} and {e['b']}.",
                ]
            ),
            t,
            (),
        )
    e = cast(rng, split, rng.choice(["lost", "share", "deliver", "gift"]), kind, thing)
    t, _ = story(rng, split, e, short=rng.random() < 0.5)
    if kind not in t:
        t = f"{e['a']} was {e['a'].trait_an} {kind}. " + t
    return (
        "tell",
        rng.choice(
            [
                f"Tell me a story about {an(kind)} and {an(thing)}.",
                f"Write a story about {an(kind)} with {an(thing)}.",
                f"Tell me about {an(kind)} called {e['a']} and {an(thing)}.",
            ]
        ),
        t,
        (),
    )


def chat(rng, split):
    """Small talk, and what the model does not know."""
    far = rng.choice(FAR)
    f, a = rng.choice(
        [
            (
                "[Hello|Hi|Good morning|Hey][!|.|]",
                "Hello! [How can I help you?|Would you like to hear a story?|What shall we do today?]",
            ),
            (
                "[Who|What] are you?",
                "I am a [small|tiny] language model. I know a little world of stories, animals and sums.",
            ),
            (
                "What can you do?",
                "I can tell stories, answer questions about them, add small numbers and fill in JSON.",
            ),
            ("[Thank you|Thanks][!|.]", "[You are welcome!|My pleasure.]"),
            ("How are you?", "I am well, thank you. [How are you?|Shall I tell you a story?]"),
            ("[Bye|Goodbye|Good night][!|.|]", "Goodbye! [Come back soon.|Sleep well.]"),
            ("What is your name?", "My name is Tales."),
            ("[Can you help me|I need help][?|.]", "Of course. What would you like to know?"),
        ]
        + [
            (
                rng.choice(UNKNOWN).format(x=far),
                "I am sorry, I do not know that. I only know a small world of stories.",
            )
        ]
        * 4
    )
    return "chat", say(rng, f, {}), say(rng, a, {}), (f, a) if "know that" in a else ("chat",)


TASKS = [
    (add_sub, 5),
    (word_problem, 2),
    (count, 2),
    (order, 3),
    (animals, 3),
    (category, 1),
    (mood, 2),
    (extract, 4),
    (mini_qa, 4),
    (rewrite, 2),
    (full_qa, 4),
    (summary, 2),
    (go_on, 1),
    (ask_story, 3),
    (chat, 2),
]
KEYED = {"chat", "word_problem", "count", "order", "opposite", "animals", "classify", "rewrite"}


def task(rng, split, fn=None):
    """One task of a random (or the given) kind: (kind, question, answer)."""
    fn = fn or rng.choices([f for f, _ in TASKS], [w for _, w in TASKS])[0]
    for _ in range(1000):
        kind, q, a, key = fn(rng, split)
        if not key or key == ("chat",) or held(*key) == (split == "heldout"):
            break
    return kind, q, a


def chat_text(turns, system=None):
    """The chat format: also what chat_template in tokenizer_config.json produces."""
    text = f"<|system|>{system}<|end|>" if system else ""
    return text + "".join(
        f"<|{'user' if i % 2 == 0 else 'assistant'}|>{t}<|end|>" for i, t in enumerate(turns)
    )


def document(rng, split):
    """One training document: a story, a conversation, or a page of sums."""
    r = rng.random()
    if r < 0.40:
        t, e = story(rng, split)
        if rng.random() < 0.15:
            t = title(rng, e) + "\n\n" + t
        return t
    if r < 0.45:
        return "\n".join(" ".join(add_sub(rng, split)[1:3]) for _ in range(12))
    fn = ask_story if rng.random() < 0.08 else None
    turns = []
    for _ in range(1 if fn else rng.choice([1, 1, 2, 3, 4])):
        turns += task(rng, split, fn)[1:]
        if sum(map(len, turns)) > 1200:
            break
    return chat_text(turns, rng.choice(SYSTEM) if rng.random() < 0.25 else None)


def main():
    """Run the command line."""
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("split", choices=["train", "heldout"])
    ap.add_argument("--docs", type=int, default=100000)
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--out", default="corpus.jsonl")
    args = ap.parse_args()
    rng = random.Random(args.seed)
    if args.split == "train":
        with open(args.out, "w") as f:
            for _ in range(args.docs):
                f.write(json.dumps(document(rng, "train")) + "\n")
        return
    text = ""
    while len(text) < 200_000:
        text += story(rng, "heldout")[0] + "\n\n\n"
    with open(f"{args.out}/heldout_stories.txt", "w") as f:
        f.write(text)
    with open(f"{args.out}/heldout_tasks.jsonl", "w") as f:
        for fn, n in [
            (fn, 60 if fn in (add_sub, extract, mini_qa, full_qa) else 40) for fn, _ in TASKS
        ]:
            for _ in range(n):
                kind, q, a = task(rng, "heldout", fn)
                f.write(json.dumps({"prompt": q, "answer": a, "kind": kind}) + "\n")


if __name__ == "__main__":
    main()
