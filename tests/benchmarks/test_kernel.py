"""The kernel benchmark's implementations compute one and the same thing."""

import json
from typing import Any

import jax
import numpy as np
import pytest
from slipstream import kernels
from slipstream.benchmarks.baselines import attentions
from slipstream.benchmarks.kernel import KernelBench
from slipstream.benchmarks.options.kernel import KernelOptions
from slipstream.cli import main as cli
from slipstream.engine_impl.weights.sharding import make_mesh

SHAPE: dict[str, Any] = {"slots": 2, "cache_length": 128, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16}


@pytest.mark.slow
def test_all_agree_and_a_cpu_says_what_it_cannot_run(capsys):
    flags = [word for name, value in SHAPE.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert cli.run(["bench", "kernel", *flags, "--live-tokens", "127", "--repeats", "2", "--json"]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert "On a CPU: JAX's paged" in "\n".join(text)
    ours = [f"slipstream ({backend})" for backend in dict.fromkeys((kernels.backend_for("cpu"), "xla"))]
    assert [row["name"] for row in result["attention"]][:-2] == ours
    assert [row["name"] for row in result["flush"]][:-2] == ["slipstream (xla)"]  # there is no native one
    for row in result["attention"] + result["flush"]:
        assert row["refused"] is None
        assert row["us_p50"] > 0
        assert row["max_error"] < 1e-5


@pytest.mark.parametrize("name", ["paged", "ragged_paged"])
def test_caches_of_the_paged_kernels_hold_the_same_rows(name):
    """Their kernels run on accelerators only; what we hand them is checked here: page by page, k and v."""
    options = KernelOptions(**{**SHAPE, "cache_length": 256}, dtype="float32", repeats=1, platform="cpu")
    bench = KernelBench(options, make_mesh(jax.devices()[:1], 4, 2, 1), "xla")
    case = bench.case(130)
    items, length_B, table = getattr(attentions, f"_prepare_{name}")(case)
    k_BKSH, v_BKSH = case.with_new_rows(1)
    assert length_B.tolist() == [131, 131]
    page, row = int(table[1, 130 // 128]), 130 % 128  # slot 1's new row, kv head 1
    if name == "paged":
        k, v = (pages[1, page, row] for pages in items[1])
    else:
        k, v = items[1][page, row, 2], items[1][page, row, 3]
    np.testing.assert_array_equal(k, case.new_BKC[1, 1, :16])
    np.testing.assert_array_equal(k, k_BKSH[1, 1, 130])
    np.testing.assert_array_equal(v, v_BKSH[1, 1, 130])


@pytest.mark.slow
def test_a_flush_that_writes_nothing_is_seen(monkeypatch):
    options = KernelOptions(**SHAPE, live_tokens="5", dtype="float32", repeats=1, platform="cpu")
    bench = KernelBench(options, make_mesh(jax.devices()[:1], 4, 2, 1), "xla")
    good = next(bench._flushes())
    monkeypatch.setattr(bench, "_flushes", lambda: [good, ("lazy", lambda cache, new, position_B: cache)])
    ours, lazy = bench.flush_rows(5, 1e9)
    assert (ours["max_error"], lazy["max_error"] > 0.1) == (0, True)


def test_refusals(capsys):
    assert cli.run(["bench", "kernel", "--live-tokens", "1024"]) == cli.BAD_INPUT
    assert "live_tokens=1024 must be below cache_length=1024" in capsys.readouterr().err
