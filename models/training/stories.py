"""Stories of a small world, from templates and a seeded generator of random numbers.

Templates are "spins": "[a|b|c]" picks one branch (they nest) and "{name}" is filled from the
story's cast. A story is a list of beats, one per line, so what happens is fixed first and only
the wording varies: that is what keeps cause, pronouns and objects consistent.
held() splits combinations, such as (name, thing) pairs, in two sets; training only ever sees one.
"""

import re
import zlib

from plots import OPEN, STORIES
from words import (
    ASIDES,
    BLOCKS,
    BOYS,
    BREAKS,
    CHORES,
    COLOURS,
    CONTESTS,
    DAYS,
    FEARS,
    GIRLS,
    JOBS,
    MORALS,
    NEEDS,
    PLACES,
    PLAGUES,
    PLANTS,
    PLAY,
    RECIPES,
    SIZES,
    SKILLS,
    SOURCES,
    SPECIES,
    SPOTS,
    STUCK,
    SURNAMES,
    THINGS,
    TRAITS,
    WEATHER,
)

SPIN = re.compile(r"\[([^\[\]]*)\]")


def an(text):
    """The text with its article."""
    return ("an " if text[0] in "aeiou" or text.startswith("honest") else "a ") + text


def cap(text):
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


def held(*key):
    """Whether this combination is kept out of training: about one in ten, by a fixed hash."""
    return zlib.crc32("|".join(map(str, key)).encode()) % 10 == 0


class Who:
    """A person or a talking animal, with pronouns; formats as the name."""

    def __init__(self, rng, taken=(), job=None):
        girl = rng.random() < 0.5
        self.name = rng.choice([n for n in (GIRLS if girl else BOYS) if n not in taken])
        self.he, self.him, self.his, self.himself = (
            ("she", "her", "her", "herself") if girl else ("he", "him", "his", "himself")
        )
        self.He, self.His = cap(self.he), cap(self.his)
        self.trait, self.kind = rng.choice(TRAITS), "girl" if girl else "boy"
        self.job = job
        if job:
            self.name = ("Mrs. " if girl else "Mr. ") + rng.choice(SURNAMES)
            self.intro = (
                f"{self.name}, the {job}," if rng.random() < 0.5 else f"the {job}, {self.name},"
            )
        else:
            if rng.random() < 0.35:
                self.kind = rng.choice(SPECIES)
            animal = self.kind in SPECIES
            self.intro = rng.choice(
                [
                    f"{an(self.kind)} named {self.name}",
                    f"{an(self.trait)} {self.kind} called {self.name}",
                ]
                + ([] if animal else [f"a neighbour named {self.name}"])
            )
        self.Intro = cap(self.intro)

    def __format__(self, spec):
        return self.name


class Thing:
    """A thing with a describing word; formats as 'red kite'."""

    def __init__(self, rng, n=None):
        self.n = n or rng.choice(THINGS)
        self.colour = rng.choice(COLOURS) if rng.random() < 0.65 else None
        self.adj = self.colour or rng.choice(SIZES)
        self.full = f"{self.adj} {self.n}"
        self.an = an(self.full)

    def __format__(self, spec):
        return self.full


class Place:
    """A place; formats as 'the mill'."""

    def __init__(self, rng, n=None, taken=()):
        self.n = n or rng.choice([p for p in PLACES if p not in taken])
        self.at = f"{PLACES[self.n]} the {self.n}"
        self.At = cap(self.at)

    def __format__(self, spec):
        return "the " + self.n


def say(rng, template, env):
    """Choose a branch of each spin, fill in the names, and mend spaces and capitals."""
    while "[" in template:
        template = SPIN.sub(lambda m: rng.choice(m[1].split("|")), template)
    text = (
        re.sub(r"  +", " ", template.format(**env).replace(",,", ",").replace(",.", "."))
        .replace(" .", ".")
        .strip()
    )
    return re.sub(r"(^|[.!?] )([a-z])", lambda m: m[1] + m[2].upper(), text)


def cast(rng, split, schema=None, animal=None, thing=None):
    """Choose who, what and where for one story: what its templates are filled from."""
    while True:
        schema_ = schema or rng.choice(list(STORIES))
        a = Who(rng)
        if animal:
            a.kind = animal
        b = Who(rng, taken=[a.name])
        c = Who(rng, job=rng.choice(list(JOBS)))
        e = {
            "a": a,
            "b": b,
            "c": c,
            "schema": schema_,
            "day": rng.choice(DAYS),
            "home": Place(rng),
            "o": Thing(rng, thing),
            "pet": rng.choice(["Dot", "Button", "Pip", "Clover", "Speck", "Crumb"]),
        }
        e["p"] = Place(rng, taken=[e["home"].n])
        e["s1"], e["s2"] = rng.sample(SPOTS, 2)
        weather = rng.choice(list(WEATHER))
        key = e["o"].n
        if schema_ in ("block", "rescue") and rng.random() < 0.4:
            e["b"] = b = Who(rng, job=rng.choice(list(JOBS)))
        if schema_ == "block":
            e["block"], e["tried"], e["tool"], e["fix"] = key, *_ = rng.choice(BLOCKS)
            e["tried"] = e["tried"].replace("[his|]", a.his)
        elif schema_ == "rescue":
            e["animal"], e["stuck"], e["tool"], e["free"] = key, *_ = rng.choice(STUCK)
            e["animal_an"] = an(key)
        elif schema_ == "make":
            key = e["product"] = rng.choice(list(RECIPES))
            e["product_an"] = (
                key if key in ("vegetable soup", "honey bread", "berry jam") else an(key)
            )
            e["i1"], e["i2"], e["i3"] = rng.sample(RECIPES[key], 3)
            e["c"] = c = Who(rng, job=SOURCES[e["i3"]])
            e["src"] = Place(rng, JOBS[c.job])
            e["chore"], e["chored"] = rng.choice(CHORES)
        elif schema_ == "learn":
            e["skill"], e["flop"], e["tip"], e["win"] = key, *_ = rng.choice(SKILLS)
        elif schema_ == "fear":
            e["scare"], e["truth"] = key, _ = rng.choice(FEARS)
        elif schema_ == "plant":
            key = e["plant"] = rng.choice(list(PLANTS))
            e["grown"] = PLANTS[key]
            e["plague"], e["cure"] = rng.choice(PLAGUES)
        elif schema_ == "honest":
            key, e["how"] = rng.choice(BREAKS)
            e["o"] = Thing(rng, key)
        elif schema_ == "contest":
            e["contest"], e["mishap"], aid = key, *_ = rng.choice(CONTESTS)
            e["aid"] = aid.format(a=a, b=b)
        elif schema_ == "swap":
            (e["need1"], n1), (e["need2"], n2) = rng.sample(NEEDS, 2)
            e["x"], e["y"] = Thing(rng, n1), Thing(rng, n2)
            if key in (n1, n2):
                continue
            for t in (e["x"], e["y"]):
                t.a_n = an(t.n)
        elif schema_ == "plans":
            e["play"], weather, e["instead"] = rng.choice(PLAY)
            key = e["play"]
        if (
            held(a.name, key) != (split == "heldout")
            or (split == "train" and held(a.name, e["o"].n))
            or b.name == c.name
        ):
            continue
        if a.kind in SPECIES:  # animals mostly meet animals
            a.kind2 = "little " + a.kind
        else:
            a.kind2 = "my " + rng.choice(["friend", "dear", a.kind])
        a.trait_an = an(a.trait)
        e["o"].An = cap(e["o"].an)
        e["weather"], e["sky"] = weather, rng.choice(WEATHER[weather])
        return e


def story(rng, split, env=None, short=False):
    """One full story; returns (text, env)."""
    e = env or cast(rng, split)
    beats, _, _, moral = STORIES[e["schema"]]
    parts, para = [], []
    if e["schema"] not in ("alone", "share") and rng.random() < (0.35 if short else 0.75):
        para.append(say(rng, "[" + OPEN + "]", e))
    for beat in beats:
        if not beat:
            if rng.random() < 0.75:
                parts.append(" ".join(para))
                para = []
            continue
        if beat[0] == "?":
            if rng.random() < (0.7 if short else 0.45):
                continue
            beat = beat[1:]
        para.append(say(rng, beat, e))
        if not short and rng.random() < 0.07 and not para[-1].endswith(('"', ":")):
            para.append(rng.choice(ASIDES).format(**e) if "[" not in para[-1] else "")
            para[-1] = say(rng, para[-1], e)
    parts.append(" ".join(para))
    if not short and rng.random() < 0.3:
        parts[-1] += " " + rng.choice(MORALS[moral])
    sep = " " if short else "\n\n"
    return sep.join(p for p in parts if p), e


def title(rng, e):
    """A title for the story of this cast."""
    return say(
        rng,
        "[{a} and the {o}|{a} and the {o.n}|The {o}]"
        if e["schema"] in ("lost", "share", "deliver", "gift", "honest", "swap")
        else "[{a}'s story|{a} and {b}|The story of {a}|A day {p.at}]",
        e,
    )


def mini(rng, split):
    """A three to five sentence story with known facts, for questions and extraction."""
    while True:
        a, o, p = Who(rng), Thing(rng), Place(rng)
        b = Who(rng, taken=[a.name])
        if held(a.name, o.n) == (split == "heldout"):
            break
    w, mood = rng.choice(list(WEATHER)), rng.choice(["happy", "sad"])
    e = {
        "a": a,
        "b": b,
        "o": o,
        "p": p,
        "sky": rng.choice(WEATHER[w]),
        "day": rng.choice(DAYS),
        "weather": w,
        "mood": mood,
        "spot": rng.choice(SPOTS),
    }
    end = (
        "[{a} found {o.an} {spot}. What luck!|{b} gave {a} {o.an}, and {a} laughed.|{a} played with {o.an} all day.|{a} got {o.an} as a present.]"
        if mood == "happy"
        else "[{a} lost {o.an} and began to cry.|Then {a} broke {o.an} by accident.|Someone had taken {a}'s {o}.|{a} dropped {o.an} into the water, and it was gone.]"
    )
    e["bi"] = b.intro
    text = say(
        rng,
        "[{sky}. |][On {day}, {a}|{a}|One day {a}] [was|played|sat] {p.at}. [{b} was there, too. |There {a.he} met {bi}. |{a} was with {b}. ]"
        + end,
        e,
    )
    return text, e
