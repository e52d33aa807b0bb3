"""Every family by the real TPU compiler: small shapes in `make test`, the real ones in `make gates`."""

from dataclasses import replace
from typing import Any

import jax
import pytest
from slipstream.engine_impl import assembly
from slipstream.engine_impl.compiler.budget import cache_copies
from slipstream.engine_impl.compiler.chips import chip_of
from slipstream.engine_impl.compiler.hlo import Program
from slipstream.engine_impl.compiler.lowering import lower_generate, lower_prefill, lower_score_step
from slipstream.engine_impl.compiler.plan import abstract_engine
from slipstream.engine_impl.compiler.presets import PRESETS
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.engine import Engine
from slipstream.engine_impl.models import registry
from slipstream.engine_impl.models.glm4 import GlmConfig
from slipstream.engine_impl.models.llama import LlamaConfig
from slipstream.engine_impl.models.rope_scaling import DynamicNTK, LongLists

from tests.tpu import compiled_once, memory_of, text_of

TOPOLOGY = "v5e:2x4"
STEPS = {"generate": lower_generate, "score": lower_score_step}
BUCKET = 1024

SMALL = (
    "mistral-7b-v0.1", "qwen2.5-7b", "qwen3-8b", "gemma-7b", "gemma-2-9b", "gemma-3-12b", "mixtral-8x7b", "phi-3-mini",
    "qwen3-30b-a3b", "gpt-oss-20b", "smollm3-3b", "olmo-2-7b", "granite-3.3-8b", "glm-4-9b", "command-r7b",
    "olmo-3-7b", "command-r", "stablelm-2-12b",
)  # fmt: skip

REAL = {  # slots that fit with 4096 tokens each, bf16
    "mistral-7b": 64, "mistral-7b-v0.1": 64, "qwen2.5-7b": 64, "qwen3-8b": 64, "gemma-2-9b": 32, "gemma-3-12b": 32,
    "mixtral-8x7b": 16, "phi-3-mini": 16, "qwen3-30b-a3b": 32, "gpt-oss-20b": 32, "smollm3-3b": 64, "olmo-2-7b": 8,
    "granite-3.3-8b": 32,
    "glm-4-9b": 64, "command-r7b": 32, "stablelm-2-12b": 16, "olmo-3-7b": 8, "command-r": 8,
}  # fmt: skip


def small(name: str, **more: Any) -> Engine:
    """The family with a layer of each kind that it has and one more, a kv head a chip, and windows that cut off; few
    slots, as each costs the compiler time. `more`: of its config."""
    windows = tuple(window and 500 for window in dict.fromkeys(PRESETS[name].windows))
    layers = max(len(windows), len(getattr(PRESETS[name], "without_rope", ()))) + 1
    shape = replace(
        PRESETS[name], num_layers=layers, windows=windows, num_heads=16, num_kv_heads=8, model_dim=1024,
        ffn_dim=2048, vocab_size=32768, **more,
    )  # fmt: skip
    config = EngineConfig(model=name, slots=16, cache_length=4096, cache_tokens=16 * 4096)
    return abstract_engine(shape, TOPOLOGY, config)


def check(engine: Engine, program: str, bucket: int = BUCKET) -> None:
    """It fits; the step reads the cache in place, by one kernel a layer, and writes it once."""
    lowered = lower_prefill(engine, 1, bucket) if program == "prefill" else STEPS[program](engine)
    executable = compiled_once(lowered, engine.mesh)
    layout, cache_bytes = engine.layout, engine.layout.bytes // engine.mesh.size
    memory, hlo = memory_of(executable), Program(text_of(executable))
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < chip_of(TOPOLOGY).hbm_bytes
    if program in STEPS:
        assert cache_copies(hlo, engine) == []
        windows = engine.model.config.window_of_layer  # those that cut nothing off are none
        lists = len({window if window is not None and window < layout.length else None for window in windows})
        assert hlo.pallas_calls() == {"live_steps": lists, "ragged_attention": layout.layers, "cache_flush": 1}
        assert memory.alias_size_in_bytes >= cache_bytes
    else:
        assert cache_copies(hlo, engine) == []
        assert hlo.pallas_calls() == {"chunk_attention": layout.layers}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "program"), [*((name, "score") for name in SMALL), ("gemma-2-9b", "generate")])
def test_a_familys_step(name, program):
    """With given tokens: what chooses them is one for all families, and takes the compiler longer than the layers."""
    check(small(name), program)


def test_every_family_has_a_step_of_its_own():
    """GLM-4 of 2024 is that of 2025 without two norms; Llama's programs are those of test_programs."""
    tried = {type(PRESETS[name]) for name in SMALL} | {GlmConfig, LlamaConfig}
    assert tried == {family.config_type for family in registry.FAMILIES.values()}


TRAINED = 2048
BY_LENGTH = {
    "longrope": LongLists(trained_length=TRAINED, plain=(1.0,) * 48, long=(2.0,) * 48),
    "dynamic": DynamicNTK(trained_length=TRAINED, factor=2.0, width=96),
}


@pytest.mark.slow
@pytest.mark.parametrize("rope", BY_LENGTH)
def test_a_step_of_texts_that_turn_each_by_its_length(rope):
    engine = small("phi-3-mini", rope_beyond=BY_LENGTH[rope])
    assert engine.model.config.reach_of(TRAINED + 1)
    check(engine, "score")


@pytest.mark.slow
def test_a_prompt_of_layers_that_see_differently_far():
    """One attention, which is told each layer's window."""
    check(small("gemma-3-12b"), "prefill", 512)  # a window is 500


@pytest.mark.gates
@pytest.mark.parametrize("program", ["generate", "prefill"])
@pytest.mark.parametrize("name", REAL)
def test_a_real_shape(name, program):
    config = EngineConfig(model=name, slots=REAL[name], cache_length=4096, cache_tokens=REAL[name] * 4096)
    check(abstract_engine(PRESETS[name], TOPOLOGY, config), program)


def sliced_weights(name: str, program: str) -> list[str]:
    """Slices of at least 256 KiB that a layer takes out of a stack before it uses them; of eight layers. A step's given
    tokens save the compiler the sampler."""
    config = EngineConfig(model=name, slots=16, cache_length=4096, cache_tokens=32 * 4096)
    engine = abstract_engine(replace(PRESETS[name], num_layers=8), TOPOLOGY, config)
    lowered = STEPS[program](engine) if program in STEPS else lower_prefill(engine, 1, 512)
    executable = compiled_once(lowered, engine.mesh)
    return Program(text_of(executable)).loop_slices(2**18)


@pytest.mark.parametrize(
    ("name", "program"),
    [
        pytest.param("llama-2-7b", "score", marks=pytest.mark.slow),
        pytest.param("llama-2-7b", "generate", marks=pytest.mark.gates),
        pytest.param("llama-2-7b", "prefill", marks=pytest.mark.gates),
        pytest.param("qwen3-8b", "generate", marks=pytest.mark.gates),
        pytest.param("phi-3-mini", "generate", marks=pytest.mark.gates),
    ],
)
def test_products_read_the_stacked_weights_themselves(name, program):
    assert sliced_weights(name, program) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "weights", "products", "saved"),
    [
        ("v5e:2x4", "none", 2, 11_000),
        pytest.param("v5e:2x4", "int8", 1, 5000, marks=pytest.mark.gates),
        pytest.param("v6e:2x4", "none", 2, 3000, marks=pytest.mark.gates),
        pytest.param("v6e:2x4", "int8", 1, 2000, marks=pytest.mark.gates),
    ],
)
def test_joined_products_save_cycles(topology, weights, products, saved, monkeypatch):
    """Gate and up, and k and v of floats: at least so many static cycles a layer fewer than apart, and an operation for
    each; all weights are read in the stack. Of four layers of llama-3.1-8b and 128 slots."""

    def step() -> Program:
        config = EngineConfig(slots=128, cache_length=512, cache_tokens=128 * 512, quantize_weights=weights)
        engine = abstract_engine(replace(PRESETS["llama-3.1-8b"], num_layers=4), topology, config)
        return Program(text_of(compiled_once(lower_score_step(engine), engine.mesh)))

    joined = step()
    monkeypatch.setattr(assembly, "join_products", lambda model: None)
    apart = step()
    assert joined.loop_slices(2**18) == []
    assert joined.estimated_cycles() <= apart.estimated_cycles() - 4 * saved
    assert joined.operations() <= apart.operations() - 4 * products
    assert joined.collectives() == apart.collectives()


@pytest.mark.slow
def test_left_alone_the_compiler_would_slice_them_out(monkeypatch):
    """Why `bridge.linear` keeps a product apart; and that the gate sees it."""
    monkeypatch.setattr(jax.lax, "optimization_barrier", lambda x: x)
    assert len(sliced_weights("llama-2-7b", "score")) == 1, "q, as k and v are one product"
