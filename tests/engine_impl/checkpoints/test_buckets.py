"""Models from buckets, against fsspec's file system in memory: the real store is not tried."""

import fcntl
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from slipstream.engine_impl.checkpoints import buckets
from slipstream.engine_impl.checkpoints.open import open_checkpoint
from slipstream.engine_impl.errors import RefusedError

from .folders import write_folder

URL = "gs://bucket/models/tiny"


class Bucket(MemoryFileSystem):
    """Counts what is read, and breaks off when it is told to."""

    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]
    cachable = False

    def __init__(self):
        super().__init__()
        self.read: list[tuple[str, int, int]] = []
        self.breaks_after: int | None = None

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs://"))

    def ls(self, path, detail=True, **more):
        listed: Any = super().ls(path, detail=True)
        for file in listed:
            if file["type"] == "file":
                file["generation"] = str(zlib.crc32(self.store[file["name"]].getvalue()))
        return listed

    def cat_file(self, path, start=None, end=None, **more):
        if self.breaks_after is not None and len(self.read) >= self.breaks_after:
            raise OSError("connection reset")
        assert start is not None
        assert end is not None
        self.read.append((Path(path).name, start, end))
        return super().cat_file(path, start, end)

    def bytes_read(self) -> int:
        return sum(end - start for _, start, end in self.read)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """With a tiny Llama in two files, and two files that nobody needs."""
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(buckets, "PIECE", 4096)
    monkeypatch.setattr(buckets, "TOGETHER", 2)
    monkeypatch.setattr(Bucket, "store", {})
    bucket = Bucket()
    monkeypatch.setattr(buckets, "open_bucket", lambda: bucket)
    for file in write_folder(tmp_path / "model", files=2).iterdir():
        bucket.pipe_file(f"{URL}/{file.name}", file.read_bytes())
    bucket.pipe_file(f"{URL}/pytorch_model.bin", b"pickle")
    bucket.pipe_file(f"{URL}/original/model-9.safetensors", b"nested")
    return bucket


def test_a_model_is_copied_once_and_then_read_without_the_bucket(bucket, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(URL)
    assert checkpoint.name == URL
    folder = buckets.folder_of(URL)
    assert folder == tmp_path / "home/models/gs/bucket/models/tiny"
    originals = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert sorted(path.name for path in folder.iterdir()) == [buckets.LISTING, buckets.LOCK, *originals]
    assert all((folder / name).read_bytes() == (tmp_path / "model" / name).read_bytes() for name in originals)
    monkeypatch.setattr(buckets, "open_bucket", lambda: pytest.fail("the bucket was asked"))
    open_checkpoint(URL)


def test_an_interrupted_copy_goes_on_where_it_was(bucket, tmp_path):
    total = sum(path.stat().st_size for path in (tmp_path / "model").iterdir())
    bucket.breaks_after = 8
    with pytest.raises(RefusedError, match=r"whole \(connection reset\); run it again: what has come is kept"):
        open_checkpoint(URL)
    assert any(path.name.endswith(buckets.PART) for path in buckets.folder_of(URL).iterdir())
    bucket.breaks_after = None
    open_checkpoint(URL)
    assert bucket.bytes_read() == total  # nothing came twice


def test_a_look_at_the_config_loses_nothing_of_a_copy_that_was_begun(bucket, tmp_path):
    total = sum(path.stat().st_size for path in (tmp_path / "model").iterdir())
    bucket.breaks_after = 8
    with pytest.raises(RefusedError):
        open_checkpoint(URL)
    (buckets.folder_of(URL) / "config.json").unlink(missing_ok=True)
    bucket.breaks_after = None
    bucket.read = [read for read in bucket.read if read[0] != "config.json"]
    buckets.config_file(URL)
    open_checkpoint(URL)
    assert bucket.bytes_read() == total


def test_who_fetches_what_another_fetches_waits_for_it(bucket, caplog):
    folder = buckets.folder_of(URL)
    folder.mkdir(parents=True)
    caplog.set_level("INFO")
    with ThreadPoolExecutor(1) as pool:
        with (folder / buckets.LOCK).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            second = pool.submit(buckets.fetch, URL)
            end = time.monotonic() + 10
            while "waits for it" not in caplog.text:
                assert time.monotonic() < end
                time.sleep(0.002)
            assert bucket.read == []
        assert second.result(timeout=10) == folder
    assert bucket.read


def test_a_piece_that_fails_once_is_asked_for_again(bucket, monkeypatch):
    whole, failed = bucket.cat_file, []

    def sometimes(path, start=None, end=None):
        if start and not failed:
            failed.append(path)
            raise OSError("connection reset")
        return whole(path, start, end)

    monkeypatch.setattr(bucket, "cat_file", sometimes)
    open_checkpoint(URL)
    assert failed


def test_fetch_brings_what_the_bucket_has_changed(bucket, tmp_path):
    open_checkpoint(URL)
    bucket.read.clear()
    assert buckets.fetch(URL) == buckets.folder_of(URL)
    assert bucket.read == []
    changed = (tmp_path / "model/config.json").read_bytes() + b" "
    bucket.pipe_file(f"{URL}/config.json", changed)
    buckets.fetch(URL)
    assert {name for name, _, _ in bucket.read} == {"config.json"}
    assert (buckets.folder_of(URL) / "config.json").read_bytes() == changed


def test_a_file_that_changed_while_half_of_it_was_there_comes_anew(bucket):
    bucket.breaks_after = 8
    with pytest.raises(RefusedError):
        buckets.fetch(URL)
    parts = [path for path in buckets.folder_of(URL).iterdir() if path.name.endswith(buckets.PART)]
    part = max(parts, key=lambda path: path.stat().st_size)  # another may have nothing yet
    assert part.stat().st_size
    name = part.name.removesuffix(buckets.PART)
    fresh = bytes(reversed(bucket.store[f"/bucket/models/tiny/{name}"].getvalue()))
    bucket.pipe_file(f"{URL}/{name}", fresh)
    bucket.breaks_after = None
    buckets.fetch(URL)
    assert (buckets.folder_of(URL) / name).read_bytes() == fresh


def test_the_config_alone_is_not_taken_for_the_model(bucket):
    assert buckets.config_file(URL).name == "config.json"
    assert {name for name, _, _ in bucket.read} == {"config.json"}
    assert open_checkpoint(URL).shapes()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gs://bucket", "names no folder of a bucket; give gs://bucket/path"),
        ("gs://bucket/../other", "names no folder of a bucket"),
        ("gs://bucket/nothing", "cannot be listed .* `gcloud auth application-default login`"),
        (f"{URL}/original", "has no config.json"),
    ],
)
def test_what_is_no_model_is_refused(url, message, bucket):
    with pytest.raises(RefusedError, match=message):
        open_checkpoint(url)


def test_without_gcsfs_it_is_told_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(RefusedError, match=r"pip install 'slipstream-llm\[gcs\]'"):
        open_checkpoint(URL)
