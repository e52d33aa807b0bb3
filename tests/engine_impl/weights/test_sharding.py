"""Which tensor-parallel sizes work."""

import jax
import pytest
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.weights.sharding import make_mesh, tensor_parallel_sizes


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


def test_the_default_is_the_largest():
    assert make_mesh(jax.devices(), 9, 3, None).shape == {"tensor": 3}


@pytest.mark.parametrize("wanted", [2, 9, 0])
def test_a_size_that_does_not_work_is_refused_naming_those_that_do(wanted):
    with pytest.raises(RefusedError, match=f"tensor_parallel={wanted} does not work .* sizes that do: 1, 3"):
        make_mesh(jax.devices(), 9, 3, wanted)
