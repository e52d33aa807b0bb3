"""How keys and values are stored: as they are, or as int8 codes with scales.

A codec decides the leaves of whatever holds keys and values (the cache, a prompt's prefix, a step's new tokens), and
nothing else differs between codecs: insert, flush and free treat leaf by leaf.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

TINY = float(jnp.finfo(jnp.float32).tiny)  # the smallest normal number: no scale is below


class KV(NamedTuple):
    """Stored keys and values."""

    rows: jax.Array
    """[..., T, C]: a token's k and v side by side, or their codes"""
    scales: jax.Array | None = None
    """[..., 2, T], f32: what a token's k and its v are to be multiplied by; None: nothing. T stands last, or the TPU
    would pad a token's two scales to 128"""


@dataclass(frozen=True)
class Plain:
    """Rows as they are."""

    dtype: jnp.dtype

    def encode(self, rows_XC: jax.Array) -> KV:
        """Rows [..., C] of one token each."""
        return KV(rows_XC.astype(self.dtype))


@dataclass(frozen=True)
class Int8:
    """int8 codes, and an f32 scale for each token's k and v of each kv head: symmetric absmax quantisation, as in
    arXiv:2208.07339 (2.1), a head vector at a time.

        scale = max |x| / 127,  code = round(x / scale),  |x - code * scale| <= scale / 2

    Zero vectors are stored exactly. A row of head dim H takes 2 H + 8 bytes: of bf16's 4 H 52 % at H = 128, 53 % at 64.
    """

    dtype = jnp.dtype(jnp.int8)

    def encode(self, rows_XC: jax.Array) -> KV:
        """Rows [..., C] of one token each; scales [..., 2]."""
        half_X2H = rows_XC.reshape(*rows_XC.shape[:-1], 2, -1).astype(jnp.float32)
        scale_X2 = jnp.maximum(jnp.max(jnp.abs(half_X2H), axis=-1) / 127, TINY)
        code_X2H = jnp.clip(jnp.round(half_X2H / scale_X2[..., None]), -127, 127).astype(jnp.int8)
        return KV(code_X2H.reshape(rows_XC.shape), scale_X2)


Codec = Plain | Int8
