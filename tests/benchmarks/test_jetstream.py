"""The comparison's own logic, between two servers over fake engines; the real ones are in tests/server."""

import json
from contextlib import contextmanager

import pytest
from slipstream.benchmarks import jetstream
from slipstream.cli import main as cli

from tests.fakes import FakeEngine
from tests.serving import serving_in_thread

SIZES = [
    "--slots",
    "2",
    "--cache-length",
    "128",
    "--in-flight",
    "2",
    "--requests",
    "3",
    "--prompt-tokens",
    "4",
    "--output-tokens",
    "5",
    "--pairs",
    "2",
]
QUICK = ["bench", "jetstream", *SIZES, "--cancels", "1", "--cancelled-tokens", "40", "--json"]


@pytest.fixture
def sides(monkeypatch):
    """By their flags: the engines that the two servers run."""
    engines = {(): FakeEngine(step_s=0.02), ("--orchestrator", "jetstream"): FakeEngine(step_s=0.02)}

    @contextmanager
    def server(engine, *flags):
        with serving_in_thread(engines[flags]) as address:
            yield None, address

    monkeypatch.setattr(jetstream, "server", server)
    monkeypatch.setattr(jetstream, "IDS", (65, 70))
    monkeypatch.setattr(jetstream, "SETTLE_S", 0.1)
    return engines


@pytest.mark.slow
def test_both_sides_get_the_same_load_and_lose_one_request_each(sides, capsys):
    assert cli.run(QUICK) == 0
    out = capsys.readouterr().out
    assert "ours / jetstream, tokens/s, pair by pair" in out
    result = json.loads(out.splitlines()[-1])
    assert result["same_tokens"] is True
    assert len(result["speedup"]["pairs"]) == 2
    for side in ("ours", "jetstream"):
        assert (result[side]["requests"], result[side]["completed"], result[side]["failed"]) == (6, 6, 0)
        assert result[side]["tokens_per_second"] > 0
        assert result[side]["ttft_ms"]["p99"] >= result[side]["ttft_ms"]["p50"] > 0
        (reuse_ms,) = result[side]["cancelled_slot_reuse_ms"]["all"]
        assert 0 < reuse_ms < 400  # 40 tokens would take 800
    prefills = [[line for line in engine.log if line.startswith("prefill")] for engine in sides.values()]
    assert sorted(prefills[0]) == sorted(prefills[1])  # which of two callers is first is chance
    assert len(prefills[0]) == 3 + 2 * 3 + 3


def test_answers_that_differ_end_it(sides, capsys):
    other = sides["--orchestrator", "jetstream"]
    next_token = other.next_token
    other.next_token = lambda text: next_token(text) + 1
    assert cli.run(QUICK) == cli.FAILED
    assert "by us and" in capsys.readouterr().err


def test_answers_beyond_the_cache_are_refused(capsys):
    assert cli.run(["bench", "jetstream", "--cancelled-tokens", "500"]) == cli.BAD_INPUT
    assert "exceed cache_length=256; raise --cache-length" in capsys.readouterr().err
