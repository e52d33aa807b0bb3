"""A step and a piece, apart and together."""

import pytest
from slipstream.benchmarks import carry
from slipstream.benchmarks.measure.models import Loaded

from tests.engine_impl.tiny_models import TINY, RandomCheckpoint, tiny_engine


@pytest.mark.slow
def test_both_ways_are_timed_in_turns(monkeypatch):
    engine, params = tiny_engine(slots=2, cache_length=256)
    monkeypatch.setattr(carry, "load", lambda config: Loaded(engine, params, RandomCheckpoint(TINY)))
    head, *_, row = carry.run("tiny", [(2, 16)], pairs=2).splitlines()
    assert head.split()[:2] == ["slots", "tokens"]
    slots, tokens, apart, together, *ratios, compile_s = map(float, row.split())
    assert (slots, tokens) == (2, 16)
    assert min(apart, together, *ratios, compile_s) > 0
    assert ratios[1] <= ratios[0] <= ratios[2]
