"""`ferrule tune`: what is tried, kept, and used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import ferrule
from ferrule import _core, tuning
from ferrule.tuning import Tuning


def test_each_step_tries_the_default_and_chooses_one() -> None:
    trials = list(tuning.search(budget_s=0.05))
    default = Tuning(_core.threads()[0])
    for what in ("threads", "claim_bytes", "tile_tokens"):
        step = [trial for trial in trials if trial.what == what]
        assert len(step) > 1 or what == "threads"
        assert sum(trial.chosen for trial in step) == 1
        assert len({trial.tuning for trial in step}) == len(step)
        assert all(trial.seconds > 0 for trial in step)
    assert trials[0].tuning == default
    # A step begins with what the one before chose.
    chosen = [trial.tuning for trial in trials if trial.chosen]
    first = [next(t.tuning for t in trials if t.what == what) for what in ("claim_bytes",)]
    assert first == chosen[:1]


@pytest.mark.parametrize("gain", [1.01, 1.5])
def test_the_default_stays_unless_another_is_clearly_faster(
    gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def race(_: object, __: int, tried: list[Tuning], ___: float) -> list[list[float]]:
        return [[1.0] * 5] + [[1.0 / gain] * 5 for _ in tried[1:]]

    monkeypatch.setattr(tuning, "_race", race)
    chosen = [trial for trial in tuning.search() if trial.chosen]
    default = Tuning(_core.threads()[0])
    assert (chosen[-1].tuning == default) == (gain < 1.03)


def test_it_is_used_on_this_machine_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = tmp_path / "ferrule"
    assert tuning.load(cache) is None
    found = Tuning(3, tile_tokens=33, claim_bytes=4096)
    file = tuning.save(found, cache)
    assert tuning.load(cache) == found
    with ferrule.LLM("tales-1m") as llm:
        assert llm.info.threads == 3
        tuned = llm.generate("Once upon a time" * 9, max_tokens=9, temperature=0)
    with ferrule.LLM("tales-1m", threads=1) as llm:
        assert llm.info.threads == 1
        plain = llm.generate("Once upon a time" * 9, max_tokens=9, temperature=0)
    assert tuned.token_ids == plain.token_ids
    held = json.loads(file.read_text())
    file.write_text(json.dumps(held | {"machine": "another"}))
    assert tuning.load(cache) is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"machine": 1}', '{"tuning": {"threads": 2}}', "null"]
)
def test_a_broken_file_is_no_tuning(text: str, tmp_path: Path) -> None:
    (tmp_path / "tuning.json").write_text(text)
    assert tuning.load(tmp_path) is None


@pytest.mark.parametrize("field", ["threads", "tile_tokens", "claim_bytes"])
def test_numbers_of_another_type_are_no_tuning(field: str, tmp_path: Path) -> None:
    file = tuning.save(Tuning(2), tmp_path)
    held = json.loads(file.read_text())
    held["tuning"][field] = "2"
    file.write_text(json.dumps(held))
    assert tuning.load(tmp_path) is None
