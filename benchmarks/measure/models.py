"""The model under test: the embedded one, a checkpoint that `serve` takes, or a preset's shape with random weights."""

from typing import Any, NamedTuple

import numpy as np

from ...engine_impl.checkpoints.contract import Checkpoint, Codes, Compact
from ...engine_impl.checkpoints.open import open_checkpoint
from ...engine_impl.compiler.presets import PRESETS
from ...engine_impl.config import EngineConfig
from ...engine_impl.engine import Engine
from ...engine_impl.forward import Params
from ...engine_impl.loading import build_engine, load_params
from ...engine_impl.models import registry
from ...engine_impl.models.decoder import ModelConfig
from ...engine_impl.weights.load import needed_shapes

RANDOM_VALUES = 2**20


class Loaded(NamedTuple):
    """An engine, its weights on the devices, and where the weights came from."""

    engine: Engine
    params: Params
    checkpoint: Checkpoint


class RandomCheckpoint:
    """Normal weights of a model's shape, the same in every run. Their speed is a real checkpoint's, their text is not.

    A million values are drawn and repeated: drawing eight billion would take longer than the benchmark.
    """

    def __init__(self, config: ModelConfig, name: str) -> None:
        self.config, self.name = config, name
        self.quantization = None
        self._values = np.random.default_rng(0).standard_normal(RANDOM_VALUES, np.float32)
        self._shapes = needed_shapes(registry.build(config), config.num_kv_heads)

    def tensor(self, name: str) -> np.ndarray:
        """Norms are one; a matrix keeps the size of what it multiplies."""
        shape = self._shapes[name]
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        return np.resize(self._values * shape[-1] ** -0.5, shape)

    def compact(self) -> dict[str, Compact]:
        """None: they are float32."""
        return {}

    def codes(self, name: str) -> Codes:
        """There are none."""
        raise KeyError(name)

    def files(self) -> tuple[()]:
        """None."""
        return ()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What the model needs."""
        return self._shapes

    def tokenizer(self) -> Any:
        """There is none: text is none of a benchmark's business."""
        return None


def load(config: EngineConfig) -> Loaded:
    """Raises RefusedError as `load_engine` does."""
    if config.model in PRESETS:
        return load_random(config, PRESETS[config.model])
    checkpoint = open_checkpoint(config.model)
    engine = build_engine(config, checkpoint)
    return Loaded(engine, load_params(engine, checkpoint), checkpoint)


def resized(config: EngineConfig, loaded: Loaded) -> Loaded:
    """Another engine for the same weights: the config differs from theirs in slots, cache length or cache type."""
    return Loaded(build_engine(config, loaded.checkpoint), loaded.params, loaded.checkpoint)


def load_random(config: EngineConfig, shape: ModelConfig) -> Loaded:
    """An engine of this shape, without a tokenizer."""
    checkpoint = RandomCheckpoint(shape, config.model)
    engine = build_engine(config, checkpoint)
    return Loaded(engine, load_params(engine, checkpoint), checkpoint)
