"""Adapters against PEFT's own merged model, for every family: three and none mixed in one batch."""

import copy
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slipstream.engine_impl.assembly import assembled
from slipstream.engine_impl.checkpoints.safetensors import SafetensorsCheckpoint
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.models import registry
from slipstream.engine_impl.session import Session
from slipstream.engine_impl.weights.sharding import make_mesh

from ..models.against_transformers import GIVEN, assert_steps_equal
from ..models.test_families import FAMILIES, written_by_transformers
from .peft_adapters import NAMES, PLACES, peft_logits, saved, with_adapters

STEPS = 4
PROMPT = [(7 * i * i + 3 * i) % 101 for i in range(13)]

VARIANTS = {"llama-biases", "qwen2-windows", "smollm3-windows", "stablelm-parallel"}
ALIKE = {"cohere2", "gemma", "glm", "granite", "mistral", "olmo3", "qwen3", "smollm3"}
"""Their matrices are another's here (cohere, gemma2, glm4, llama, olmo2, gemma3); adapters change nothing else."""


def _marks(family: str) -> list[pytest.MarkDecorator]:
    if family == "phi3":
        return []
    return [pytest.mark.slow, pytest.mark.product] if family in ALIKE else [pytest.mark.slow]


CASES = [
    pytest.param(family, 1 + 7 * (number % 2), marks=_marks(family))
    for number, family in enumerate(sorted(set(FAMILIES) - VARIANTS, key=lambda family: (family != "phi3", family)), 1)
]
"""Every other one on eight devices, where the layers are scanned. Phi-3 has copied kv heads and fused matrices."""


def engine_of(folder, devices):
    checkpoint = SafetensorsCheckpoint(folder)
    shape = checkpoint.config
    mesh = make_mesh(jax.devices(), shape.num_heads, shape.num_kv_heads, devices)
    model = registry.build(replace(shape, num_kv_heads=max(shape.num_kv_heads, mesh.size)))
    config = EngineConfig(slots=4, cache_length=128, cache_tokens=512, prefill_chunk=128, **PLACES)
    tokenizer: Any = None
    engine = assembled(
        model, mesh, config, jnp.dtype("float32"), tokenizer, "tiny", shape.num_kv_heads,
        layer_loop="scan" if devices > 1 else "unrolled",
    )  # fmt: skip
    return engine, engine.parameters.load(checkpoint)


@pytest.mark.parametrize(("family", "devices"), CASES)
def test_logits_and_steps_equal_pefts_merged_model(family, devices, tmp_path_factory):
    folder, reference = written_by_transformers(family, tmp_path_factory.getbasetemp())
    assert_equal(reference, folder, tmp_path_factory.mktemp(family), devices)


def assert_equal(reference, folder, root, devices):
    """Logits and steps of adapters that are written into `root`."""
    adapted = with_adapters(copy.deepcopy(reference))
    folders = saved(adapted, root)
    engine, params = engine_of(folder, devices)
    for index, name in enumerate(NAMES, 1):
        params = engine.put_adapter(params, index, engine.read_adapter(str(folders[name])))
    session, text = Session(engine, params), PROMPT + GIVEN[: STEPS + 1]
    expected = [peft_logits(adapted, name, text)[len(PROMPT) - 1 :] for name in (None, *NAMES)]
    for slot, logits_TV in enumerate(expected):
        session.adapter = slot
        prefix = session.prefilled(slot, PROMPT)
        np.testing.assert_allclose(np.asarray(prefix.logits_NV)[0], logits_TV[0], atol=2e-4)
        assert all(np.abs(logits_TV - other).max(axis=-1).min() > 0.05 for other in expected[:slot])
        session.insert(engine.force(prefix, GIVEN[:1]), slot)
    assert_steps_equal(session, expected, atol=2e-4)
