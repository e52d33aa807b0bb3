"""Gate and up, and k and v, as one product each: which are joined, that the weights are the checkpoint's, and that
adapters, exclusions and int8 answer as they do where the two are apart."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from slipstream.engine_impl.adapters.stacks import AdapterWeights
from slipstream.engine_impl.assembly import assembled
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.engine import Engine
from slipstream.engine_impl.forward import LayerLoop
from slipstream.engine_impl.models import registry
from slipstream.engine_impl.models.llama import LlamaConfig
from slipstream.engine_impl.session import Session
from slipstream.engine_impl.weights.load import matrices, needed_shapes
from slipstream.engine_impl.weights.sharding import make_mesh

from .tiny_models import TINY, RandomCheckpoint, logits_behind

GATE, UP = "mlp.gate_proj", "mlp.up_proj"
K, V = "self_attn.k_proj", "self_attn.v_proj"
TEXT = list(range(1, 12))
WIDE = replace(TINY, model_dim=64, ffn_dim=128)
"""Blocks of 32 divide it."""


def engine_of(loop: LayerLoop, devices: int = 2, config: LlamaConfig = WIDE, **options: Any) -> Engine:
    mesh = make_mesh(jax.devices(), config.num_heads, config.num_kv_heads, devices)
    with torch.device("meta"):
        model = registry.build(config)
    settings = EngineConfig(slots=3, cache_length=128, cache_tokens=384, **options)
    tokenizer: Any = None
    return assembled(model, mesh, settings, jnp.dtype("float32"), tokenizer, "tiny", layer_loop=loop)


def joined_in(engine: Engine) -> tuple[bool, bool]:
    """Whether gate and up are joined, and k and v, in all layers."""
    layers: Any = engine.model.layers
    found = {(layer.mlp.gate_and_up is not None, layer.self_attn.k_and_v is not None) for layer in layers}
    return found.pop() if len(found) == 1 else pytest.fail(f"layers differ: {found}")


INT8: dict[str, Any] = {"quantize_weights": "int8"}


def without(*names: str) -> dict[str, Any]:
    return INT8 | {"quantize_exclude": tuple(f"*.{name}" for name in names)}


KINDS: dict[str, tuple[tuple[bool, bool], dict[str, Any]]] = {
    "floats": ((True, True), {}),
    "int8": ((True, False), INT8),
    "int8 activations": ((False, False), INT8 | {"quantize_activations": "int8"}),
    "both excluded": ((True, False), without(GATE, UP)),
    "gate excluded": ((False, False), without(GATE)),
    "up excluded": ((False, False), without(UP)),
    "k and v excluded": ((True, True), without(K, V)),
    "v excluded": ((True, False), without(V)),
    "int4": ((False, False), {"quantize_weights": "int4"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_two_of_one_kind_are_joined_under_a_scan(kind):
    joined, options = KINDS[kind]
    scan, apart = engine_of("scan", **options), engine_of("unrolled", **options)
    assert (joined_in(scan), joined_in(apart)) == (joined, (False, False))
    assert scan.parameters.bytes == apart.parameters.bytes
    for kv_heads in (4, 2):  # as they are in the checkpoint, or repeated
        assert needed_shapes(scan.model, kv_heads) == needed_shapes(apart.model, kv_heads)
    elements = [sum(n for _, n in matrices(engine.model, engine.mesh)) for engine in (scan, apart)]
    assert elements[0] == elements[1]


def test_biases_keep_k_and_v_apart():
    assert joined_in(engine_of("scan", config=replace(WIDE, attention_bias=True))) == (True, False)


@pytest.mark.parametrize(("devices", "ffn_dim", "share"), [(4, 128, 32), (4, 126, 126), (1, 128, 128)])
def test_the_weights_lie_one_behind_the_other(devices, ffn_dim, share, without_native_kernels):
    """Each device has its rows of both, or all where it cannot share them."""
    config = replace(WIDE, ffn_dim=ffn_dim)
    engine, checkpoint = engine_of("scan", devices, config), RandomCheckpoint(config)
    params = engine.parameters.load(checkpoint)
    stack_LGFD = params["layers"]["mlp.gate_and_up.weight"]
    assert not {f"{GATE}.weight", f"{UP}.weight"} & set(params["layers"])
    assert stack_LGFD.addressable_shards[0].data.shape == (2, 2, share, 64)
    for stack, names in ((stack_LGFD, (GATE, UP)), (params["layers"]["self_attn.k_and_v.weight"], (K, V))):
        expected = [[checkpoint.tensor(f"layers.{i}.{name}.weight") for name in names] for i in range(2)]
        np.testing.assert_array_equal(stack, expected)


def test_codes_and_scales_are_those_of_each():
    params = {loop: engine_of(loop, **INT8).parameters.load(RandomCheckpoint(WIDE)) for loop in ("scan", "unrolled")}
    for part in ("code", "scale"):
        stack = params["scan"]["layers"][f"mlp.gate_and_up.{part}"]
        expected = [[layer[f"{name}.{part}"] for name in (GATE, UP)] for layer in params["unrolled"]["layers"]]
        np.testing.assert_array_equal(stack, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "gate excluded"])
def test_logits_are_those_of_unrolled_layers(kind):
    """Floats are compared with transformers in test_families.py."""
    _, options = KINDS[kind]
    scanned_V, unrolled_V = (
        logits_behind(engine, engine.parameters.load(RandomCheckpoint(WIDE)), TEXT)
        for engine in (engine_of("scan", **options), engine_of("unrolled", **options))
    )
    np.testing.assert_allclose(scanned_V, unrolled_V, atol=1e-4)


def adapter_of(engine: Engine, *names: str) -> AdapterWeights:
    """One that changes these modules in every layer."""
    places, rng = engine.parameters.places, np.random.default_rng(len(names))
    assert places is not None
    array = {}
    for site in places.sites:
        if site.path in names:
            for part in ("adapter_down", "adapter_up"):
                array[site.name(part)] = rng.normal(size=(2, *site.shape(part, 2))).astype(np.float32) / 4
    return AdapterWeights(2, array, places.bytes_of_one)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, pytest.param(INT8, marks=pytest.mark.product)], ids=["floats", "int8"])
def test_adapters_change_either_or_both(options):
    """Beside a row without: one of gate, one of up, one of both."""
    told = []
    for loop in ("scan", "unrolled"):
        engine = engine_of(loop, max_adapters=3, max_adapter_rank=2, **options)
        params = engine.parameters.load(RandomCheckpoint(WIDE))
        for index, names in enumerate([(GATE,), (UP,), (GATE, UP)], 1):
            params = engine.put_adapter(params, index, adapter_of(engine, *names))
        session, of_loop = Session(engine, params), []
        for adapter in range(4):
            session.adapter = adapter
            of_loop.append(np.array(session.prefilled(0, TEXT).logits_NV)[0])
        told.append(np.array(of_loop))
    np.testing.assert_allclose(*told, atol=1e-4)
    apart = [np.abs(one - other).max() for i, one in enumerate(told[0]) for other in told[0][:i]]
    assert min(apart) > 0.05
