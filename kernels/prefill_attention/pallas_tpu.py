"""Causal attention on TPU: JAX's own splash attention kernel, given our layout."""

from typing import cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import splash_attention as splash

MIN_BLOCK = 128  # splash attention's blocks of keys are multiples of a lane tile
MAX_BLOCK = 512


def prefill_attention_tpu(
    q_TNH: jax.Array,
    k_TKH: jax.Array,
    v_TKH: jax.Array,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    interpret: pltpu.InterpretParams | bool = False,
) -> jax.Array:
    """`op.prefill_attention` on one chip's heads.

    Pads the prompt to a multiple of 128 tokens at its end, where causality keeps the padding out of the real rows.
    """
    T, N, H = q_TNH.shape
    block, tokens = _block_and_padded_length(T)
    q_TNH = (q_TNH.astype(jnp.float32) * H**-0.5).astype(q_TNH.dtype)  # the kernel does not scale
    q_NTH, k_KTH, v_KTH = (jnp.pad(x.swapaxes(0, 1), ((0, 0), (0, tokens - T), (0, 0))) for x in (q_TNH, k_TKH, v_TKH))
    mask = splash.CausalMask((tokens, tokens))
    if window is not None and window < T:
        mask = splash.LocalMask((tokens, tokens), window_size=(window - 1, 0), offset=0)
    attend = splash.make_splash_mha_single_device(  # "mha" takes any N that is a multiple of K, and repeats nothing
        splash.MultiHeadMask([mask] * N),
        block_sizes=splash.BlockSizes(block_q=block, block_kv=block),
        attn_logits_soft_cap=soft_cap,
        interpret=interpret,  # pyright: ignore[reportArgumentType]  (annotated bool, handed on to pallas_call)
    )
    out_NTH = cast(jax.Array, attend(q_NTH, k_KTH, v_KTH))
    return out_NTH[:, :T].swapaxes(0, 1)


def _block_and_padded_length(num_tokens: int) -> tuple[int, int]:
    """The largest block up to MAX_BLOCK that divides the prompt padded to MIN_BLOCK, and that padded length."""
    tokens = -(-num_tokens // MIN_BLOCK) * MIN_BLOCK
    block = MAX_BLOCK
    while tokens % block:
        block //= 2
    return block, tokens
