"""From the name of a model to a folder on disk. The only code that uses the network."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from . import _core
from .errors import (
    DownloadError,
    FerruleError,
    ModelFormatError,
    ModelNotFoundError,
    UnsupportedModelError,
)

EMBEDDED = ("tales-4m", "tales-1m")
"""Models that ship inside this package."""

# After the colon: which of a repository's GGUF files.
_REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?::([\w.-]+))?")
_FILES = ["*.json", "*.safetensors", "*.jinja"]
# Sub-folders and consolidated.* hold the same weights once more, in the author's own format.
_NOT_FILES = ["*/*", "consolidated*"]
# Large, and no header tells of them.
_TOKENS = ("tokenizer.json", "vocab.json")
# The longest header of a safetensors file, and more than a JSON file has; what of a GGUF file is
# looked at first is an eighth.
_HEADER = 100_000_000


def is_model_name(text: str) -> bool:
    """Whether `text` reads as a model: a path that is there, an embedded name, org/repo[:kind]."""
    return (
        text in EMBEDDED
        or _REPOSITORY.fullmatch(text) is not None
        or (len(text) < 4096 and "\n" not in text and os.path.exists(text))
    )


def resolve(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    offline: bool = False,
    progress: bool = True,
) -> Path:
    """The folder or GGUF file of `model`: an existing path, an embedded name, else on the hub."""
    name = os.fspath(model)
    path = Path(name).expanduser()
    if path.exists():
        return _core.gguf_at(path) or _folder(path, name)
    if name in EMBEDDED:
        return _embedded(name)
    repository = _REPOSITORY.fullmatch(name) if isinstance(model, str) else None
    if repository is None:
        raise ModelNotFoundError(
            f"{name!r}: no such file or folder, and not the name of an embedded model "
            f"({', '.join(EMBEDDED)}) or of a hub repository ('org/repo', or 'org/repo:Q4_K_M' "
            "for a GGUF file)"
        )
    found = _download(repository[1], repository[2], revision, offline, progress)
    _no_adapter(found, name)
    return found


def _folder(path: Path, name: str) -> Path:
    if path.is_file():
        also = (
            "; give the folder that it lies in" if path.suffix in (".safetensors", ".json") else ""
        )
        raise ModelNotFoundError(
            f"{name}: is a file that is not GGUF, expected a model folder or a GGUF file{also}"
        )
    _no_adapter(path, name)
    if not (path / "config.json").is_file():
        raise ModelNotFoundError(
            f"{name}: no config.json in it, expected a model folder or a GGUF file"
        )
    return path


def _no_adapter(path: Path, name: str) -> None:
    if (path / "adapter_config.json").is_file():
        raise UnsupportedModelError(
            f"{name}: found adapter_config.json: adapters (LoRA) are not applied; merge it into "
            f"{_base(path)} and save that (peft: merge_and_unload(), save_pretrained(folder))"
        )


def _base(path: Path) -> str:
    """The model that an adapter is for, as far as it says."""
    try:
        base = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        return str(base["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        return "its base model"


def _embedded(name: str) -> Path:
    here = Path(__file__).resolve().parent
    # Installed: beside this file. In an editable installation: in the source tree.
    for folder in (here / "models" / name, here.parents[1] / "models" / name):
        if (folder / "config.json").is_file():
            return folder
    raise ModelNotFoundError(
        f"the embedded model {name!r} is missing from this installation ({here}); reinstall ferrule"
    )


def headers(model: str, into: Path, *, revision: str | None = None, offline: bool = False) -> Path:
    """As `resolve`, to look and not to load: of a repository only the headers come here.

    `into` gets files as long as the repository's that hold nothing else. What quantized safetensors
    are depends on more: those are downloaded.
    """
    repository = _REPOSITORY.fullmatch(model)
    here = model in EMBEDDED or Path(model).expanduser().exists()
    # On Windows a file that is made longer takes all of its length on the disk.
    if repository is None or here or offline or os.name == "nt":
        return resolve(model, revision=revision, offline=offline)
    name, kind = repository.groups()
    from huggingface_hub import HfApi, HfFileSystem

    with _told(name, revision, offline):
        files = HfApi().list_repo_files(name, revision=revision)
        hub = HfFileSystem()

        def copy(file: str, count: int = _HEADER) -> Path:
            """The first `count` bytes of a file; of a safetensors file no more than its header."""
            path = into / file.rpartition("/")[2]
            with hub.open(f"{name}/{file}", "rb", revision=revision) as there:
                start = b""
                if file.endswith(".safetensors"):
                    start = there.read(8)
                    count = min(count, int.from_bytes(start, "little"))
                path.write_bytes(start + there.read(count))
                os.truncate(path, there.size)
            return path

        def fits(file: str, *patterns: str) -> bool:
            return any(fnmatch(file, pattern) for pattern in patterns)

        ignored = [*_NOT_FILES, *_TOKENS]
        wanted = [file for file in files if fits(file, *_FILES) and not fits(file, *ignored)]
        weights = [file for file in wanted if file.endswith(".safetensors")]
        if kind is None and weights:
            for file in wanted:
                if not file.endswith(".safetensors"):
                    copy(file)
            _no_adapter(into, name)
            config = (_folder(into, name) / "config.json").read_bytes()
            if re.search(rb"\b(quantization|compression)_config\b", config):
                return resolve(model, revision=revision)
            for file in weights:
                copy(file)
            return into
        weights = _chosen(name, files, kind)
        for count in (_HEADER >> 3, _HEADER) if weights else ():
            first, *_ = [copy(file, count) for file in weights]
            with contextlib.suppress(ModelFormatError):  # it goes on behind
                tensors = json.loads(_core.inspect(first))["tensors"]
                if all(tensor["start"] <= count for tensor in tensors):
                    return first
    return resolve(model, revision=revision)


def _download(
    name: str, kind: str | None, revision: str | None, offline: bool, progress: bool
) -> Path:
    # Imported here: it takes longer than loading a small model.
    from huggingface_hub import HfApi, snapshot_download

    def fetch(allow: list[str], ignore: list[str] | None = None) -> Path:
        folder = snapshot_download(
            name,
            revision=revision,
            local_files_only=offline,
            allow_patterns=allow,
            ignore_patterns=ignore,
        )
        return Path(folder)

    def names() -> list[str]:
        if not offline:
            return HfApi().list_repo_files(name, revision=revision)
        folder = fetch(["*.gguf"])
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")]

    with _told(name, revision, offline), contextlib.nullcontext() if progress else _no_bars():
        if kind is None:
            folder = fetch(_FILES, _NOT_FILES)
            if any(folder.glob("*.safetensors")):
                return folder
        there = names()
        files = _chosen(name, there, kind)
        if files or offline:
            # A folder of neither is reported when its files are read.
            return fetch(files) / files[0] if files else folder
        weights = [file for file in there if file.endswith((".bin", ".pt", ".pth"))]
        also = f" only {weights[0]}: take a conversion of it" if weights else ""
        raise ModelNotFoundError(
            f"{name}: found no safetensors or GGUF file,{also or ' expected one'}; see {_url(name)}"
        )


@contextlib.contextmanager
def _told(name: str, revision: str | None, offline: bool) -> Iterator[None]:
    """What goes wrong on the hub, as our errors."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    url = _url(name)
    at = f" at revision {revision!r}" if revision else ""
    try:
        yield
    except FerruleError:
        raise
    except GatedRepoError as error:
        raise DownloadError(
            f"{name}: access to this repository is restricted; accept its terms on {url}, then "
            "log in (`hf auth login`) or set HF_TOKEN",
            url=url,
            status=_status(error),
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{name}: no revision {revision!r}; see {url}") from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{name!r}: no such folder here and no such repository on the hub ({url}); for a "
            "private one, log in (`hf auth login`) or set HF_TOKEN"
        ) from error
    except LocalEntryNotFoundError as error:
        if offline:
            raise ModelNotFoundError(
                f"{name}{at} is not in the local cache and offline=True; load it once with "
                "offline=False, or pass the path of a folder"
            ) from error
        raise DownloadError(
            f"{name}{at} is not in the local cache and {url} could not be reached; check the "
            "connection, or pass the path of a folder",
            url=url,
        ) from error
    except HfHubHTTPError as error:
        raise DownloadError(f"{url}: {error}", url=url, status=_status(error)) from error
    except Exception as error:  # every HTTP library that the hub client has used has its own
        raise DownloadError(f"{url}: {type(error).__name__}: {error}", url=url) from error


def _chosen(name: str, files: list[str], kind: str | None) -> list[str]:
    """The parts of the GGUF file whose name says `kind`; without a kind, of the only one."""
    models: dict[str, list[str]] = {}
    for file in sorted(files):
        base = file.rpartition("/")[2].lower()
        # mmproj-*: the vision or audio tower beside a model.
        if base.endswith(".gguf") and not base.startswith("mmproj"):
            stem = re.sub(r"-\d{5}-of-\d{5}$", "", file[: -len(".gguf")])
            models.setdefault(stem.rpartition("/")[2], []).append(file)
    found = list(models)
    if kind is not None:
        wanted = re.escape(kind.lower().removesuffix(".gguf"))
        word = re.compile(rf"(?<![a-z0-9]){wanted}(?![a-z0-9_])")
        found = [stem for stem in models if word.search(stem.lower())]
        found = [stem for stem in found if word.fullmatch(stem.lower())] or found
    if len(found) == 1:
        return models[found[0]]
    if kind is None and not models:
        return []
    number = "no GGUF file" if not found else f"{len(found)} GGUF files"
    that = "" if kind is None else f" for {kind!r}"
    there = ", ".join(found or models) or "none"
    raise ModelNotFoundError(
        f"{name}: found {number}{that}, expected one; there are: {there}; name one, as in "
        f"'{name}:Q4_K_M'"
    )


def _url(name: str) -> str:
    return f"https://huggingface.co/{name}"


def _status(error: Exception) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
