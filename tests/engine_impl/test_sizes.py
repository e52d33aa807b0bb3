"""Slots, cache length and longest prompt where nobody said."""

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
from slipstream.engine_impl.sizes import SPARE, Demand, memory_of, sized
from slipstream.engine_impl.weights.sharding import make_mesh

from .tiny_models import TINY, RandomCheckpoint

F32 = jnp.dtype("float32")
LONG = replace(TINY, context_length=131072)
ROW = 2 * 4 * 2 * 16 * 4
"""A token in the cache on one device (bytes): layers, kv heads, k and v, head dim, float32."""


def mesh(devices=1):
    return make_mesh(jax.devices(), TINY.num_heads, TINY.num_kv_heads, devices)


def chosen(memory=None, shape=TINY, devices=1, **given):
    return sized(EngineConfig(**given), shape, mesh(devices), F32, memory)


def demand(devices=1, shape=LONG, **given):
    return Demand(EngineConfig(**given), shape, mesh(devices), F32)


def needed(config, shape=LONG, *, slots=None, devices=1):
    """What the sizes ask of each device by the same arithmetic (bytes)."""
    asked = demand(devices, shape)
    slots = config.slots if slots is None else slots
    return (
        asked.weights_bytes + asked.prefill_bytes(config.largest_bucket) + slots * asked.slot_bytes(config.cache_length)
    )


def usable(memory):
    return int(memory * (1 - SPARE))


@pytest.mark.parametrize(
    ("context", "length", "prompt"),
    [
        (131072, 1024, 1024), (1024, 1024, 1024), (1000, 1024, 512), (256, 256, 256), (200, 256, 128), (128, 128, 128),
        (100, 128, 64), (16, 128, 16),
    ],
)  # fmt: skip
def test_where_memory_is_not_asked_the_model_decides(context, length, prompt):
    config = chosen(shape=replace(TINY, context_length=context))
    assert (config.slots, config.cache_length, config.largest_bucket) == (8, length, prompt)


def test_a_model_too_short_for_any_prompt_is_refused():
    with pytest.raises(RefusedError, match="trained for 15 positions, and the shortest prompt that is compiled has 16"):
        chosen(shape=replace(TINY, context_length=15))


def test_what_is_given_is_left_as_it_is():
    config = EngineConfig(slots=3, cache_length=384)
    assert sized(config, TINY, mesh(), F32, 2**30) is config
    choices: tuple[dict[str, Any], ...] = ({"slots": 3}, {"cache_length": 384}, {"max_prefill_length": 64})
    for given in choices:
        for memory in (None, 2**30):
            config = chosen(memory, **given)
            assert {name: getattr(config, name) for name in given} == given
    assert chosen(2**30, cache_length=384).largest_bucket == 256
    with pytest.raises(
        RefusedError, match="max_prefill_length=2048 must be a power of two from 16 to cache_length=512"
    ):
        chosen(max_prefill_length=2048)


def test_what_a_model_asks_by_hand():
    matrices = 101 * 32 * 2 + 2 * (32 * 128 * 2 + 32 * 64 * 2 + 3 * 32 * 48)
    norms = (2 * 2 + 1) * 32
    assert demand().weights_bytes == 4 * (matrices + norms)
    assert demand().row_bytes == ROW
    assert demand(devices=2).row_bytes == ROW // 2
    assert demand(quantize_kv="int8").row_bytes == 2 * 4 * 2 * (16 + 4)
    assert demand(quantize_weights="int8").weights_bytes < demand().weights_bytes / 2


@pytest.mark.parametrize("megabytes", [60, 100, 1000, 5000])
def test_slots_fill_the_memory_and_one_more_would_not_fit(megabytes):
    memory = megabytes * 2**20
    config = chosen(memory, LONG, cache_length=1024)
    assert needed(config) <= usable(memory)
    slots, _ = config.chosen
    assert slots == 256 or needed(config, slots=slots + 1) > usable(memory)
    assert 8 < slots <= 256


def test_a_length_that_memory_bounds_leaves_room_for_eight_slots():
    config = chosen(2**30, LONG)
    slots, length = config.chosen
    assert slots == 8
    assert length % 1024 == 0
    assert needed(config) <= usable(2**30)
    assert needed(replace(config, cache_length=length + 1024)) > usable(2**30)
    assert chosen(2**30, LONG, slots=1).cache_length == 131072
    assert chosen(2**30, LONG, slots=300).slots == 300


def test_a_length_below_a_block_is_a_multiple_of_128():
    memory = 9 * 2**20
    config = chosen(memory, LONG)
    slots, length = config.chosen
    assert length < 1024
    assert length % 128 == 0
    assert slots >= 8
    assert needed(config) <= usable(memory)


def test_two_devices_hold_more_than_one():
    (_, one), (_, two) = (chosen(2**30, LONG, devices, slots=64).chosen for devices in (1, 2))
    assert two > 1.5 * one


def test_a_prefill_takes_no_more_than_its_share():
    config, asked = chosen(2**30, LONG), demand()
    left = usable(2**30) - asked.weights_bytes
    assert asked.prefill_bytes(config.largest_bucket) <= left / 4
    assert config.largest_bucket == 8192, "XLA's prefill attention would compile for minutes beyond"
    assert chosen(2**27, LONG).largest_bucket < 8192


def test_where_nothing_fits_whoever_allocates_is_told():
    config = chosen(2**10, LONG)
    assert (config.slots, config.cache_length) == (1, 1024)


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
    assert (engine.max_concurrent_decodes, engine.cache_length, engine.max_prefill_length) == (8, 256, 256)
    engine, _ = engine_of(200)
    assert (engine.layout.length, engine.cache_length, engine.max_prefill_length) == (256, 200, 128)


@pytest.mark.parametrize("name", ["cache_length", "max_prefill_length"])
def test_more_than_a_model_was_trained_for_is_refused(name):
    with pytest.raises(
        RefusedError, match=f"{name}=512 is beyond what random was trained for; use at most 256, or leave"
    ):
        engine_of(256, **{name: 512})


def test_a_model_shorter_than_a_tile_of_the_cache_answers_up_to_its_positions():
    engine, checkpoint = engine_of(20, slots=2)
    params, state = engine.load_params(checkpoint), engine.init_decode_state()
    prefix, _ = engine.prefill(params, *engine.pad([1] * 16))
    state = engine.insert(prefix, state, 0)
    lengths = []
    for _ in range(6):
        state, _ = engine.generate(params, state)
        lengths.append(int(np.asarray(state.length_B)[0]))
    assert lengths == [17, 18, 19, 20, 20, 20]
