"""Milliseconds of a decode step, beside what its bytes must cost, and beside a baseline timed in turns with it.

A point is one choice of slots, cache length, live tokens, dtype and quantisation. All slots are live. Every block of
steps starts anew at `live_tokens - steps / 2`, so that `live_tokens` is the mean over a block.
A sweep tells each point when it is measured, and goes on after one that does not fit on the device.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import jax
import numpy as np

from ..engine_impl.config import EngineConfig
from ..engine_impl.engine import Engine
from ..engine_impl.errors import RefusedError
from ..engine_impl.loading import choose_devices
from .baselines.eager import eager_twin
from .baselines.steppers import PROMPT_LENGTH, Block, EngineStepper, Stepper
from .measure import machine
from .measure.models import Loaded, load, resized
from .measure.stats import Ratio, percentile
from .measure.table import Progress, table
from .measure.traffic import bytes_per_step, stored_as

Versus = Literal["none", "eager", "eager-per-layer", "transformers", "transformers-dynamic"]
CHECKED_TOKENS = 16
"""Steps of the untimed first block whose tokens are compared with the baseline's."""
PROMPTS = 4
"""Different prompts: slots take them in turns, so that tokens of the wrong slot are told from the right ones."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """What one row of the table measures."""

    slots: int
    cache_length: int
    live_tokens: int
    dtype: Literal["auto", "float32", "bfloat16"]
    quantize_weights: Literal["auto", "none", "int8", "int4"] = "auto"
    quantize_kv: Literal["none", "int8"] = "none"

    @property
    def weights_key(self) -> tuple[object, ...]:
        """Points that have it in common share their weights."""
        return (self.dtype, self.quantize_weights)

    @property
    def engine_key(self) -> tuple[object, ...]:
        """Points that have it in common share an engine."""
        return (*self.weights_key, self.slots, self.cache_length, self.quantize_kv)


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What all points share."""

    model: str
    platform: Literal["auto", "cpu", "tpu", "cuda"]
    tensor_parallel: int | None
    versus: Versus
    steps: int
    """a block's"""
    pairs: int
    """blocks"""
    threads: int | None
    attention: bool = False
    """time attention alone too"""


def run(plan: StepPlan, points: list[Point]) -> dict[str, Any]:
    """Measure every point. One point gives one flat object, several give {"sweep": [one object each]}.

    Raises RefusedError for a point that cannot be measured, before anything is.
    """
    for point in points:
        check(plan, point)
    load_average, threads = machine.warn_if_busy(), machine.use_threads(plan.threads)
    results = [result | {"load_average": load_average} for result in _results(plan, points, threads)]
    if all("refused" in result for result in results):
        raise RefusedError(results[0]["refused"])
    print(summary(results))
    return results[0] if len(results) == 1 else {"sweep": results}


def has_unequal_tokens(result: dict[str, Any]) -> bool:
    """Whether a baseline computed something else than we did: then its ratio compares nothing."""
    return any(row.get("equal_tokens") is False for row in result.get("sweep", [result]))


def check(plan: StepPlan, point: Point) -> None:
    """Raises RefusedError unless a block fits around the live tokens, and the baseline knows the quantisation."""
    is_quantized = "int8" in point.quantize_kv or point.quantize_weights in ("int8", "int4")
    if plan.versus.startswith("transformers") and is_quantized:
        raise RefusedError(
            f"versus={plan.versus!r} is given float weights and a float cache; leave out --quantize-weights and "
            "--quantize-kv, or use --versus eager, which takes quantised weights"
        )
    if plan.versus.startswith("eager") and point.quantize_kv != "none":
        raise RefusedError(
            f"versus={plan.versus!r} stores rows as they are, not as quantize_kv={point.quantize_kv!r}; leave it out"
        )
    longest = point.cache_length - (plan.steps + 1) // 2
    if not plan.steps // 2 < point.live_tokens <= longest:
        raise RefusedError(
            f"live_tokens={point.live_tokens} must be above {plan.steps // 2} and at most {longest}: "
            f"{plan.steps} steps around it fit into cache_length={point.cache_length}; choose others, or fewer --steps"
        )


def _results(plan: StepPlan, points: list[Point], threads: int) -> Iterator[dict[str, Any]]:
    """Points that differ in live tokens alone share an engine; those that differ in slots or cache, the weights."""
    progress, bench, weights = Progress(), None, None
    bandwidth = machine.copy_bandwidth(choose_devices(plan.platform)[0])  # while there is room for it
    for point in points:
        try:
            if bench is None or bench.key != point.engine_key:
                progress.show(f"{plan.model}: preparing {point} ...")
                bench = None  # its memory goes first
                weights = weights if weights is not None and weights[0] == point.weights_key else None
                bench = PointBench(plan, point, None if weights is None else weights[1])
                weights = (point.weights_key, bench.loaded)
            progress.show(f"{plan.model}: measuring {point} ...")
            result = bench.measure(point, bandwidth)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            bench = None
            result = {"model": plan.model, **asdict(point), "refused": f"does not fit: {str(error).splitlines()[0]}"}
        progress.clear()
        if len(points) > 1:
            print(told(result), file=sys.stderr, flush=True)
        yield result | machine.describe(threads)


class PointBench:
    """A loaded model with its baseline, for points that differ in live tokens alone."""

    def __init__(self, plan: StepPlan, point: Point, weights: Loaded | None = None) -> None:
        """`weights`: of a point with the same `weights_key`; None loads them."""
        config = EngineConfig(
            model=plan.model,
            slots=point.slots,
            cache_length=point.cache_length,
            dtype=point.dtype,
            platform=plan.platform,
            tensor_parallel=plan.tensor_parallel,
            quantize_weights=point.quantize_weights,
            quantize_kv=point.quantize_kv,
        )
        self._plan, self.key = plan, point.engine_key
        self.loaded = loaded = load(config) if weights is None else resized(config, weights)
        self.engine, self.params = loaded.engine, loaded.params
        prompts = prompts_for(loaded.engine)
        self._ours, self.compile_seconds, tokens = started(EngineStepper(self.engine, self.params), prompts)
        self._baseline, self._equal_tokens = None, None
        if plan.versus != "none":
            baseline = baseline_for(plan.versus, loaded)
            self._baseline, _, baseline_tokens = started(baseline, prompts)
            self._equal_tokens = tokens == baseline_tokens

    def measure(self, point: Point, bandwidth: float) -> dict[str, Any]:
        """All that the table and the JSON say of a point, but for the machine."""
        steppers = [self._ours] if self._baseline is None else [self._ours, self._baseline]
        blocks = in_turns(steppers, self._plan, point.live_tokens)
        ms = [ms for block in blocks[0] for ms in block.step_ms]
        p50, nbytes = float(np.median(ms)), bytes_per_step(self.engine, self.params, point.live_tokens)
        devices = self.engine.mesh.devices.flat
        # Virtual CPU devices share one memory; real ones each have their own.
        chips = 1 if devices[0].platform == "cpu" else len(list(devices))
        datasheet = machine.datasheet_bandwidth(devices[0])
        taken = {"dtype": self.engine.layout.dtype.name, "quantize_weights": stored_as(self.engine)}
        result = (
            {"model": self._plan.model, **asdict(point)}
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
                "layer_loop": self.engine.layer_loop,
            }
        )
        if self._plan.attention:
            result |= self._attention_share(point, p50, (datasheet or bandwidth) * chips)
        if self._baseline is None:
            return result
        baseline_ms = [ms for block in blocks[1] for ms in block.step_ms]
        ratio = Ratio.of([b.step_ms for b in blocks[0]], [b.step_ms for b in blocks[1]])
        return (
            result
            | ratio.json()
            | {
                "versus": self._plan.versus,
                "baseline_step_ms_p50": _rounded(percentile(baseline_ms, 50)),
                "baseline_step_ms_p99": _rounded(percentile(baseline_ms, 99)),
                "equal_tokens": self._equal_tokens,
            }
        )

    def _attention_share(self, point: Point, step_ms: float, bandwidth: float) -> dict[str, Any]:
        """Attention alone, and the step if it took no longer than its rows at this bandwidth."""
        self._ours.set_length(point.live_tokens)
        attention_ms = float(np.median(self._ours.attention_ms(self._plan.steps)))
        live_bytes = self.engine.layout.bytes * point.live_tokens / self.engine.cache_length
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
    if versus == "eager":
        return EngineStepper(eager_twin(engine, "stacked"), params)
    if versus == "eager-per-layer":
        eager = eager_twin(engine, "per_layer")
        return EngineStepper(eager, params if eager.layer_loop == engine.layer_loop else eager.load_params(checkpoint))
    if engine.mesh.devices.flat[0].platform != "cpu":
        raise RefusedError(f"versus={versus!r} is compared on CPUs only; use --platform cpu, or --versus eager")
    from .baselines.huggingface import TransformersStepper, transformers_model

    return TransformersStepper(
        transformers_model(checkpoint, engine.layout.dtype.name),
        cache_length=engine.cache_length,
        cache="dynamic" if versus == "transformers-dynamic" else "static",
    )


def prompts_for(engine: Engine) -> list[list[int]]:
    """A prompt a slot: random tokens, the same in every run; few enough that the checked ones fit behind them."""
    length = min(PROMPT_LENGTH, engine.max_prefill_length, engine.cache_length // 2)
    prompts = np.random.default_rng(0).integers(0, engine.vocab_size, (PROMPTS, length)).tolist()
    return [prompts[slot % PROMPTS] for slot in range(engine.max_concurrent_decodes)]


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
    steppers: list[Any], plan: StepPlan, live_tokens: int, pause: Callable[[], object] = lambda: time.sleep(0.05)
) -> list[list[Block]]:
    """A B A B ...: each stepper's blocks. Before each, one untimed step: threads of the other may still be spinning."""
    blocks: list[list[Block]] = [[] for _ in steppers]
    for _ in range(plan.pairs):
        for stepper, its_blocks in zip(steppers, blocks, strict=True):
            pause()
            stepper.set_length(live_tokens - plan.steps // 2)
            stepper.block(1)
            stepper.set_length(live_tokens - plan.steps // 2)
            its_blocks.append(stepper.block(plan.steps))
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
        lines.append(
            "UNEQUAL TOKENS: where it says so, the baseline computes something else, and its ratio compares nothing "
            "(bfloat16 differs by rounding alone: see whether float32 is equal)"
        )
    return "\n".join(lines)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
