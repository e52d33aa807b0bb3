"""Where a process's time goes until it is ready: until SERVING, or until a command's first token.

JAX reports each interval of tracing and compiling when it ends (jax.monitoring); `load_engine` says when it works; the
operating system knows when the process began. `startup()` puts them together.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .compilations import Compilations, programs

TRACE = ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration")
COMPILE = "/jax/core/compile/backend_compile_duration"
"""JAX's names of its reports. Reading a program from the disk is reported as compiling it."""

STAGES = ("imports", "loading", "tracing", "compiling", "rest")

Interval = tuple[float, float]
"""From and until (seconds of time.monotonic())."""


@dataclass(frozen=True)
class Startup:
    """A start that is over."""

    stages: dict[str, float]
    """Seconds by STAGES; they add up to the whole.

    tracing, compiling: whenever they happened; a compilation within a trace counts as compiling. The other stages are
    without these two. imports: until the engine's loading begins. loading: devices, tokenizer, weights. rest: behind
    loading: the first steps, threads, ports.
    """
    programs: Compilations
    """Made on the way."""

    @property
    def seconds(self) -> float:
        """From the process's start until it was ready."""
        return sum(self.stages.values())

    def as_json(self) -> dict[str, float]:
        """What logs and `generate --json` hold: each stage in seconds, and the programs."""
        stages = {f"{name}_s": round(seconds, 3) for name, seconds in self.stages.items()}
        return stages | {"programs_compiled": self.programs.compiled, "programs_found": self.programs.found}


class Timeline:
    """Collects until the start is over. Reports may come from any thread."""

    def __init__(self, began: float) -> None:
        """`began`: when the process did (seconds of time.monotonic())."""
        self._began, self._is_listening = began, False
        self._loading: Interval | None = None
        self._tracing: list[Interval] = []
        self._compiling: list[Interval] = []
        self._startup: Startup | None = None

    @contextmanager
    def loading(self) -> Iterator[None]:
        """The block loads an engine. Of several blocks the last one counts."""
        self._listen()
        start = time.monotonic()
        try:
            yield
        finally:
            self._loading = (start, time.monotonic())

    def startup(self) -> Startup:
        """The start, which the first call ends; later calls return the same."""
        if self._startup is None:
            self._startup = Startup(self._stages(time.monotonic()), programs())
        return self._startup

    def on_duration(self, event: str, duration_secs: float, **about: str | int) -> None:
        """JAX's report at an interval's end."""
        intervals = self._compiling if event == COMPILE else self._tracing if event in TRACE else None
        if intervals is not None and self._startup is None:
            now = time.monotonic()
            intervals.append((now - duration_secs, now))

    def _listen(self) -> None:
        import jax  # late: a front that only asks for startup() is spared it

        if not self._is_listening:
            self._is_listening = True
            jax.monitoring.register_event_duration_secs_listener(self.on_duration)

    def _stages(self, ended: float) -> dict[str, float]:
        began, either = self._began, [*self._tracing, *self._compiling]
        load_began, load_ended = self._loading or (ended, ended)

        def idle(since: float, until: float) -> float:
            return until - since - covered(either, since, until)

        compiling = covered(self._compiling, began, ended)
        return {
            "imports": idle(began, load_began),
            "loading": idle(load_began, load_ended),
            "tracing": covered(either, began, ended) - compiling,
            "compiling": compiling,
            "rest": idle(load_ended, ended),
        }


def covered(intervals: Sequence[Interval], since: float, until: float) -> float:
    """How much of the time between two moments lies in at least one interval (seconds)."""
    total, reached = 0.0, since
    for start, end in sorted(intervals):
        total += max(0.0, min(end, until) - max(start, reached))
        reached = max(reached, min(end, until))
    return total


def process_start() -> float:
    """When this process began (seconds of time.monotonic(), to a hundredth); where the system does not tell: now."""
    now = time.monotonic()
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()  # a name may hold spaces
        ticks_after_boot = int(fields[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks_after_boot / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # no Linux
        return now
    return now - age


THIS_PROCESS = Timeline(process_start())
