"""The growth curves, on models of no size."""

import json

import pytest
from slipstream.benchmarks import growth, host
from slipstream.benchmarks.options.growth import GrowthOptions
from slipstream.cli import main as cli
from slipstream.engine_impl.errors import RefusedError

from tests.engine_impl.tiny_models import tiny_engine


@pytest.fixture
def options():
    return GrowthOptions(
        model="tiny", cache_lengths="256,128", live_tokens="8,64,120,250", slots="2", base_slots=2, steps=4,
        blocks=3, platform="cpu",
    )  # fmt: skip


@pytest.mark.slow
def test_curves_and_plot(tiny_loaded, tmp_path, monkeypatch, capsys):
    built = []

    def build(config, checkpoint):
        built.append((config.slots, config.cache_length))
        return tiny_engine(slots=config.slots, cache_length=config.cache_length)[0]

    monkeypatch.setattr(growth, "load", lambda config: tiny_loaded)
    monkeypatch.setattr(growth, "build_engine", build)
    monkeypatch.setattr(host, "HOST_STEPS", 40)  # several may come as one event
    plot = tmp_path / "growth.svg"
    words = "--cache-lengths 128 --live-tokens 8,64,1000 --slots 2,3 --base-slots 2 --steps 2 --blocks 1 --json --plot"
    assert cli.run(["bench", "growth", *words.split(), str(plot)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert built == [(3, 128)]  # the first is there, with the weights that both use
    assert result["live_tokens"]["128"]["x"] == [8, 64]  # 1000 do not fit
    assert result["insert"]["x"] == [16, 64, 128]
    assert result["slots"]["x"] == result["host"]["x"] == [2, 3]
    assert result["slots_live_tokens"] == 64
    for curve in (result["live_tokens"]["128"], result["insert"], result["slots"], result["host"]):
        points = zip(curve["ms_min"], curve["ms"], curve["ms_max"], strict=True)
        assert all(0 < low <= ms <= high for low, ms, high in points)
    assert min(result["host"]["bare_ms"]) > 0
    # k and v of 16 in f32, 2 layers, 4 kv heads: 1024 bytes a token, read and written
    floor = 2 * 1024 * 128 / result["copy_bandwidth_bytes_per_second"] * 1000
    assert result["insert"]["ms_at_bandwidth"][-1] == pytest.approx(floor, abs=1e-5)
    assert plot.stat().st_size > 1000


def test_a_slope_is_compared_with_the_bytes_slope():
    """By hand: 4 ms a token, where the bytes take 2; the middle point is 1 ms off a line that is 41 there."""
    curve = {"x": [0, 10, 20], "ms": [0.5, 42.0, 80.5], "ms_at_bandwidth": [3.0, 23.0, 43.0]}
    found = growth.compared(curve)
    assert found["ms_per_token"] == pytest.approx(4)
    assert found["share_of_bandwidth"] == pytest.approx(0.5)
    assert found["largest_deviation"] == pytest.approx(0.5 / 0.5)  # the line is at 1 there
    assert growth.compared({"x": [1], "ms": [2.0], "ms_at_bandwidth": [1.0]})["share_of_bandwidth"] is None


def test_points_take_turns(options):
    order = []
    blocks = [lambda: order.append("a") or [1.0, 2.0, 30.0], lambda: order.append("b") or [4.0]]
    assert growth.in_turns(blocks, options) == [[2.0] * 3, [4.0] * 3]
    assert "".join(order) == "ababab"


def test_only_live_tokens_that_fit_are_measured(options):
    """Four steps start two tokens before and end two behind."""
    assert options.fitting(256) == (8, 64, 120, 250)
    assert options.fitting(128) == (8, 64, 120)
    assert options.fitting(250) == (8, 64, 120)
    assert options.slot_curve_live_tokens == 64
    with pytest.raises(RefusedError, match=r"none of live_tokens=.* fits into cache_length=8 with 4 steps"):
        options.fitting(8)


def test_refusals_come_before_anything_is_loaded(capsys):
    assert cli.run(["bench", "growth", "--cache-lengths", "1024,100"]) == cli.BAD_INPUT
    assert "cache_length=100" in capsys.readouterr().err
    assert cli.run(["bench", "growth", "--cache-lengths", "128", "--live-tokens", "1000"]) == cli.BAD_INPUT
    assert "none of live_tokens=(1000,) fits" in capsys.readouterr().err
