"""`attend` for both ways through the model: decode against the cache, prefill within the prompt.

A model hands over q, k, v of its rows and gets back what they attend to; where keys and values live is decided here.
"""

from collections.abc import Callable

import jax

from ..cache_manager import rows
from ..kernels import Backend, attention_steps, prefill_attention, ragged_attention

Attend = Callable[[jax.Array | int, jax.Array, jax.Array, jax.Array], jax.Array]
"""(layer, q_RNH, k_RKH, v_RKH) -> out_RNH"""


def attend_cache(cache_LBKSC: jax.Array, length_B: jax.Array, *, mesh: jax.sharding.Mesh, backend: Backend) -> Attend:
    """Rows are slots: each attends to its first `length` cached tokens and to its own new one."""
    steps = attention_steps(cache_LBKSC, length_B, mesh=mesh, backend=backend)

    def attend(layer, q_BNH, k_BKH, v_BKH):
        new_BKC = rows(k_BKH, v_BKH)
        return ragged_attention(q_BNH, new_BKC, cache_LBKSC, layer, length_B, steps, mesh=mesh, backend=backend)

    return attend


def attend_prompt(*, mesh: jax.sharding.Mesh, backend: Backend) -> Attend:
    """Rows are one prompt's tokens: each attends to itself and those before it."""

    def attend(layer, q_TNH, k_TKH, v_TKH):
        return prefill_attention(q_TNH, k_TKH, v_TKH, mesh=mesh, backend=backend)

    return attend
