"""A `slipstream` command that notes when its stages end: `python -m slipstream.benchmarks.stages FILE COMMAND ...`.

The command runs as it is. What is noted are its call of load_engine, JAX's own reports of tracing and compiling, and
how many programs were compiled or found on disk. FILE gets it as JSON when the command ends.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

TRACE = ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration")
COMPILE = "/jax/core/compile/backend_compile_duration"
"""What JAX reports at an interval's end (jax.monitoring). Reading a program from disk counts as compiling it."""

Interval = tuple[float, float]


@dataclass
class Notes:
    """Moments are seconds of time.monotonic(), one clock for all processes."""

    load_began: float = 0.0
    load_ended: float = 0.0
    tracing: list[Interval] = field(default_factory=list)
    compiling: list[Interval] = field(default_factory=list)
    programs_compiled: int = 0
    programs_found: int = 0

    def on_duration(self, event: str, duration_secs: float, **about: str | int) -> None:
        """JAX's report."""
        intervals = self.compiling if event == COMPILE else self.tracing if event in TRACE else None
        if intervals is not None:
            now = time.monotonic()
            intervals.append((now - duration_secs, now))


def seconds(notes: Notes, began: float, ended: float) -> dict[str, float]:
    """Where the time from `began` to `ended` went (seconds); the stages add up to it.

    imports: until the engine's loading begins. compiling, tracing: whenever they happened. loading: until the weights
    are there, less those two. rest: after it, less those two: the first steps, and what a server does around them.
    """

    def busy(since: float, until: float, *intervals: list[Interval]) -> float:
        return covered([interval for some in intervals for interval in some], since, until)

    compiling = busy(began, ended, notes.compiling)
    either = notes.tracing, notes.compiling
    return {
        "imports": notes.load_began - began - busy(began, notes.load_began, *either),
        "loading": notes.load_ended - notes.load_began - busy(notes.load_began, notes.load_ended, *either),
        "tracing": busy(began, ended, *either) - compiling,
        "compiling": compiling,
        "rest": ended - notes.load_ended - busy(notes.load_ended, ended, *either),
    }


def covered(intervals: list[Interval], since: float, until: float) -> float:
    """How much of the time between two moments lies in at least one interval (seconds)."""
    total, reached = 0.0, since
    for start, end in sorted(intervals):
        total += max(0.0, min(end, until) - max(start, reached))
        reached = max(reached, min(end, until))
    return total


def run(file: Path, words: list[str]) -> int:
    """The command's exit status."""
    from ..cli import main as cli
    from ..engine_impl import loading
    from ..engine_impl.runtime import compilations

    notes = Notes()
    load_engine: Any = loading.load_engine

    @wraps(load_engine)
    def noted(*args: Any, **kwargs: Any) -> Any:
        import jax

        jax.monitoring.register_event_duration_secs_listener(notes.on_duration)
        notes.load_began = time.monotonic()
        try:
            return load_engine(*args, **kwargs)
        finally:
            notes.load_ended = time.monotonic()

    loading.load_engine = noted  # commands import it when they run
    status = cli.run(words)
    made = compilations.programs()
    notes.programs_compiled, notes.programs_found = made.compiled, made.found
    file.write_text(json.dumps(asdict(notes)))
    return status


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), sys.argv[2:]))
