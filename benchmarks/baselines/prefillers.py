"""What is timed: a prompt's first token, ours and transformers', behind one face and in turns."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from ...engine_impl.api import Opening
from ...engine_impl.engine import Engine
from ...engine_impl.forward import Params
from ...engine_impl.sampling.params import GREEDY
from ...engine_impl.session import Session

PAUSE_S = 0.05
"""Before each block (seconds): the other's threads may still be spinning."""


class Prefiller(Protocol):
    """A model that reads a prompt."""

    def first_token(self, prompt: list[int]) -> int:
        """The greedy token behind the prompt, when it is on the host; keys and values are made, and dropped."""
        ...


class EnginePrefiller:
    """Our engine: the prompt in chunks, the last one padded."""

    def __init__(self, engine: Engine, params: Params) -> None:
        self._session = Session(engine, params)

    def first_token(self, prompt: list[int]) -> int:
        opening = Opening(text=prompt, prompt_length=len(prompt), sampling=GREEDY)
        _, result = self._session.engine.first_tokens(self._session.prefilled(0, prompt), [opening])
        return int(np.asarray(result.token_BW)[0, 0])


class TransformersPrefiller:
    """transformers with its growing cache, which attends over the prompt alone, and the vocabulary for the last token
    alone."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @torch.inference_mode()
    def first_token(self, prompt: list[int]) -> int:
        from transformers import DynamicCache

        cache = DynamicCache(config=self._model.config)
        answer = self._model(torch.tensor([prompt]), cache=cache, use_cache=True, logits_to_keep=1)
        return int(answer.logits[0, -1].argmax())


class PrefillBlock(NamedTuple):
    """Prompts timed one after another."""

    ms: list[float]
    tokens: list[int]
    """each prompt's first"""


def timed(prefiller: Prefiller, prompts: Sequence[list[int]]) -> PrefillBlock:
    """Each prompt once."""
    ms, tokens = [], []
    for prompt in prompts:
        start = time.perf_counter()
        tokens.append(prefiller.first_token(prompt))
        ms.append((time.perf_counter() - start) * 1000)
    return PrefillBlock(ms, tokens)


def in_turns(prefillers: Sequence[Prefiller], prompts: Sequence[list[int]], *, pairs: int) -> list[list[PrefillBlock]]:
    """A B A B ...: each one's blocks, in which the prompts are shared out evenly. Before each block a pause and one
    untimed prompt."""
    blocks: list[list[PrefillBlock]] = [[] for _ in prefillers]
    repeats = len(prompts) // pairs
    for pair in range(pairs):
        its_prompts = prompts[pair * repeats : (pair + 1) * repeats]
        for prefiller, its_blocks in zip(prefillers, blocks, strict=True):
            time.sleep(PAUSE_S)
            prefiller.first_token(its_prompts[0])
            its_blocks.append(timed(prefiller, its_prompts))
    return blocks
