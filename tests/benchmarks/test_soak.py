"""A short soak with the fake engine, and that it finds what it is there to find."""

import dataclasses

import pytest
from slipstream.benchmarks import soak
from slipstream.benchmarks.load.hosted import hosted
from slipstream.benchmarks.options.soak import SoakOptions
from slipstream.server.config import ServerConfig

from tests.fakes import FakeEngine

OPTIONS = SoakOptions(
    requests=400,
    in_flight=24,
    max_seconds=60,
    prompts=6,
    prompt_tokens=8,
    answer_tokens=12,
    token_ids="97:118",
    seed=1,
)
CONFIG = ServerConfig(port=0, grace_s=1, max_queued=12, probe_interval_s=0.05)


@pytest.mark.slow
def test_a_short_soak(capsys):
    with hosted(FakeEngine(max_concurrent_decodes=4, step_s=0.001), None, CONFIG) as serving:
        result = soak.measure(serving, OPTIONS)
    assert result["faults"] == []
    assert result["requests"] == OPTIONS.requests
    kinds = result["ends"]
    assert kinds["whole"]["OK"] > 20
    assert kinds["whole"]["RESOURCE_EXHAUSTED"] > 0
    assert kinds["cancelled"]["CANCELLED"] > 0
    assert kinds["senseless"]["INVALID_ARGUMENT"] > 0
    assert "no faults" in capsys.readouterr().out


def test_wrong_tokens_are_found():
    class Confused(FakeEngine):
        """After a while, behind the first answers, every slot counts by two."""

        def generate(self, params, state):
            if self.steps > 80:
                state.token_B[state.token_B >= 0] += 1
            return super().generate(params, state)

    options = dataclasses.replace(OPTIONS, requests=60, prompts=2)
    with hosted(Confused(max_concurrent_decodes=2), None, CONFIG) as serving:
        result = soak.measure(serving, options)
    assert any("is no beginning of" in fault for fault in result["faults"])
    assert "the answers are others than at the beginning" in result["faults"]


def test_a_slot_that_is_never_freed_is_found(monkeypatch):
    monkeypatch.setattr(soak, "QUIET_S", 0.2)
    options = dataclasses.replace(OPTIONS, requests=30, in_flight=4)
    with hosted(FakeEngine(), None, CONFIG) as serving:
        serving.metrics.watch(queue_depth=int, slots_in_use=lambda: 1, slots=2, pages=dict)
        result = soak.measure(serving, options)
    assert any("1 slots and 0 places in the queue are still taken" in fault for fault in result["faults"])
