"""A short soak with the fake engine, and that it finds what it is there to find."""

import dataclasses

import pytest
from slipstream.benchmarks import soak
from slipstream.benchmarks.load.hosted import hosted
from slipstream.benchmarks.options.soak import SoakOptions
from slipstream.engine_impl.errors import RefusedError
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


@pytest.mark.slow
def test_a_soak_with_inputs_made_to_harm():
    """Large enough to go to the processes where large bodies are read."""
    options = dataclasses.replace(OPTIONS, requests=150, in_flight=8, hostile=0.3, input_bytes=100_000)
    config = dataclasses.replace(CONFIG, http_port=0)
    with hosted(FakeEngine(max_concurrent_decodes=4, step_s=0.001), None, config) as serving:
        result = soak.measure(serving, options)
    assert result["faults"] == []
    assert result["requests"] == 150
    assert sum(result["ends"]["hostile"].values()) > 30
    assert {"400", "INVALID_ARGUMENT"} <= result["ends"]["hostile"].keys()


def test_a_share_is_checked():
    with pytest.raises(RefusedError, match="hostile=1 must be from 0 to 1, 1 left out"):
        dataclasses.replace(OPTIONS, hostile=1)
    assert OPTIONS.server.http_port is None


@pytest.mark.slow
def test_wrong_tokens_are_found():
    class Confused(FakeEngine):
        """After a while, behind the first answers, every slot counts by two."""

        def next_tokens(self, state, token_N, length_N, page_NJ):
            return super().next_tokens(state, token_N, length_N, page_NJ) + (self.steps > 80)

    options = dataclasses.replace(OPTIONS, requests=60, prompts=2)
    with hosted(Confused(max_concurrent_decodes=2), None, CONFIG) as serving:
        result = soak.measure(serving, options)
    assert any("is no beginning of" in fault for fault in result["faults"])
    assert "the answers are others than at the beginning" in result["faults"]


@pytest.mark.slow
def test_a_slot_that_is_never_freed_is_found(monkeypatch):
    monkeypatch.setattr(soak, "QUIET_S", 0.2)
    options = dataclasses.replace(OPTIONS, requests=30, in_flight=4)
    with hosted(FakeEngine(), None, CONFIG) as serving:
        nothing = {"free": 0, "live": 0, "cached": 0}
        serving.metrics.watch(queue_depth=int, slots_in_use=lambda: 1, slots=2, pages=lambda: nothing)
        result = soak.measure(serving, options)
    assert any("1 slots, 0 places in the queue and 0 pages are still taken" in fault for fault in result["faults"])


@pytest.mark.slow
def test_a_pool_that_is_too_small_is_soaked_by_preemptions(capsys):
    """Prompts of up to 8 tokens and answers of up to 30: a request grows into its second or third page of 16, and there
    are 4 pages for 4 slots."""
    options = dataclasses.replace(OPTIONS, requests=120, answer_tokens=30, token_ids="10:40", min_preemptions=5)
    with hosted(FakeEngine(max_concurrent_decodes=4, pages=4, cache_length=64), None, CONFIG) as serving:
        result = soak.measure(serving, options)
    assert result["faults"] == []
    assert result["preemptions"] >= 5
    assert result["pages"]["live"] == 0
    assert sum(result["pages"].values()) == 4
    assert f"{result['preemptions']} pre-empted" in capsys.readouterr().out


@pytest.mark.slow
def test_a_pool_that_is_not_tight_is_told():
    options = dataclasses.replace(OPTIONS, requests=30, min_preemptions=1)
    with hosted(FakeEngine(), None, CONFIG) as serving:
        result = soak.measure(serving, options)
    assert result["faults"] == ["0 requests were pre-empted, not the 1 asked for; lower --cache-tokens"]


@pytest.mark.slow
def test_lost_pages_are_found(monkeypatch):
    """One is never given back, another is in no list any more."""
    monkeypatch.setattr(soak, "QUIET_S", 0.2)
    options = dataclasses.replace(OPTIONS, requests=30, in_flight=4)
    asked = []

    def pages():
        asked.append(None)
        return {"free": 30, "live": 1, "cached": 0} if len(asked) > 3 else {"free": 32, "live": 0, "cached": 0}

    with hosted(FakeEngine(), None, CONFIG) as serving:
        serving.metrics.watch(queue_depth=int, slots_in_use=int, slots=2, pages=pages)
        result = soak.measure(serving, options)
    assert any("0 places in the queue and 1 pages are still taken" in fault for fault in result["faults"])
    assert "of 32 pages {'free': 30, 'live': 1, 'cached': 0} are left" in result["faults"]


def test_the_pool_is_the_engines_and_bad_numbers_are_refused():
    assert SoakOptions(cache_tokens=1024).engine.cache_tokens == 1024
    with pytest.raises(RefusedError, match="cache_tokens=100 must be a multiple of 128"):
        SoakOptions(cache_tokens=100)
    with pytest.raises(RefusedError, match="min_preemptions=-1 must be 0 or more"):
        SoakOptions(min_preemptions=-1)
