"""What a newcomer waits for: from a command's start to its first token, or to SERVING, and where the time goes.

Every run is a process of its own. Runs come in pairs: "cold" finds an empty folder of compiled programs, "warm" finds
what the cold one left there. The model is fetched before, and its file is in the operating system's memory after the
first run.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ..engine_impl.checkpoints.embedded import home
from ..engine_impl.checkpoints.open import open_checkpoint
from ..engine_impl.config import EngineConfig
from ..engine_impl.loading import choose_devices
from ..server.child import flags
from ..server.errors import FailedError
from .measure import machine
from .measure.table import Progress, table
from .stages import Notes, seconds

GOAL_S = 10.0
"""A warm `generate` on a CPU shows its first token within this (seconds)."""
WAITED_FOR = {"generate": '{"model"', "serve": "SERVING on "}
"""How the line begins that ends the wait: `generate --max-tokens 1` prints its one token, `serve` its address."""
STOP_S = 60.0
"""How long a process may take to end after that (seconds)."""


@dataclass(frozen=True, kw_only=True)
class StartPlan:
    """What is asked; see the flags of `slipstream bench start`."""

    command: Literal["generate", "serve"]
    engine: EngineConfig
    prompt: str
    runs: int
    timeout_s: float

    @property
    def words(self) -> list[str]:
        """The command line, without the program's name."""
        size = flags(self.engine)
        if self.command == "serve":
            return ["serve", "--port", "0", *size]
        return ["generate", *size, "--prompt", self.prompt, "--max-tokens", "1", "--json"]


class Start(NamedTuple):
    """One process."""

    seconds: float
    stages: dict[str, float]
    programs_compiled: int
    programs_found: int


def run(plan: StartPlan) -> dict[str, Any]:
    """{"cold": numbers, "warm": numbers, ...}. Raises RefusedError for a model that is not there, FailedError when the
    command fails or takes longer than it may."""
    load_average = machine.warn_if_busy()
    open_checkpoint(plan.engine.model)  # fetched, if need be, by nobody's clock
    starts: dict[str, list[Start]] = {"cold": [], "warm": []}
    progress = Progress()
    for _ in range(plan.runs):
        with tempfile.TemporaryDirectory(prefix="slipstream-start-") as name:
            folder = Path(name)
            home().mkdir(parents=True, exist_ok=True)
            (folder / "models").symlink_to(home().absolute() / "models")
            for state, its_starts in starts.items():
                progress.bar(sum(map(len, starts.values())), 2 * plan.runs, f"{plan.command}, {state}")
                its_starts.append(measure(plan, folder))
    progress.clear()
    choose_devices(plan.engine.platform)  # for their names; not sooner, or a TPU would be taken
    warm = float(np.median([start.seconds for start in starts["warm"]]))
    has_goal = plan.command == "generate" and plan.engine.model == "embedded"
    result = (
        {"command": plan.command, "words": plan.words, "runs": plan.runs}
        | {state: summary(its_starts) for state, its_starts in starts.items()}
        | {"goal_seconds": GOAL_S if has_goal else None, "goal_met": warm <= GOAL_S if has_goal else None}
        | machine.describe(len(os.sched_getaffinity(0)))
        | {"load_average": load_average}
    )
    print(told(result))
    return result


def measure(plan: StartPlan, folder: Path) -> Start:
    """One run, with `folder` as its home."""
    notes_file = folder / "notes.json"
    command = [sys.executable, "-m", "slipstream.benchmarks.stages", str(notes_file), *plan.words]
    environment = os.environ | {"SLIPSTREAM_HOME": str(folder)}
    with tempfile.TemporaryFile("w+") as log:
        began = time.monotonic()
        # A session of its own: Ctrl-C is ours to handle.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, start_new_session=True
        )
        try:
            ended = _wait_for(process, WAITED_FOR[plan.command], plan.timeout_s)
            if ended is not None:
                if plan.command == "serve":
                    process.send_signal(signal.SIGTERM)
                process.wait(STOP_S)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()  # pyright: ignore[reportOptionalMemberAccess]
        if ended is None or process.returncode:
            log.seek(0)
            said = log.read().strip().splitlines()[-5:]
            raise FailedError(
                f"`slipstream {' '.join(plan.words)}` ended with status {process.returncode} after "
                f"{time.monotonic() - began:.0f} s: " + ("\n".join(said) or "it said nothing")
            )
    notes = Notes(**json.loads(notes_file.read_text()))
    return Start(ended - began, seconds(notes, began, ended), notes.programs_compiled, notes.programs_found)


def _wait_for(process: subprocess.Popen, line: str, timeout_s: float) -> float | None:
    """When a line that begins so was there (seconds of time.monotonic()); None when the process ended without it, or
    was ended because its time was up."""
    assert process.stdout is not None
    timer = threading.Timer(timeout_s, process.kill)
    timer.start()
    try:
        for said in process.stdout:
            if said.startswith(line):
                return time.monotonic()
        process.wait(STOP_S)
        return None
    finally:
        timer.cancel()


def summary(starts: list[Start]) -> dict[str, Any]:
    """Of all runs; stages and programs are those of the run in the middle."""
    middle = sorted(starts)[(len(starts) - 1) // 2]
    all_seconds = [start.seconds for start in starts]
    return {
        "seconds_p50": round(float(np.median(all_seconds)), 3),
        "seconds_min": round(min(all_seconds), 3),
        "seconds_max": round(max(all_seconds), 3),
        "seconds": [round(each, 3) for each in all_seconds],
        "stages": {name: round(each, 3) for name, each in middle.stages.items()},
        "programs_compiled": middle.programs_compiled,
        "programs_found": middle.programs_found,
    }


def told(result: dict[str, Any]) -> str:
    """The result as a table."""
    stages = list(result["cold"]["stages"])
    rows = [
        [state]
        + [result[state][key] for key in ("seconds_p50", "seconds_min", "seconds_max")]
        + list(result[state]["stages"].values())
        + [result[state]["programs_compiled"], result[state]["programs_found"]]
        for state in ("cold", "warm")
    ]
    end = "its first token" if result["command"] == "generate" else "SERVING"
    text = f"`slipstream {' '.join(result['words'])}`, from its start to {end}, on {result['cpu']}\n" + table(
        ["programs on disk", "p50 s", "min", "max", *stages, "compiled", "found"], rows
    )
    if result["goal_seconds"] is None:
        return text
    met = "met" if result["goal_met"] else "missed"
    return f"{text}\ngoal: a warm start within {result['goal_seconds']:g} s: {met}"
