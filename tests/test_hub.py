"""From a name to a folder. No network: the hub client is replaced where one would be needed."""

from __future__ import annotations

import io
import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

import ferrule
from ferrule import LLM, cli, hub


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
        ("Qwen/Qwen3-0.6B-GGUF:Q4_K_M", True),
        ("Qwen/Qwen3: a model", False),
        ("Qwen:Q4_K_M", False),
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


@pytest.mark.parametrize(
    "name",
    [
        "nothing",
        "a/b/c",
        "../up/x",
        "a b/c",
        "/no/where",
        "",
        "a\0b",
        "a/b:",
        "a/b:c/d",
        "a/b.gguf/",
    ],
)
def test_not_found(name: str) -> None:
    with pytest.raises(ferrule.ModelNotFoundError):
        hub.resolve(name)


def test_what_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (tmp_path / "model.safetensors").touch()
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


FILES = [
    "README.md",
    "mmproj-F16.gguf",
    "model-Q4_K_M.gguf",
    "model-Q4_K_S.gguf",
    "model-q8_0.gguf",
    "model-IQ4_XS.gguf",
    "model-UD-Q6_K_XL.gguf",
    "BF16/model-BF16-00001-of-00002.gguf",
    "BF16/model-BF16-00002-of-00002.gguf",
]


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A stand-in for the hub: what it holds; downloads appear in a folder, empty."""
    files = list(FILES)

    def download(_: str, *, allow_patterns: list[str], **options: Any) -> str:
        chosen = huggingface_hub.utils.filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=options["ignore_patterns"]
        )
        for name in chosen:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            if not options["local_files_only"]:
                (tmp_path / name).touch()
        return str(tmp_path)

    def listed(_self: Any, _: str, **_options: Any) -> list[str]:
        return files

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listed)
    return files


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("Q4_K_M", "model-Q4_K_M.gguf"),
        ("q4_k_s", "model-Q4_K_S.gguf"),
        ("Q8_0", "model-q8_0.gguf"),
        ("IQ4_XS", "model-IQ4_XS.gguf"),
        ("UD-Q6_K_XL", "model-UD-Q6_K_XL.gguf"),
        ("Q6_K_XL", "model-UD-Q6_K_XL.gguf"),
        ("BF16", "BF16/model-BF16-00001-of-00002.gguf"),
        ("model-q8_0", "model-q8_0.gguf"),
        ("model-q8_0.gguf", "model-q8_0.gguf"),
    ],
)
def test_a_file_of_a_gguf_repository(
    repository: list[str], tmp_path: Path, kind: str, file: str
) -> None:
    path = hub.resolve(f"org/repo:{kind}")
    assert path == tmp_path / file
    there = sorted(p.name for p in tmp_path.rglob("*.gguf"))
    assert there == (sorted(p.name for p in path.parent.iterdir()) if "-of-" in file else [file])
    # What is there already needs no network.
    repository.clear()
    repository.extend(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.gguf"))
    assert hub.resolve(f"org/repo:{kind}", offline=True) == path


def test_a_gguf_repository_with_one_model(repository: list[str], tmp_path: Path) -> None:
    repository[:] = ["config.json", "m-Q8_0.gguf", "mmproj-m.gguf"]
    assert hub.resolve("org/repo") == tmp_path / "m-Q8_0.gguf"
    repository[:] = ["config.json", "model.safetensors", "m-Q8_0.gguf"]
    assert hub.resolve("org/repo") == tmp_path
    assert hub.resolve("org/repo:Q8_0") == tmp_path / "m-Q8_0.gguf"


def test_a_repository_of_other_weights(repository: list[str]) -> None:
    repository[:] = ["config.json", "pytorch_model.bin"]
    with pytest.raises(ferrule.ModelNotFoundError, match=r"org/repo: .* only pytorch_model\.bin"):
        hub.resolve("org/repo")
    repository[:] = ["README.md"]
    with pytest.raises(
        ferrule.ModelNotFoundError, match="found no safetensors or GGUF file, expected"
    ):
        hub.resolve("org/repo")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("org/repo", "6 GGUF files"),
        ("org/repo:Q4_K", "no GGUF file for 'Q4_K'"),
        ("org/repo:Q2_K", "there are: model-BF16, model-IQ4_XS, model-Q4_K_M"),
        ("org/repo:model", "6 GGUF files for 'model'"),
        ("org/repo:F16", "no GGUF file for 'F16'"),
        ("org/repo:.", "no GGUF file"),
    ],
)
def test_which_gguf_file_is_meant(repository: list[str], name: str, text: str) -> None:
    with pytest.raises(ferrule.ModelNotFoundError, match=text):
        hub.resolve(name)


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


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A stand-in for the hub that gives ranges of these files, and downloads none."""
    files: dict[str, Path] = {}

    class There(io.FileIO):
        @property
        def size(self) -> int:
            return os.fstat(self.fileno()).st_size

        def read(self, size: int = -1, /) -> bytes:
            assert 0 <= size <= hub._HEADER
            return super().read(size)

    def opened(_self: Any, path: str, mode: str, *, revision: str | None) -> There:
        assert (mode, revision) == ("rb", "v1")
        return There(files[path.removeprefix("org/repo/")])

    def download(*_: Any, **__: Any) -> None:
        raise RuntimeError("a download")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: list(files))
    monkeypatch.setattr(huggingface_hub.HfFileSystem, "open", opened)
    return files


def planned(capsys: pytest.CaptureFixture[str], *args: str) -> Any:
    assert cli.main(["plan", *args, "-q", "int8", "-c", "64", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    # Free memory changes from one call to the next.
    return [{name: x for name, x in row.items() if "available" not in name} for row in rows]


@pytest.mark.skipif(os.name != "posix", reason="on Windows all is downloaded: see `headers`")
def test_a_plan_reads_headers_only(
    ranges: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remote = ["org/repo", "--revision", "v1"]
    folder = hub.resolve("tales-1m")
    ranges |= {path.name: path for path in folder.iterdir()}
    assert planned(capsys, *remote) == planned(capsys, "tales-1m")
    path = hub.headers("org/repo", tmp_path, revision="v1") / "model.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    whole = (folder / "model.safetensors").read_bytes()
    assert path.read_bytes() == whole[:header].ljust(len(whole), b"\0")
    del ranges["config.json"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ferrule.ModelNotFoundError, match=r"^org/repo: no config\.json in it"):
        hub.headers("org/repo", tmp_path / "empty", revision="v1")
    gguf = sorted((Path(__file__).parent / "golden/gguf").rglob("*.gguf"))[0]
    ranges.clear()
    ranges["sub/m-Q8_0.gguf"] = gguf
    assert planned(capsys, "org/repo:Q8_0", *remote[1:]) == planned(capsys, str(gguf))
    # What depends on more than headers is downloaded.
    golden = Path(__file__).parent / "golden/quant-fp8-block-moe-a"
    ranges.clear()
    ranges |= {path.name: path for path in golden.iterdir()}
    with pytest.raises(ferrule.DownloadError, match="a download"):
        hub.headers("org/repo", tmp_path, revision="v1")
    ranges["adapter_config.json"] = golden / "config.json"
    with pytest.raises(
        ferrule.UnsupportedModelError, match=r"org/repo: found adapter_config\.json"
    ):
        hub.headers("org/repo", tmp_path, revision="v1")
