"""Log-probabilities of tokens under the model itself: log_softmax of its logits, before penalties, temperature, cuts.

They are made only when a slot asks for them, the likeliest tokens' only when one asks for those. Static cycles on a
chip of eight, Llama-3.1-8B: a step of 96 slots 9.0 M, logprobs 0.1 M more; a prefill of 1024 tokens 29.1 M, its prompt
logprobs 3.4 M more, and all its temporaries 2.1 MiB where the prompt's logits would be 63.
"""

from collections.abc import Callable
from math import gcd
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ...kernels.backend import AXIS
from .params import MAX_LOGPROBS

PROMPT_CHUNK = 128
"""Prompt tokens whose logits exist at a time."""

TOP_ROWS = 16
"""Rows of which a chip finds the largest at a time. The more there are, the longer the TPU compiler takes for `top_k`:
for 128, of a vocabulary of 128,256 on eight v5e, 3.7 s of CPU time, for 16 at a time 0.4 s (libtpu 0.0.42). So
divided, a row costs the chip 0.9 thousand static cycles more."""


class Logprobs(NamedTuple):
    """A row for each slot, or each token of a prompt; P is MAX_LOGPROBS. Zeros where nobody asks."""

    chosen_B: jax.Array
    """f32"""
    top_token_BP: jax.Array
    """i32, likeliest first; equally likely ones by their id"""
    top_BP: jax.Array
    """f32"""


def logprobs(logits_BV: jax.Array, token_B: jax.Array, asked_B: jax.Array, mesh: Mesh) -> Logprobs:
    """What the slots ask for, given their logits, the tokens chosen, and SlotSampling.logprobs."""
    nobodys = nothing(token_B.shape[0])

    def made() -> Logprobs:
        wide_BV = logits_BV.astype(jnp.float32)
        norm_B = jax.nn.logsumexp(wide_BV, axis=-1)

        def tops() -> tuple[jax.Array, jax.Array]:
            top_token_BP, top_logit_BP = likeliest(wide_BV, mesh)
            return top_token_BP, top_logit_BP - norm_B[:, None]

        top_token_BP, top_BP = jax.lax.cond((asked_B > 0).any(), tops, lambda: tuple(nobodys[1:]))
        return Logprobs(_at(wide_BV, token_B) - norm_B, top_token_BP, top_BP)

    return jax.lax.cond((asked_B >= 0).any(), made, lambda: nobodys)


def logprob_of(logits_RV: jax.Array, token_R: jax.Array) -> jax.Array:
    """logprob_R, f32, of one token a row."""
    wide_RV = logits_RV.astype(jnp.float32)
    return _at(wide_RV, token_R) - jax.nn.logsumexp(wide_RV, axis=-1)


def prompt_logprobs(
    x_RD: jax.Array,
    next_R: jax.Array,
    asked: jax.Array,
    logits_of: Callable[[jax.Array, jax.Array], jax.Array],
    mesh: Mesh,
) -> Logprobs:
    """Of the token `next_R` (i32) behind each row, and the likeliest where `asked` (i32) is more than 0. Zeros where
    next_R is -1, and where nobody asks.

    `logits_of` turns rows of the last layer's output into logits, those that its second argument says (bool). It sees
    at most PROMPT_CHUNK rows at a time, so that the logits of a whole prompt never exist.
    """
    rows = next_R.shape[0]
    chunks = -1, gcd(PROMPT_CHUNK, rows)

    def of_chunk(chunk: tuple[jax.Array, jax.Array]) -> Logprobs:
        x_CD, next_C = chunk
        asked_C = jnp.where(next_C >= 0, asked, -1)
        return logprobs(logits_of(x_CD, next_C >= 0), next_C, asked_C, mesh)

    def made() -> Logprobs:
        of_chunks = jax.lax.map(of_chunk, (x_RD.reshape(*chunks, x_RD.shape[1]), next_R.reshape(chunks)))
        of_rows = Logprobs(*(values.reshape(rows, *values.shape[2:]) for values in of_chunks))
        is_asked_R = next_R >= 0
        return Logprobs(
            jnp.where(is_asked_R, of_rows.chosen_B, 0),
            *(jnp.where(is_asked_R[:, None], values_RP, 0) for values_RP in of_rows[1:]),
        )

    return jax.lax.cond((next_R >= 0).any(), made, lambda: nothing(rows))


def nothing(rows: int) -> Logprobs:
    """What nobody asked for."""
    no_tops = jnp.zeros((rows, MAX_LOGPROBS), jnp.int32), jnp.zeros((rows, MAX_LOGPROBS), jnp.float32)
    return Logprobs(jnp.zeros((rows,), jnp.float32), *no_tops)


def _at(values_RV: jax.Array, token_R: jax.Array) -> jax.Array:
    """One value a row; a masked sum, which chips that share V do each for their part, where a gather would need all."""
    is_token_RV = jnp.arange(values_RV.shape[1]) == token_R[:, None]
    return jnp.where(is_token_RV, values_RV, 0).sum(-1)


def likeliest(logits_BV: jax.Array, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """(token_BP i32, logit_BP), largest first. The chips share V where they divide it: each finds its own largest, and
    P of each are compared.

    What the TPU compiler makes of a vocabulary of 128,256 on eight chips (libtpu 0.0.42), all rows at once: on each
    chip 190 thousand VLIW bundles for 96 slots (20 trips through 9,067), 0.13 ms at 1.5 GHz. One `argmax` after another
    is 480 thousand cycles for 64 slots and two all-gathers a token; on two CPU cores it takes 21 ms for [8, 49152]
    where this takes 0.6. Left to the partitioner, `top_k` of a shared V compiles for TPUs to token ids that are all 0.
    """
    chips = mesh.shape[AXIS]
    is_shared = logits_BV.shape[1] % chips == 0

    def of_chip(logits_BV):
        logit_BP, token_BP = _largest(logits_BV, min(MAX_LOGPROBS, logits_BV.shape[1]))
        if not is_shared:
            return token_BP, logit_BP
        token_BP += jax.lax.axis_index(AXIS) * logits_BV.shape[1]
        every_chips = jax.lax.all_gather((logit_BP, token_BP), AXIS, axis=1, tiled=True)
        logit_BP, at_BP = jax.lax.top_k(every_chips[0], MAX_LOGPROBS)
        return jnp.take_along_axis(every_chips[1], at_BP, axis=1), logit_BP

    specs = P(None, AXIS) if is_shared else P()
    return jax.shard_map(of_chip, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)(logits_BV)


def _largest(values_RV: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """(value_RP, at_RP), largest first; TOP_ROWS rows at a time where they are the parts of all."""
    if len(values_RV) == TOP_ROWS or len(values_RV) % TOP_ROWS:
        return jax.lax.top_k(values_RV, count)
    parts = jax.lax.map(lambda part: jax.lax.top_k(part, count), values_RV.reshape(-1, TOP_ROWS, values_RV.shape[1]))
    value_RP, at_RP = (part.reshape(-1, count) for part in parts)
    return value_RP, at_RP
