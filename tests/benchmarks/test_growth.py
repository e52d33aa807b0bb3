"""The growth curves, on models of no size."""

import json

import pytest
from slipstream.benchmarks import growth, step
from slipstream.server import cli


@pytest.mark.slow
def test_curves_and_plot(tiny_loaded, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step, "load", lambda config: tiny_loaded)
    monkeypatch.setattr(growth, "HOST_STEPS", 8)
    plot = tmp_path / "growth.svg"
    words = "--cache-lengths 128 --live-tokens 8,64,1000 --slots 2 --steps 2 --blocks 1 --json --plot"
    assert cli.run(["bench", "growth", *words.split(), str(plot)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["live_tokens"]["128"]["x"] == [8, 64]  # 1000 do not fit
    assert result["insert"]["x"] == [16, 32, 64, 128]
    assert result["slots"]["x"] == result["host"]["x"] == [2]
    assert min(result["insert"]["ms"] + result["host"]["ms"]) > 0
    assert plot.stat().st_size > 1000


def test_the_slope_is_compared_with_the_bytes(tiny_loaded):
    """2 layers, 2 slots, 4 kv heads, k and v of 16 in f32: 2048 bytes a token; at 1 MB/s 2.048 ms, half the slope."""
    found = growth.live_slope({"x": [0, 10], "ms": [1.0, 41.96]}, tiny_loaded.engine, 1e6)
    assert found["ms_at_bandwidth"] == pytest.approx(2.048)
    assert found["share_of_bandwidth"] == pytest.approx(0.5)
