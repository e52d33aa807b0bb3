"""slipstream demo: a real server, a real question, a clean stop."""

import dataclasses
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ...engine_impl.config import EngineConfig
from ..options import AnswerOptions

QUESTION = "What is the capital of France, and what is it known for?"
CLI = [sys.executable, "-m", "slipstream.server.cli"]
STOP_S = 60.0
"""How long the server may take to stop (seconds)."""


@dataclass(frozen=True)
class Demo:
    """Start a server, ask it a question over gRPC, show the answer and its speed, stop the server."""

    engine: EngineConfig
    answer: AnswerOptions
    question: str = QUESTION
    """What to ask (text)."""

    def __post_init__(self) -> None:
        self.answer.check_one_sample("the demo")

    def run(self) -> int:
        print("Starting `slipstream serve` on a free port; it loads the model and compiles it ...", flush=True)
        start = time.perf_counter()
        with server(self.engine) as (process, target, log):
            print(f"SERVING on {target} after {time.perf_counter() - start:.1f} s\n\n> {self.question}\n", flush=True)
            with log.held:
                self._ask(target)
            process.send_signal(signal.SIGTERM)
            status = process.wait(STOP_S)
        print(f"\nThe server stopped with status {status}.", flush=True)
        return 1 if status else 0

    def _ask(self, target: str) -> None:
        from ..client import Client

        arrivals, tokens = [], 0
        with Client(target) as client:
            start = time.perf_counter()
            question = [{"role": "user", "content": self.question}]
            for piece in client.ask_chat(question, self.answer):
                if piece.token_ids:
                    arrivals.append(time.perf_counter())
                    tokens += len(piece.token_ids)
                print(piece.text, end="", flush=True)
        print(f"\n\n{speed(start, arrivals, tokens)}", flush=True)


def speed(start: float, arrivals: list[float], tokens: int) -> str:
    """One line; the clock is the client's (s)."""
    if not arrivals:
        return "no tokens"
    line = f"{tokens} tokens · TTFT {(arrivals[0] - start) * 1000:.0f} ms"
    if tokens > 1 and arrivals[-1] > arrivals[0]:
        per_token = (arrivals[-1] - arrivals[0]) / (tokens - 1)
        line += f" · {per_token * 1000:.1f} ms per token · {1 / per_token:.1f} tokens/s"
    return line


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
