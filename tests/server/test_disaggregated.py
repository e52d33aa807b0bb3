"""Prompts on two virtual devices, decoding on two others: the answers of one device, whatever the pages' way was.

All pieces have more than 64 tokens: one prefill program on each side.
"""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from slipstream.engine_impl.api import Opening, Piece
from slipstream.engine_impl.disaggregated import BothParams, DisaggregatedEngine
from slipstream.engine_impl.errors import AdaptersLostError
from slipstream.engine_impl.sampling.params import SamplingParams
from slipstream.engine_impl.weights.sharding import make_mesh
from slipstream.server.request.events import Event
from slipstream.server.scheduler.orchestrator import Orchestrator

from tests.engine_impl.text_models import CONFIG, byte_tokenizer
from tests.engine_impl.tiny_models import tiny_engine
from tests.fakes import FakeEngine
from tests.server.scheduler.loop import Asked

LENGTH = 512
COMPILES_S = 120
"""The first requests wait for programs (seconds)."""
FREE = SamplingParams(ignore_eos=True)
DRAWN = SamplingParams(ignore_eos=True, temperature=1.0, seed=5, repetition_penalty=1.2)


def engine_on(devices):
    """Two slots, pages of 128 tokens, prompts in pieces of as many."""
    mesh = make_mesh(devices, CONFIG.num_heads, CONFIG.num_kv_heads, len(devices))
    config = replace(CONFIG, context_length=LENGTH)
    engine, params = tiny_engine(config, slots=2, mesh=mesh, cache_length=LENGTH, prefill_chunk=128)
    engine.get_tokenizer = byte_tokenizer
    return engine, params


def served(engine, params):
    orchestrator = Orchestrator(engine, params, max_queued=9, warm_up=False)
    orchestrator.start()
    return orchestrator


@pytest.fixture(scope="module")
def alone():
    orchestrator = served(*engine_on(jax.devices()[:1]))
    yield orchestrator
    orchestrator.close()


@pytest.fixture(scope="module")
def apart():
    (prefill, prefill_params), (decode, decode_params) = engine_on(jax.devices()[:2]), engine_on(jax.devices()[2:4])
    orchestrator = served(DisaggregatedEngine(prefill, decode), BothParams(prefill_params, decode_params))
    yield orchestrator
    orchestrator.close()


def answers(orchestrator, *asks):
    """(token ids by sample, cached tokens) of requests that run together; a prompt is a text or token ids."""
    requests = []
    for prompt, tokens, more in asks:
        request = Asked("", tokens, **{"sampling": FREE} | more)
        request.prompt_ids = list(prompt.encode()) if isinstance(prompt, str) else prompt
        requests.append(request)
    orchestrator.submit(*requests)
    told = []
    for request in requests:
        ids, event = {}, Event()
        while not event.is_last:
            event = request.events.get(timeout=COMPILES_S)
            assert event.error is None
            ids.setdefault(event.index, []).extend(event.token_ids)
        assert event.usage is not None
        told.append((ids, event.usage.cached_tokens))
    return told


def test_answers_are_those_of_one_device(alone, apart):
    """A prompt of three pieces beside a short one, greedy and drawn, and two samples of one prompt."""
    long, short = "a prompt of many pieces " * 15, "one piece " * 10
    asks = (long, 20, {}), (short, 40, {"sampling": DRAWN})
    assert answers(apart, *asks) == answers(alone, *asks)
    samples = (short + "!", 9, {"num_samples": 2, "sampling": DRAWN})
    assert answers(apart, samples) == answers(alone, samples)


def test_a_conversation_goes_on_from_pages_that_decoding_has_filled(alone, apart):
    """The second turn begins with a page whose last rows came from steps: the prefill side is given them."""
    first = list(b"Once upon a time there was a server. " * 3)
    ((answer, _),) = answers(alone, (first, 120, {}))
    assert answers(apart, (first, 120, {})) == [(answer, 0)]
    second = [*first, *answer[0], 33]
    assert len(first) < 128 < len(second)
    ((expected, cached),) = answers(alone, (second, 12, {}))
    assert cached == 128
    assert answers(apart, (second, 12, {})) == [(expected, 128)]


def test_a_copy_that_fails_fails_its_request_alone_though_it_loses_the_prefill_sides_cache(alone, apart, monkeypatch):
    """Both sides go on: what was computed before, a prompt or an answer, comes back as it is asked for."""
    text, other = list(b"There was once a queue that nobody left. " * 3), "nothing of that sort, and longer " * 8
    ((answer, _),) = answers(apart, (text, 120, {}))
    answers(apart, (other, 1, {}))
    assert not apart._loop._execution._state.has_P.all()

    def lose(caches, pages, page_M):
        for leaf in jax.tree.leaves(caches):
            leaf.delete()
        raise RuntimeError("the copy failed")

    turn = [*text, *answer[0], 33]
    with monkeypatch.context() as broken:
        broken.setattr(apart._loop._execution._engine._copies, "_put", lose)
        request = Asked("", 4, sampling=FREE)
        request.prompt_ids = turn
        running = Asked("", 60, sampling=FREE)
        running.prompt_ids = list(b"another one " * 8)
        apart.submit(running)
        first = running.events.get(timeout=COMPILES_S)
        apart.submit(request)
        assert "the copy failed" in str(request.events.get(timeout=COMPILES_S).error)
        while not first.is_last:
            first = running.events.get(timeout=COMPILES_S)
            assert first.error is None
    for ask in ((turn, 4, {}), (other, 5, {})):
        (ours,), (theirs,) = answers(apart, ask), answers(alone, ask)
        assert ours[0] == theirs[0]
        assert ours[1] >= 128


def test_steps_make_stale_only_the_pages_that_they_may_have_filled(apart):
    """Entries behind a text's pages are 0: page 0, whose text lies elsewhere, is not theirs."""
    engine, params = apart._loop._execution._engine, apart._loop._execution._params
    state, text = engine.init_decode_state(), list(range(1, 121))
    for pages, slot in (([0], None), ([2, 3], 1)):
        page_NJ = np.zeros((1, LENGTH // 128), np.int32)
        page_NJ[0, : len(pages)] = pages
        prefix = engine.prefill(params, state, [Piece(token_T=np.array(text), start=0, page_J=page_NJ[0])])
        opening = Opening(text=text, prompt_length=len(text), sampling=FREE)
        prefix, _ = engine.first_tokens(prefix, [opening])
        state = engine.insert(prefix, state, [slot], page_NJ)
    assert np.flatnonzero(state.has_P).tolist() == [0, 2]
    state.has_P[3] = True  # as if of an earlier text
    for step in range(9):
        state, _ = engine.generate(params, state, np.array([1]), page_NJ)
        assert np.flatnonzero(state.has_P).tolist() == ([0, 3] if step < 8 else [0])


@pytest.mark.parametrize(("failing", "error"), [(0, RuntimeError), (1, AdaptersLostError)])
def test_an_adapter_that_one_side_cannot_take_is_lost_once_the_other_has_given_up_its_own(failing, error):
    def fail(call):
        if call.startswith("put_adapter"):
            raise RuntimeError("out of memory")

    sides: Any = FakeEngine(max_adapters=1), FakeEngine(max_adapters=1)
    engine, params = DisaggregatedEngine(*sides), BothParams({}, {})
    sides[failing].on_call = fail
    with pytest.raises(error):
        engine.put_adapter(params, 1, sides[0].read_adapter("adapter-1"))
    assert engine.without_adapters(params) == params
    assert [side.log[-1] for side in sides] == ["without_adapters"] * 2


def test_sides_whose_pages_differ_are_refused():
    one, _ = engine_on(jax.devices()[:1])
    other, _ = tiny_engine(CONFIG, slots=3)
    with pytest.raises(ValueError, match="pages"):
        DisaggregatedEngine(one, other)
