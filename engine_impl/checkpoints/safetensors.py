"""A Hugging Face folder: config.json, weights in safetensors files, tokenizer files.

The format: https://huggingface.co/docs/safetensors/index#format. Each tensor is mapped into memory for itself, as it is
asked for, and unmapped when it is dropped: a file's pages never add up.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import RefusedError
from ..models import registry
from ..tokenizer import Tokenizer
from .hf_config import read_hf_config
from .tokenizer_files import read_tokenizer

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype("bfloat16"),
}


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies."""

    file: Path
    offset: int
    """bytes from the file's start"""
    shape: tuple[int, ...]
    dtype: np.dtype


class SafetensorsCheckpoint:
    """One open folder. Only headers are read until a tensor is asked for."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        """`name` is what messages call it; default: the folder's path.

        Raises RefusedError when files are missing, damaged, pickled or quantised, or when config.json asks for a model
        that is not there.
        """
        self.folder, self.name = folder, name or str(folder)
        self.config = read_hf_config(folder)
        family = registry.family_of(self.config)
        self._tensors: dict[str, _Stored] = {}
        for file in weight_files(folder, self.name):
            for stored_name, tensor in _header(file).items():
                parameter = family.without_prefix(stored_name)
                if parameter in self._tensors:
                    raise RefusedError(f"{self.name} holds {stored_name} twice, again in {file.name}; fetch it anew")
                self._tensors[parameter] = tensor

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor there is, by its parameter's name."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> np.ndarray:
        """One tensor by its parameter's name, a read-only memory map of the file, in the file's type."""
        at = self._tensors[name]
        if not math.prod(at.shape):
            return np.zeros(at.shape, at.dtype)
        return np.memmap(at.file, at.dtype, "r", at.offset, at.shape)

    def tokenizer(self) -> Tokenizer:
        """The folder's; one that takes only token ids if it has none."""
        return read_tokenizer(self.folder, self.name, self.config.vocab_size)


def weight_files(folder: Path, name: str) -> list[Path]:
    """The folder's safetensors files: those that its index names, else the single one.

    Raises RefusedError when there are none, or not all.
    """
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return [folder / SINGLE]
        raise RefusedError(_why_no_weights(folder, name))
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if not files or any(Path(file).name != file for file in files):
            raise ValueError("it has to name files beside it")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise RefusedError(f"{str(index)!r} is no index of safetensors files ({error!r}); fetch it anew") from error
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise RefusedError(f"{name} lacks {len(missing)} of {len(files)} files: {', '.join(missing)}; fetch it anew")
    return [folder / file for file in files]


def _why_no_weights(folder: Path, name: str) -> str:
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        return (
            f"{name} holds only pickled weights ({', '.join(pickles[:3])}), which can run any code when opened "
            "and are never read here; take a copy in safetensors, or convert it with transformers on a machine that "
            "may run them: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)"
        )
    return f"{name} has neither {SINGLE} nor {INDEX}; give a folder or hub id with safetensors weights, or a GGUF file"


def _header(file: Path) -> dict[str, _Stored]:
    """What a file holds. The safetensors library checks it: every tensor whole, no gap, no overlap."""
    try:
        with safe_open(file, framework="np"):
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            fields: dict[str, Any] = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise RefusedError(f"{str(file)!r} is no whole safetensors file ({error}); fetch it anew") from error
    fields.pop("__metadata__", None)
    foreign = {name: of["dtype"] for name, of in fields.items() if of["dtype"] not in _DTYPES}
    if foreign:
        name, dtype = next(iter(foreign.items()))
        raise RefusedError(
            f"{str(file)!r} holds {len(foreign)} tensors that are not in {', '.join(_DTYPES)}, such as {name} in "
            f"{dtype}; take a copy of the model that is not quantised"
        )
    start = 8 + length
    return {
        name: _Stored(file, start + of["data_offsets"][0], tuple(of["shape"]), _DTYPES[of["dtype"]])
        for name, of in fields.items()
    }
