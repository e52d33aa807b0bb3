"""Answers by steps of any width, and a proposer that says what a test has it say."""

import itertools
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from slipstream.cache_manager import KV
from slipstream.engine_impl.assembly import twin
from slipstream.engine_impl.caching import Drafting
from slipstream.engine_impl.session import Session
from slipstream.engine_impl.speculation.drafts import Drafts


class Told(NamedTuple):
    """What the steps told of one slot."""

    tokens: list[int]
    logprobs: list[float]
    tops: list[list[int]]
    counts: list[int]
    """tokens of each step"""


def scripted(engine):
    """An engine like it, whose drafts `script` says."""

    def propose(texts, rows, width):
        at_NW = rows.length_N[:, None] + 1 + jnp.arange(width)
        last = texts.token_BS.shape[1] - 1
        token_NW = jnp.where(at_NW <= last, jnp.take_along_axis(texts.token_BS, jnp.minimum(at_NW, last), axis=1), -1)
        return Drafts(token_NW, jnp.cumprod(token_NW >= 0, axis=1).sum(axis=1).astype(jnp.int32))

    model = engine.programs.drafting.model
    return twin(engine, replace(engine.programs, drafting=Drafting(propose=propose, model=model)))


def script(session, slot, drafts):
    """What stands in a slot's place from the next step on, as drafts, token by token in their places: where its text
    will stand. A -1 is no draft, and ends them."""
    texts, first = session.state.texts, int(session.state.length_B[slot]) + 1
    token_BS = np.array(texts.token_BS)
    token_BS[slot, first:] = -1
    token_BS[slot, first:][: len(drafts)] = drafts[: token_BS.shape[1] - first]
    there = jax.device_put(token_BS, texts.token_BS.sharding)
    session.state = replace(session.state, texts=replace(texts, token_BS=there))


def poisoned(cache):
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), cache)


def told_by(loaded, openings, tokens, width, *, scripts=(), checks_rows=False):
    """(Told of each of `openings`: (prompt, sampling, prediction), by steps of these widths in turns; the session). All
    that is not stored is NaN.

    `scripts`: each one's drafts.
    """
    widths = itertools.cycle([width] if isinstance(width, int) else width)
    session = Session(*loaded)
    session.state = replace(session.state, cache=poisoned(session.state.cache))
    if session.state.draft_cache is not None:
        session.state = replace(session.state, draft_cache=poisoned(session.state.draft_cache))
    told = [Told([], [], [], []) for _ in openings]
    for slot, (prompt, sampling, prediction) in enumerate(openings):
        _take(told[slot], session.start(slot, prompt, sampling, prediction=prediction), 0)
    for slot, drafts in enumerate(scripts):
        script(session, slot, drafts)
    while min(len(one.tokens) for one in told) < tokens:
        lengths = np.array(session.state.length_B)
        result = session.step(next(widths))
        for row, one in enumerate(told):
            _take(one, result, row)
        if checks_rows:
            np.testing.assert_array_equal(
                np.asarray(session.state.length_B) - lengths, _of_slots(result.count_B, session)
            )
            check_rows(session)
    return [Told(one.tokens[:tokens], one.logprobs[:tokens], one.tops[:tokens], one.counts) for one in told], session


def _of_slots(count_N, session):
    count_B = np.zeros(session.engine.sizes.slots, np.int32)
    count_B[session.slots] = np.asarray(count_N)[: len(session.slots)]
    return count_B


def _take(one, result, row):
    count = int(result.count_B[row])
    token_W = np.asarray(result.token_BW)[row]
    assert (token_W[:count] >= 0).all()
    assert (token_W[count:] == -1).all()
    one.tokens.extend(token_W[:count].tolist())
    one.logprobs.extend(np.asarray(result.logprob_BW)[row, :count].tolist())
    one.tops.extend(np.asarray(result.top_token_BWP)[row, :count, :2].tolist())
    one.counts.append(count)


def check_rows(session):
    """Rows up to each slot's length are there, and nothing else was ever written but a prompt's padding."""
    for cache in (session.state.cache,):
        assert isinstance(cache, KV)
        rows = np.asarray(cache.rows)
        for slot in session.slots:
            pages = rows[:, session.page_BJ[slot]].swapaxes(1, 2)
            own = pages.reshape(*pages.shape[:2], -1, pages.shape[-1])
            length = int(session.state.length_B[slot])
            assert np.isfinite(own[:, :, :length]).all()
            assert np.isnan(own[:, :, length:]).all()
