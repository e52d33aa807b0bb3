"""Linear modules, and the embedding that is a head too, whose weights lie in panels: kernels/panel_matmul.

This is how CPUs hold floats where they have native kernels. Weights are there once, so prefill takes the panels too.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from torch import Tensor, nn

from ...kernels import PANEL, Backend, Panels, columns, pack, panel_matmul
from .. import bridge
from ..config import EngineConfig
from ..models.decoder import Decoder
from ..models.parts import Linear
from .linear import EncodedModule, Stored


def packs(mesh: Mesh, backend: Backend) -> bool:
    """Whether weights become panels: of one CPU. Several have no kernels for shares of a panel."""
    return backend == "native_cpu" and mesh.size == 1


def pack_floats(model: Decoder, config: EngineConfig, mesh: Mesh, backend: Backend) -> None:
    """Swaps the model's `Linear` modules, those that are left, for ones with panels of the config's type."""
    dtype = jnp.dtype("bfloat16" if config.dtype == "bfloat16" else "float32")
    linear = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    for name, module in linear.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, PanelLinear(module, mesh, dtype=dtype, backend=backend))
    if model.config.tied_embeddings:
        model.embed_tokens = PanelEmbedding(model.embed_tokens, mesh, dtype=dtype)


class PanelWeight(EncodedModule):
    """A matrix [O, I] in panels."""

    panels: Tensor

    def __init__(self, replaced: nn.Module, mesh: Mesh, *, dtype: jnp.dtype) -> None:
        self.outputs, inputs = replaced.get_parameter("weight").shape
        stored = Stored((-(-self.outputs // PANEL), inputs, PANEL), dtype, {})
        super().__init__(replaced, {"panels": stored}, None, mesh)

    def encode(self, weight: jax.Array) -> Mapping[str, jax.Array]:
        return {"panels": pack(weight, self.stored["panels"].dtype).code}


class PanelLinear(PanelWeight):
    """In the place of a `Linear`."""

    def __init__(self, replaced: Linear, mesh: Mesh, *, dtype: jnp.dtype, backend: Backend) -> None:
        super().__init__(replaced, mesh, dtype=dtype)
        self.backend: Backend = backend

    def forward(self, x_RI: Tensor) -> Tensor:
        def multiply(x_RI: jax.Array, code: jax.Array) -> jax.Array:
            return panel_matmul(x_RI, Panels(code), outputs=self.outputs, backend=self.backend)

        return self.with_bias(bridge.call_kernel(multiply, x_RI, self.panels))


class PanelEmbedding(PanelWeight):
    """In the place of an `Embedding` whose weight is the head's too."""

    def forward(self, token_R: Tensor) -> Tensor:
        return bridge.call_kernel(lambda token_R, code: columns(Panels(code), token_R), token_R, self.panels)
