"""Vectors of stacked layers that lie alike: which these are, and that each layer gets its own."""

from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from slipstream.engine_impl.assembly import twin
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.forward import LayerLoop, vectors_of
from slipstream.engine_impl.joined import join_products
from slipstream.engine_impl.models import registry
from slipstream.engine_impl.models.qwen2 import Qwen2Config
from slipstream.engine_impl.quantization.swap import quantize
from slipstream.engine_impl.sizes import device_bytes
from slipstream.engine_impl.weights.alike import join, joined_shapes
from slipstream.engine_impl.weights.load import abstract_params
from slipstream.engine_impl.weights.sharding import make_mesh

from ..tiny_models import TINY, RandomCheckpoint, logits_behind, tiny_engine

OF_A_SQUARE: dict[str, Any] = asdict(TINY) | {"model_dim": TINY.num_heads * TINY.head_dim}
SQUARE = Qwen2Config(**OF_A_SQUARE)
"""A query's bias has the length of a norm's weights. Chips share the one, and each has the other."""
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
KV = ("self_attn.k_proj", "self_attn.v_proj")


def shapes_of(config, devices, loop: LayerLoop = "scan", **quantization: Any):
    """The model, and its parameters' shapes before any are joined."""
    with torch.device("meta"):
        model = registry.build(config)
    mesh = make_mesh(jax.devices(), config.num_heads, config.num_kv_heads, devices)
    dtype = jnp.dtype("bfloat16")
    quantize(model, EngineConfig(slots=1, **quantization), dtype, mesh, "xla")
    if loop == "scan":
        join_products(model)
    return model, abstract_params(model, mesh, dtype, loop)


def filled(shapes):
    """Every value of every array another one."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda of: jax.device_put(rng.normal(size=of.shape).astype(of.dtype), of.sharding), shapes)


def all_apart(params):
    """Parameters with no vector joined, as programs take them too."""
    vectors = {name: array[i] for names, array in params["alike"].items() for i, name in enumerate(names)}
    return {**params, "layers": params["layers"] | vectors, "alike": {}}


def assert_as_told(params, shapes):
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    for array, of in zip(jax.tree.leaves(params), jax.tree.leaves(shapes), strict=True):
        assert (array.shape, array.dtype) == (of.shape, of.dtype)
        assert array.sharding.is_equivalent_to(of.sharding, array.ndim)


def test_each_layer_gets_its_own_of_those_that_lie_alike():
    model, shapes = shapes_of(TINY, 4, quantize_weights="int8")
    joined_as, params = joined_shapes(model, shapes), filled(shapes)
    joined = join(params, joined_as)
    assert_as_told(joined, joined_as)
    assert {name for name, stack in joined["layers"].items() if stack.ndim == 2} == {"self_attn.q_proj.scale"}
    assert set(joined["alike"]) == {
        NORMS,
        tuple(f"{name}.scale" for name in KV),
        ("self_attn.o_proj.scale", "mlp.down_proj.scale"),
    }
    for layer in range(TINY.num_layers):
        found = vectors_of(joined["alike"], jnp.int32(layer))
        assert found.keys() | joined["layers"].keys() == params["layers"].keys()
        for name, vector in found.items():
            np.testing.assert_array_equal(vector, params["layers"][name][layer])
    assert device_bytes(jax.tree.leaves(joined_as)) == device_bytes(jax.tree.leaves(shapes))


def test_what_chips_share_lies_apart_from_what_each_has():
    model, shapes = shapes_of(SQUARE, 4)
    bias = "self_attn.q_proj.bias"
    assert shapes["layers"][bias].shape == shapes["layers"][NORMS[0]].shape
    joined = joined_shapes(model, shapes)
    assert bias in joined["layers"]
    assert {frozenset(names) for names in joined["alike"]} == {
        frozenset(NORMS),
        frozenset(f"{name}.bias" for name in KV),
    }


def test_unrolled_layers_stay_as_they_are():
    model, shapes = shapes_of(TINY, 1, "unrolled")
    params = filled(shapes)
    joined = join(params, joined_shapes(model, shapes))
    assert joined["layers"] is params["layers"]
    assert joined["alike"] == {}


def test_a_draft_models_are_joined_too():
    draft = RandomCheckpoint(TINY)
    engine, _ = tiny_engine(speculate="auto", draft=TINY, devices=2)
    scan = twin(engine, layer_loop="scan")
    params, told = scan.parameters.load(RandomCheckpoint(TINY), draft), scan.parameters.abstract()
    assert_as_told(params, told)
    assert set(params["alike"]) == set(params["draft"]["alike"]) == {NORMS}
    assert scan.parameters.bytes == engine.parameters.bytes


@pytest.mark.slow
def test_logits_are_those_of_vectors_apart():
    engine, _ = tiny_engine(devices=2)
    scan = twin(engine, layer_loop="scan")
    params = scan.parameters.load(RandomCheckpoint(TINY))
    assert params["alike"]
    text = list(range(1, 20))
    np.testing.assert_array_equal(logits_behind(scan, params, text), logits_behind(scan, all_apart(params), text))
