"""How costs grow, and whether they grow as the bytes do.

Four curves: a step's ms against live tokens, one line for each cache length (they should lie on each other: nobody
reads rows that are not live); against slots; an insert's ms against its tokens; and the host's ms per step against
slots (host.py). A curve's points take turns, block by block, so that a machine that slows down bends none of them.
Beside each point is what its bytes would take at the copy bandwidth measured in the same run.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..engine_impl.engine import Engine
from ..engine_impl.loading import build_engine
from ..engine_impl.session import Session
from .baselines.steppers import EngineStepper
from .host import HostBench
from .measure import machine
from .measure.models import Loaded, load
from .measure.stats import slope
from .measure.table import Progress, table
from .measure.traffic import bytes_per_step
from .options.growth import GrowthOptions

INSERTS = 7
"""Inserts of a block."""

Curve = dict[str, list[float]]
"""x, and of each point over the blocks' medians: ms (their median), ms_min, ms_max; ms_at_bandwidth"""


def run(options: GrowthOptions) -> dict[str, Any]:
    """All curves; `live_slopes` and `insert_slope` compare them with what the bytes cost at copy bandwidth.

    Raises RefusedError for a plot that cannot be drawn, before anything is measured.
    """
    if options.plot is not None:
        from .measure.plot import check_plot

        check_plot(options.plot)
    load_average = machine.warn_if_busy()
    threads, progress = machine.use_threads(options.threads), Progress()
    progress.show(f"{options.model}: loading ...")
    field = Field(options)
    progress.show("live tokens ...")
    live, insert = field.live_curves(), field.insert_curve()
    progress.show("slots ...")
    slots = field.slot_curve()
    progress.show("host ...")
    host = host_curve(options)
    progress.clear()
    result = {
        "live_tokens": live, "live_slopes": {name: compared(curve) for name, curve in live.items()}, "slots": slots,
        "slots_live_tokens": options.slot_curve_live_tokens, "insert": insert, "insert_slope": compared(insert),
        "host": host, "copy_bandwidth_bytes_per_second": round(field.bandwidth),
    }  # fmt: skip
    print(summary(result))
    if options.plot is not None:
        draw_curves(options.plot, result)
    return {"plan": options.facts()} | result | machine.describe(threads) | {"load_average": load_average}


class Field:
    """One set of weights, and engines of several sizes that use it."""

    def __init__(self, options: GrowthOptions) -> None:
        self._options = options
        self._loaded: Loaded = load(options.config(options.base_slots, max(options.lengths)))
        devices = self._loaded.engine.mesh.devices.flat
        chips = 1 if devices[0].platform == "cpu" else self._loaded.engine.mesh.size  # virtual CPUs share one memory
        self.bandwidth = machine.copy_bandwidth(devices[0]) * chips

    def live_curves(self) -> dict[str, Curve]:
        """By cache length: step ms against live tokens per slot."""
        options = self._options
        engines = {length: self._engine(options.base_slots, length) for length in options.lengths}
        points = [(length, live) for length in options.lengths for live in options.fitting(length)]
        curve = self._steps([(live, engines[length], live) for length, live in points])
        of_length = {length: [i for i, point in enumerate(points) if point[0] == length] for length in engines}
        return {
            str(length): {name: [values[i] for i in indices] for name, values in curve.items()}
            for length, indices in of_length.items()
        }

    def slot_curve(self) -> Curve:
        """Step ms against slots, in the shortest cache."""
        live, length = self._options.slot_curve_live_tokens, self._options.shortest
        return self._steps([(slots, self._engine(slots, length), live) for slots in self._options.slot_counts])

    def insert_curve(self) -> Curve:
        """Insert ms against the padded piece (tokens), into the longest cache: rows are read once, written once."""
        engine, params, _ = self._loaded
        session = Session(engine, params)
        tokens = [length for pieces, length in engine.shapes.prefills if pieces == 1]
        prefixes = {length: session.prefilled(0, [0] * length) for length in tokens}
        for prefix in prefixes.values():
            session.insert(prefix, 0)  # compiles

        def block(length: int) -> list[float]:
            ms = []
            for _ in range(INSERTS):
                jax.block_until_ready(session.state)
                start = time.perf_counter()
                session.insert(prefixes[length], 0)
                jax.block_until_ready(session.state)
                ms.append((time.perf_counter() - start) * 1000)
            return ms

        row_bytes = engine.layout.bytes / engine.sizes.pages / engine.sizes.page_rows
        floors = [2 * row_bytes * length / self.bandwidth * 1000 for length in tokens]
        return curve_of(tokens, floors, in_turns([lambda n=n: block(n) for n in tokens], self._options))

    def _engine(self, slots: int, cache_length: int) -> Engine:
        engine, _, checkpoint = self._loaded
        if (slots, cache_length) == (engine.sizes.slots, engine.sizes.cache_length):
            return engine
        return build_engine(self._options.config(slots, cache_length), checkpoint)

    def _steps(self, points: Sequence[tuple[int, Engine, int]]) -> Curve:
        """A curve from points (x, engine, live tokens)."""
        options, params = self._options, self._loaded.params
        steppers = {id(engine): EngineStepper(engine, params) for _, engine, _ in points}
        for stepper in steppers.values():
            stepper.fill([])  # all slots are set to a length: their rows are zeros, which cost the same

        def block(engine: Engine, live: int) -> list[float]:
            stepper = steppers[id(engine)]
            for steps in (1, options.steps):  # the first does not count: it compiles, or finds another engine's caches
                stepper.set_length(live - options.steps // 2)
                ms = stepper.block(steps).step_ms
            return ms

        floors = [bytes_per_step(engine, params, live) / self.bandwidth * 1000 for _, engine, live in points]
        blocks = [lambda engine=engine, live=live: block(engine, live) for _, engine, live in points]
        return curve_of([x for x, _, _ in points], floors, in_turns(blocks, options))


def host_curve(options: GrowthOptions) -> Curve:
    """The host's ms per step against slots; `bare_ms` is the same tiny engine's without an orchestrator."""
    benches = [HostBench(slots, options.platform) for slots in options.slot_counts]
    for bench in benches:
        bench.bare_ms()  # compiles
        bench.served_ms()
    served = in_turns([lambda b=b: [b.served_ms()] for b in benches], options)
    bare = in_turns([lambda b=b: [b.bare_ms()] for b in benches], options)
    curve = curve_of(options.slot_counts, None, served)
    return curve | {"bare_ms": curve_of(options.slot_counts, None, bare)["ms"]}


def in_turns(blocks: Sequence[Callable[[], list[float]]], options: GrowthOptions) -> list[list[float]]:
    """Each point's medians of its blocks: all points once, all points again, ..."""
    medians: list[list[float]] = [[] for _ in blocks]
    for _ in range(options.blocks):
        for block, its_medians in zip(blocks, medians, strict=True):
            its_medians.append(float(np.median(block())))
    return medians


def curve_of(x: Sequence[float], floors: Sequence[float] | None, medians: Sequence[Sequence[float]]) -> Curve:
    """A curve from each point's block medians, with what its bytes cost."""
    curve = {"x": list(x)} | {
        name: [round(float(choose(of_point)), 5) for of_point in medians]
        for name, choose in (("ms", np.median), ("ms_min", min), ("ms_max", max))
    }
    return curve if floors is None else curve | {"ms_at_bandwidth": [round(floor, 5) for floor in floors]}


def compared(curve: Curve) -> dict[str, float | None]:
    """What one more token costs (ms), what its bytes would cost, their quotient, and how straight the line is: the
    largest distance of a point from it, over the ms of that point. None of a single point."""
    if len(curve["x"]) < 2:
        return dict.fromkeys(("ms_per_token", "ms_at_bandwidth", "share_of_bandwidth", "largest_deviation"))
    measured, at_zero = slope(curve["x"], curve["ms"])
    floor, _ = slope(curve["x"], curve["ms_at_bandwidth"])
    off = [abs(at_zero + measured * x - ms) / ms for x, ms in zip(curve["x"], curve["ms"], strict=True)]
    return {
        "ms_per_token": measured,
        "ms_at_bandwidth": floor,
        "share_of_bandwidth": floor / measured if measured > 0 else None,
        "largest_deviation": max(off),
    }


def summary(result: dict[str, Any]) -> str:
    """The curves as tables."""
    parts = [f"copy bandwidth {result['copy_bandwidth_bytes_per_second'] / 1e9:.1f} GB/s"]
    for cache_length, curve in result["live_tokens"].items():
        parts.append(_part(f"cache length {cache_length}", "live tokens", curve, result["live_slopes"][cache_length]))
    parts.append(_part(f"{result['slots_live_tokens']} live tokens per slot", "slots", result["slots"]))
    parts.append(_part("insert", "tokens", result["insert"], result["insert_slope"]))
    parts.append(_part("host, a model of no size", "slots", result["host"]))
    return "\n\n".join(parts)


def _part(title: str, x: str, curve: Curve, compared: dict[str, float | None] | None = None) -> str:
    if compared is not None and compared["share_of_bandwidth"] is not None:
        title += f" (one more token: {compared['share_of_bandwidth']:.2f} of copy bandwidth)"
    headers = {"x": x, "ms": "ms", "ms_min": "min", "ms_max": "max", "ms_at_bandwidth": "at bandwidth"}
    headers |= {"bare_ms": "bare engine"}
    columns = [name for name in headers if name in curve]
    rows = list(zip(*(curve[name] for name in columns), strict=True))
    return f"{title}\n{table([headers[name] for name in columns], rows)}"


def draw_curves(path: Path, result: dict[str, Any]) -> None:
    """Four panels, measured and at copy bandwidth."""
    from .measure.plot import Panel, draw

    def of(name: str, curve: Curve) -> dict[str, tuple[list[float], list[float]]]:
        found = {name: (curve["x"], curve["ms"])}
        for key, title in (("ms_at_bandwidth", "its bytes at copy bandwidth"), ("bare_ms", "bare engine")):
            found |= {title: (curve["x"], curve[key])} if key in curve else {}
        return found

    live = {}
    for cache_length in sorted(result["live_tokens"], key=int):  # the bytes are the same for all, the last has them all
        live |= of(f"S = {cache_length}", result["live_tokens"][cache_length])
    draw(
        path,
        [
            Panel(title="Step against live tokens", x="live tokens per slot", y="ms", series=live),
            Panel(title="Step against slots", x="slots", y="ms", series=of("step", result["slots"])),
            Panel(title="Insert", x="tokens", y="ms", series=of("insert", result["insert"])),
            Panel(title="Host", x="slots", y="ms per step", series=of("behind the orchestrator", result["host"])),
        ],
    )
