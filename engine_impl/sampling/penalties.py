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

import jax
import jax.numpy as jnp

from .slots import SlotSampling

IN_PROMPT, IN_ANSWER = 1, 2
FULL = 2**16 - 1 - IN_ANSWER
"""A count above this is not raised any more."""


def counts_of_prompt(token_T: jax.Array, true_length: jax.Array, vocab_size: int) -> jax.Array:
    """count_V, u16, of a padded prompt."""
    outside = vocab_size
    real_T = jnp.where(jnp.arange(token_T.shape[0]) < true_length, token_T, outside)
    return jnp.zeros((vocab_size,), jnp.uint16).at[real_T].set(IN_PROMPT, mode="drop")


def count_answer(count_BV: jax.Array, token_B: jax.Array, sampling: SlotSampling) -> jax.Array:
    """count_BV with one more token of each slot's answer; as it was when no slot asks for a penalty."""

    def counted() -> jax.Array:
        is_token_BV = jnp.arange(count_BV.shape[1]) == token_B[:, None]
        return count_BV + jnp.where(is_token_BV & (count_BV <= FULL), jnp.uint16(IN_ANSWER), jnp.uint16(0))

    return jax.lax.cond(sampling.is_penalised.any(), counted, lambda: count_BV)


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
