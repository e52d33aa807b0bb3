"""Arrays on the device."""

from typing import Any

import jax
import numpy as np


def array(values: Any, dtype: Any = None) -> jax.Array:
    """As jnp.array makes it, which compiles a program for each shape. A copy: the device may go on using numpy's."""
    return jax.device_put(np.array(values, dtype))
