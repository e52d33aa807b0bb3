"""A Hugging Face folder: config.json, weights in safetensors files, tokenizer files.

The format: https://huggingface.co/docs/safetensors/index#format. Each tensor is mapped into memory for itself, as it is
asked for, and unmapped when it is dropped: a file's pages never add up.
"""

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import RefusedError
from ..models import registry
from ..models.decoder import Part
from ..text.tokenizer import Tokenizer
from .contract import WEIGHT, Codes, Compact, Quantization
from .damage import damage_told
from .hf_config import config_path, read_fields, read_hf_config
from .mistral_format import PARAMS, WEIGHTS, folder_error, own_name
from .mixed import Mixed
from .mxfp4 import MXFP4
from .prequantized import Matrix
from .quantization_config import read_format
from .sources import halves_from_pairs
from .tokenizer_files import read_tokenizer
from .widened import Float8

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
COMPILED = "_orig_mod."
"""What torch.compile puts into the names of a module that is saved as it is."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype("bfloat16"),
}
_COMPACT = {_DTYPES["F16"]: Compact("float16"), _DTYPES["BF16"]: Compact("bfloat16")}
_CODES = {
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F8_E4M3": jnp.dtype("float8_e4m3fn"),
}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    file: Path
    offset: int
    """bytes from the file's start"""
    full_shape: tuple[int, ...]
    dtype: np.dtype
    part: Part | None = None
    """what is meant of it; None is all"""

    @property
    def shape(self) -> tuple[int, ...]:
        return self._of(np.broadcast_to(np.zeros((), bool), self.full_shape)).shape

    def read(self) -> np.ndarray:
        """A read-only memory map."""
        if not math.prod(self.full_shape):
            return self._of(np.zeros(self.full_shape, self.dtype))
        return self._of(np.memmap(self.file, self.dtype, "r", self.offset, self.full_shape))

    def _of(self, whole: np.ndarray) -> np.ndarray:
        if self.part is None:
            return whole
        return whole[self.part.index].T if self.part.transposed else whole[self.part.index]


class SafetensorsCheckpoint:
    """One open folder. Only headers are read until a tensor is asked for. Quantised matrices are decoded when they are:
    each is one tensor to whoever asks."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        """`name` is what messages call it; default: the folder's path.

        Raises RefusedError when files are missing, damaged, pickled, or quantised in a way that cannot be read, or when
        config.json asks for a model that is not there.
        """
        self.folder, self.name = folder, name or str(folder)
        with damage_told(self.name):
            self._read(folder)

    def _read(self, folder: Path) -> None:
        self.config = read_hf_config(folder)
        self._format = read_format(read_fields(folder), str(config_path(folder)))
        family = registry.family_of(self.config)
        self._is_mistrals = config_path(folder).name == PARAMS
        self._tensors: dict[str, Stored] = {}
        for file in weight_files(folder, self.name):
            for stored_name, tensor in header(file).items():
                own = family.own_name(self.config, stored_name.replace(COMPILED, ""))
                own = own_name(stored_name) if self._is_mistrals else own
                for parameter, part in ({} if own is None else family.parts_of(own, tensor.full_shape)).items():
                    if parameter in self._tensors:
                        raise RefusedError(
                            f"{self.name} holds {stored_name} twice, again in {file.name}; fetch it anew"
                        )
                    self._tensors[parameter] = replace(tensor, part=part)
        shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        self._matrices = {} if self._format is None else self._format.matrices(shapes, self._stored)
        parts = {part for matrix in self._matrices.values() for part in matrix.parts.values()}
        self._plain = {name: tensor for name, tensor in self._tensors.items() if name not in parts}
        kinds = {dtype: kind for kind, dtype in _CODES.items()}
        codes = {name: kinds[tensor.dtype] for name, tensor in self._plain.items() if tensor.dtype in kinds}
        if codes:
            raise _not_floats(self.name, codes)
        if self._format is not None and self._format.quantization is None:
            where = ", but by native kernels of CPUs" if self._compact_matrices() else ""
            told = (
                "%s has %d matrices of %s, which are widened to floats%s; --quantize-weights int8 takes a byte for each"
            )
            log.info(
                told, self.name, len(self._matrices), self._format.kind, where,
            )  # fmt: skip

    @property
    def quantization(self) -> Quantization | None:
        """As config.json says, but what was left as it is by the files."""
        if self._format is None or self._format.quantization is None:
            return None
        plain = (name.removesuffix(f".{WEIGHT}") for name in self._plain if name.endswith(f".{WEIGHT}"))
        return replace(self._format.quantization, floats=tuple(map(re.escape, plain)))

    def files(self) -> Sequence[Path]:
        """Those with weights, and the config."""
        return [*weight_files(self.folder, self.name), config_path(self.folder)]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor there is, by its parameter's name."""
        plain = {name: tensor.shape for name, tensor in self._plain.items()}
        return plain | {name: matrix.shape for name, matrix in self._matrices.items()}

    def tensor(self, name: str) -> np.ndarray:
        """One tensor by its parameter's name: a read-only memory map of the file, in the file's type; of a quantised
        matrix, floats that hold its values."""
        if self._is_mistrals and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = self.config.num_heads if "q_proj" in name else self.config.num_kv_heads
            return halves_from_pairs(self._stored(name), heads)
        if self._format is None or name not in self._matrices:
            return self._stored(name)
        return self._format.floats(self._matrices[name], self._parts(self._matrices[name]))

    def compact(self) -> Mapping[str, Compact]:
        """What is stored as bfloat16 or float16, MXFP4 and floats of 8 bits; other quantised matrices have none."""
        plain = {name: _COMPACT[tensor.dtype] for name, tensor in self._plain.items() if tensor.dtype in _COMPACT}
        return plain | self._compact_matrices()

    def _compact_matrices(self) -> dict[str, Compact]:
        if not isinstance(self._format, MXFP4 | Float8 | Mixed):
            return {}
        forms = {name: self._format.compact(matrix) for name, matrix in self._matrices.items()}
        return {name: form for name, form in forms.items() if form is not None}

    def codes(self, name: str) -> Codes:
        """Those of MXFP4 and of floats of 8 bits. Raises KeyError for others."""
        if not isinstance(self._format, MXFP4 | Float8 | Mixed):
            raise KeyError(name)
        return self._format.codes(self._matrices[name], self._parts(self._matrices[name]))

    def _parts(self, matrix: Matrix) -> dict[str, np.ndarray]:
        return {part: self._stored(stored) for part, stored in matrix.parts.items()}

    def _stored(self, name: str) -> np.ndarray:
        return self._tensors[name].read()

    def tokenizer(self) -> Tokenizer:
        """The folder's; one that takes only token ids if it has none."""
        return read_tokenizer(self.folder, self.name, self.config.vocab_size)


def weight_files(folder: Path, name: str) -> list[Path]:
    """The folder's safetensors files: the single one, else those that its index names. In this order, as transformers
    does: an index beside a single file is left over from what the folder held before.

    Raises RefusedError when there are none, or not all.
    """
    index = folder / INDEX
    if config_path(folder).name == PARAMS:
        index = folder / f"{WEIGHTS}.safetensors.index.json"
        if (folder / f"{WEIGHTS}.safetensors").is_file():
            return [folder / f"{WEIGHTS}.safetensors"]
        if not index.is_file():
            raise folder_error(name)
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not index.is_file():
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


def header(file: Path) -> dict[str, Stored]:
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
    dtypes = _DTYPES | _CODES
    foreign = {name: of["dtype"] for name, of in fields.items() if of["dtype"] not in dtypes}
    if foreign:
        raise _not_floats(str(file), foreign)
    start = 8 + length
    return {
        name: Stored(file, start + of["data_offsets"][0], tuple(of["shape"]), dtypes[of["dtype"]])
        for name, of in fields.items()
    }


def _not_floats(holder: str, dtypes: Mapping[str, str]) -> RefusedError:
    name, dtype = next(iter(dtypes.items()))
    return RefusedError(
        f"{holder!r} holds {len(dtypes)} tensors that are not in {', '.join(_DTYPES)}, such as {name} in {dtype}; its "
        "config.json has no quantization_config that says how to read them; take a copy of the model that is not "
        "quantised, or one in AWQ, GPTQ or compressed-tensors that has one"
    )
