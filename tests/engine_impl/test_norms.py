"""Native norms in the place of a model's own."""

import jax.numpy as jnp
import numpy as np
import pytest
from slipstream.engine_impl import bridge
from slipstream.engine_impl.models.olmo2 import HeadsNorm
from slipstream.engine_impl.models.parts import GemmaRMSNorm, RMSNorm, WideRMSNorm
from slipstream.engine_impl.norms import KernelRMSNorm, swap_norms
from torch import nn

from tests.engine_impl.tiny_models import tiny_engine


@pytest.mark.parametrize("kind", [RMSNorm, WideRMSNorm, GemmaRMSNorm])
def test_each_kind_keeps_its_values(kind):
    holder, rng = nn.ModuleDict({"norm": kind(48, 1e-5)}), np.random.default_rng(0)
    x_RND, weight_D = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 2, 48), (48,)))
    expected_RND = bridge.run(holder["norm"], {"weight": weight_D}, x_RND)
    swap_norms(holder, "native_cpu")
    assert isinstance(holder["norm"], KernelRMSNorm)
    found_RND = bridge.run(holder["norm"], {"weight": weight_D}, x_RND)
    np.testing.assert_allclose(found_RND, expected_RND, rtol=1e-6)


def test_a_familys_own_kind_stays():
    holder = nn.ModuleDict({"norm": HeadsNorm(48, 1e-5)})
    swap_norms(holder, "native_cpu")
    assert type(holder["norm"]) is HeadsNorm


@pytest.mark.parametrize(("devices", "kind"), [(1, KernelRMSNorm), (2, RMSNorm)])
def test_one_cpu_has_them(devices, kind):
    engine, _ = tiny_engine(devices=devices)
    assert type(engine.model.norm) is kind
    assert type(engine.model.layers[1].input_layernorm) is kind
