"""Linear modules, and the embedding that is a head too, whose weights lie in panels: kernels/panel_matmul.

This is how CPUs hold weights where they have native kernels, floats and codes alike. They are there once: prefill takes
the panels too.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal

import jax
import jax.numpy as jnp
import torch
from jax.sharding import Mesh
from torch import Tensor, nn

from ...kernels import Backend, Panels, columns, pack, pack_int4, pack_int8, panel_matmul, unpack
from .. import bridge
from ..checkpoints.contract import WEIGHT
from ..config import EngineConfig
from ..models.decoder import Decoder
from ..models.parts import Linear
from .codecs import encode_int4, encode_int8
from .linear import EncodedModule, Stored

HEAD = "lm_head"


@dataclass(frozen=True)
class Form:
    """What a weight in panels is stored as."""

    kind: Literal["float32", "bfloat16", "int8", "int4"]
    block: int = 0
    """inputs that share a scale, of int4 alone"""
    activations: Literal["float32", "bfloat16"] = "float32"
    """what a product's inputs are rounded to; sums are float32"""

    def panels(self, weight_OI: jax.Array) -> Panels:
        """A float weight in this form."""
        if self.kind == "int8":
            return pack_int8(*encode_int8(weight_OI).values())
        if self.kind == "int4":
            return pack_int4(*encode_int4(weight_OI, self.block, jnp.dtype("float32")))
        return pack(weight_OI, jnp.dtype(self.kind))


def packs(mesh: Mesh, backend: Backend) -> bool:
    """Whether weights become panels: of one CPU. Several have no kernels for shares of a panel."""
    return backend == "native_cpu" and mesh.size == 1


def form_of(config: EngineConfig, kind: Literal["float", "int8", "int4"], block: int = 0) -> Form:
    """That of weights of floats, or of codes: with `dtype` bfloat16 every product's inputs are rounded to it."""
    floats = "bfloat16" if config.dtype == "bfloat16" else "float32"
    return Form(floats if kind == "float" else kind, block, floats)


def pack_floats(model: Decoder, config: EngineConfig, mesh: Mesh, backend: Backend) -> None:
    """Swaps the model's `Linear` modules, those that are left, for ones with panels of the config's type."""
    form, head = form_of(config, "float"), _head_form(model, config)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    for name, module in linear.items():
        parent, _, own = name.rpartition(".")
        of_module = head if name == HEAD else form
        setattr(model.get_submodule(parent), own, PanelLinear(module, mesh, of_module, backend))
    if model.config.tied_embeddings:
        model.embed_tokens = PanelEmbedding(model.embed_tokens, mesh, head)


def _head_form(model: Decoder, config: EngineConfig) -> Form:
    """A head that is the embedding too becomes int8 where other weights are codes and nothing leaves it out."""
    is_left = any(fnmatch(HEAD, pattern) for pattern in config.quantize_exclude)
    is_coded = config.quantize_weights in ("int8", "int4") and model.config.tied_embeddings and not is_left
    return form_of(config, "int8" if is_coded else "float")


def decoded(model: Decoder, params: dict[str, Any]) -> dict[str, Any]:
    """`forward.Params` of a model without panels, float32 weights of the same values; of layers that are unrolled."""

    def section(module: nn.Module, weights: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        weights = dict(weights)
        for path, part in module.named_modules():
            if isinstance(part, PanelWeight):
                prefix = f"{path}." if path else ""
                arrays = {name: weights.pop(f"{prefix}{name}") for name in part.stored}
                weights[f"{prefix}{WEIGHT}"] = unpack(Panels(**arrays), part.outputs, part.inputs)
        return weights

    embed_tokens = section(model.embed_tokens, params["embed_tokens"])
    return {
        "embed_tokens": embed_tokens,
        "after_embedding": params["after_embedding"],
        "layers": tuple(section(*of_layer) for of_layer in zip(model.layers, params["layers"], strict=True)),
        "norm": params["norm"],
        "lm_head": embed_tokens if model.config.tied_embeddings else section(model.lm_head, params["lm_head"]),
    }


class PanelWeight(EncodedModule):
    """A matrix [O, I] in panels; its parameters are named as the fields of `Panels`."""

    def __init__(self, replaced: nn.Module, mesh: Mesh, form: Form) -> None:
        self.outputs, self.inputs = replaced.get_parameter("weight").shape
        super().__init__(replaced, _stored(form, self.outputs, self.inputs), None, mesh)
        self.form, self.kind, self.block = form, form.kind, form.block

    def encode(self, weight: jax.Array) -> Mapping[str, jax.Array]:
        return _arrays(self.form.panels(weight))

    def call(self, kernel: Any, *inputs: Tensor) -> Tensor:
        """`kernel` of the inputs and the panels."""
        names = list(self.stored)

        def of_panels(*arrays: jax.Array) -> jax.Array:
            given, stored = arrays[: len(inputs)], arrays[len(inputs) :]
            return kernel(*given, Panels(**dict(zip(names, stored, strict=True))))

        return bridge.call_kernel(of_panels, *inputs, *(getattr(self, name) for name in names))


class PanelLinear(PanelWeight):
    """In the place of a `Linear`."""

    def __init__(self, replaced: Linear, mesh: Mesh, form: Form, backend: Backend) -> None:
        super().__init__(replaced, mesh, form)
        self.multiply = functools.partial(panel_matmul, outputs=self.outputs, backend=backend)

    def forward(self, x_RI: Tensor) -> Tensor:
        return self.with_bias(self.call(self.multiply, x_RI.to(getattr(torch, self.form.activations))))


class PanelEmbedding(PanelWeight):
    """In the place of an `Embedding` whose weight is the head's too."""

    def forward(self, token_R: Tensor) -> Tensor:
        return self.call(lambda token_R, panels: columns(panels, token_R, self.inputs), token_R)


@functools.cache
def _stored(form: Form, outputs: int, inputs: int) -> dict[str, Stored]:
    arrays = _arrays(jax.eval_shape(form.panels, jax.ShapeDtypeStruct((outputs, inputs), jnp.float32)))
    return {name: Stored(array.shape, array.dtype, {}) for name, array in arrays.items()}


def _arrays(panels: Panels) -> dict[str, Any]:
    return {name: array for name, array in panels._asdict().items() if array is not None}
