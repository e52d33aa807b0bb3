"""What is timed: a prompt's first token, ours and transformers', behind one face."""

from typing import Any, Protocol

import numpy as np
import torch

from ..engine_impl.engine import Engine
from ..engine_impl.forward import Params


class Prefiller(Protocol):
    """A model that reads a prompt."""

    name: str

    def first_token(self, prompt: list[int]) -> int:
        """The greedy token behind the prompt, when it is on the host; keys and values are made, and dropped."""
        ...


class EnginePrefiller:
    """Our engine: the prompt is padded to its bucket."""

    name = "slipstream"

    def __init__(self, engine: Engine, params: Params) -> None:
        self._engine, self._params = engine, params

    def first_token(self, prompt: list[int]) -> int:
        _, result = self._engine.prefill(self._params, *self._engine.pad(prompt))
        return int(np.asarray(result.token_B)[0])


class TransformersPrefiller:
    """transformers with its growing cache, which attends over the prompt alone, and the vocabulary for the last token
    alone."""

    name = "transformers"

    def __init__(self, model: Any) -> None:
        self._model = model

    @torch.inference_mode()
    def first_token(self, prompt: list[int]) -> int:
        from transformers import DynamicCache

        cache = DynamicCache(config=self._model.config)
        logits = self._model(
            torch.tensor([prompt]), past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits  # fmt: skip
        return int(logits[0, -1].argmax())
