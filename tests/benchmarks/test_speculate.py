"""The comparison's own logic, between two servers over fake engines."""

import json
from contextlib import contextmanager
from typing import Any

import pytest
from slipstream.benchmarks import speculate
from slipstream.cli import main as cli
from slipstream.server.scheduler.widths import Widths

from tests.fakes import FakeEngine
from tests.serving import serving_in_thread

QUICK = ["bench", "speculate", "--slots", "2", "--load", "1,2", "--requests", "2", "--max-tokens", "20", "--pairs", "1"]


@pytest.fixture
def engines(monkeypatch):
    """By their flags."""
    size: dict[str, Any] = {"cache_length": 1024, "max_prefill_length": 512}
    found = {(): FakeEngine(**size), ("--speculate", "auto"): FakeEngine(**size, widths=(1, 4))}

    @contextmanager
    def server(engine, *flags):
        with serving_in_thread(found[flags]) as address:
            yield None, address

    monkeypatch.setattr(speculate, "server", server)
    monkeypatch.setattr(
        Widths, "choose", lambda self, roster: self._widths_of(roster.taken)[-1]
    )  # whatever time it takes
    monkeypatch.setattr(speculate, "IDS", (65, 70))
    return found


def test_both_sides_answer_the_same_and_the_drafts_are_counted(engines, capsys):
    assert cli.run([*QUICK, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["kind"], row["load"]) for row in result["rows"]] == [
        (kind, load) for kind in ("copies", "random", "schema") for load in (1, 2)
    ]
    assert result["rows"][0]["accepted_share"] > 0.3
    assert all(row["speedup"]["ratio_p50"] > 0 for row in result["rows"])


def test_answers_that_differ_end_it(engines, capsys):
    engines[()].next_token = lambda text: 66
    assert cli.run(QUICK) == 1
    assert "without speculation [66, " in capsys.readouterr().err


def test_a_load_that_is_no_count_is_refused(capsys):
    assert cli.run(["bench", "speculate", "--load", "1.5"]) == 2
    assert "load=1.5 must be a whole number" in capsys.readouterr().err


def test_answers_that_are_not_known_are_refused(capsys):
    assert cli.run(["bench", "speculate", "--answers", "copies,odes"]) == 2
    assert "answers='odes' must be of copies, random, schema" in capsys.readouterr().err
