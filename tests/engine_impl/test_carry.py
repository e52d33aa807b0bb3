"""Pieces of a prompt that a step carries along: its tokens and theirs are those of two programs."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slipstream.engine_impl.api import Opening, Piece
from slipstream.engine_impl.assembly import twin
from slipstream.engine_impl.errors import PieceError
from slipstream.engine_impl.models.rope_scaling import DynamicNTK
from slipstream.engine_impl.sampling.params import SamplingParams
from slipstream.engine_impl.session import Session
from slipstream.engine_impl.shapes import Carried, Shapes

from .tiny_models import TINY, greedy, tiny_engine

CHUNK, SLOTS, STEPS = 128, 4, 12
RUNNING = [[n * 7 % 101 for n in range(length)] for length in (120, 5, 250)]  # the first goes over a page's border
LONG = [n * 5 % 101 for n in range(300)]


@functools.cache
def carrying_engine(config, devices):
    """It carries whole chunks, and what is shorter is padded."""
    engine, params = tiny_engine(config, devices=devices, slots=SLOTS, cache_length=512, prefill_chunk=CHUNK)
    engine = twin(engine, shapes=replace(engine.shapes, carried=Carried(SLOTS, CHUNK, CHUNK)))
    assert engine.shapes.carries == ((SLOTS, CHUNK),)
    return engine, params


@pytest.fixture(scope="module")
def tiny():
    return carrying_engine(TINY, 1)


def running(engine, params):
    """(session, first tokens) of RUNNING in slots 0 to 2, in pages in no order, NaN in all that is not stored."""
    session = Session(engine, params)
    session.page_BJ = np.random.default_rng(3).permutation(session.page_BJ.reshape(-1)).reshape(SLOTS, -1)
    nan = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), session.state.cache)
    session.state = replace(session.state, cache=nan)
    return session, [tokens(session.start(slot, prompt))[0] for slot, prompt in enumerate(RUNNING)]


def tokens(result):
    return np.asarray(result.token_BW)[:, 0].tolist()


def pieces_of(session, slot, text, **more):
    for start in range(0, len(text), CHUNK):
        token_T = np.array(text[start : start + CHUNK], np.int32)
        behind = text[start + CHUNK] if start + CHUNK < len(text) else -1
        more["reach"] = session.engine.reach_of(session.engine.sizes.cache_length)
        yield Piece(token_T=token_T, start=start, page_J=session.page_BJ[slot], next_id=behind, **more)


def carry(session, piece):
    """(the running slots' tokens, the piece's prefix)"""
    slot_N = np.array(session.slots, np.int32)
    session.state, result, prefix = session.engine.carry(
        session.params, session.state, slot_N, session.page_BJ[slot_N], [piece]
    )
    return tokens(result)[: len(slot_N)], prefix


@pytest.mark.parametrize(
    ("config", "devices"),
    [
        (TINY, 1),
        (replace(TINY, num_kv_heads=8), 8),
        pytest.param(replace(TINY, windows=(40, None), attn_soft_cap=20.0), 1, marks=pytest.mark.slow),
        pytest.param(replace(TINY, rope_beyond=DynamicNTK(64, 4.0, 16)), 1, marks=pytest.mark.slow),
    ],
    ids=["llama", "8 devices", "windows", "angles by the length"],
)
def test_a_prompt_that_steps_carry_along_has_its_own_tokens_and_so_have_they(config, devices):
    engine, params = carrying_engine(config, devices)
    expected = greedy(engine, params, [*RUNNING, LONG], STEPS)
    assert len({*expected[3]}) > 5, "a model that repeats itself would prove little"
    session, firsts = running(engine, params)
    told, prefix = [firsts], None
    for piece in pieces_of(session, 3, LONG):
        if prefix is not None:
            session.insert(prefix, 3, is_last=False)
        step, prefix = carry(session, piece)
        told.append(step)
    assert prefix is not None
    opening = Opening(text=LONG, prompt_length=len(LONG), sampling=SamplingParams())
    prefix, first = engine.first_tokens(prefix, [opening])
    session.insert(prefix, 3)
    carried = len(told) - 1
    assert carried == 3
    last = tokens(first)
    for _ in range(STEPS - carried - 1):
        *of_running, of_long = tokens(session.step())
        told.append(of_running)
        last.append(of_long)
    assert np.array(told).T.tolist() == [answer[: len(told)] for answer in expected[:3]]
    assert last == expected[3][: len(last)]


def test_a_carried_piece_is_as_a_prefilled_one(tiny):
    """Its rows, its logits and the log-probabilities of its prompt."""
    engine, params = tiny
    session, _ = running(engine, params)
    (piece,) = pieces_of(session, 3, LONG[:100], logprobs=2)
    theirs = engine.prefill(params, session.state, [piece])
    _, ours = carry(session, piece)
    np.testing.assert_allclose(ours.kv.rows[:, :, :100], theirs.kv.rows[:, :, :100], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours.logits_NV, theirs.logits_NV, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ours.logprob_NT, theirs.logprob_NT, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(ours.top_token_NTP[:, :99], theirs.top_token_NTP[:, :99])
    assert np.asarray(ours.logprob_NT)[0, :99].all()


@pytest.mark.parametrize(
    ("slots", "lengths", "start"), [([0, 1, 2], [129], 0), ([0], [1, 1], 0), ([], [5], 0), ([0], [5], 64)]
)
def test_what_no_step_carries_is_told_before_anything_is_started(tiny, slots, lengths, start):
    engine, params = tiny
    session, _ = running(engine, params)
    pieces = [Piece(token_T=np.zeros(n, np.int32), start=start, page_J=session.page_BJ[3]) for n in lengths]
    with pytest.raises(PieceError):
        engine.carry(params, session.state, np.array(slots, np.int32), session.page_BJ[slots], pieces)
    assert len(tokens(session.step())) == SLOTS, "the state is as it was"


@pytest.mark.parametrize(
    ("platform", "slots", "chunk", "carries"),
    [
        ("cpu", 256, 512, ()),
        ("gpu", 256, 512, ()),
        ("tpu", 1, 512, ()),
        ("tpu", 3, 128, ((3, 128),)),
        ("tpu", 256, 512, ((32, 256), (32, 512), (128, 256), (128, 512), (256, 256), (256, 512))),
    ],
)
def test_few_steps_carry(platform, slots, chunk, carries):
    shapes = Shapes(slots=slots, pages_per_slot=4, page_rows=128, chunk=chunk, platform=platform)
    assert shapes.carries == carries


def test_a_step_that_carries_has_the_smallest_shape_that_holds_both():
    shapes = Shapes(slots=256, pages_per_slot=4, page_rows=128, chunk=512, platform="tpu")
    for slots, tokens, shape in (
        (1, 1, (32, 256)),
        (32, 257, (32, 512)),
        (33, 256, (128, 256)),
        (256, 512, (256, 512)),
    ):
        assert shapes.carry_of(slots, [tokens]) == shape
    for slots, lengths in ((0, [1]), (1, []), (1, [1, 1]), (1, [513]), (257, [1])):
        assert shapes.carry_of(slots, lengths) is None
