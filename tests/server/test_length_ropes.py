"""Ropes whose angles depend on the request's length, where a text comes back to a prefill or moves to other devices: a
pre-empted one, and one whose prompt is computed elsewhere. Real engines behind the scheduler."""

from dataclasses import replace

import jax
import pytest
from slipstream.engine_impl.disaggregated import BothParams, DisaggregatedEngine
from slipstream.engine_impl.models.rope_scaling import DynamicNTK, LongLists
from slipstream.engine_impl.sampling.params import SamplingParams
from slipstream.engine_impl.weights.sharding import make_mesh
from slipstream.server.observe.metrics import Metrics
from slipstream.server.scheduler.orchestrator import Orchestrator

from tests.engine_impl.text_models import CONFIG, byte_tokenizer
from tests.engine_impl.tiny_models import tiny_engine
from tests.server.scheduler.loop import Asked

TRAINED, LENGTH, COMPILES_S = 128, 512, 120
FREE = SamplingParams(ignore_eos=True)
HALF = CONFIG.head_dim // 2
ROPES = {
    "dynamic": DynamicNTK(trained_length=TRAINED, factor=4.0, width=CONFIG.head_dim),
    "longrope": LongLists(
        trained_length=TRAINED,
        plain=tuple(CONFIG.rope_theta ** (-i / HALF) for i in range(HALF)),
        long=tuple(1.0 + i for i in range(HALF)),
    ),
}
ASKS = (("the first of three " * 6, 250), ("another one " * 8, 210), ("short " * 12, 40))
"""(prompt, tokens of the answer); the last one stays within the trained length."""


def engine_on(rope, devices, **more):
    mesh = make_mesh(devices, CONFIG.num_heads, CONFIG.num_kv_heads, len(devices))
    config = replace(CONFIG, context_length=LENGTH, rope_beyond=ROPES[rope])
    engine, params = tiny_engine(config, slots=3, mesh=mesh, cache_length=LENGTH, prefill_chunk=128, **more)
    engine.get_tokenizer = byte_tokenizer
    return engine, params


class Counting(Metrics):
    preemptions = 0

    def preempted(self):
        self.preemptions += 1


def answers(engine, params, *, together, asks=ASKS):
    """(token ids of each answer, how often a request was pre-empted), in a new cache."""
    metrics = Counting()
    orchestrator = Orchestrator(engine, params, max_queued=9, warm_up=False, metrics=metrics)
    orchestrator.start()
    try:
        requests = [Asked(prompt, tokens, sampling=FREE) for prompt, tokens in asks]
        told = []
        for some in [requests] if together else [[request] for request in requests]:
            orchestrator.submit(*some)
            told += [ids_of(request) for request in some]
        return told, metrics.preemptions
    finally:
        orchestrator.close()


def ids_of(request):
    ids, is_last = [], False
    while not is_last:
        event = request.events.get(timeout=COMPILES_S)
        assert event.error is None
        ids += event.token_ids
        is_last = event.is_last
    return ids


@pytest.mark.slow
@pytest.mark.parametrize("rope", ROPES)
def test_a_pre_empted_text_turns_as_before(rope):
    """Two grow to three pages each, and the pool has four. Its text is computed anew while it is shorter than it may
    become, by the angles of its end."""
    engine, params = engine_on(rope, jax.devices()[:1], cache_tokens=512)
    told, preemptions = answers(engine, params, together=True)
    assert preemptions
    assert (told, 0) == answers(engine, params, together=False)
    assert all(len(set(answer)) > 5 for answer in told)
    prompt, tokens = ASKS[2]
    longer, _ = answers(engine, params, together=False, asks=[(prompt, tokens + 200)])
    assert longer[0][:tokens] != told[2], "whose angles are others"


@pytest.mark.slow
@pytest.mark.parametrize("rope", ROPES)
def test_prompts_that_other_devices_compute_turn_alike(rope):
    alone = prefill, of_prefill = engine_on(rope, jax.devices()[:1])  # programs are compiled for each device
    decode, of_decode = engine_on(rope, jax.devices()[1:2])
    apart = DisaggregatedEngine(prefill, decode), BothParams(of_prefill, of_decode)
    asks = [(prompt, 30) for prompt, _ in ASKS] + [(ASKS[0][0] * 2, 30)]
    assert answers(*apart, together=True, asks=asks) == answers(*alone, together=True, asks=asks)
