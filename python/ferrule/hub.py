"""From the name of a model to a folder on disk. The only code that uses the network."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from .errors import DownloadError, ModelNotFoundError

EMBEDDED = ("tales-4m", "tales-1m")
"""Models that ship inside this package."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILES = ["*.json", "*.safetensors", "*.jinja"]
# Sub-folders and consolidated.* hold the same weights once more, in the author's own format.
_NOT_FILES = ["*/*", "consolidated*"]


def is_model_name(text: str) -> bool:
    """Whether `text` reads as a model: a path that is there, an embedded name, or org/repo."""
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
    """The folder of `model`: a path if it exists, an embedded name, else a hub repository."""
    name = os.fspath(model)
    path = Path(name).expanduser()
    if path.exists():
        if not (path / "config.json").is_file():
            raise ModelNotFoundError(f"{path}: no config.json in it, expected a model folder")
        return path
    if name in EMBEDDED:
        return _embedded(name)
    if not isinstance(model, str) or _REPOSITORY.fullmatch(name) is None:
        raise ModelNotFoundError(
            f"{name!r}: no such file or folder, and not the name of an embedded model "
            f"({', '.join(EMBEDDED)}) or of a hub repository ('org/repo')"
        )
    return _download(name, revision, offline, progress)


def _embedded(name: str) -> Path:
    here = Path(__file__).resolve().parent
    # Installed: beside this file. In an editable installation: in the source tree.
    for folder in (here / "models" / name, here.parents[1] / "models" / name):
        if (folder / "config.json").is_file():
            return folder
    raise ModelNotFoundError(
        f"the embedded model {name!r} is missing from this installation ({here}); reinstall ferrule"
    )


def _download(name: str, revision: str | None, offline: bool, progress: bool) -> Path:
    # Imported here: it takes longer than loading a small model.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    url = f"https://huggingface.co/{name}"
    at = f" at revision {revision!r}" if revision else ""
    try:
        with contextlib.nullcontext() if progress else _no_bars():
            folder = snapshot_download(
                name,
                revision=revision,
                local_files_only=offline,
                allow_patterns=_FILES,
                ignore_patterns=_NOT_FILES,
            )
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
    return Path(folder)


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
