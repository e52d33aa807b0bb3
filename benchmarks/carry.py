"""A decode step and a piece of a prompt, one behind the other and as one program, in turns: what the table of steps
that carry (`engine_impl/shapes.py`) is chosen by.

Run as `python -m slipstream.benchmarks.carry 8x64 32x256`: slots, all live, and tokens of the piece. On CPUs the time
is that of all threads, which other programs disturb less.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np

from ..engine_impl.api import Piece
from ..engine_impl.assembly import twin
from ..engine_impl.config import EngineConfig
from ..engine_impl.session import Session
from ..engine_impl.shapes import Carried
from .measure.models import Loaded, load
from .measure.stats import Ratio
from .measure.table import table

PAIRS = 9
LIVE_TOKENS = 128


def run(model: str, cases: list[tuple[int, int]], pairs: int = PAIRS, cache_length: int = 1024) -> str:
    """The table, a row for each (slots, tokens)."""
    rows = []
    for slots, tokens in cases:
        loaded = load(EngineConfig(model=model, slots=slots, cache_length=cache_length))
        apart, together = both_ways(loaded, slots, tokens)
        compile_s = [_seconds(way) for way in (apart, together)][1]
        blocks = [(_seconds(apart), _seconds(together)) for _ in range(pairs)]
        ratio = Ratio(tuple(one / other for one, other in blocks)).json()
        ms = [round(float(np.median(of)) * 1000, 1) for of in zip(*blocks, strict=True)]
        rows.append(
            [slots, tokens, *ms, ratio["ratio_p50"], ratio["ratio_min"], ratio["ratio_max"], round(compile_s, 1)]
        )
    head = ["slots", "tokens", "apart ms", "together ms", "ratio", "min", "max", "compile s"]
    return table(head, rows)


def both_ways(loaded: Loaded, slots: int, tokens: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """One turn each, until the device is done: the piece and a step, and both together."""
    engine, session = loaded.engine, Session(loaded.engine, loaded.params)
    engine = twin(engine, shapes=replace(engine.shapes, carried=Carried(slots, tokens, tokens)))
    for slot in range(slots):
        session.start(slot, [slot + at for at in range(LIVE_TOKENS)])
    slot_N, page_NJ = np.arange(slots, dtype=np.int32), session.page_BJ
    reach = engine.reach_of(engine.sizes.cache_length)
    piece = Piece(token_T=np.arange(tokens, dtype=np.int32), start=0, page_J=page_NJ[0], reach=reach)

    def apart() -> None:
        prefix = engine.prefill(loaded.params, session.state, [piece])
        session.state, result = engine.generate(loaded.params, session.state, slot_N, page_NJ)
        jax.block_until_ready((prefix, result))

    def together() -> None:
        session.state, result, prefix = engine.carry(loaded.params, session.state, slot_N, page_NJ, [piece])
        jax.block_until_ready((prefix, result))

    return apart, together


def _seconds(way: Callable[[], None]) -> float:
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    start = clock()
    way()
    return clock() - start


if __name__ == "__main__":
    sizes = [(int(slots), int(tokens)) for slots, _, tokens in (case.partition("x") for case in sys.argv[1:])]
    print(run("embedded", sizes))
