"""A model's shape from a Hugging Face `config.json`, in the form of today and of before transformers 5."""

import json
from pathlib import Path

from ..errors import RefusedError
from ..models import registry
from ..models.decoder import ModelConfig


def read_hf_config(path: Path) -> ModelConfig:
    """The config of whatever family it is of.

    Args:
        path: a `config.json`, or the folder that holds it.

    Raises RefusedError when there is none, or when it asks for what is not there: another family, another rope, ...
    """
    path = path / "config.json" if path.is_dir() else path
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
    return registry.read_config(fields, str(path))
