"""`slipstream bench step` on a tiny model: what it prints, what it counts, what it refuses."""

import json
from dataclasses import replace
from typing import Any, cast
from unittest.mock import ANY

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from slipstream.benchmarks import step
from slipstream.benchmarks.baselines.huggingface import transformers_model
from slipstream.benchmarks.baselines.steppers import EngineStepper
from slipstream.benchmarks.measure import machine, models
from slipstream.benchmarks.measure.models import Loaded
from slipstream.benchmarks.measure.traffic import bytes_per_step, stored_as
from slipstream.cli import main as cli
from slipstream.engine_impl.checkpoints.contract import Quantization
from slipstream.engine_impl.compiler.presets import PRESETS
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.loading import build_engine
from slipstream.engine_impl.models.mixtral import MixtralConfig
from slipstream.engine_impl.runtime.compilations import keep_in, programs

from tests.engine_impl.tiny_models import TINY, RandomCheckpoint, tiny_engine

KEYS = {
    "model", "slots", "cache_length", "live_tokens", "dtype", "quantize_weights", "quantize_kv", "compile_seconds",
    "step_ms_p50", "step_ms_p99", "tokens_per_second", "bytes_per_step", "copy_bandwidth_bytes_per_second", "mbu",
    "threads", "versions", "date",
}  # fmt: skip
VERSUS_KEYS = {"versus", "ratio_p50", "ratio_min", "ratio_max", "pairs", "baseline_step_ms_p50", "equal_tokens"}
QUICK = ["bench", "step", "--slots", "2", "--cache-length", "128", "--steps", "2", "--pairs", "2", "--json"]

DEAR = [pytest.param(name, marks=pytest.mark.slow) for name in ("eager-per-layer", "transformers-dynamic")]
"""Baselines that differ little from one that the quick tests run."""
IN_PRODUCT = [pytest.param(*name.values, marks=(*name.marks, pytest.mark.product)) for name in DEAR]
"""Their tokens are compared by the stepper, below, and their pairs are everybody's."""


@pytest.fixture
def last_line(monkeypatch, capsys, tiny_loaded):
    """The JSON of a command line on the tiny model."""
    monkeypatch.setattr(step, "load", lambda config: tiny_loaded)

    def run(*words):
        assert cli.run([*QUICK, *words]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def test_one_point_is_one_flat_object(last_line):
    result = last_line("--live-tokens", "40")
    assert set(result) >= KEYS
    assert not VERSUS_KEYS & set(result)
    assert (result["slots"], result["live_tokens"], result["steps_timed"]) == (2, 40, 4)
    assert (result["quantize_weights"], result["chips"]) == ("none", 1)  # not "auto": what it is
    bandwidth = result["copy_bandwidth_bytes_per_second"]
    assert result["mbu"] == pytest.approx(
        result["bytes_per_step"] / (result["step_ms_p50"] / 1000) / bandwidth, abs=1e-3, rel=1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize("versus", ["eager", "transformers", "xla", *IN_PRODUCT])
def test_a_baseline_gives_equal_tokens_and_a_ratio_a_pair(last_line, versus):
    result = last_line("--live-tokens", "40", "--versus", versus)
    assert set(result) >= KEYS | VERSUS_KEYS
    assert result["equal_tokens"] is True
    assert len(result["pairs"]) == 2
    assert result["ratio_min"] <= result["ratio_p50"] <= result["ratio_max"]


@pytest.mark.slow
@pytest.mark.parametrize("versus", ["eager", "transformers", *DEAR])
def test_a_baseline_takes_the_length_that_it_is_set_to(versus, tiny_loaded):
    """Rows that nobody wrote are zeros everywhere, so tokens must stay equal: longer, and then shorter than it was."""
    steppers = [EngineStepper(tiny_loaded.engine, tiny_loaded.params), step.baseline_for(versus, tiny_loaded)]
    tokens = []
    for stepper in steppers:
        stepper.fill(step.prompts_for(tiny_loaded.engine))
        tokens.append([])
        for length in (100, 40):
            stepper.set_length(length)
            tokens[-1] += stepper.block(6).tokens
    assert tokens[0] == tokens[1]


@pytest.fixture
def stretched():
    """TINY with every frequency divided by three."""
    config = replace(TINY, rope_factors=(3.0,) * 8)
    engine, params = tiny_engine(config, slots=2)
    return Loaded(engine, params, RandomCheckpoint(config))


@pytest.mark.slow
def test_a_long_rope_is_stretched_for_transformers_too(stretched):
    """A plain rope gives other tokens."""
    baseline = step.baseline_for("transformers", stretched)
    prompts = step.prompts_for(stretched.engine)
    _, _, expected = step.started(EngineStepper(stretched.engine, stretched.params), prompts)
    assert step.started(baseline, prompts)[2] == expected
    plain = stretched._replace(checkpoint=RandomCheckpoint(TINY))
    assert step.started(step.baseline_for("transformers", plain), prompts)[2] != expected


def test_unequal_tokens_are_told_and_are_a_failure(monkeypatch, capsys, tiny_loaded):
    """The baseline mixes up two slots."""
    monkeypatch.setattr(step, "load", lambda config: tiny_loaded)

    class Mixed(EngineStepper):
        def fill(self, prompts):
            super().fill(prompts[::-1])

    monkeypatch.setattr(step, "baseline_for", lambda versus, loaded: Mixed(loaded.engine, loaded.params))
    assert cli.run([*QUICK, "--live-tokens", "40", "--versus", "eager"]) == 1
    *text, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["equal_tokens"] is False
    assert "UNEQUAL TOKENS" in "\n".join(text)


def test_transformers_refuses_other_families(tiny_loaded):
    with pytest.raises(RefusedError, match="mistral-7b is a Mistral, and --versus transformers builds Llamas only"):
        transformers_model(RandomCheckpoint(PRESETS["mistral-7b"], "mistral-7b"), "float32")
    stored = RandomCheckpoint(TINY, "awq", Quantization("int4", group=64))
    with pytest.raises(RefusedError, match="awq is stored as int4"):
        transformers_model(stored, "float32")


def test_a_compile_time_is_never_the_disks(tmp_path):
    """JAX goes on using its folder after its flag has been cleared, unless it is reset."""

    def found_now():
        before = programs().found
        jax.jit(lambda x: x * 3 + 1)(2.0)
        return programs().found - before

    folder = cast(Any, jax.config).jax_compilation_cache_dir
    keep_in(tmp_path)
    compilation_cache.reset_cache()
    try:
        found_now()  # now it is there
        assert found_now() == 1
        with machine.compiling_anew():
            assert found_now() == 0
        assert found_now() == 1
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()


def test_a_sweep_is_one_object_with_all_results(last_line):
    result = last_line("--live-tokens", "40,64")
    assert [point["live_tokens"] for point in result["sweep"]] == [40, 64]
    assert all(set(point) >= KEYS for point in result["sweep"])


def test_quantisation_is_swept_with_an_engine_each(monkeypatch, capsys, tiny_loaded):
    asked = []
    monkeypatch.setattr(step, "load", lambda config: asked.append(config) or tiny_loaded)
    words = ["--live-tokens", "40", "--quantize-weights", "none,int8", "--quantize-kv", "int8"]
    assert cli.run([*QUICK, *words]) == 0
    points = [("none", "int8"), ("int8", "int8")]
    assert [(config.quantize_weights, config.quantize_kv) for config in asked] == points
    sweep = json.loads(capsys.readouterr().out.splitlines()[-1])["sweep"]
    assert [point["quantize_kv"] for point in sweep] == ["int8", "int8"]


@pytest.mark.slow
def test_points_that_differ_in_slots_share_the_weights(monkeypatch, capsys):
    """Eight billion weights are not loaded anew for each number of slots."""
    loads = []
    monkeypatch.setattr(step, "load", lambda config: loads.append(config) or models.load_random(config, TINY))
    assert cli.run([*QUICK, "--slots", "1,3", "--live-tokens", "40"]) == 0
    out, err = capsys.readouterr()
    assert [point["slots"] for point in json.loads(out.splitlines()[-1])["sweep"]] == [1, 3]
    assert [config.slots for config in loads] == [1]
    assert [line.split(":")[0] for line in err.splitlines() if " live, " in line] == [
        f"{slots} slots x 128, 40 live, float32" for slots in (1, 3)
    ]


def test_a_sweep_goes_on_after_a_point_that_does_not_fit(monkeypatch, capsys, tiny_loaded):
    def load(config, *_):
        if config.cache_length > 128:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 64 GiB.")
        return tiny_loaded

    monkeypatch.setattr(step, "load", load)
    monkeypatch.setattr(step, "resized", load)
    assert cli.run([*QUICK, "--cache-length", "256,128,384", "--live-tokens", "40"]) == 0
    out, err = capsys.readouterr()
    assert [point.get("refused") for point in json.loads(out.splitlines()[-1])["sweep"]] == [
        "does not fit: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 64 GiB.",
        None,
        ANY,
    ]
    assert "2 slots x 256, 40 live, auto: does not fit" in err
    assert cli.run([*QUICK, "--cache-length", "256", "--live-tokens", "40"]) == cli.BAD_INPUT
    assert "does not fit: RESOURCE_EXHAUSTED" in capsys.readouterr().err


def test_what_attention_alone_takes_and_what_its_floor_would_gain(last_line):
    result = last_line("--live-tokens", "40", "--attention")
    live_bytes = 2 * 40 * 2 * 4 * 2 * 16 * 4  # slots, rows, layers, kv heads, k and v, head dim, float32
    floor_ms = live_bytes / result["copy_bandwidth_bytes_per_second"] * 1000
    assert result["attention_floor_ms"] == pytest.approx(floor_ms, abs=1e-4)
    rest_ms = max(result["step_ms_p50"] - result["attention_ms_p50"], 0)
    assert result["step_ms_at_attention_floor"] == pytest.approx(rest_ms + floor_ms, abs=1e-3)
    assert result["attention_gain"] == pytest.approx(result["step_ms_p50"] / (rest_ms + floor_ms), rel=1e-2)
    assert result["attention_ms_p50"] > 0


def test_bytes_of_codes_and_scales(without_native_kernels):
    """By hand, as below: a byte a code, a scale an output; 2 * 16 codes and two scales a row and head."""
    config = EngineConfig(slots=2, cache_length=128, quantize_weights="int8", quantize_kv="int8", tensor_parallel=1)
    engine = build_engine(config, RandomCheckpoint(TINY))
    layer = 32 * (8 + 4 + 4) * 16 + 8 * 16 * 32 + 3 * 32 * 48 + 4 * ((8 + 4 + 4) * 16 + 32 + 2 * 48 + 32)
    weights = 2 * (layer + 4 * 2 * 32) + 4 * (32 + 101 * 32)
    rows = 2 * 2 * 4 * (2 * 16 + 2 * 4) * (9 + 1)
    assert bytes_per_step(engine, engine.parameters.load(RandomCheckpoint(TINY)), 9) == weights + rows
    assert stored_as(engine) == "int8"


def test_only_experts_that_are_chosen_count(without_native_kernels):
    """By hand: of four experts two slots, one expert each, choose 4 * (1 - 0.75^2) = 1.75 on average."""
    shape = {name: value for name, value in vars(TINY).items() if name != "num_experts"}
    config = MixtralConfig(**shape, num_experts=4, experts_per_token=1)
    engine = build_engine(EngineConfig(slots=2, cache_length=128, tensor_parallel=1), RandomCheckpoint(config))
    attention = 32 * (8 + 4 + 4) * 16 + 8 * 16 * 32
    layer = attention + 2 * 32 + 4 * 32 + 1.75 * 3 * 32 * 48
    weights = 2 * layer + 32 + 101 * 32
    rows = 2 * 2 * 4 * 2 * 16 * (9 + 1)
    assert bytes_per_step(engine, engine.parameters.load(RandomCheckpoint(config)), 9) == 4 * (weights + rows)
    assert stored_as(engine) == "none"


def test_bytes_are_weights_but_the_embedding_and_live_rows(without_native_kernels):
    """By hand, for two layers of TINY in f32, two slots with 9 rows to read and one to write."""
    engine, params = tiny_engine(slots=2)
    layer = 32 * (8 + 4 + 4) * 16 + 8 * 16 * 32 + 3 * 32 * 48 + 2 * 32
    weights = 2 * layer + 32 + 101 * 32
    rows = 2 * 2 * 4 * 2 * 16 * (9 + 1)
    assert bytes_per_step(engine, params, 9) == 4 * (weights + rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--slots", "1,x"], "slots='1,x' must be positive numbers"),
        (["--slots", "0"], "slots='0' must be positive"),
        (["--dtype", "float8"], "dtype='float8' is not known; those that are: auto, float32, bfloat16"),
        (
            ["--quantize-weights", "int8,int2"],
            "quantize_weights='int2' is not known; those that are: auto, none, int8, int4",
        ),
        (["--pairs", "0"], "pairs=0 must be at least 1"),
        (["--live-tokens", "1024"], "live_tokens=1024 must be above 8 and at most 1016"),
        (["--live-tokens", "8"], "live_tokens=8 must be above 8"),
        (["--model", "llama-9"], "llama-9"),
        (["--threads", "4096"], "threads=4096 must be at most"),
        (
            ["--versus", "transformers", "--quantize-weights", "int8"],
            "versus='transformers' is given float weights and a float cache; leave out --quantize-weights",
        ),
        (["--versus", "eager", "--quantize-kv", "int8"], "stores rows as they are, not as quantize_kv='int8'"),
    ],
)
def test_refusals_name_the_limit(words, message, capsys):
    assert cli.run(["bench", "step", *words]) == cli.BAD_INPUT
    assert message in capsys.readouterr().err
