"""From what a user calls a model to its open checkpoint."""

from pathlib import Path

from ..errors import RefusedError
from . import buckets, hub
from .contract import Checkpoint
from .embedded import embedded_model
from .gguf import GGUFCheckpoint
from .safetensors import SafetensorsCheckpoint


def open_checkpoint(model: str) -> Checkpoint:
    """The checkpoint that `EngineConfig.model` names, fetched if it has to be; only its headers are read.

    Raises RefusedError when there is none, when it cannot be fetched, or when it is damaged.
    """
    if model == "embedded":
        return GGUFCheckpoint(embedded_model())
    if buckets.is_url(model):
        return SafetensorsCheckpoint(buckets.model_folder(model), model)
    path = Path(model).expanduser()
    if path.is_dir():
        return SafetensorsCheckpoint(path)
    if path.is_file():
        return GGUFCheckpoint(path)
    if hub.is_id(model):
        return SafetensorsCheckpoint(hub.model_folder(model), model)
    raise RefusedError(
        f"model {model!r} does not exist; give `embedded`, a GGUF file, a folder with config.json and safetensors "
        "files, a hub id (org/name), or gs://bucket/path"
    )
