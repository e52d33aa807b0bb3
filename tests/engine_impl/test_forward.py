"""What a scan over the layers takes out of its stacks."""

from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import torch
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.forward import alike_vectors, vectors_of
from slipstream.engine_impl.models import registry
from slipstream.engine_impl.models.qwen2 import Qwen2Config
from slipstream.engine_impl.quantization.swap import quantize
from slipstream.engine_impl.weights.sharding import make_mesh

from .tiny_models import TINY

SQUARE = Qwen2Config(**asdict(TINY) | {"model_dim": TINY.num_heads * TINY.head_dim})
"""A query's bias has the length of a norm's weights. Chips share the one, and each has the other."""
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
KV = ("self_attn.k_proj", "self_attn.v_proj")


def stacks_of(config, devices, **quantization):
    """The model, and vectors of its layers: every value of all of them another one."""
    with torch.device("meta"):
        model = registry.build(config)
    mesh = make_mesh(jax.devices(), config.num_heads, config.num_kv_heads, devices)
    quantize(model, EngineConfig(slots=1, **quantization), jnp.dtype("bfloat16"), mesh, "xla_cpu")
    vectors = {name: len(of) for name, of in model.layers[0].named_parameters() if of.ndim == 1}
    rng, layers = np.random.default_rng(0), config.num_layers
    return model, {name: jnp.asarray(rng.normal(size=(layers, length))) for name, length in vectors.items()}


def test_each_layer_gets_its_own_of_those_that_lie_alike():
    model, stacks = stacks_of(TINY, 4, quantize_weights="int8")
    matrix = {"matrix": jnp.zeros((TINY.num_layers, 2, 3))}
    left, alike = alike_vectors(model, stacks | matrix)
    assert set(left) == {"matrix", "self_attn.q_proj.scale"}
    assert set(alike) == {
        NORMS,
        tuple(f"{name}.scale" for name in KV),
        ("self_attn.o_proj.scale", "mlp.down_proj.scale"),
        ("mlp.gate_proj.scale", "mlp.up_proj.scale"),
    }
    for layer in range(TINY.num_layers):
        found = vectors_of(alike, jnp.int32(layer))
        assert found.keys() | left.keys() == stacks.keys() | matrix.keys()
        for name, vector in found.items():
            np.testing.assert_array_equal(vector, stacks[name][layer])


def test_what_chips_share_lies_apart_from_what_each_has():
    model, stacks = stacks_of(SQUARE, 4)
    assert stacks["self_attn.q_proj.bias"].shape == stacks[NORMS[0]].shape
    left, alike = alike_vectors(model, stacks)
    assert set(left) == {"self_attn.q_proj.bias"}
    assert {frozenset(names) for names in alike} == {frozenset(NORMS), frozenset(f"{name}.bias" for name in KV)}
