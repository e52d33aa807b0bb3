"""Milliseconds of a decode step, beside what its bytes must cost, and beside a baseline timed in turns with it.

A point is one choice of slots, cache length, live tokens, dtype and quantisation. All slots are live. Every block of
steps starts anew at `live_tokens - steps / 2`, so that `live_tokens` is the mean over a block.
A sweep tells each point when it is measured, and goes on after one that does not fit on the device.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import jax
import numpy as np

from ..engine_impl.engine import Engine
from ..engine_impl.errors import RefusedError
from ..engine_impl.loading import choose_devices
from .baselines.eager import eager_twin
from .baselines.steppers import PROMPT_LENGTH, Block, EngineStepper, Stepper
from .baselines.xla import xla_twin
from .measure import machine
from .measure.datasheet import datasheet_bandwidth
from .measure.models import Loaded, load, resized
from .measure.stats import Ratio, percentile
from .measure.table import Progress, table
from .measure.traffic import bytes_per_step, matrices_in_memory, stored_as, weights_dtype
from .measure.verdict import UNEQUAL_TOKENS, has_unequal_tokens
from .options.step import Point, StepOptions, Versus

CHECKED_TOKENS = 16
"""Steps of the untimed first block whose tokens are compared with the baseline's."""
PROMPTS = 4
"""Different prompts: slots take them in turns, so that tokens of the wrong slot are told from the right ones."""


def run(options: StepOptions) -> dict[str, Any]:
    """Measure every point. One point gives one flat object, several give {"sweep": [one object each]}.

    Raises RefusedError when no point fits on the device.
    """
    load_average, threads = machine.warn_if_busy(), machine.use_threads(options.threads)
    results = [result | {"load_average": load_average} for result in _results(options, threads)]
    if all("refused" in result for result in results):
        raise RefusedError(results[0]["refused"])
    print(summary(results))
    return results[0] if len(results) == 1 else {"sweep": results}


def _results(options: StepOptions, threads: int) -> Iterator[dict[str, Any]]:
    """Points that differ in live tokens alone share an engine; those that differ in slots or cache, the weights."""
    progress, points, bench, weights = Progress(), options.points, None, None
    bandwidth = machine.copy_bandwidth(choose_devices(options.platform)[0])  # while there is room for it
    for point in points:
        try:
            if bench is None or bench.key != point.engine_key:
                progress.show(f"{options.model}: preparing {point} ...")
                bench = None  # its memory goes first
                weights = weights if weights is not None and weights[0] == point.weights_key else None
                bench = PointBench(options, point, None if weights is None else weights[1])
                weights = (point.weights_key, bench.loaded)
            progress.show(f"{options.model}: measuring {point} ...")
            result = bench.measure(point, bandwidth)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            bench = None
            result = {"model": options.model, **asdict(point), "refused": f"does not fit: {str(error).splitlines()[0]}"}
        progress.clear()
        if len(points) > 1:
            print(told(result), file=sys.stderr, flush=True)
        yield result | machine.describe(threads)


class PointBench:
    """A loaded model with its baseline, for points that differ in live tokens alone."""

    def __init__(self, options: StepOptions, point: Point, weights: Loaded | None = None) -> None:
        """`weights`: of a point with the same `weights_key`; None loads them."""
        config = options.config(point)
        self._options, self.key = options, point.engine_key
        self.loaded = loaded = load(config) if weights is None else resized(config, weights)
        self.engine, self.params = loaded.engine, loaded.params
        prompts = prompts_for(loaded.engine)
        self._ours, self.compile_seconds, tokens = started(EngineStepper(self.engine, self.params), prompts)
        self._baseline, self._equal_tokens = None, None
        if options.versus != "none":
            baseline = baseline_for(options.versus, loaded)
            self._baseline, _, baseline_tokens = started(baseline, prompts)
            self._equal_tokens = tokens == baseline_tokens

    def measure(self, point: Point, bandwidth: float) -> dict[str, Any]:
        """All that the table and the JSON say of a point, but for the machine."""
        steppers = [self._ours] if self._baseline is None else [self._ours, self._baseline]
        blocks = in_turns(steppers, self._options, point.live_tokens)
        ms = [ms for block in blocks[0] for ms in block.step_ms]
        p50, nbytes = float(np.median(ms)), bytes_per_step(self.engine, self.params, point.live_tokens)
        devices = self.engine.mesh.devices.flat
        # Virtual CPU devices share one memory; real ones each have their own.
        chips = 1 if devices[0].platform == "cpu" else len(list(devices))
        datasheet = datasheet_bandwidth(devices[0])
        taken = {"dtype": weights_dtype(self.engine), "quantize_weights": stored_as(self.engine)}
        result = (
            {"model": self._options.model, **asdict(point)}
            | taken
            | {
                "compile_seconds": round(self.compile_seconds, 3),
                "step_ms_p50": round(p50, 4),
                "step_ms_p99": _rounded(percentile(ms, 99)),
                "tokens_per_second": round(point.slots * 1000 / float(np.mean(ms)), 2),
                "bytes_per_step": nbytes,
                "copy_bandwidth_bytes_per_second": round(bandwidth * chips),
                "mbu": round(nbytes / (p50 / 1000) / (bandwidth * chips), 4),
                "datasheet_bandwidth_bytes_per_second": datasheet and datasheet * chips,
                "mbu_datasheet": datasheet and round(nbytes / (p50 / 1000) / (datasheet * chips), 4),
                "steps_timed": len(ms),
                "chips": len(list(self.engine.mesh.devices.flat)),
                "layer_loop": self.engine.parameters.layer_loop,
                "matrices": matrices_in_memory(self.engine),
            }
        )
        if self._options.attention:
            result |= self._attention_share(point, p50, (datasheet or bandwidth) * chips)
        if self._baseline is None:
            return result
        baseline_ms = [ms for block in blocks[1] for ms in block.step_ms]
        ratio = Ratio.of([b.step_ms for b in blocks[0]], [b.step_ms for b in blocks[1]])
        return (
            result
            | ratio.json()
            | {
                "versus": self._options.versus,
                "baseline_step_ms_p50": _rounded(percentile(baseline_ms, 50)),
                "baseline_step_ms_p99": _rounded(percentile(baseline_ms, 99)),
                "equal_tokens": self._equal_tokens,
            }
        )

    def _attention_share(self, point: Point, step_ms: float, bandwidth: float) -> dict[str, Any]:
        """Attention alone, and the step if it took no longer than its rows at this bandwidth."""
        self._ours.set_length(point.live_tokens)
        attention_ms = float(np.median(self._ours.attention_ms(self._options.steps)))
        live_bytes = (
            self.engine.layout.bytes
            / self.engine.sizes.pages
            / self.engine.sizes.page_rows
            * point.slots
            * point.live_tokens
        )
        floor_ms = live_bytes / bandwidth * 1000
        best_ms = max(step_ms - attention_ms, 0.0) + floor_ms
        return {
            "attention_ms_p50": round(attention_ms, 4),
            "attention_floor_ms": round(floor_ms, 4),
            "step_ms_at_attention_floor": round(best_ms, 4),
            "attention_gain": round(step_ms / best_ms, 4),
        }


def baseline_for(versus: Versus, loaded: Loaded) -> Stepper:
    """The baseline on the same weights, type and slots.

    Raises RefusedError for one that does not run where the engine runs.
    """
    engine, params, checkpoint = loaded
    if versus == "xla":
        return EngineStepper(*xla_twin(engine, params))
    if versus == "eager":
        return EngineStepper(eager_twin(engine, "stacked"), params)
    if versus == "eager-per-layer":
        eager = eager_twin(engine, "per_layer")
        if eager.parameters.layer_loop != engine.parameters.layer_loop:
            params = eager.parameters.load(checkpoint)
        return EngineStepper(eager, params)
    if engine.mesh.devices.flat[0].platform != "cpu":
        raise RefusedError(f"versus={versus!r} is compared on CPUs only; use --platform cpu, or --versus eager")
    from .baselines.huggingface import TransformersStepper, transformers_model

    return TransformersStepper(
        transformers_model(checkpoint, weights_dtype(engine)),
        cache_length=engine.sizes.cache_length,
        cache="dynamic" if versus == "transformers-dynamic" else "static",
    )


def prompts_for(engine: Engine) -> list[list[int]]:
    """A prompt a slot: random tokens, the same in every run; few enough that the checked ones fit behind them."""
    length = min(PROMPT_LENGTH, engine.sizes.max_prefill_length, engine.sizes.cache_length // 2)
    prompts = np.random.default_rng(0).integers(0, engine.sizes.vocab_size, (PROMPTS, length)).tolist()
    return [prompts[slot % PROMPTS] for slot in range(engine.sizes.slots)]


def started(stepper: Stepper, prompts: list[list[int]]) -> tuple[Any, float, list[list[int]]]:
    """Filled and stepped for the first time: (stepper, seconds of the first step less a usual one, tokens of all)."""
    stepper.fill(prompts)
    with machine.compiling_anew():
        start = time.perf_counter()
        first = stepper.block(1)
        seconds = time.perf_counter() - start
    block = stepper.block(CHECKED_TOKENS)
    return stepper, max(0.0, seconds - min(block.step_ms) / 1000), first.tokens + block.tokens


def in_turns(
    steppers: list[Any], options: StepOptions, live_tokens: int, pause: Callable[[], object] = lambda: time.sleep(0.05)
) -> list[list[Block]]:
    """A B A B ...: each stepper's blocks. Before each, one untimed step: threads of the other may still be spinning."""
    blocks: list[list[Block]] = [[] for _ in steppers]
    for _ in range(options.pairs):
        for stepper, its_blocks in zip(steppers, blocks, strict=True):
            pause()
            stepper.set_length(live_tokens - options.steps // 2)
            stepper.block(1)
            stepper.set_length(live_tokens - options.steps // 2)
            its_blocks.append(stepper.block(options.steps))
    return blocks


def told(result: dict[str, Any]) -> str:
    """A point of a sweep, as soon as it is known."""
    point = f"{result['slots']} slots x {result['cache_length']}, {result['live_tokens']} live, {result['dtype']}"
    if "refused" in result:
        return f"{point}: {result['refused']}"
    return f"{point}: p50 {result['step_ms_p50']:.3f} ms, MBU {result['mbu']:.2f}"


def summary(results: list[dict[str, Any]]) -> str:
    """The results as a table, with what they share above it; a point that did not fit has dashes."""
    first = next(result for result in results if "refused" not in result)
    head = (
        f"{first['model']} on {first['chips']} x {first['device']} ({first['cpu']}), threads={first['threads']}, "
        f"copy bandwidth {first['copy_bandwidth_bytes_per_second'] / 1e9:.1f} GB/s"
    )
    columns = {
        "slots": "slots", "cache_length": "cache", "live_tokens": "live", "dtype": "dtype",
        "quantize_weights": "weights", "quantize_kv": "kv", "compile_seconds": "compile s", "step_ms_p50": "p50 ms",
        "step_ms_p99": "p99 ms",
        "tokens_per_second": "tokens/s", "bytes_per_step": "bytes", "mbu": "MBU",
    }  # fmt: skip
    if "attention_gain" in first:
        columns |= {"attention_ms_p50": "attention ms", "attention_floor_ms": "floor", "attention_gain": "gain"}
    if "versus" in first:
        columns |= {
            "baseline_step_ms_p50": f"{first['versus']} ms", "ratio_p50": "ratio", "ratio_min": "min",
            "ratio_max": "max", "equal_tokens": "equal tokens",
        }  # fmt: skip
    lines = [head, table(list(columns.values()), [[r.get(key) for key in columns] for r in results])]
    if any(has_unequal_tokens(result) for result in results):
        lines.append(UNEQUAL_TOKENS)
    return "\n".join(lines)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
