"""Pipes that nobody reads."""

import contextlib
import os


def fill(pipe: int) -> None:
    """Whoever writes there waits from now on."""
    os.set_blocking(pipe, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe, b"x" * 4096)
    os.set_blocking(pipe, True)
