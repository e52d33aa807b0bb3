"""A model's parameters: from the folder that keeps them, else from the checkpoint."""

import inspect
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh

from ..checkpoints.contract import Checkpoint
from ..forward import LayerLoop, Params
from ..models.decoder import Decoder
from .kept import kept
from .load import abstract_params, load_params


def loaded(
    model: Decoder, checkpoint: Checkpoint, mesh: Mesh, dtype: jnp.dtype, loop: LayerLoop, folder: Path | None
) -> Params:
    """From `folder`, if there is one and it has them. Raises RefusedError for a checkpoint that does not fit."""

    def load() -> Params:
        return load_params(model, checkpoint, mesh, dtype, loop)

    if folder is None:
        return load()
    files = checkpoint.files()
    family = [Path(inspect.getfile(type(model)))] if files else []  # it may be a module of the user's
    return kept(folder, [*files, *family], abstract_params(model, mesh, dtype, loop), load)
