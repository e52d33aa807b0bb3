"""Linear modules, experts and embeddings whose weights lie in panels: kernels/panel_matmul.

This is how CPUs hold weights where they have native kernels, floats and codes alike. They are there once: prefill takes
the panels too. What counts as floats lies as the checkpoint has it wherever its values are float32's (`Compact`): a
product has the very bits then that one of float32 weights has.
"""

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import Mesh
from torch import Tensor, nn

from ...kernels import (
    Backend,
    Panels,
    columns,
    expert_matmul,
    pack,
    pack_blocks,
    pack_int4,
    pack_int8,
    panel_matmul,
    takes_blocks,
    unpack,
)
from .. import bridge
from ..checkpoints.contract import FLOAT8, WEIGHT, Codes, Compact
from ..config import EngineConfig
from ..models.decoder import Decoder, Pairs, Transposed
from ..models.parts import ExpertLinear, Linear
from .codecs import encode_int4, encode_int8
from .linear import EncodedModule, Stored

Array = jax.Array | np.ndarray
HEAD, EMBEDDING = "lm_head", "embed_tokens"


@dataclass(frozen=True)
class Form:
    """What a weight in panels is stored as."""

    kind: Literal["float32", "bfloat16", "float16", "int8", "int4", "4-bit", "8-bit", "float8"]
    """floats; or codes, "int8" and "int4" those that floats are rounded to, the last three a checkpoint's own"""
    block: int = 0
    """inputs that share a scale, of codes in blocks"""
    grid: Literal["float32", "float16"] = "float32"
    """the type of scales and offsets"""
    has_offset: bool = False
    """of a checkpoint's codes"""
    table: tuple[int, ...] = ()
    """likewise, what those of 4 bits stand for"""
    activations: Literal["float32", "bfloat16"] = "float32"
    """what a product's inputs are rounded to; sums are float32"""

    def __str__(self) -> str:
        codes = " codes" if self.kind.endswith("bit") else ""
        return f"{self.kind}{codes} in blocks of {self.block}" if self.block else self.kind

    @property
    def keeps_codes(self) -> bool:
        """Whether it is of a checkpoint's own codes."""
        return self.kind in ("4-bit", "8-bit", "float8")

    @property
    def source(self) -> jnp.dtype:
        """What floats are read as. Codes are encoded from float32: rounding first would move values off their grid."""
        return jnp.dtype(self.kind if self.kind in ("bfloat16", "float16") else "float32")

    def described(self, outputs: int, inputs: int) -> Panels:
        """Shapes and types of a weight's panels."""
        weight_OI = jax.ShapeDtypeStruct((outputs, inputs), self.source)
        if not self.keeps_codes:
            return jax.eval_shape(self.panels, weight_OI)
        grid_OQ = jax.ShapeDtypeStruct((outputs, inputs // self.block), jnp.dtype(self.grid))
        code_OI = jax.ShapeDtypeStruct((outputs, inputs), FLOAT8 if self.kind == "float8" else jnp.dtype("int8"))
        return jax.eval_shape(self.of_codes, code_OI, grid_OQ, grid_OQ if self.has_offset else None)

    def of_codes(self, code_OI: Array, scale_OQ: Array, offset_OQ: Array | None) -> Panels:
        """A checkpoint's codes in this form."""
        offset_OQ = None if offset_OQ is None else jnp.asarray(offset_OQ)
        bits = 4 if self.kind == "4-bit" else 8
        return pack_blocks(jnp.asarray(code_OI), jnp.asarray(scale_OQ), offset_OQ, bits, self.table)

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
    return Form(floats if kind == "float" else kind, block, activations=floats)


def pack_floats(
    model: Decoder, config: EngineConfig, mesh: Mesh, backend: Backend, compact: Mapping[str, Compact]
) -> None:
    """Swaps the model's `Linear` and `ExpertLinear` modules, those that are left, for ones with panels: of bfloat16
    where the config says so, else of the checkpoint's own form, or of float32 where there is none that is exact. So is
    the embedding where it is a head too, or has such a form."""
    floats = form_of(config, "float")
    parts = {name: part for name, part in model.named_modules() if isinstance(part, Linear | ExpertLinear)}

    def form(name: str, module: nn.Module) -> Form:
        exact = _exact(model, f"{name}.{WEIGHT}", module, compact) if floats.kind == "float32" else None
        return exact or floats

    head = form_of(config, "int8") if _has_coded_head(model, config) else None
    of_embedding = head or form(EMBEDDING, model.embed_tokens)
    for name, part in parts.items():
        parent, _, own = name.rpartition(".")
        of_part = of_embedding if name == HEAD and model.config.tied_embeddings else form(name, part)
        setattr(model.get_submodule(parent), own, in_panels(part, mesh, of_part, backend))
    if model.config.tied_embeddings or of_embedding != floats:
        model.embed_tokens = PanelEmbedding(model.embed_tokens, mesh, of_embedding)


def _has_coded_head(model: Decoder, config: EngineConfig) -> bool:
    """A head that is the embedding too becomes int8 where other weights are codes and nothing leaves it out."""
    is_left = any(fnmatch(HEAD, pattern) for pattern in config.quantize_exclude)
    return config.quantize_weights in ("int8", "int4") and model.config.tied_embeddings and not is_left


def _exact(model: Decoder, parameter: str, module: nn.Module, compact: Mapping[str, Compact]) -> Form | None:
    """That of the one tensor that a matrix is, or is rows of, or of all experts'; where inputs are whole blocks."""
    sources, inputs = model.sources(parameter), module.get_parameter(WEIGHT).shape[1]
    found = {compact.get(source) for source in sources}
    form = found.pop() if len(found) == 1 else None
    if form is None or not form.is_codes:
        return None if form is None else Form(form.kind)
    if isinstance(module, ExpertLinear):  # [in, out] in the model, so that a transposed source has whole outputs
        moves_inputs = not all(isinstance(source, Transposed) for source in sources)
    else:
        source = sources[0]
        moves_inputs = isinstance(source, Transposed) or (isinstance(source, Pairs) and source.axis) or sources[1:]
    return None if moves_inputs or not takes_blocks(inputs, form.block) else Form(**vars(form))


def told(model: Decoder) -> str:
    """How the matrices lie that are in panels: "210 of 4-bit codes in blocks of 32, 1 of float32"."""
    parts = {name: part for name, part in model.named_modules() if isinstance(part, PanelWeight)}
    if model.config.tied_embeddings:
        parts.pop(EMBEDDING, None)  # the head is the same
    counts = Counter(str(replace(part.form, activations="float32")) for part in parts.values())
    return ", ".join(f"{count} of {form}" for form, count in counts.most_common())


def decoded(model: Decoder, params: dict[str, Any]) -> dict[str, Any]:
    """`forward.Params` of a model without panels, float32 weights of the same values; of layers that are unrolled."""

    def section(module: nn.Module, weights: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        weights = dict(weights)
        for path, part in module.named_modules():
            if isinstance(part, PanelWeight):
                prefix = f"{path}." if path else ""
                arrays = {name: weights.pop(f"{prefix}{name}") for name in part.stored}
                weights[f"{prefix}{WEIGHT}"] = part.unpacked(Panels(**arrays))
        return weights

    embed_tokens = section(model.embed_tokens, params["embed_tokens"])
    return {
        "embed_tokens": embed_tokens,
        "after_embedding": params["after_embedding"],
        "layers": tuple(
            section(layer, {**weights, **{name: stack[i] for name, stack in params["stacks"].items()}})
            for i, (layer, weights) in enumerate(zip(model.layers, params["layers"], strict=True))
        ),
        "alike": params["alike"],
        "stacks": {},
        "norm": params["norm"],
        "lm_head": embed_tokens if model.config.tied_embeddings else section(model.lm_head, params["lm_head"]),
    }


class PanelWeight(EncodedModule):
    """A matrix [O, I] in panels, or experts' [E, I, O]; its parameters are named as the fields of `Panels`."""

    is_live: Tensor
    """of those that `skips_padding`"""

    def __init__(self, replaced: nn.Module, mesh: Mesh, form: Form) -> None:
        *stack, self.outputs, self.inputs = replaced.get_parameter(WEIGHT).shape
        if stack:
            self.outputs, self.inputs = self.inputs, self.outputs
        super().__init__(replaced, _stored(form, self.outputs, self.inputs, tuple(stack)), None, mesh)
        self.form, self.kind, self.block, self.source = form, form.kind, form.block, form.source
        self.keeps_codes = form.keeps_codes

    def encode(self, weight: jax.Array) -> Mapping[str, jax.Array]:
        return _arrays(self.form.panels(weight))

    def encode_codes(self, codes: Codes) -> Mapping[str, jax.Array]:
        return _arrays(self.form.of_codes(*codes))

    def unpacked(self, panels: Panels) -> jax.Array:
        """The float32 weight."""
        return unpack(panels, self.outputs, self.inputs)

    def call(self, kernel: Any, *inputs: Tensor) -> Tensor:
        """`kernel` of the inputs and the panels, as they are given."""
        names = list(self.stored)

        def of_panels(*arrays: jax.Array) -> jax.Array:
            given, stored = arrays[: len(inputs)], arrays[len(inputs) :]
            return kernel(*given, Panels(**dict(zip(names, stored, strict=True))))

        return bridge.call_kernel(of_panels, *inputs, *(getattr(self, name) for name in names))


class PanelLinear(PanelWeight):
    """In the place of a `Linear`."""

    reads_stack = True
    skips_padding = True
    lies_in_stack = True
    layer: Tensor

    def __init__(self, replaced: Linear, mesh: Mesh, form: Form, backend: Backend) -> None:
        super().__init__(replaced, mesh, form)
        self._multiply = functools.partial(panel_matmul, outputs=self.outputs, backend=backend)
        self.register_buffer("layer", torch.empty((), dtype=torch.int32, device="meta"))
        self.register_buffer("is_live", torch.empty((0,), dtype=torch.bool, device="meta"))

    def forward(self, x_RI: Tensor) -> Tensor:
        x_RI = x_RI.to(getattr(torch, self.form.activations))
        return self.with_bias(self.call(self.multiply, x_RI, self.layer, self.is_live))

    def multiply(self, x_RI: jax.Array, layer: jax.Array, is_live_R: jax.Array, panels: Panels) -> jax.Array:
        """Of panels that are a layer's of a stack, or alone."""
        is_stack = panels.code.ndim > len(self.stored["code"].shape)
        return self._multiply(x_RI, panels, layer if is_stack else None, is_live_R)


class PanelExperts(PanelWeight):
    """In the place of an `ExpertLinear`, for experts that are asked by row: see `MixtureOfExperts`."""

    by_expert = True
    skips_padding = True

    def __init__(self, replaced: ExpertLinear, mesh: Mesh, form: Form, backend: Backend) -> None:
        super().__init__(replaced, mesh, form)
        self._multiply = functools.partial(expert_matmul, outputs=self.outputs, backend=backend)
        self.register_buffer("is_live", torch.empty((0,), dtype=torch.bool, device="meta"))

    def of_chosen(self, x: Tensor, expert_RX: Tensor) -> Tensor:
        """What each row's experts answer, [R, X, out], to the row, [R, in], or each to a row of its own, [R, X, in]."""
        x_MI = x.reshape(-1, self.inputs).to(getattr(torch, self.form.activations))
        expert_MX = expert_RX.to(torch.int32).reshape(len(x_MI), -1)
        out_RXO = self.call(self.multiply, x_MI, expert_MX, self.is_live).reshape(*expert_RX.shape, self.outputs)
        bias_EO = self._parameters["bias"]
        return out_RXO if bias_EO is None else out_RXO + bias_EO[expert_RX]

    def multiply(self, x_MI: jax.Array, expert_MX: jax.Array, is_live_R: jax.Array, panels: Panels) -> jax.Array:
        """Of rows, or of M / R choices of each one behind another."""
        return self._multiply(x_MI, expert_MX, panels, jnp.repeat(is_live_R, len(x_MI) // len(is_live_R)))

    def unpacked(self, panels: Panels) -> jax.Array:
        return jax.vmap(super().unpacked)(panels).swapaxes(1, 2)


class PanelEmbedding(PanelWeight):
    """In the place of an `Embedding`."""

    def forward(self, token_R: Tensor) -> Tensor:
        return self.call(lambda token_R, panels: columns(panels, token_R, self.inputs), token_R)


def in_panels(part: Linear | ExpertLinear, mesh: Mesh, form: Form, backend: Backend) -> PanelWeight:
    """What takes its place."""
    if isinstance(part, ExpertLinear):
        return PanelExperts(part, mesh, form, backend)
    return PanelLinear(part, mesh, form, backend)


@functools.cache
def _stored(form: Form, outputs: int, inputs: int, stack: tuple[int, ...]) -> dict[str, Stored]:
    arrays = _arrays(form.described(outputs, inputs))
    return {name: Stored((*stack, *array.shape), array.dtype, {}) for name, array in arrays.items()}


def _arrays(panels: Panels) -> dict[str, Any]:
    return {name: array for name, array in panels._asdict().items() if array is not None}
