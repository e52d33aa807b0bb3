"""A server in a process of its own: started by the command line, stopped by a signal."""

import dataclasses
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ..engine_impl.config import EngineConfig

CLI = [sys.executable, "-m", "slipstream.cli.main"]
"""The `slipstream` command, by this Python."""
STOP_S = 60.0
"""How long the server may take to stop (seconds)."""


class Log:
    """What a process writes, passed on to our stderr."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.held = threading.Lock()
        """Whoever has it writes undisturbed; the lines wait."""
        self._lines = lines
        self._thread = threading.Thread(target=self._pass_on, name="log", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Waits for the last line."""
        if self._thread.is_alive():
            self._thread.join(STOP_S)

    def _pass_on(self) -> None:
        for line in self._lines:
            with self.held:
                print(line, end="", file=sys.stderr, flush=True)


@contextmanager
def server(engine: EngineConfig, *words: str) -> Iterator[tuple[subprocess.Popen, str, Log]]:
    """A serving process, with more flags, its address and its log. It does not outlive us."""
    command = [*CLI, "serve", "--port", "0", *flags(engine), *words]
    # A session of its own: Ctrl-C is ours to handle.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert process.stdout is not None
    log = Log(process.stdout)
    try:
        for line in process.stdout:
            if match := re.match(r"SERVING on (\S+)", line):
                log.start()
                yield process, match[1], log
                return
            print(line, end="", file=sys.stderr, flush=True)
        raise SystemExit(process.wait(STOP_S) or 1)  # the server has told why
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        log.close()
        process.stdout.close()


def flags(engine: EngineConfig) -> list[str]:
    """What differs from the defaults, as command line flags."""
    words = []
    for option in dataclasses.fields(engine):
        value = getattr(engine, option.name)
        if value != option.default:
            words += [f"--{option.name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    return words
