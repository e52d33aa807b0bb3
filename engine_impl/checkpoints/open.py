"""From what a user calls a model to its open checkpoint."""

from pathlib import Path

from ..weights import Checkpoint
from .embedded import embedded_model
from .gguf import GGUFCheckpoint
from .safetensors import SafetensorsCheckpoint


def open_checkpoint(model: str) -> Checkpoint:
    """The checkpoint that `EngineConfig.model` names; only its headers are read.

    Raises RefusedError when there is none, or when it is damaged.
    """
    if model == "embedded":
        return GGUFCheckpoint(embedded_model())
    path = Path(model).expanduser()
    if path.is_dir():
        return SafetensorsCheckpoint(path)
    return GGUFCheckpoint(path)
