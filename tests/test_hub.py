"""From a name to a folder. No network: the hub client is replaced where one would be needed."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

import ferrule
from ferrule import LLM, hub


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_embedded_models() -> None:
    for name in hub.EMBEDDED:
        assert (hub.resolve(name) / "model.safetensors").is_file()


def test_a_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tales-4m").mkdir()
    (tmp_path / "tales-4m/config.json").write_text("{}")
    assert hub.resolve("tales-4m") == Path("tales-4m")
    assert hub.resolve(tmp_path / "tales-4m") == tmp_path / "tales-4m"


@pytest.mark.parametrize(
    ("text", "is_model"),
    [
        ("tales-1m", True),
        ("Qwen/Qwen3-0.6B", True),
        (".", True),
        ("Once upon a time", False),
        ("and/or?", False),
        ("a b/c", False),
        ("x" * 5000, False),
        ("two\nlines", False),
        ("", False),
        ("a\0b", False),
    ],
)
def test_what_reads_as_a_model(text: str, is_model: bool) -> None:
    assert hub.is_model_name(text) == is_model


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "../up/x", "a b/c", "/no/where", "", "a\0b"])
def test_not_found(name: str) -> None:
    with pytest.raises(ferrule.ModelNotFoundError):
        hub.resolve(name)


def test_what_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.resolve("org/repo", revision="v1", offline=True) == tmp_path
    assert asked["name"] == "org/repo"
    assert asked["revision"] == "v1"
    assert asked["local_files_only"] is True
    files = [
        "config.json",
        "model.safetensors",
        "original/params.json",
        "consolidated.safetensors",
        "pytorch_model.bin",
        "chat_template.jinja",
    ]
    chosen = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(chosen) == ["config.json", "model.safetensors", "chat_template.jinja"]


def test_offline_and_unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ferrule.ModelNotFoundError, match="offline=True"):
        LLM("org/not-there", offline=True)
    with pytest.raises(ferrule.DownloadError, match="org/not-there") as caught:
        LLM("org/not-there")
    assert caught.value.url == "https://huggingface.co/org/not-there"


@pytest.mark.parametrize(
    ("raised", "error", "text"),
    [
        (errors.GatedRepoError, ferrule.DownloadError, "HF_TOKEN"),
        (errors.RepositoryNotFoundError, ferrule.ModelNotFoundError, "no such repository"),
        (errors.RevisionNotFoundError, ferrule.ModelNotFoundError, "'v9'"),
        (errors.HfHubHTTPError, ferrule.DownloadError, "503"),
        (RuntimeError, ferrule.DownloadError, "RuntimeError"),
    ],
)
def test_failures(
    monkeypatch: pytest.MonkeyPatch,
    raised: type[Exception],
    error: type[Exception],
    text: str,
) -> None:
    def download(*_: Any, **__: Any) -> None:
        if issubclass(raised, errors.HfHubHTTPError):
            answer = SimpleNamespace(status_code=503, headers={}, request=None)
            raise raised("503 from the hub", response=answer)
        raise raised("odd")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(error, match=text) as caught:
        hub.resolve("org/repo", revision="v9")
    if isinstance(caught.value, ferrule.DownloadError) and raised is not RuntimeError:
        assert caught.value.status == 503
