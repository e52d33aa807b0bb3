"""Host arrays onto the devices of a sharding, be they this host's or several hosts'."""

from typing import Any

import jax


def placed(tree: Any, sharding: jax.sharding.Sharding | None) -> Any:
    """Arrays that every host has, by `sharding`; None: on the first device. They are on their way when this returns.

    Where a sharding spans hosts, `jax.device_put` would first compare what they have, by a program of its own.
    """
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda array: jax.make_array_from_callback(array.shape, sharding, array.__getitem__), tree)
