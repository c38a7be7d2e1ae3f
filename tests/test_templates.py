"""Chat templates render as jinja2 renders them, whatever the conversation.

For every template in the repository and, where FERRULE_SHARED is set, every one there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ferrule

HERE = Path(__file__).parent / "golden"
_spec = importlib.util.spec_from_file_location("make_chat", HERE / "make_chat.py")
assert _spec is not None and _spec.loader is not None
make_chat = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_chat)

SHARED = os.environ.get("FERRULE_SHARED")
FOLDERS = [HERE / "chat"] + ([Path(SHARED) / "weights" / "chat_templates"] if SHARED else [])
SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|eos|>"}  # tales-1m's
TEMPLATES = sorted(path for folder in FOLDERS for path in folder.rglob("*.jinja"))

text = st.text(
    st.sampled_from("aZ09 \n\t.,:'\"\\/<>&{}%#|äß你😀")
    | st.characters(exclude_categories=["C", "Z"]),
    max_size=12,
)
words = (
    st.sampled_from(["", "a", "Hi\n", "<think>\nHm.\n</think>\n\nYes.", "<|im_end|>", "[INST]"])
    | text
)
name = st.sampled_from(["get_weather", "f", "Search_2"])
leaf = (
    words | st.integers(-3, 10**6) | st.booleans() | st.floats(-10, 10).map(lambda x: round(x, 3))
)
arguments = st.dictionaries(
    st.sampled_from(["city", "days", "x"]), leaf | st.lists(leaf, max_size=2), max_size=3
)


def tools() -> st.SearchStrategy[list[dict[str, Any]]]:
    kind = st.sampled_from(["string", "integer", "number", "boolean", "object"])
    items = st.fixed_dictionaries({"type": kind})
    field = st.fixed_dictionaries(
        {"type": kind}, optional={"description": words, "enum": st.lists(text, max_size=2)}
    )
    field |= st.fixed_dictionaries({"type": st.just("array"), "items": items})
    parameters = st.fixed_dictionaries(
        {"type": st.just("object"), "properties": st.dictionaries(name, field, max_size=2)},
        optional={"required": st.lists(name, max_size=2)},
    )
    function = st.fixed_dictionaries({"name": name, "description": words, "parameters": parameters})
    return st.lists(
        st.fixed_dictionaries({"type": st.just("function"), "function": function}), max_size=2
    )


@st.composite
def conversation(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A system turn or none; then turns of user and assistant, with calls of tools and answers."""
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(words)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(words)})
        if draw(st.booleans()):
            continue  # some templates want turns to alternate: both must refuse
        if draw(st.booleans()):
            call = {"name": draw(name), "arguments": draw(arguments)}
            calls = [{"type": "function", "id": "abcdef123", "function": call}]
            messages.append({"role": "assistant", "content": draw(words), "tool_calls": calls})
            answer = {"role": "tool", "content": draw(words), "tool_call_id": "abcdef123"}
            messages.append({**answer, "name": call["name"]})
        message = {"role": "assistant", "content": draw(words)}
        if draw(st.booleans()):
            message["reasoning_content"] = draw(words)
        messages.append(message)
    return messages


@pytest.fixture(scope="module", params=TEMPLATES, ids=lambda path: path.stem)
def template(request: pytest.FixtureRequest) -> Any:
    source = request.param.read_text(encoding="utf-8")
    try:
        theirs = make_chat.environment().from_string(source)
    except Exception as error:  # not for the Python that runs this
        pytest.skip(f"jinja2 does not take it: {error}")
    now = make_chat.NOW - time.localtime().tm_gmtoff
    with (
        ferrule.LLM("tales-1m", chat_template=source, threads=1, progress=False) as llm,
        mock.patch("time.time", return_value=now),
    ):
        yield llm, theirs, source


@settings(max_examples=40)
@given(data=st.data())
def test_as_jinja2(template: Any, data: st.DataObject) -> None:
    llm, theirs, source = template
    messages = data.draw(conversation())
    some = data.draw(tools())
    if some and "tools" not in source:
        with pytest.raises(ferrule.ChatTemplateError, match="no place for tools"):
            llm.apply_chat_template(messages, tools=some)
        some = []
    prompt = data.draw(st.booleans())
    extra = data.draw(st.sampled_from([{}, {"enable_thinking": False}, {"enable_thinking": True}]))
    try:
        expected = theirs.render(
            messages=json.loads(json.dumps(messages)),
            tools=some or None,
            documents=None,
            add_generation_prompt=prompt,
            **SPECIAL,
            **extra,
        )
    except Exception as error:
        if "not iterable" in str(error) or "JSON serializable" in str(error):
            return  # minijinja takes none as an empty list, and a generator as a list
        with pytest.raises(ferrule.ChatTemplateError):
            llm.apply_chat_template(
                messages, tools=some, chat_template_kwargs=extra, add_generation_prompt=prompt
            )
        return
    found = llm.apply_chat_template(
        messages, tools=some, chat_template_kwargs=extra, add_generation_prompt=prompt
    )
    assert found == expected
