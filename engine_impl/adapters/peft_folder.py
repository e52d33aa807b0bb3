"""A PEFT adapter's folder: adapter_config.json beside adapter_model.safetensors. Read as strictly as checkpoints are:
every tensor is used once, of the right shape, and finite."""

import re
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ..checkpoints import hub
from ..checkpoints.contract import WEIGHT
from ..checkpoints.damage import damage_told
from ..checkpoints.safetensors import Stored, header
from ..checkpoints.sources import repeat_heads, taken
from ..errors import RefusedError
from ..models.decoder import Decoder, Pairs
from .peft_config import Change, Module, PeftConfig, read_peft_config
from .sites import DOWN, UP, Site
from .stacks import AdapterPlaces, AdapterWeights

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
NAMES_TOLD = 8


def adapter_folder(path: str) -> Path:
    """The folder that a path or a hub id (org/name) names, fetched if it has to be. Raises RefusedError."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if hub.is_id(path):
        return hub.adapter_folder(path)
    raise RefusedError(f"adapter {path!r} does not exist; give a folder with {TENSORS}, or a hub id (org/name)")


def read_adapter(
    folder: Path, model: Decoder, shapes: Mapping[str, tuple[int, ...]], kv_heads: int, places: AdapterPlaces
) -> AdapterWeights:
    """The adapter as `places` take it.

    Args:
        shapes: of the tensors that a checkpoint of the model has.
        kv_heads: as a checkpoint has them, not repeated.

    Raises RefusedError, naming them, for a config that asks for more than LoRA, a rank beyond the places', and tensors
    that are missing, left over, of another shape or not finite.
    """
    config = read_peft_config(folder)
    if config.largest_rank > places.rank:
        raise RefusedError(
            f"{config.where} has rank {config.largest_rank}, at most {places.rank} is served; "
            f"serve with --max-adapter-rank {config.largest_rank}"
        )
    with damage_told(str(folder)):
        tensors = _tensors(folder, model)
        users = _users(model, places.sites)
        modules = [Module(_whole_names(model, module), layer) for module, ((layer, *_), *_) in users.items()]
        changes = {module: made for module, made in zip(users, config.changes(modules), strict=True) if made}
        _check_names(config, tensors, changes, shapes)
        arrays: dict[str, np.ndarray] = {}
        for module, used in users.items():
            if (module, "A") not in tensors:
                continue
            ends = _ends(tensors, module, changes[module].scale, config.where, places.dtype)
            for layer, site, source in used:
                for part, end in _taken_by(site, source, ends, model, kv_heads).items():
                    shape = (places.layers, *site.shape(part, config.largest_rank))
                    whole = arrays.setdefault(site.name(part), np.zeros(shape, places.dtype))
                    whole[layer][tuple(map(slice, end.shape))] = end  # of a smaller rank: zeros fill it up
    return AdapterWeights(config.largest_rank, arrays, places.bytes_of_one)


def _tensors(folder: Path, model: Decoder) -> dict[tuple[str, str], Stored]:
    """By (module in the checkpoint, "A" or "B")."""
    file = folder / TENSORS
    if not file.is_file():
        pickled = " (adapter_model.bin is pickled, which can run any code when opened, and never read)"
        is_pickled = (folder / "adapter_model.bin").is_file()
        raise RefusedError(f"{str(folder)!r} has no {TENSORS}{pickled if is_pickled else ''}; save it with PEFT anew")
    found: dict[tuple[str, str], Stored] = {}
    for name, stored in header(file).items():
        matched = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if matched is None:
            raise RefusedError(f"{str(file)!r} holds {name}, which is no lora_A or lora_B of a linear module")
        found[model.own_name(model.config, matched[1].removeprefix(PREFIX)), matched[2]] = stored
    return found


def _users(model: Decoder, sites: tuple[Site, ...]) -> dict[str, list[tuple[int, Site, str]]]:
    """Modules of a checkpoint, and which sites take their weights: of a fused one several."""
    users: dict[str, list[tuple[int, Site, str]]] = {}
    for layer in range(len(model.layers)):
        for site in sites:
            sources = model.sources(f"layers.{layer}.{site.path}.{WEIGHT}")
            if len(sources) == 1:
                users.setdefault(sources[0].removesuffix(f".{WEIGHT}"), []).append((layer, site, sources[0]))
    return users


def _check_names(
    config: PeftConfig,
    tensors: Mapping[tuple[str, str], Stored],
    changes: Mapping[str, Change],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Raises one RefusedError with all that does not agree; reads no tensor."""
    needed = {(module, end) for module in changes for end in "AB"}
    misshapen = []
    for (module, end), stored in tensors.items():
        if module in changes:
            outputs, inputs = shapes[f"{module}.{WEIGHT}"]
            rank = changes[module].rank
            shape = (rank, inputs) if end == "A" else (outputs, rank)
            if stored.shape != shape:
                misshapen.append(f"{_called(module, end)} is {stored.shape}, the model needs {shape}")
    faults = {
        "missing": [_called(*key) for key in sorted(needed - set(tensors))],
        "unexpected": [_called(*key) for key in sorted(set(tensors) - needed)],
        "of another shape": misshapen,
    }
    told = [f"{fault}: {_told(names)}" for fault, names in faults.items() if names]
    if not changes:
        told.append(f"target_modules={config.target_modules!r} name none of its linear modules")
    if told:
        raise RefusedError(f"{config.where} does not fit the model; {'; '.join(told)}")


def _whole_names(model: Decoder, module: str) -> tuple[str, ...]:
    """What a module may have been called in the model that was trained."""
    return tuple(f"{prefix}{module}" for prefix in (*model.prefixes, ""))


def _ends(
    tensors: Mapping[tuple[str, str], Stored], module: str, scale: float, where: str, dtype: jnp.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """A [r, I] and B [O, r] of a checkpoint's module, B with the adapter's scale in it.

    Raises RefusedError for values that are not finite as the devices get them. A row's answer takes B of all adapters
    times 0 but of its own: an infinity of one would be NaN for everybody.
    """
    down_rI, up_Or = (tensors[module, end].read().astype(np.float32) for end in "AB")
    with np.errstate(over="ignore", invalid="ignore"):
        ends = down_rI.astype(dtype), (up_Or * np.float32(scale)).astype(dtype)
    if not all(np.isfinite(end).all() for end in ends):
        raise RefusedError(
            f"{where}: {module} has values that are NaN or infinite, or become so by the scale {scale:g}; fetch it anew"
        )
    return ends


def _taken_by(
    site: Site, source: str, ends: tuple[np.ndarray, np.ndarray], model: Decoder, kv_heads: int
) -> dict[str, np.ndarray]:
    """A site's part of them, as its weight is a part of the module's."""
    down_rI, up_Or = ends
    if isinstance(source, Pairs) and source.axis == 1:
        return {DOWN: taken(down_rI, source), UP: up_Or}
    up_Or = taken(up_Or, source)
    if site.path.rpartition(".")[2] in model.of_kv_heads:
        up_Or = repeat_heads(up_Or, kv_heads, model.config.num_kv_heads)
    return {DOWN: down_rI, UP: up_Or}


def _called(module: str, end: str) -> str:
    return f"{module}.lora_{end}"


def _told(names: list[str]) -> str:
    more = len(names) - NAMES_TOLD
    return ", ".join(names[:NAMES_TOLD]) + (f" and {more} more" if more > 0 else "")
