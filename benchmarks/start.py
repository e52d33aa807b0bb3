"""What a newcomer waits for: from a command's start to its first token, or to SERVING, and where the time goes.

Every run is a process of its own. Runs come in pairs: "cold" finds an empty folder of compiled programs, and the
operating system has nothing of the model's files in memory; "warm" finds what the cold one left. The model is fetched
before.
"""

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..engine_impl.checkpoints.embedded import home
from ..engine_impl.checkpoints.open import open_checkpoint
from ..engine_impl.config import EngineConfig
from ..engine_impl.loading import choose_devices
from ..engine_impl.runtime import compilations
from ..engine_impl.runtime.timeline import STAGES
from ..server.child import CLI, flags
from ..server.errors import FailedError
from .measure import disk, machine
from .measure.random_checkpoint import write_checkpoint
from .measure.table import Progress, table
from .options.start import StartOptions

GOAL_S = 10.0
"""A warm `generate` on a CPU shows its first token within this (seconds)."""
WAITED_FOR = {"generate": '{"model"', "serve": "SERVING on "}
"""How the line begins that ends the wait: `generate --max-tokens 1` prints its one token, `serve` its address."""
STOP_S = 60.0
"""How long a process may take to end after that (seconds)."""


class Start(NamedTuple):
    """One process."""

    seconds: float
    stages: dict[str, float]
    programs_compiled: int
    programs_found: int


def run(options: StartOptions) -> dict[str, Any]:
    """{"cold": numbers, "warm": numbers, ...}. Raises RefusedError for a model that is not there, FailedError when the
    command fails or takes longer than it may."""
    load_average = machine.warn_if_busy()
    with started(options) as engine:
        command = words(options, engine)
        files = files_of(options, engine)
        alone_s, size = disk.plain_read_s(files), sum(file.stat().st_size for file in files)
        starts = _pairs(options, command, files)
    choose_devices(options.engine.platform)  # for their names; not sooner, or a TPU would be taken
    warm = float(np.median([start.seconds for start in starts["warm"]]))
    has_goal = options.command == "generate" and engine.model == "embedded"
    found = {state: summary(its_starts) for state, its_starts in starts.items()}
    result = (
        {"command": options.command, "words": command, "runs": options.runs}
        | found
        | {"files": of_disk(size, alone_s, found["cold"]["stages"]["loading"])}
        | {"goal_seconds": GOAL_S if has_goal else None, "goal_met": warm <= GOAL_S if has_goal else None}
        | machine.describe(len(os.sched_getaffinity(0)))
        | {"load_average": load_average}
    )
    print(told(result))
    return result


@contextmanager
def started(options: StartOptions) -> Iterator[EngineConfig]:
    """What is started. A random checkpoint and a cache of weights lie in a folder that goes away again."""
    with tempfile.TemporaryDirectory(prefix="slipstream-start-") as name:
        engine = options.engine
        if options.random_gib is not None:
            dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
            engine = replace(engine, model=str(write_checkpoint(Path(name) / "random", options.random_gib, dtype)))
        if options.weight_cache:
            engine = replace(engine, weight_cache=str(Path(name) / "weights"))
        yield engine


def files_of(options: StartOptions, engine: EngineConfig) -> list[Path]:
    """What a start reads: the checkpoint's files, or those of the cache, which a start fills that nobody times."""
    checkpoint = open_checkpoint(engine.model)  # fetched, if need be, by nobody's clock
    if engine.weight_cache is None:
        return list(checkpoint.files())
    with tempfile.TemporaryDirectory(prefix="slipstream-start-") as name:
        measure(options, words(options, engine), _home(Path(name)))
    return [path for path in Path(engine.weight_cache).rglob("*") if path.is_file()]


def _pairs(options: StartOptions, command: list[str], files: list[Path]) -> dict[str, list[Start]]:
    starts: dict[str, list[Start]] = {"cold": [], "warm": []}
    progress = Progress()
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory(prefix="slipstream-start-") as name:
            folder = _home(Path(name))
            disk.forget(files)
            for state, its_starts in starts.items():
                progress.bar(sum(map(len, starts.values())), 2 * options.runs, f"{options.command}, {state}")
                its_starts.append(measure(options, command, folder))
    progress.clear()
    return starts


def _home(folder: Path) -> Path:
    """No compiled program is in it, but the models that were fetched are."""
    home().mkdir(parents=True, exist_ok=True)
    (folder / "models").symlink_to(home().absolute() / "models")
    return folder


def of_disk(size: int, alone_s: float, loading_s: float) -> dict[str, Any]:
    """What was read (bytes), and how fast, against a plain read of the same files."""
    return {
        "bytes": size,
        "plain_read_s": round(alone_s, 3),
        "plain_read_mb_per_s": round(size / alone_s / 1e6),
        "cold_loading_share": round(alone_s / loading_s, 3) if loading_s else None,
    }


def words(options: StartOptions, engine: EngineConfig) -> list[str]:
    """The command line, without the program's name. It tells its own start-up: in its log, or in its JSON."""
    size = flags(engine)
    if options.command == "serve":
        return ["serve", "--port", "0", "--log-format", "json", *size]
    return ["generate", *size, "--prompt", options.prompt, "--max-tokens", "1", "--json"]


def measure(options: StartOptions, command: list[str], folder: Path) -> Start:
    """One run of these words, with `folder` as its home."""
    environment = os.environ | {"SLIPSTREAM_HOME": str(folder), compilations.FOLDER: ""}
    with tempfile.TemporaryFile("w+") as log:
        began = time.monotonic()
        # A session of its own: Ctrl-C is ours to handle.
        process = subprocess.Popen(
            [*CLI, *command],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            start_new_session=True,
        )
        try:
            found = _wait_for(process, WAITED_FOR[options.command], options.timeout_s)
            if found is not None:
                if options.command == "serve":
                    process.send_signal(signal.SIGTERM)
                process.wait(STOP_S)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()  # pyright: ignore[reportOptionalMemberAccess]
        log.seek(0)
        logged = log.read().strip().splitlines()
    if found is None or process.returncode:
        raise FailedError(
            f"`slipstream {' '.join(command)}` ended with status {process.returncode} after "
            f"{time.monotonic() - began:.0f} s: " + ("\n".join(logged[-5:]) or "it said nothing")
        )
    ended, line = found
    told = logged_startup(logged) if options.command == "serve" else json.loads(line)["startup"]
    return start_of(ended - began, told)


def logged_startup(lines: list[str]) -> dict[str, float]:
    """Of a server's JSON log: the line that tells its start-up."""
    logged = (json.loads(line) for line in lines if line.startswith("{"))
    return next(record for record in logged if "programs_compiled" in record)


def start_of(seconds: float, told: dict[str, float]) -> Start:
    """What a process told, and our own clock around it: what it cannot see, its birth and its line's way to us, counts
    as the rest."""
    stages = {stage: told[f"{stage}_s"] for stage in STAGES}
    stages["rest"] += seconds - sum(stages.values())
    return Start(seconds, stages, int(told["programs_compiled"]), int(told["programs_found"]))


def _wait_for(process: subprocess.Popen, line: str, timeout_s: float) -> tuple[float, str] | None:
    """When a line that begins so was there (seconds of time.monotonic()), and the line; None when the process ended
    without it, or was ended because its time was up."""
    assert process.stdout is not None
    timer = threading.Timer(timeout_s, process.kill)
    timer.start()
    try:
        for said in process.stdout:
            if said.startswith(line):
                return time.monotonic(), said
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
    files = result["files"]
    text += (
        f"\nfiles: {files['bytes'] / 1e6:,.0f} MB, which one thread reads at {files['plain_read_mb_per_s']} MB/s; cold "
        f"loading reads them at {files['cold_loading_share']} of that"
    )
    if result["goal_seconds"] is None:
        return text
    met = "met" if result["goal_met"] else "missed"
    return f"{text}\ngoal: a warm start within {result['goal_seconds']:g} s: {met}"
