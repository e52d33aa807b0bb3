"""The three measures, over the fake engine: its steps take 4 ms."""

import json

import pytest
from slipstream.benchmarks import overload, soak
from slipstream.cli import main as cli

from tests.fakes import FakeEngine

QUICK = ["--slots", "2", "--token-ids", "97:98", "--json", "--prompt-tokens", "3"]


@pytest.fixture
def engine(monkeypatch):
    engine = FakeEngine(max_concurrent_decodes=2, step_s=0.004)
    for module in (overload, soak):
        monkeypatch.setattr(module, "load_engine", lambda config: (engine, None))
    return engine


@pytest.mark.slow
def test_cost_overload_and_reuse(engine, capsys):
    words = ["--answer-tokens", "12", "--requests", "20", "--steps", "40", "--pairs", "1", "--max-queued", "2"]
    assert cli.run(["bench", "overload", *QUICK, *words]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    cost, overload, reuse = result["cost"], result["overload"], result["reuse"]
    assert 0 < cost["bare_tokens_per_second"] <= 500  # two slots, 4 ms
    assert 0.3 < cost["ratio_p50"] < 1.2
    assert overload["usual"]["answered"] == 20
    assert overload["over"]["answered"] + overload["refused"] == 20
    assert overload["refused"] > 5
    assert overload["refused_ms"]["p50"] < overload["over"]["e2e_ms"]["p50"]
    assert 1 <= reuse["steps_p50"] <= 6  # a busy machine may hold one cancellation back for some more
    assert reuse["steps_p50"] <= reuse["steps_max"]
    assert "a cancelled slot answers the next request after" in out


@pytest.mark.slow
def test_soak_from_the_command_line(engine, capsys):
    words = ["--requests", "40", "--in-flight", "8", "--answer-tokens", "6", "--prompts", "3"]
    assert cli.run(["bench", "soak", *QUICK, *words]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["requests"], result["faults"]) == (40, [])


def test_a_soak_with_faults_ends_with_status_1(engine, capsys):
    """When all is learnt, a third of the steps answers with another token."""
    generate = engine.generate

    def confused(params, state):
        if engine.steps > 25 and engine.steps % 3 == 0:
            state.token_B[state.token_B >= 0] += 1
        return generate(params, state)

    engine.generate = confused
    words = ["--requests", "30", "--in-flight", "4", "--answer-tokens", "6", "--prompts", "3"]
    assert cli.run(["bench", "soak", *QUICK, *words]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["overload", "--steps", "500"], "cache_length=512 must hold prompt_tokens + steps + 2 * slots = 580 tokens"),
        (["overload", "--factor", "0"], "factor=0.0 must be at least 1"),
        (["overload", "--token-ids", "9:3"], "token_ids='9:3' must be LOW:HIGH"),
        (["soak", "--in-flight", "0"], "in_flight=0 must be at least 1"),
        (["soak", "--max-queued", "0"], "max_queued=0 must be at least 1"),
        (["soak", "--cache-length", "100"], "cache_length=100 must be a multiple of 128"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_values(words, message, capsys):
    assert cli.run(["bench", *words]) == 2
    assert message in capsys.readouterr().err
