"""A tiny model where a benchmark would load a large one."""

import pytest
from slipstream.benchmarks.measure import machine, models

from tests.engine_impl.tiny_models import TINY, RandomCheckpoint, tiny_engine


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    """The copy bandwidth of 4 KiB, which is quick to measure."""
    monkeypatch.setattr(machine, "COPIED_BYTES", {"cpu": 4096})


@pytest.fixture(scope="package")
def tiny_loaded():
    engine, params = tiny_engine(slots=2)
    return models.Loaded(engine, params, RandomCheckpoint(TINY))
