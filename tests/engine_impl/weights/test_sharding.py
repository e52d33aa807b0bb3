"""Which tensor-parallel sizes work."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.models import registry
from slipstream.engine_impl.models.gpt_oss import GptOssConfig
from slipstream.engine_impl.weights.sharding import make_mesh, parameter_spec, tensor_parallel_sizes


@pytest.mark.parametrize(
    ("heads", "kv_heads", "devices", "sizes"),
    [
        (9, 3, 8, [1, 3]),  # SmolLM2
        (32, 8, 16, [1, 2, 4, 8, 16]),  # Llama 3: beyond 8, chips share kv heads
        (8, 4, 8, [1, 2, 4, 8]),
        (12, 4, 8, [1, 2, 4]),  # 3 and 6 divide the query heads, but leave half kv heads
        (8, 1, 8, [1, 2, 4, 8]),
        (7, 7, 4, [1]),
    ],
)
def test_sizes(heads, kv_heads, devices, sizes):
    assert tensor_parallel_sizes(heads, kv_heads, devices) == sizes


@pytest.mark.parametrize(
    ("chips", "of_weights", "of_biases"),
    [
        (4, [("tensor", None, None)] * 3, ("tensor", None)),  # eight experts
        (3, [(None, None, "tensor"), (None, "tensor", None), (None, None, "tensor")], ()),  # their ffn of 24
        (5, [()] * 3, ()),
    ],
)
def test_chips_share_experts_or_their_ffn(chips, of_weights, of_biases):
    shape = GptOssConfig(
        num_layers=1, num_heads=4, num_kv_heads=4, head_dim=8, model_dim=32, ffn_dim=24, vocab_size=64,
        context_length=64, tied_embeddings=False, rope_theta=1e4, rms_norm_eps=1e-5, num_experts=8, experts_per_token=2,
    )  # fmt: skip
    model, mesh = registry.build(shape), Mesh(np.array(jax.devices()[:chips]), ("tensor",))
    names = [f"layers.0.mlp.{matrix}.weight" for matrix in ("w1", "w2", "w3")]
    specs = [parameter_spec(model, name, model.get_parameter(name).shape, mesh) for name in names]
    assert specs == [PartitionSpec(*spec) for spec in of_weights]
    assert parameter_spec(model, "layers.0.mlp.w1.bias", (8, 24), mesh) == PartitionSpec(*of_biases)


def test_the_default_is_the_largest():
    assert make_mesh(jax.devices(), 9, 3, None).shape == {"tensor": 3}


@pytest.mark.parametrize("wanted", [2, 9, 0])
def test_a_size_that_does_not_work_is_refused_naming_those_that_do(wanted):
    with pytest.raises(RefusedError, match=f"tensor_parallel={wanted} does not work .* sizes that do: 1, 3"):
        make_mesh(jax.devices(), 9, 3, wanted)
