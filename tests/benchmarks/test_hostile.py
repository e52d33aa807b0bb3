"""The benchmark of hostile inputs: what it makes of what it sees, and once against a real server."""

import json
import os
from typing import Any

import pytest
import torch
from slipstream.benchmarks import hostile
from slipstream.benchmarks.hostile import Watched, row
from slipstream.benchmarks.load.hostile_callers import Answers
from slipstream.benchmarks.load.hostile_inputs import DECODE, INPUTS
from slipstream.benchmarks.measure import random_checkpoint
from slipstream.benchmarks.options.hostile import HostileOptions
from slipstream.engine_impl.errors import RefusedError


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("size", [1000, 100_000])
def test_inputs_are_as_large_as_they_are_asked_to_be(name, size):
    path, make = INPUTS[name]
    body = make(size)
    if path == DECODE:
        assert size <= len(body) + 12
    else:
        assert path.startswith("/v1/")
        assert isinstance(json.loads(body), dict)
    assert 0.5 * min(size, 1 << 16) < len(body) < size + 100


def seen(**more: Any) -> Watched:
    values: dict[str, Any] = {
        "health_ms": [1.0],
        "late_ms": [0.0],
        "ttft_ms": [10.0],
        "chunks": 10,
        "memory_mib": [100.0],
    }
    values |= {"seconds": 1.0, "answers": Answers([5.0], {400}), **more}
    return Watched(**values)


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ({}, None),
        ({"health_ms": [1.0] * 98 + [301.0] * 2}, "health checks' p99 (ms) 301 exceeds 300"),
        ({"health_ms": [1.0] * 200 + [1001.0]}, "the worst health check (ms) 1001 exceeds 1000"),
        ({"health_ms": [1.0] * 200 + [1001.0], "late_ms": [0.0] * 200 + [10.0]}, None),
        ({"ttft_ms": [511.0]}, "the growth of the time to first token (ms) 501 exceeds 500"),
        ({"chunks": 5}, "the stream's slowdown 2 exceeds 1.5"),
        ({"memory_mib": [301.0]}, "the growth of memory (MiB) 201 exceeds 200"),
    ],
)
def test_what_must_not_be_is_told(more, fault):
    told = row("words", 10, 1, seen(), seen(**more), 100.0, 100.0)
    assert told["faults"] == ([fault] if fault else [])
    assert told["slowdown"] == (2.0 if "chunks" in more else 1.0)


def test_a_child_that_has_not_become_its_own_program_is_not_counted_again(monkeypatch):
    own, other = os.getpid(), os.getppid()
    monkeypatch.setattr(hostile, "_children", lambda pid: iter([own, other]))
    monkeypatch.setattr(hostile, "_own_mib", {own: 700.0, other: 30.0}.__getitem__)
    assert hostile.memory_mib(own) == 730.0


def test_an_unknown_input_is_refused():
    with pytest.raises(RefusedError, match="only='nonsense' is not known; those that are: words, digits"):
        hostile.run(HostileOptions(only="nonsense"))


@pytest.mark.slow
def test_a_short_run(capsys, one_device, monkeypatch, tmp_path):
    """Of a small model, which no input reaches; they are large enough for the processes where large ones are read."""
    monkeypatch.setattr(hostile, "USUAL_S", 0.3)
    monkeypatch.setattr(hostile, "SETTLE_S", 0.1)
    told = {"spaces": [400], "grpc-groups": [3]}  # by either front
    tiny = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "intermediate_size": 48}
    shape = random_checkpoint.SHAPE | tiny | {"vocab_size": 300}
    folder = random_checkpoint.write_checkpoint(tmp_path / "m", 2**17 / 2**30, torch.float32, shape)
    options = HostileOptions(
        only=",".join(told), callers=3, seconds=0.1, slots=2, model=str(folder), input_bytes=400_000
    )
    rows = hostile.run(options)["sweep"]
    assert [(row["input"], row["callers"]) for row in rows] == [(name, callers) for name in told for callers in (1, 3)]
    assert all(row["statuses"] == told[row["input"]] for row in rows)
    # No pace is asked for here: the tests' machine has other work.
    assert all(0 < row["health_ms_max"] < 10_000 for row in rows)
    assert all(row["peak_mib"] < 600 for row in rows)
    assert "peak + MiB" in capsys.readouterr().out
