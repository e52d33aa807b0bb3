"""How likely a model finds a given text: each token's log-probability, by either of the engine's two ways."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from .errors import RefusedError
from .session import Session

Through = Literal["prefill", "decode"]


def score(session: Session, token_ids: Sequence[int], through: Through = "prefill") -> list[float]:
    """log p(token | those before it), natural logarithm, of each token but the first. Takes the session's first slot.

    Args:
        through: "prefill" takes all tokens in one pass; "decode" takes them one by one through the cache, as an
            answer's tokens are. Both have to agree.

    Raises RefusedError for fewer than two tokens, for more than the engine takes, and for ids beyond its vocabulary.
    """
    engine = session.engine
    longest = engine.sizes.max_prefill_length if through == "prefill" else engine.sizes.cache_length
    if not 2 <= len(token_ids) <= longest:
        flag = "--max-prefill-length" if through == "prefill" else "--cache-length"
        raise RefusedError(f"{len(token_ids)} tokens must be from 2 to {longest} (see {flag}) to be scored")
    for token_id in token_ids:
        if not 0 <= token_id < engine.sizes.vocab_size:
            raise RefusedError(f"token id {token_id} must be from 0 to {engine.sizes.vocab_size - 1}")
    if through == "decode":
        return _through_decode(session, token_ids)
    prefixes = session.prefill(0, token_ids, next_id=-1, length=len(token_ids))
    pieces = [np.asarray(prefix.logprob_NT)[0] for prefix in prefixes]
    return np.concatenate(pieces)[: len(token_ids) - 1].tolist()


def perplexity(logprobs: Sequence[float]) -> float:
    """exp of the mean negative log-probability."""
    return math.exp(-math.fsum(logprobs) / len(logprobs))


def _through_decode(session: Session, token_ids: Sequence[int]) -> list[float]:
    first, second, *rest = token_ids
    (prefix,) = session.prefill(0, [first], next_id=second, length=len(token_ids))
    session.insert(session.engine.force(prefix, [second]), 0)
    logprobs = [prefix.logprob_NT[0, 0], *(session.score([token_id])[0] for token_id in rest)]
    session.stop(0)
    return [float(logprob) for logprob in logprobs]
