"""What callers of `LLM` give, checked and brought into one form."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from .errors import FileAccessError, InvalidParameterError
from .params import ChatFields, Fields


def prompt_list(prompts: Any) -> tuple[bool, Sequence[Any]]:
    """Whether it is one prompt, and the list of prompts."""
    if isinstance(prompts, str):
        return True, [prompts]
    if isinstance(prompts, (bytes, Mapping)) or not hasattr(prompts, "__getitem__"):
        raise TypeError(
            f"prompts: found {type(prompts).__name__}, expected text, token ids, or a list of them"
        )
    # A number has __index__; so has an array, but that has a length, too.
    ids = len(prompts) and hasattr(prompts[0], "__index__") and not hasattr(prompts[0], "__len__")
    return (True, [prompts]) if ids or getattr(prompts, "ndim", 2) == 1 else (False, prompts)


def chat_list(messages: Any) -> tuple[bool, Sequence[Any]]:
    """Whether it is one conversation, and the list of conversations."""
    if isinstance(messages, (str, bytes, Mapping)) or not hasattr(messages, "__getitem__"):
        raise TypeError(
            f"messages: found {type(messages).__name__}, expected a list of dicts with 'role' and "
            "'content'"
        )
    single = len(messages) and isinstance(messages[0], Mapping)
    return (True, [messages]) if single else (False, messages)


def plain_ids(name: str, ids: Any) -> list[int]:
    """Token ids as a list of Python's whole numbers."""
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence):
        raise TypeError(f"{name}: found {type(ids).__name__}, expected token ids")
    for token in ids:
        if not hasattr(token, "__index__"):
            raise TypeError(f"{name}: found {token!r}, expected a token id")
        if not 0 <= int(token) < 1 << 32:
            raise InvalidParameterError(
                f"{name}: found {token}, expected a token id", field=name, value=str(token)
            )
    return [int(token) for token in ids]


def sampling(fields: ChatFields) -> Fields:
    """Those that are not for the template."""
    told = ("tools", "chat_template_kwargs")
    return cast("Fields", {name: x for name, x in fields.items() if name not in told})


def as_json(name: str, value: object) -> str:
    """As JSON text."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
        return text
    except UnicodeEncodeError as error:
        raise surrogate(name, error) from None
    except (TypeError, ValueError) as error:
        raise InvalidParameterError(
            f"{name}: expected what JSON can hold: {error}", field=name
        ) from error


def text_file(name: str, path: str | os.PathLike[str]) -> str:
    """The text of the UTF-8 file that the argument `name` names."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        what = error.strerror or str(error)
        raise FileAccessError(f"{name}: {os.fspath(path)}: {what}", file=os.fspath(path)) from None
    except UnicodeDecodeError as error:
        raise InvalidParameterError(
            f"{name}: {os.fspath(path)}: not UTF-8 ({error})", field=name, value=os.fspath(path)
        ) from None


def family(path: str | os.PathLike[str] | None) -> str | None:
    """The TOML text of a family, if one is given."""
    return None if path is None else text_file("family", path)


def texts(name: str, given: str | Sequence[str]) -> list[str]:
    """One text or several as a list of what UTF-8 can hold."""
    found = [given] if isinstance(given, str) else list(given)
    for text in found:
        if not isinstance(text, str):
            raise TypeError(f"{name}: found {type(text).__name__}, expected text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise surrogate(name, error) from None
    return found


def too_large(fields: Mapping[str, Any]) -> InvalidParameterError:
    """The error for a number that the core's types can't hold."""
    signed = (-(1 << 63), (1 << 63) - 1)
    whole = {"seed": (0, (1 << 64) - 1)}
    whole["stop_token_ids"] = whole["logit_bias"] = (0, (1 << 32) - 1)
    for name, value in fields.items():
        for item in value if isinstance(value, list) else [value]:
            number, bias = item if isinstance(item, tuple) else (item, 0)
            for found, (least, most) in ((number, whole.get(name, signed)), (bias, signed)):
                if isinstance(found, int) and not least <= found <= most:
                    expected = f"at least {least}" if found < least else f"at most {most}"
                    return InvalidParameterError(
                        f"{name}: found {found}, expected {expected}", field=name, value=str(found)
                    )
    return InvalidParameterError("found a number that is too large")


def surrogate(name: str, error: UnicodeEncodeError) -> InvalidParameterError:
    """The error for text that UTF-8 can't hold."""
    found = error.object[error.start]
    return InvalidParameterError(
        f"{name}: lone surrogate U+{ord(found):04X} at position {error.start}; expected text that "
        "UTF-8 can hold",
        field=name,
        value=ascii(found),
    )


def auto(name: str, value: int | str) -> int | None:
    """A count, or None for "auto"."""
    if value == "auto":
        return None
    if isinstance(value, str) or value < 1:
        raise InvalidParameterError(
            f"{name}: found {value!r}, expected 'auto' or at least 1", field=name, value=str(value)
        )
    return value
