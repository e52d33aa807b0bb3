"""`slipstream bench prefill` on a tiny model: what it prints, what it counts, what it refuses."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest
from slipstream.benchmarks import prefill
from slipstream.benchmarks.baselines import prefillers
from slipstream.benchmarks.measure import datasheet, flops
from slipstream.cli import main as cli
from slipstream.engine_impl.models.mixtral import MixtralConfig

from tests.engine_impl.tiny_models import TINY

QUICK = ["bench", "prefill", "--cache-length", "128", "--repeats", "1", "--pairs", "2", "--json"]
KEYS = {
    "model", "prompt_tokens", "prefill_chunk", "dtype", "quantize_weights", "compile_seconds", "prefill_ms_p50",
    "prefill_ms_min", "prefill_ms_max", "tokens_per_second", "prefills_timed", "flops", "flops_per_second",
    "matmul_flops_per_second", "mfu", "datasheet_flops_per_second", "mfu_datasheet", "threads", "versions",
    "load_average",
}  # fmt: skip
VERSUS_KEYS = {"versus", "ratio_p50", "ratio_min", "ratio_max", "pairs", "baseline_prefill_ms_p50", "equal_tokens"}
LAYER = 32 * (8 + 4 + 4) * 16 + 8 * 16 * 32
"""Weights of TINY's attention, a layer's; what it shares with its Mixtral."""


@pytest.fixture
def last_line(monkeypatch, capsys, tiny_loaded):
    """The JSON of a command line on the tiny model."""
    monkeypatch.setattr(prefill, "load", lambda config: tiny_loaded)
    monkeypatch.setattr(flops, "SIDE", {"cpu": 8})

    def run(*words):
        assert cli.run([*QUICK, *words]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def test_one_point_is_one_flat_object(last_line):
    result = last_line("--prompt-tokens", "20")
    assert set(result) >= KEYS
    assert not VERSUS_KEYS & set(result)
    assert (result["prompt_tokens"], result["prefill_chunk"], result["prefills_timed"]) == (20, 128, 2)
    assert result["prefill_ms_min"] <= result["prefill_ms_p50"] <= result["prefill_ms_max"]
    assert result["tokens_per_second"] == pytest.approx(20_000 / result["prefill_ms_p50"], rel=1e-3)
    assert result["mfu"] == pytest.approx(result["flops_per_second"] / result["matmul_flops_per_second"], rel=1e-2)
    assert result["datasheet_flops_per_second"] is None


@pytest.mark.slow
def test_transformers_finds_the_same_token_behind_every_prompt(last_line):
    result = last_line("--prompt-tokens", "1,100", "--versus", "transformers")
    assert [(row["prompt_tokens"], row["prefill_chunk"]) for row in result["sweep"]] == [(1, 128), (100, 128)]
    for row in result["sweep"]:
        assert set(row) >= KEYS | VERSUS_KEYS
        assert row["equal_tokens"] is True
        assert len(row["pairs"]) == 2


@pytest.mark.slow
def test_dtypes_and_quantisation_get_an_engine_each(monkeypatch, last_line, tiny_loaded):
    asked = []
    monkeypatch.setattr(prefill, "load", lambda config: asked.append(config) or tiny_loaded)
    last_line("--prompt-tokens", "16,20", "--quantize-weights", "none,int8")
    assert [(config.quantize_weights, config.slots) for config in asked] == [("none", 1), ("int8", 1)]


def test_blocks_alternate_and_each_pair_has_its_own_prompts():
    calls = []
    sides: list[Any] = [
        SimpleNamespace(first_token=lambda prompt, side=side: calls.append(f"{side}{prompt[0]}") or prompt[0])
        for side in "ab"
    ]
    blocks = prefillers.in_turns(sides, [[1], [2], [3], [4]], pairs=2)
    assert " ".join(calls) == "a1 a1 a2 b1 b1 b2 a3 a3 a4 b3 b3 b4"  # the first of each three is not timed
    assert [[block.tokens for block in side] for side in blocks] == [[[1, 2], [3, 4]]] * 2
    assert [[len(block.ms) for block in side] for side in blocks] == [[2, 2], [2, 2]]


def test_another_token_ends_it_with_status_1(monkeypatch, capsys, tiny_loaded):
    monkeypatch.setattr(prefill, "load", lambda config: tiny_loaded)
    monkeypatch.setattr(flops, "SIDE", {"cpu": 8})
    monkeypatch.setattr(prefill, "baseline", lambda versus, loaded: SimpleNamespace(first_token=lambda prompt: -1))
    assert cli.run([*QUICK, "--prompt-tokens", "16", "--versus", "transformers"]) == cli.FAILED
    out = capsys.readouterr().out
    assert "UNEQUAL TOKENS" in out
    assert json.loads(out.splitlines()[-1])["equal_tokens"] is False


def test_operations_by_hand():
    """Two layers, every token with every weight, the vocabulary for the last one, causal pairs of eight heads of 16."""
    pairs = 1 + 2 + 3
    weights = 2 * (LAYER + 3 * 32 * 48)
    assert flops.prefill_flops(TINY, 3) == 2 * (weights * 3 + 101 * 32) + 4 * 16 * 8 * 2 * pairs


def test_a_window_limits_what_a_token_sees():
    """One layer of the two sees two tokens."""
    windowed = flops.prefill_flops(replace(TINY, windows=(2, None)), 4)
    assert flops.prefill_flops(TINY, 4) - windowed == 4 * 16 * 8 * ((1 + 2 + 3 + 4) - (1 + 2 + 2 + 2))


def test_tied_embeddings_multiply_once():
    assert flops.prefill_flops(replace(TINY, tied_embeddings=True), 5) == flops.prefill_flops(TINY, 5)


def test_a_token_multiplies_the_experts_that_it_goes_to():
    """Two of four, and the router."""
    mixtral = MixtralConfig(**vars(TINY), num_experts=4, experts_per_token=2)
    weights = 2 * (LAYER + 2 * 3 * 32 * 48 + 4 * 32)
    assert flops.prefill_flops(mixtral, 1) == 2 * (weights + 101 * 32) + 4 * 16 * 8 * 2


def test_peaks_of_the_data_sheets():
    def peak(kind, dtype=jnp.bfloat16):
        return datasheet.datasheet_flops(SimpleNamespace(device_kind=kind), jnp.dtype(dtype))

    assert peak("TPU v5 lite") == 197e12
    assert peak("NVIDIA H100 80GB HBM3") == 989e12
    assert peak("TPU v5 lite", jnp.float32) is None
    assert peak("cpu") is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt-tokens", "0"], "prompt_tokens='0' must be positive"),
        (["--prompt-tokens", "1025"], "prompt_tokens=1025 must be at most cache_length=1024; raise"),
        (["--cache-length", "100"], "cache_length=100 must be a multiple of 128"),
        (["--dtype", "float8"], "dtype='float8' is not known"),
        (["--versus", "transformers", "--quantize-weights", "int8"], "versus='transformers' is given float weights"),
        (["--repeats", "0"], "repeats=0 must be at least 1"),
    ],
)
def test_refusals_name_the_limit(words, message, capsys):
    assert cli.run(["bench", "prefill", *words]) == cli.BAD_INPUT
    assert message in capsys.readouterr().err
