"""Models in Google Cloud Storage (gs://bucket/path), copied whole into a folder of ours before they are read.

What is there whole is used as it is, without a look at the bucket; `slipstream fetch` brings it up to date. Files come
side by side, each in pieces that are appended to what came before an interruption. Processes that fetch the same model
at once take turns: whoever comes second finds it there.
"""

import fcntl
import fnmatch
import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import RefusedError
from .embedded import home
from .hub import CONFIG_FILES, FILES
from .safetensors import weight_files

log = logging.getLogger(__name__)

SCHEME = "gs://"
LISTING = ".listing.json"
"""What the bucket had when the copy was begun: {file: [bytes, version]}."""
LOCK = ".lock"
"""Whoever fetches has it."""
PART = ".part"
"""Ends the name of a file that is not whole."""
PIECE = 32 * 2**20
"""Bytes that are asked for at a time."""
TOGETHER = 16
"""Files that come at the same time."""
TRIES = 3
"""For each piece."""


def is_url(model: str) -> bool:
    return model.startswith(SCHEME)


def model_folder(url: str) -> Path:
    """The model's files: the copy if it is whole, else fetched. Raises RefusedError as `fetch` does."""
    folder = folder_of(url)
    return folder if _is_whole(folder) else fetch(url)


def folder_of(url: str) -> Path:
    """Where the copy is. Raises RefusedError for an address that names no folder in a bucket."""
    parts = url.removeprefix(SCHEME).strip("/").split("/")
    if len(parts) < 2 or any(part in ("", ".", "..") for part in parts):
        raise RefusedError(f"{url!r} names no folder of a bucket; give gs://bucket/path")
    return home().joinpath("models", "gs", *parts)


def config_file(url: str) -> Path:
    """The model's config.json alone, likewise."""
    file = folder_of(url) / "config.json"
    return file if file.is_file() else _fetch(url, CONFIG_FILES) / file.name


def fetch(url: str) -> Path:
    """Brings the copy up to date: files that the bucket has changed come anew, what came of the others is kept.

    Raises RefusedError for a folder without config.json or safetensors weights, without gcsfs, and when the network
    fails.
    """
    folder = _fetch(url, FILES)
    weight_files(folder, url)
    return folder


def _fetch(url: str, patterns: Sequence[str]) -> Path:
    folder, bucket = folder_of(url), open_bucket()
    try:
        there = {Path(file["name"]).name: file for file in bucket.ls(url, detail=True, refresh=True)}
    except Exception as error:  # of gcsfs, of what it is built on, and of the network
        raise RefusedError(
            f"{url} cannot be listed ({_why(error)}); check the name, and log in with "
            "`gcloud auth application-default login` where it is private"
        ) from error
    listing = {
        name: [int(file["size"]), str(file.get("generation") or file.get("etag") or file.get("created"))]
        for name, file in there.items()
        if file["type"] == "file" and _is_among(name, FILES)
    }
    if "config.json" not in listing:
        raise RefusedError(f"{url} has no config.json; give the folder of a model in transformers' form")
    wanted = [name for name in listing if _is_among(name, patterns)]

    def copy(name: str) -> None:
        _copy(bucket, there[name]["name"], folder / name, listing[name][0])

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder), ThreadPoolExecutor(TOGETHER, "fetch") as pool:
            _prepare(folder, listing)
            for _ in pool.map(copy, wanted):
                pass
    except Exception as error:
        raise RefusedError(
            f"{url} could not be fetched whole ({_why(error)}); run it again: what has come is kept in {folder}"
        ) from error
    return folder


def _is_among(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two that append to one file would spoil it. The lock goes with its process."""
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process fetches into %s; this one waits for it", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _prepare(folder: Path, listing: dict[str, list[Any]]) -> None:
    """Drops what the bucket has changed, or does not have any more."""
    before = _listing(folder)
    for name in before:
        if before[name] != listing.get(name):
            for path in (folder / name, folder / f"{name}{PART}"):
                path.unlink(missing_ok=True)
    fresh = folder / f"{LISTING}{os.getpid()}"
    fresh.write_text(json.dumps(listing))
    os.replace(fresh, folder / LISTING)


def _copy(bucket: Any, source: str, target: Path, size: int) -> None:
    if target.is_file() and target.stat().st_size == size:
        return
    part = target.with_name(f"{target.name}{PART}")
    with part.open("ab") as file:
        if (done := file.tell()) > size:
            file.truncate(0)
            done = 0
        while done < size:
            piece = _piece(bucket, source, done, min(done + PIECE, size))
            file.write(piece)
            done += len(piece)
    os.replace(part, target)


def _piece(bucket: Any, source: str, start: int, end: int) -> bytes:
    """Raises what the last try raised."""
    for tries_left in reversed(range(TRIES)):
        try:
            piece = bucket.cat_file(source, start=start, end=end)
            if len(piece) != end - start:
                raise OSError(f"{len(piece)} bytes came of {source} instead of {end - start}")
            return piece
        except Exception:
            if not tries_left:
                raise
    raise AssertionError(TRIES)


def _listing(folder: Path) -> dict[str, list[Any]]:
    try:
        listing = json.loads((folder / LISTING).read_text())
        return listing if isinstance(listing, dict) else {}
    except (OSError, ValueError):
        return {}


def _is_whole(folder: Path) -> bool:
    listing = _listing(folder)
    try:
        there = all((folder / name).stat().st_size == size for name, (size, _) in listing.items())
        return there and bool(weight_files(folder, ""))
    except (OSError, ValueError, TypeError, RefusedError):
        return False


def open_bucket() -> Any:
    """What lists and reads objects, as fsspec's file systems do. Raises RefusedError without gcsfs."""
    try:
        import gcsfs
    except ImportError as error:
        raise RefusedError("models from gs:// need gcsfs: pip install 'slipstream-llm[gcs]'") from error
    return gcsfs.GCSFileSystem()


def _why(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
