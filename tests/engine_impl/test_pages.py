"""A request's tokens do not depend on which pages it has, nor on what lies in any other."""

import copy
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .tiny_models import TINY, greedy, tiny_engine

LENGTH, R, SLOTS = 384, 128, 4
PROMPTS = [[n * 7 % 101 for n in range(length)] for length in (120, 5, 250)]
STEPS = 20  # the first slot and the last go over a page's border


def on_pages(engine, page_BJ):
    """The same engine, whose slots have other pages."""
    other = copy.copy(engine)
    other.page_BJ = np.asarray(page_BJ, np.int32)
    return other


def poisoned(engine):
    """The engine, whose empty cache is NaN; codes, which know none, have NaN scales."""

    def poison(leaf):
        return jnp.full_like(leaf, jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else 99)

    def init_decode_state():
        state = engine.init_decode_state()
        return replace(state, cache=jax.tree.map(poison, state.cache))

    other = copy.copy(engine)
    other.init_decode_state = init_decode_state
    return other


@pytest.mark.parametrize(("devices", "quantize_kv"), [(1, "none"), (1, "int8"), (8, "none")])
def test_any_pages_give_the_same_tokens(devices, quantize_kv):
    """NaN in every page and row that no slot has filled."""
    config = replace(TINY, num_kv_heads=8) if devices > 1 else TINY
    engine, params = tiny_engine(config, devices=devices, slots=SLOTS, cache_length=LENGTH, quantize_kv=quantize_kv)
    assert engine.layout.shape[1:4:2] == (SLOTS * 3, R)
    expected = greedy(engine, params, PROMPTS, STEPS)
    assert len({*expected[0]}) > 5, "a model that repeats itself would prove little"
    scattered = np.random.default_rng(3).permutation(SLOTS * 3).reshape(SLOTS, 3)
    assert greedy(poisoned(on_pages(engine, scattered)), params, PROMPTS, STEPS) == expected


def test_a_prompt_fills_its_own_pages_alone():
    """A bucket's padding goes no further than the prompt's last page: the next may be another slot's."""
    engine, params = tiny_engine(slots=SLOTS, cache_length=LENGTH)
    engine = poisoned(on_pages(engine, [[5, 0, 0], [1, 2, 3], [4, 6, 7], [8, 9, 10]]))
    prefix, _ = engine.prefill(params, *engine.pad(PROMPTS[0][:128] + [1] * 3))  # a bucket of 256
    prefix = replace(prefix, length=jnp.int32(100))
    state = engine.insert(prefix, engine.init_decode_state(), 0)
    is_nan_P = np.isnan(np.asarray(state.cache.rows)).any(axis=(0, 2, 3, 4))
    assert np.flatnonzero(~is_nan_P).tolist() == [5]


def test_a_step_writes_one_row_of_one_page_per_live_slot():
    """And shared pages keep their bits: two slots with one first page, each with its own second."""
    engine, params = tiny_engine(slots=SLOTS, cache_length=LENGTH)
    engine = on_pages(engine, [[5, 2, 0], [5, 7, 0], [1, 3, 4], [8, 9, 10]])
    prompt = [n * 7 % 101 for n in range(R)]
    prefix, _ = engine.prefill(params, *engine.pad(prompt))
    state = engine.init_decode_state()
    for slot in (0, 1):
        state = engine.insert(prefix, state, slot)
    before = np.array(state.cache.rows)
    state, result = engine.generate(params, state)
    after = np.array(state.cache.rows)
    assert result.token_BW[0, 0] == result.token_BW[1, 0] >= 0
    changed = np.argwhere((before != after).any(axis=(0, 2, 4)))
    assert changed.tolist() == [[2, 0], [7, 0]]
