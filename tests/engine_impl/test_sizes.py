"""Slots, cache length and the cache's tokens where nobody said."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.loading import build_engine
from slipstream.engine_impl.session import Session
from slipstream.engine_impl.sizes import SPARE, STEP_SHARE, Demand, free_memory, memory_of, sized
from slipstream.engine_impl.weights.sharding import make_mesh
from slipstream.kernels import backend_for, native

from .tiny_models import TINY, RandomCheckpoint

F32 = jnp.dtype("float32")
LONG = replace(TINY, context_length=131072)
ROW = 2 * 4 * 2 * 16 * 4
"""A token in the cache on one device (bytes): layers, kv heads, k and v, head dim, float32."""
ROWS = 64 if native.is_built() else 128
"""Of a page."""


def mesh(devices=1):
    return make_mesh(jax.devices(), TINY.num_heads, TINY.num_kv_heads, devices)


def chosen(memory=None, shape=TINY, devices=1, **given):
    return sized(EngineConfig(**given), shape, mesh(devices), F32, memory)


def demand(devices=1, shape=LONG, **given):
    return Demand(EngineConfig(**given), shape, mesh(devices), F32)


def usable(memory):
    return int(memory * (1 - SPARE))


def needed(config, shape=LONG, *, devices=1):
    """What the sizes ask of each device by the same arithmetic (bytes)."""
    asked, (slots, _, tokens) = demand(devices, shape), config.chosen
    return asked.weights_bytes + asked.prefill_bytes(512) + slots * asked.slot_bytes + tokens * asked.row_bytes


@pytest.mark.parametrize(
    ("context", "length"),
    [(131072, 1024), (1024, 1024), (1000, 1024), (256, 256), (200, 256), (128, 128), (100, 128), (3, 128)],
)
def test_where_memory_is_not_asked_the_model_decides(context, length):
    config = chosen(shape=replace(TINY, context_length=context))
    assert config.chosen == (8, length, 8 * length)


def test_on_cpus_the_cache_takes_a_quarter_of_the_free_memory_at_most():
    """All virtual devices share it."""
    for devices in (1, 4):
        assert sized(EngineConfig(), TINY, mesh(devices), F32, None, 4 * 2048 * ROW).chosen == (8, 512, 2048)
        assert sized(EngineConfig(), TINY, mesh(devices), F32, None, 4 * 2047 * ROW).chosen == (8, 512, 1920)
    assert sized(EngineConfig(), TINY, mesh(), F32, None, 2**40).chosen == (8, 512, 4096)
    assert sized(EngineConfig(), TINY, mesh(), F32, None, 1).chosen == (8, 512, 128), "a tile at least"
    wide = replace(TINY, vocab_size=200_000)
    for rows, tokens in ((1024, 1024), (1023, 896)):  # the weights go first
        free = math.ceil((demand(shape=wide).weights_bytes + rows * ROW) / (1 - SPARE))
        assert sized(EngineConfig(), wide, mesh(), F32, None, free).cache_tokens == tokens
    assert sized(EngineConfig(cache_tokens=4096), TINY, mesh(), F32, None, 1).cache_tokens == 4096


def test_this_machine_tells_its_free_memory():
    free = free_memory()
    assert free is None or 2**20 < free < 2**50


def test_what_is_given_is_left_as_it_is():
    config = EngineConfig(slots=3, cache_length=384, cache_tokens=640)
    assert sized(config, TINY, mesh(), F32, 2**30) == config
    choices: tuple[dict[str, Any], ...] = (
        {"slots": 3}, {"cache_length": 384}, {"cache_tokens": 640}, {"max_prefill_length": 65}, {"prefill_chunk": 256},
    )  # fmt: skip
    for given in choices:
        for memory in (None, 2**30):
            config = chosen(memory, **given)
            assert {name: getattr(config, name) for name in given} == given


def test_what_a_model_asks_by_hand():
    vocab, ffn = (128, 64) if backend_for("cpu") == "native_cpu" else (101, 48)  # outputs fill whole panels of 32
    matrices = (101 + vocab) * 32 + 2 * (32 * 128 * 2 + 32 * 64 * 2 + 2 * 32 * ffn + 32 * 48)
    norms = (2 * 2 + 1) * 32
    assert demand().weights_bytes == 4 * (matrices + norms)
    assert demand().row_bytes == ROW
    assert demand(devices=2).row_bytes == ROW // 2
    assert demand(quantize_kv="int8").row_bytes == 2 * 4 * 2 * (16 + 4)
    assert demand(quantize_weights="int8").weights_bytes < demand().weights_bytes / 2


@pytest.mark.parametrize("megabytes", [60, 100, 1000, 5000])
def test_the_cache_fills_the_memory_and_one_more_page_would_not_fit(megabytes):
    memory = megabytes * 2**20
    config = chosen(memory, LONG)
    assert (config.slots, config.cache_length) == (256, 131072)
    assert needed(config) <= usable(memory)
    assert needed(replace(config, cache_tokens=config.chosen[2] + 128)) > usable(memory)


def test_a_length_costs_no_cache():
    long, short = (chosen(2**30, LONG, cache_length=length).cache_tokens for length in (131072, 1024))
    assert long == short


def test_slots_that_a_step_has_no_memory_for_are_left_out():
    """Each needs rows of the vocabulary."""
    wide = replace(LONG, vocab_size=200_000)
    memory = 2**30
    config, asked = chosen(memory, wide), demand(shape=wide)
    left = usable(memory) - asked.weights_bytes
    slots = config.chosen[0]
    assert slots * asked.slot_bytes <= left * STEP_SHARE < (slots + 1) * asked.slot_bytes
    assert 1 < slots < 256
    assert chosen(memory, wide, slots=200).slots == 200


def test_two_devices_hold_more_than_one():
    (_, _, one), (_, _, two) = (chosen(2**30, LONG, devices, slots=64).chosen for devices in (1, 2))
    assert two > 1.5 * one


def test_where_nothing_fits_whoever_allocates_is_told():
    assert chosen(2**10, LONG).chosen == (1, 131072, 128)


def test_memory_is_that_of_the_device_that_has_least():
    devices = [SimpleNamespace(memory_stats=lambda limit=limit: {"bytes_limit": limit}) for limit in (300, 200)]
    assert memory_of(devices) == 200
    assert memory_of([*devices, SimpleNamespace(memory_stats=lambda: None)]) is None
    assert memory_of(jax.devices()) is None, "CPUs do not tell"


def engine_of(context, **given):
    checkpoint = RandomCheckpoint(replace(TINY, context_length=context))
    return build_engine(EngineConfig(tensor_parallel=1, **given), checkpoint), checkpoint


def test_an_engine_takes_what_its_model_was_trained_for():
    engine, _ = engine_of(256)
    sizes = engine.sizes
    assert (sizes.slots, sizes.cache_length, sizes.max_prefill_length) == (8, 256, 256)
    assert (sizes.page_rows, sizes.pages_per_slot) == (ROWS, 256 // ROWS)
    assert (sizes.pages, sizes.table_entries) == (2048 // ROWS, 2048 // ROWS)
    assert (sizes.prefill_chunk, sizes.prefill_batch, sizes.cache_tokens) == (256, (4, 8, 32), 2048)
    assert sizes.prefill_lengths == (16, 64, 256)
    assert sizes.skips_padding
    engine, _ = engine_of(200)
    assert (engine.layout.length, engine.sizes.cache_length, engine.sizes.max_prefill_length) == (256, 200, 200)
    engine, _ = engine_of(512, slots=1, max_prefill_length=100)
    assert (engine.sizes.max_prefill_length, engine.sizes.prefill_chunk, engine.sizes.prefill_batch) == (
        100,
        128,
        (1, 1, 128),
    )


@pytest.mark.parametrize("name", ["cache_length", "max_prefill_length"])
def test_more_than_a_model_was_trained_for_is_refused(name):
    with pytest.raises(
        RefusedError, match=f"{name}=512 is beyond what random was trained for; use at most 256, or leave"
    ):
        engine_of(256, **{name: 512})


def test_a_model_shorter_than_a_tile_of_the_cache_answers_up_to_its_positions():
    engine, checkpoint = engine_of(20, slots=2)
    session = Session(engine, engine.parameters.load(checkpoint))
    session.start(0, [1] * 16)
    lengths = []
    for _ in range(6):
        session.step()
        lengths.append(int(np.asarray(session.state.length_B)[0]))
    assert lengths == [17, 18, 19, 20, 20, 20]
