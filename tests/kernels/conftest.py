import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh


@pytest.fixture
def mesh():
    """One CPU device."""
    return Mesh(np.array(jax.devices()[:1]), ("tensor",))


@pytest.fixture
def mesh_of_8():
    """Eight virtual CPU devices."""
    return Mesh(np.array(jax.devices()), ("tensor",))


@pytest.fixture(autouse=True)
def strict():
    """No dtype or rank is promoted silently inside the kernels."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True)
def no_race():
    """Fails a test whose simulated kernel had a data race."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator  # there is no public way to ask

    pltpu.reset_tpu_interpret_mode_state()
    yield
    assert simulator.races is None or not simulator.races.races_found
