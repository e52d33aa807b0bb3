"""A model's shape from a Hugging Face `config.json`, in the form of today and of before transformers 5."""

import json
from pathlib import Path
from typing import Any

from ..errors import RefusedError
from ..models import registry
from ..models.decoder import ModelConfig
from .mistral_format import PARAMS, of_params


def read_hf_config(path: Path) -> ModelConfig:
    """The config of whatever family it is of.

    Args:
        path: a `config.json`, or the folder that holds it.

    Raises RefusedError when there is none, or when it asks for what is not there: another family, another rope, ...
    """
    return registry.read_config(read_fields(path), str(config_path(path)))


def config_path(path: Path) -> Path:
    """The config.json that a path, or a folder, means; the params.json of a folder that has only that."""
    if not path.is_dir():
        return path
    has_params = (path / PARAMS).is_file() and not (path / "config.json").is_file()
    return path / (PARAMS if has_params else "config.json")


def read_fields(path: Path) -> dict[str, Any]:
    """What the file says, in the terms of a config.json. Raises RefusedError when it cannot be read."""
    path = config_path(path)
    try:
        fields = json.loads(path.read_text())
    except OSError as error:
        raise RefusedError(
            f"{str(path)!r} cannot be read ({error.strerror}); give a config.json or its folder"
        ) from error
    except ValueError as error:
        raise RefusedError(f"{str(path)!r} is not JSON ({error}); fetch it anew") from error
    if not isinstance(fields, dict):
        raise RefusedError(f"{str(path)!r} is no JSON object; fetch it anew")
    return of_params(fields, str(path)) if path.name == PARAMS else fields
