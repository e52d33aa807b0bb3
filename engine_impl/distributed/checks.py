"""What all hosts of a group must have in common, compared before weights are read."""

import hashlib
import os
import platform
from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from ..checkpoints.contract import Checkpoint
from ..config import EngineConfig
from ..engine import Engine

PACKAGES = ("slipstream-llm", "jax", "jaxlib", "libtpu", "torch", "torchax", "numpy")
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
"""What the compiler reads beside."""
PATHS = ("model", "draft_model")
"""Fields of the config that may differ."""
SAMPLES = 32
"""Tensors that are looked into."""
TOLD = 8


def facts_of(
    config: EngineConfig, engine: Engine, checkpoint: Checkpoint, draft_checkpoint: Checkpoint | None = None
) -> dict[str, str]:
    """By the name that a person knows them by. Flags as they were given, but for the models' paths, which may be others
    on each host: it is the models that are compared."""
    names = [of.name for of in fields(config) if of.name not in PATHS]
    flags = {f"--{name.replace('_', '-')}": getattr(config, name) for name in names}
    packages = {f"the package {name}": _version(name) for name in PACKAGES}
    variables = {name: os.environ.get(name, "") for name in VARIABLES}
    shapes = engine.shapes
    sizes = (shapes.steps, shapes.wide_steps, shapes.prefills, shapes.carries)
    programs = (*sizes, engine.programs.cache_layouts, engine.parameters.layer_loop, engine.mesh.size)
    facts = {
        "Python": platform.python_version(),
        **packages,
        **variables,
        **flags,
        "the model": fingerprint(checkpoint),
        "the draft model": None if draft_checkpoint is None else fingerprint(draft_checkpoint),
        "the programs": programs,
    }
    return {name: str(value) for name, value in facts.items()}


def differing(own: Mapping[str, str], leaders: Mapping[str, str]) -> str:
    """What is not the same on both, with both values; empty: nothing."""
    names = [name for name in {**leaders, **own} if own.get(name) != leaders.get(name)]
    told = [f"{name}: {own.get(name)!r} here, {leaders.get(name)!r} on the leader" for name in names[:TOLD]]
    more = [f"and {len(names) - TOLD} more"] if len(names) > TOLD else []
    return "; ".join([*told, *more])


def fingerprint(checkpoint: Checkpoint) -> str:
    """Of a model's shape, its tensors' shapes and the first row of SAMPLES of them: tells fine-tunes of a model apart,
    and reads little of it."""
    shapes = dict(sorted(checkpoint.shapes().items()))
    digest = hashlib.sha256(repr((checkpoint.config, shapes)).encode())
    for name in list(shapes)[:: -(-len(shapes) // SAMPLES)]:
        digest.update(np.ascontiguousarray(checkpoint.tensor(name)[:1]).tobytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
