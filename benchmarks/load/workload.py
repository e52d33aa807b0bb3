"""The requests of a load test: how long they are, what they say, when they come. All from one seed."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...engine_impl.compiler.lengths import SHAREGPT_LIMITS, SHAREGPT_MEAN, SHAREGPT_SIGMA
from ...engine_impl.errors import RefusedError

PROMPT, OUTPUT = 0, 1
LENGTHS, TOKENS, SHARED = 0, 1, 2
"""What is drawn, each from random numbers of its own."""

Draw = Callable[[np.random.Generator, int], int]
"""(random numbers, the request's index) -> tokens"""


@dataclass(frozen=True)
class LoadRequest:
    """One request to be sent."""

    prompt_ids: list[int]
    max_tokens: int


def lengths(spec: str, column: int) -> Draw:
    """What `spec` says: fixed:N, uniform:LOW:HIGH (both included), sharegpt, file:PATH. `column`: PROMPT or OUTPUT.

    A file is a JSON list of [prompt, output] lengths, taken in order and from the start again.

    Raises RefusedError.
    """
    kind, _, rest = spec.partition(":")
    if kind == "sharegpt" and not rest:
        return lambda rng, index: _sharegpt(rng, column)
    if kind == "file":
        pairs = _read_pairs(Path(rest))
        return lambda rng, index: pairs[index % len(pairs)][column]
    try:
        values = [int(word) for word in rest.split(":")]
    except ValueError:
        values = []
    if kind == "fixed" and len(values) == 1 and values[0] > 0:
        return lambda rng, index: values[0]
    if kind == "uniform" and len(values) == 2 and 0 < values[0] <= values[1]:
        return lambda rng, index: int(rng.integers(values[0], values[1] + 1))
    raise RefusedError(f"lengths {spec!r} must be fixed:N, uniform:LOW:HIGH, sharegpt or file:PATH")


def make_requests(
    count: int,
    prompt: Draw,
    output: Draw,
    *,
    ids: tuple[int, int],
    max_length: int | None,
    seed: int,
    block: int = 0,
    prefix_share: int = 0,
) -> list[LoadRequest]:
    """Random prompts of token ids in [ids[0], ids[1]); prompt and answer together cut to `max_length`, if given.

    The same seed gives the same requests, the first ones too when `count` is larger. Another `block` has the same
    lengths and other tokens, which no server can have cached. All prompts of a seed, whatever the block, begin with the
    same `prefix_share` tokens, which come on top of what `prompt` says.
    """
    shared = np.random.default_rng([seed, SHARED]).integers(*ids, prefix_share).tolist()
    asks = []
    for index in range(count):
        rng = np.random.default_rng([seed, LENGTHS, index])
        prompt_tokens, output_tokens = prompt(rng, index), output(rng, index)
        if max_length is not None:
            prompt_tokens = min(prompt_tokens, max_length - prefix_share - 1)
            output_tokens = min(output_tokens, max_length - prefix_share - prompt_tokens)
        own = np.random.default_rng([seed, TOKENS, block, index]).integers(*ids, prompt_tokens).tolist()
        asks.append(LoadRequest(shared + own, output_tokens))
    return asks


def arrivals(count: int, rate: float, *, burst_size: int, seed: int) -> list[float]:
    """When requests come at `rate` a second (seconds from the start): the bursts are a Poisson process."""
    bursts = -(-count // burst_size)
    gaps = np.random.default_rng(seed).exponential(burst_size / rate, bursts)
    gaps[0] = 0.0
    return np.repeat(np.cumsum(gaps), burst_size)[:count].tolist()


def _sharegpt(rng: np.random.Generator, column: int) -> int:
    sigma = SHAREGPT_SIGMA[column]
    drawn = rng.lognormal(np.log(SHAREGPT_MEAN[column]) - sigma**2 / 2, sigma)
    return int(np.clip(round(drawn), *SHAREGPT_LIMITS))


def _read_pairs(path: Path) -> Sequence[tuple[int, int]]:
    try:
        pairs = [(int(prompt), int(output)) for prompt, output in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise RefusedError(f"lengths file {path}: must be JSON [[prompt, output], ...] in tokens ({error})") from error
    if not pairs or min(min(pair) for pair in pairs) < 1:
        raise RefusedError(f"lengths file {path}: must hold at least one pair, and no length below 1")
    return pairs
