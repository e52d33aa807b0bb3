"""The bytes that a decode step cannot avoid to move, counted from the arrays that are there."""

from dataclasses import replace
from typing import Any, Literal

import jax

from ...engine_impl.engine import Engine
from ...engine_impl.forward import Params
from ...engine_impl.models.parts import ExpertLinear
from ...engine_impl.quantization.linear import EncodedModule, Int8ExpertLinear
from ...engine_impl.quantization.panels import PanelExperts, PanelWeight, told

WHOLE = "alike", "stacks", "norm", "lm_head"
"""Sections of the parameters that a step reads whole."""


def bytes_per_step(engine: Engine, params: Params, live_tokens: int) -> int:
    """Weights and all live rows read once, the new rows written; of what is quantised, codes and scales.

    Each chip reads its own: kv heads that several chips have count for each. Not counted: an embedding table that is
    not also the output projection (a step reads one row of it a slot), the zeros that fill up narrow heads, and experts
    that nobody chooses.
    """
    layers = params["layers"]
    weights = sum(
        leaf.nbytes * (_experts_read(engine) if name in _expert_weights(engine, layer) else 1)
        for layer in (layers if isinstance(layers, tuple) else (layers,))
        for name, leaf in layer.items()
    )
    weights += sum(leaf.nbytes for part in WHOLE for leaf in jax.tree.leaves(params[part]))
    layout = replace(engine.layout, head_dim=engine.model.config.head_dim)
    row_bytes = layout.bytes / layout.pages / layout.page_rows
    return round(weights + row_bytes * layout.slots * (live_tokens + 1))


def stored_as(engine: Engine) -> Literal["none", "int8", "int4"]:
    """What most of the weights are rounded to: `auto` says it of no checkpoint."""
    kinds = {part.kind for part in _encoded(engine)}
    return "int4" if "int4" in kinds else "int8" if "int8" in kinds else "none"


def matrices_in_memory(engine: Engine) -> str | None:
    """How they lie, where they are in panels; as the log tells it when an engine is built."""
    return told(engine.model) or None


def weights_dtype(engine: Engine) -> str:
    """The type of products: that of the activations, on CPUs also what both are rounded to."""
    is_rounded = any(isinstance(part, PanelWeight) and part.form.activations == "bfloat16" for part in _encoded(engine))
    return "bfloat16" if is_rounded else engine.layout.dtype.name


def _encoded(engine: Engine) -> list[EncodedModule]:
    return [part for part in engine.model.modules() if isinstance(part, EncodedModule)]


def _expert_weights(engine: Engine, layer: dict[str, Any]) -> set[str]:
    """Names of a layer's weights that are one array of all experts."""
    modules = dict(engine.model.layers[0].named_modules())
    experts = (ExpertLinear, Int8ExpertLinear, PanelExperts)
    return {name for name in layer if isinstance(modules.get(name.rpartition(".")[0]), experts)}


def _experts_read(engine: Engine) -> float:
    """The share of the experts that at least one slot chooses, on average, were the choices independent."""
    config: Any = engine.model.config
    return 1 - (1 - config.experts_per_token / config.num_experts) ** engine.sizes.slots
