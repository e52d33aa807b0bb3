"""How costs grow, and whether they grow as the bytes do.

Four curves: a step's ms against live tokens, one line for each cache length (they should lie on each other: nobody
reads rows that are not live); against slots; an insert's ms against its bucket; and the host's ms a step against slots,
with a model so small that what remains is dispatch, read-back and the orchestrator.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import jax
import numpy as np

from ..engine_impl.config import EngineConfig
from ..engine_impl.engine import Engine
from ..engine_impl.models.llama import LlamaConfig
from ..engine_impl.sampling_params import SamplingParams
from ..server.orchestrator import Orchestrator
from ..server.request import Event, Request
from . import machine
from .models import load_random
from .stats import slope
from .step import Point, PointBench, StepPlan
from .table import Progress, table

TINY = LlamaConfig(
    num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, model_dim=32, ffn_dim=32, vocab_size=128,
    rope_theta=10000.0, rms_norm_eps=1e-5, tied_embeddings=True, context_length=128,
)  # fmt: skip
HOST_STEPS = 64
INSERTS = 7


@dataclass(frozen=True, kw_only=True)
class GrowthPlan:
    """See the flags of `slipstream bench growth`."""

    model: str
    cache_lengths: tuple[int, ...]
    live_tokens: tuple[int, ...]
    slots: tuple[int, ...]
    base_slots: int
    steps: int
    blocks: int
    threads: int | None
    platform: Literal["auto", "cpu", "tpu", "cuda"]


Curve = dict[str, list[float]]
"""{"x": [...], "ms": [...]}"""


def run(plan: GrowthPlan, plot: Path | None) -> dict[str, Any]:
    """All curves; `live_slopes` compares each live-token line's slope with what its bytes cost at copy bandwidth."""
    if plot is not None:
        from .plot import check_plot

        check_plot(plot)
    machine.warn_if_busy()
    threads, progress = machine.use_threads(plan.threads), Progress()
    live: dict[str, Curve] = {}
    slopes, insert, bandwidth = {}, {}, None
    for cache_length in plan.cache_lengths:
        progress.show(f"live tokens, cache length {cache_length} ...")
        bench = bench_of(plan, plan.base_slots, cache_length, plan.live_tokens[0])
        bandwidth = bandwidth or machine.copy_bandwidth(jax.devices()[0])
        live[str(cache_length)] = live_curve(bench, plan, cache_length, bandwidth)
        slopes[str(cache_length)] = live_slope(live[str(cache_length)], bench.engine, bandwidth)
        if cache_length == max(plan.cache_lengths):
            insert = insert_curve(bench.engine, bench.params)
        del bench  # its memory, before the next
    assert bandwidth is not None
    slots = slot_curve(plan, bandwidth, progress)
    host = host_curve(plan, progress)
    progress.clear()
    result = {
        "live_tokens": live, "live_slopes": slopes, "slots": slots, "insert": insert, "host": host,
        "copy_bandwidth_bytes_per_second": round(bandwidth),
    }  # fmt: skip
    print(summary(result))
    if plot is not None:
        draw_curves(plot, result)
    return {"plan": asdict(plan)} | result | machine.describe(threads)


def bench_of(plan: GrowthPlan, slots: int, cache_length: int, live_tokens: int) -> PointBench:
    """A filled engine."""
    shared = StepPlan(
        model=plan.model, platform=plan.platform, tensor_parallel=None, versus="none", steps=plan.steps,
        pairs=plan.blocks, threads=plan.threads,
    )  # fmt: skip
    return PointBench(shared, point_of(slots, cache_length, live_tokens))


def point_of(slots: int, cache_length: int, live_tokens: int) -> Point:
    return Point(slots=slots, cache_length=cache_length, live_tokens=live_tokens, dtype="auto")


def live_curve(bench: PointBench, plan: GrowthPlan, cache_length: int, bandwidth: float) -> Curve:
    """Step ms against live tokens a slot, those that the cache holds."""
    half = (plan.steps + 1) // 2
    fitting = [live for live in plan.live_tokens if half < live <= cache_length - half]
    points = [bench.measure(point_of(plan.base_slots, cache_length, live), bandwidth) for live in fitting]
    return {"x": list(fitting), "ms": [point["step_ms_p50"] for point in points]}


def live_slope(curve: Curve, engine: Engine, bandwidth: float) -> dict[str, float | None]:
    """What one more live token a slot costs (ms), and what its bytes would cost at copy bandwidth."""
    floor = engine.layout.bytes / engine.cache_length / bandwidth * 1000
    if len(curve["x"]) < 2:
        return {"ms_per_token": None, "ms_at_bandwidth": floor, "share_of_bandwidth": None}
    measured, _ = slope(curve["x"], curve["ms"])
    return {
        "ms_per_token": measured,
        "ms_at_bandwidth": floor,
        "share_of_bandwidth": floor / measured if measured > 0 else None,
    }


def slot_curve(plan: GrowthPlan, bandwidth: float, progress: Progress) -> Curve:
    """Step ms against slots, at the second number of live tokens and the shortest cache."""
    live, cache_length = plan.live_tokens[min(1, len(plan.live_tokens) - 1)], min(plan.cache_lengths)
    ms = []
    for slots in plan.slots:
        progress.show(f"slots, {slots} ...")
        bench = bench_of(plan, slots, cache_length, live)
        ms.append(bench.measure(point_of(slots, cache_length, live), bandwidth)["step_ms_p50"])
        del bench
    return {"x": list(plan.slots), "ms": ms}


def insert_curve(engine: Engine, params: Any) -> Curve:
    """Insert ms against the prompt's bucket (tokens)."""
    state, medians = engine.init_decode_state(), []
    for bucket in engine.buckets:
        prefix, _ = engine.prefill(params, np.zeros(bucket, np.int32), bucket)
        ms = []
        for _ in range(INSERTS + 1):
            jax.block_until_ready((prefix, state))
            start = time.perf_counter()
            state = jax.block_until_ready(engine.insert(prefix, state, 0))
            ms.append((time.perf_counter() - start) * 1000)
        medians.append(float(np.median(ms[1:])))  # the first one compiles
    return {"x": list(engine.buckets), "ms": medians}


def host_curve(plan: GrowthPlan, progress: Progress) -> Curve:
    """ms between an answer's tokens behind the orchestrator, all slots live, against slots."""
    medians = []
    for slots in plan.slots:
        progress.show(f"host, {slots} slots ...")
        config = EngineConfig(slots=slots, cache_length=128, platform=plan.platform, tensor_parallel=1)
        engine, params, _ = load_random(config, TINY)
        engine.get_tokenizer = NoText  # pyright: ignore
        medians.append(host_ms(engine, params, slots))
    return {"x": list(plan.slots), "ms": medians}


class NoText:
    """A tokenizer, and its streams, of a model without text."""

    stop_ids = frozenset()

    def stream(self) -> "NoText":
        return self

    def feed(self, token_id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def host_ms(engine: Engine, params: Any, slots: int) -> float:
    """The median gap between the tokens of the request that was inserted last: by then all slots are live."""
    times: dict[int, list[float]] = {slot: [] for slot in range(slots)}
    orchestrator = Orchestrator(engine, params, max_queued=slots, warm_up=False)
    ends = SimpleNamespace(left=slots)

    def deliver(slot: int, event: Event) -> None:
        times[slot].append(time.perf_counter())
        ends.left -= event.is_last

    orchestrator.start()
    try:
        for slot in range(slots):
            orchestrator.submit(
                Request(
                    prompt_ids=[1],
                    max_tokens=HOST_STEPS,
                    sampling=SamplingParams(),
                    deliver=lambda event, slot=slot: deliver(slot, event),
                )
            )
        while ends.left:
            time.sleep(0.01)
    finally:
        orchestrator.close()
    # While the last request is answered, those before it end one by one, a prefill apart: its first tokens count.
    return float(np.median(np.diff(times[slots - 1])[: HOST_STEPS // 2]) * 1000)


def summary(result: dict[str, Any]) -> str:
    """The curves as tables."""
    parts = []
    for cache_length, curve in result["live_tokens"].items():
        share = result["live_slopes"][cache_length]["share_of_bandwidth"]
        note = "" if share is None else f" (one more token a slot: {share:.2f} of copy bandwidth)"
        rows = list(zip(curve["x"], curve["ms"], strict=True))
        parts.append(f"cache length {cache_length}{note}\n{table(['live tokens', 'step ms'], rows)}")
    for name, x, y in (("slots", "slots", "step ms"), ("insert", "bucket", "insert ms"), ("host", "slots", "host ms")):
        parts.append(table([x, y], list(zip(result[name]["x"], result[name]["ms"], strict=True))))
    return "\n\n".join(parts)


def draw_curves(path: Path, result: dict[str, Any]) -> None:
    """Four panels."""
    from .plot import Panel, draw

    def of(curve: Curve) -> tuple[Sequence[float], Sequence[float]]:
        return curve["x"], curve["ms"]

    lines = {f"S = {cache_length}": of(curve) for cache_length, curve in result["live_tokens"].items()}
    draw(
        path,
        [
            Panel(title="Step against live tokens", x="live tokens a slot", y="ms", series=lines),
            Panel(title="Step against slots", x="slots", y="ms", series={"step": of(result["slots"])}),
            Panel(title="Insert", x="bucket (tokens)", y="ms", series={"insert": of(result["insert"])}),
            Panel(title="Host", x="slots", y="ms a step", series={"host": of(result["host"])}),
        ],
    )
