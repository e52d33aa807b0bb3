"""How likely a model finds a given text: each token's log-probability, by either of the engine's two ways."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from .engine import Engine
from .errors import RefusedError
from .forward import Params

Through = Literal["prefill", "decode"]


def score(engine: Engine, params: Params, token_ids: Sequence[int], through: Through = "prefill") -> list[float]:
    """log p(token | those before it), natural logarithm, of each token but the first.

    Args:
        through: "prefill" takes all tokens in one pass; "decode" takes them one by one through the cache, as an
            answer's tokens are. Both have to agree.

    Raises RefusedError for fewer than two tokens, for more than the engine takes, and for ids beyond its vocabulary.
    """
    longest = engine.max_prefill_length if through == "prefill" else engine.cache_length
    if not 2 <= len(token_ids) <= longest:
        flag = "--max-prefill-length" if through == "prefill" else "--cache-length"
        raise RefusedError(f"{len(token_ids)} tokens must be from 2 to {longest} (see {flag}) to be scored")
    for token_id in token_ids:
        if not 0 <= token_id < engine.vocab_size:
            raise RefusedError(f"token id {token_id} must be from 0 to {engine.vocab_size - 1}")
    if through == "decode":
        return _through_decode(engine, params, token_ids)
    prefix, _ = engine.prefill(params, *engine.pad(token_ids), prompt_logprobs=True)
    return np.asarray(prefix.prompt_logprob_T)[1 : len(token_ids)].tolist()


def perplexity(logprobs: Sequence[float]) -> float:
    """exp of the mean negative log-probability."""
    return math.exp(-math.fsum(logprobs) / len(logprobs))


def _through_decode(engine: Engine, params: Params, token_ids: Sequence[int]) -> list[float]:
    first, second, *rest = token_ids
    prefix, _ = engine.prefill(params, *engine.pad([first]))
    prefix, logprob = engine.force(prefix, second)
    state = engine.insert(prefix, engine.init_decode_state(), 0)
    logprobs = [logprob]
    for token_id in rest:
        state, logprob_B = engine.score_step(params, state, np.full(engine.max_concurrent_decodes, token_id))
        logprobs.append(logprob_B[0])
    return [float(logprob) for logprob in logprobs]
