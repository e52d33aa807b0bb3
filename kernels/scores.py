"""What a query sees and how its scores are scaled and capped: arithmetic that attention has in common."""

import math

import jax
import jax.numpy as jnp


def rows_seen(length: jax.Array, window: jax.Array | None) -> tuple[jax.Array | int, jax.Array]:
    """The rows [first, end) of a slot of `length` rows that its next token sees; (0, 0) if it sees only itself.

    `window` counts that token too, None is no window. Of scalars within a kernel, of arrays outside.
    """
    if window is None:
        return 0, length
    has_rows = window > 1
    return jnp.where(has_rows, jnp.maximum(length - window + 1, 0), 0), jnp.where(has_rows, length, 0)


def exact_scale(head_dim: int) -> float:
    """The power of two next below head_dim**-0.5: queries times it are exact in every dtype, and scores less work."""
    return 2.0 ** math.floor(math.log2(head_dim**-0.5))


def cap_scores(score: jax.Array, soft_cap: float | None) -> jax.Array:
    """cap * tanh(score / cap), close to the score where that is small, never beyond the cap (arXiv:2408.00118, 2)."""
    return score if soft_cap is None else soft_cap * jnp.tanh(score * (1 / soft_cap))


def add_sink(
    m: jax.Array, l: jax.Array, acc: jax.Array, sink: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """An online softmax (largest score, sum of exp(score - m), sum of exp(score - m) v) with one more score that has no
    value: it takes its share of the weights, and adds nothing. None leaves all as it is.

    `acc` has m's axes, of which the sink has the last ones, and one for the values' dimensions unless m has it already.
    """
    if sink is None:
        return m, l, acc
    sink = jnp.broadcast_to(sink, m.shape)
    m_next = jnp.maximum(m, sink)
    decay = jnp.exp(m - m_next)
    return m_next, l * decay + jnp.exp(sink - m_next), acc * decay.reshape(decay.shape + (1,) * (acc.ndim - m.ndim))


def check_soft_cap(soft_cap: float | None) -> None:
    """Raises ValueError for a cap that is not above 0."""
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"{soft_cap=} must be above 0; None leaves the scores as they are")


def check_window(window: jax.Array | int | None) -> None:
    """Raises ValueError for a window below 1, if its value is known, and for one that is no integer scalar."""
    if isinstance(window, int) and window < 1:
        raise ValueError(f"{window=} must be at least 1, the token itself; None lets it see all tokens before it")
    if window is not None and (jnp.shape(window) or not jnp.issubdtype(jnp.result_type(window), jnp.integer)):
        raise ValueError(f"window must be an integer scalar, got {jnp.result_type(window)}{list(jnp.shape(window))}")
