"""Penalties on tokens that a text has already, and the counts that they need.

A slot's counts are one u16 a vocabulary entry: 1 if the prompt has the token, plus 2 for each time that the answer has
it. They are made for every slot, but kept up to date only while some slot asks for a penalty.

Llama-3.1-8B on eight v5e, 96 slots (libtpu 0.0.42): the counts take 2.9 MiB a chip, which shares V as the logits do.
A step of 9.0 M static cycles pays 31 thousand to count and 39 thousand to penalise while somebody asks, and 35 thousand
for another argmax. While nobody asks it pays no cycle; the compiler prefetches the counts into VMEM all the same (4 us
of bandwidth, beside the layers' work), and never copies them in HBM. The tokens themselves, [B, S], would be smaller
(0.4 MiB), but would have to be scattered into counts again at every step, one by one. On two CPU cores (SmolLM2-135M,
8 slots) the step takes 1.00 times the CPU time of one without all this while nobody asks, and 1.02 with penalties.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ...kernels.backend import AXIS
from .params import SamplingParams
from .slots import SlotSampling

IN_PROMPT, IN_ANSWER = 1, 2
FULL = 2**16 - 1 - IN_ANSWER
"""A count above this is not raised any more."""
MOST = (FULL + IN_ANSWER) // IN_ANSWER
"""So many times that the answer has a token are told apart from fewer."""


def is_penalised(params: SamplingParams) -> bool:
    """Whether a request asks for a penalty of any kind."""
    return (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1, 0, 0)


def counts_of_text(text: Sequence[int] | np.ndarray, prompt_length: int, vocab_size: int) -> np.ndarray:
    """count_V, u16, of a text whose first `prompt_length` tokens are the prompt. Made on the host: few requests ask."""
    prompt, answer = np.asarray(text[:prompt_length], np.int64), np.asarray(text[prompt_length:], np.int64)
    count_V = IN_ANSWER * np.minimum(np.bincount(answer, minlength=vocab_size), MOST)
    count_V[prompt] += IN_PROMPT
    return count_V.astype(np.uint16)


def count_answer(
    count_BV: jax.Array, slot_N: jax.Array, token_NW: jax.Array, counted_N: jax.Array, mesh: Mesh
) -> jax.Array:
    """count_BV with so many (`counted_N`, i32) of these tokens of the slots' answers more; as it was where there are
    none.

    In place: a cell of each slot is read and written, one token after another, by the chip that has its column.
    """
    is_shared = count_BV.shape[1] % mesh.shape[AXIS] == 0

    def of_chip(count_BV, slot_N, token_NW, counted_N):
        column_NW = token_NW - jax.lax.axis_index(AXIS) * count_BV.shape[1] if is_shared else token_NW
        for w in range(token_NW.shape[1]):
            column_N, row_N = column_NW[:, w], jnp.where(w < counted_N, slot_N, count_BV.shape[0])
            is_mine_N = (column_N >= 0) & (column_N < count_BV.shape[1])
            cell_N = jnp.where(is_mine_N, row_N, count_BV.shape[0]), jnp.where(is_mine_N, column_N, 0)
            count_BV = count_BV.at[cell_N].set(_one_more(count_BV.at[cell_N].get(mode="clip")), mode="drop")
        return count_BV

    def counted() -> jax.Array:
        spec = P(None, AXIS) if is_shared else P()
        sharded = jax.shard_map(of_chip, mesh=mesh, in_specs=(spec, P(), P(), P()), out_specs=spec, check_vma=False)
        return sharded(count_BV, slot_N, token_NW, counted_N)

    return jax.lax.cond((counted_N > 0).any(), counted, lambda: count_BV)


def counts_behind(count_NV: jax.Array, token_NW: jax.Array) -> list[jax.Array]:
    """W + 1 times count_NV: as it is, and behind each of these tokens of the answers and those before it."""
    counts = [count_NV]
    for w in range(token_NW.shape[1]):
        is_token_NV = jnp.arange(count_NV.shape[1]) == token_NW[:, w, None]
        counts.append(jnp.where(is_token_NV, _one_more(counts[-1]), counts[-1]))
    return counts


def _one_more(count: jax.Array) -> jax.Array:
    return jnp.where(count <= FULL, count + jnp.uint16(IN_ANSWER), count)


def penalise(logits_BV: jax.Array, count_BV: jax.Array, sampling: SlotSampling) -> jax.Array:
    """Logits, f32, after the repetition penalty (as transformers' RepetitionPenaltyLogitsProcessor), then those for
    presence and frequency (as OpenAI defines them). A slot that asks for none keeps its logits to the last bit."""
    answer_BV = (count_BV >> 1).astype(jnp.float32)
    rate_B1 = sampling.repetition_penalty[:, None]
    repeated_BV = jnp.where(logits_BV > 0, logits_BV / rate_B1, logits_BV * rate_B1)
    penalised_BV = jnp.where(count_BV > 0, repeated_BV, logits_BV)
    penalised_BV -= sampling.frequency_penalty[:, None] * answer_BV
    penalised_BV -= jnp.where(answer_BV > 0, sampling.presence_penalty[:, None], 0)
    return penalised_BV
