"""Two engines from one config: refusals, and sizes that fit both sides."""

import jax
import pytest
from slipstream.engine_impl import loading
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.errors import RefusedError

from .tiny_models import TINY, RandomCheckpoint


@pytest.fixture(autouse=True)
def random_weights(monkeypatch):
    checkpoint = RandomCheckpoint(TINY)
    monkeypatch.setattr(loading, "open_model", lambda config: checkpoint)


def test_both_sides_have_the_same_pages_and_heads():
    """4 kv heads; two devices compute prompts, four decode of the six that are left."""
    engine, params = loading.load_disaggregated(EngineConfig(slots=2, cache_length=256, platform="cpu"), 2)
    sides = engine.prefill_engine, engine.decode_engine
    assert [side.mesh.size for side in sides] == [2, 4]
    assert sides[0].layout == sides[1].layout
    assert [list(side.mesh.devices.flat) for side in sides] == [jax.devices()[:2], jax.devices()[2:6]]
    assert params.prefill.keys() == params.decode.keys()


@pytest.mark.parametrize("share", [0, 8, 9])
def test_a_share_that_leaves_one_side_empty_is_refused(share):
    with pytest.raises(RefusedError, match=f"^prefill_devices={share}: there are 8 devices, and both sides need one"):
        loading.load_disaggregated(EngineConfig(slots=2, cache_length=256, platform="cpu"), share)
