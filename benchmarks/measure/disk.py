"""Files, and what the operating system keeps of them in memory."""

import os
import time
from collections.abc import Iterable
from pathlib import Path

CHUNK = 16 * 2**20
"""Bytes that are read at a time."""


def forget(files: Iterable[Path]) -> None:
    """The operating system keeps nothing of these files in memory, as after a boot, unless one has them mapped."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())  # what is not written yet cannot be forgotten
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_read_s(files: Iterable[Path]) -> float:
    """How long one thread takes to read them from the disk, one by one (seconds). It leaves them in memory."""
    files, chunk = list(files), bytearray(CHUNK)
    forget(files)
    start = time.monotonic()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(chunk):
                pass
    return time.monotonic() - start
