"""The model under test: the embedded one, a GGUF file, or a preset's shape with random weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..engine_impl.checkpoints.embedded import embedded_model
from ..engine_impl.checkpoints.gguf import GGUFCheckpoint
from ..engine_impl.config import EngineConfig
from ..engine_impl.engine import Engine
from ..engine_impl.forward import Params
from ..engine_impl.loading import _devices, _dtype, load_engine
from ..engine_impl.models import registry
from ..engine_impl.models.decoder import ModelConfig
from ..engine_impl.presets import PRESETS
from ..engine_impl.sharding import make_mesh
from ..engine_impl.weights import Checkpoint

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
        self._values = np.random.default_rng(0).standard_normal(RANDOM_VALUES, np.float32)
        self._shapes = {name: tuple(p.shape) for name, p in registry.build(config).named_parameters()}

    def tensor(self, name: str) -> np.ndarray:
        """Norms are one; a matrix keeps the size of what it multiplies."""
        shape = self._shapes[name]
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        return np.resize(self._values * shape[-1] ** -0.5, shape)

    def unused(self, names: set[str]) -> list[str]:
        """Nothing is left over."""
        return []


def load(config: EngineConfig) -> Loaded:
    """Raises RefusedError as `load_engine` does."""
    if config.model in PRESETS:
        return load_random(config, PRESETS[config.model])
    engine, params = load_engine(config)
    path = embedded_model() if config.model == "embedded" else Path(config.model)
    return Loaded(engine, params, GGUFCheckpoint(path))


def load_random(config: EngineConfig, shape: ModelConfig) -> Loaded:
    """An engine of this shape, without a tokenizer."""
    devices = _devices(config.platform)
    mesh = make_mesh(devices, shape.num_heads, shape.num_kv_heads, config.tensor_parallel)
    model = registry.build(replace(shape, num_kv_heads=max(shape.num_kv_heads, mesh.size)))
    tokenizer: Any = None
    engine = Engine(model, mesh, config, _dtype(config.dtype, devices[0].platform), tokenizer, config.model)
    checkpoint = RandomCheckpoint(shape, config.model)
    return Loaded(engine, engine.load_params(checkpoint), checkpoint)
