"""What callers ask of the next tokens, as arrays."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np

from .api import Allowed, Opening
from .placing import placed
from .sampling.mask import Asked
from .sampling.params import GREEDY
from .sampling.penalties import counts_of_text, is_penalised
from .sampling.slots import SlotSampling
from .text.tokenizer import Tokenizer


def sampling_of(openings: Sequence[Opening | None], tokenizer: Tokenizer) -> SlotSampling:
    """[N] each, on the host; `min_tokens` as a position in the text, as a step's tokens have."""

    def of_one(opening: Opening | None) -> SlotSampling:
        if opening is None:
            return SlotSampling.of(GREEDY)
        asked = opening.sampling
        one = SlotSampling.of(asked, tokenizer.stop_ids if asked.min_tokens else ())
        return replace(one, min_tokens=one.min_tokens + np.int32(opening.prompt_length))

    return jax.tree.map(lambda *values: np.stack(values), *map(of_one, openings))


def counts_of(openings: Sequence[Opening | None], made_NV: jax.Array) -> jax.Array:
    """u16 count_NV of the texts, where one of them asks for a penalty; else what is there already, which nobody
    reads."""
    if not any(opening is not None and is_penalised(opening.sampling) for opening in openings):
        return made_NV
    count_NV = np.zeros(made_NV.shape, np.uint16)
    for n, opening in enumerate(openings):
        if opening is not None and is_penalised(opening.sampling):
            count_NV[n] = counts_of_text(opening.text, opening.prompt_length, made_NV.shape[1])
    return placed(count_NV, made_NV.sharding)


def masks_of_openings(openings: Sequence[Opening | None]) -> list[Asked]:
    """Of those that have one."""
    asked = [(row, opening.allowed_W) for row, opening in enumerate(openings) if opening is not None]
    return [Asked(row, (), word_W) for row, word_W in asked if word_W is not None]


def masks_of(allowed: Allowed | None) -> list[Asked]:
    """Of a step's rows."""
    if allowed is None:
        return []
    of_rows = zip(allowed.row_C.tolist(), allowed.forced_CF, allowed.word_CW, strict=True)
    return [Asked(row, forced_F[forced_F >= 0], word_W) for row, forced_F, word_W in of_rows]
