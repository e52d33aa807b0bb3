"""Where adapters may change a model, and the pass that lets them.

An adapter changes a linear module's answer y to y + B A x (Hu et al., arXiv 2106.09685). The pass hangs a hook on each
linear module of a layer, whatever kind of weights it has; a model's `forward` does not know.

X adapters that the devices hold, r their rank at most, I inputs, O outputs, R rows.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax.sharding import Mesh
from torch import Tensor, nn

from ...kernels import AXIS
from .. import bridge
from ..errors import RefusedError
from ..models.decoder import Decoder
from ..models.parts import Linear

DOWN, UP, ROWS = "adapter_down", "adapter_up", "adapter_of_row"
"""Buffers of a module that has a site: A of all adapters, B of all, and each row's adapter."""


@dataclass(frozen=True)
class Site:
    """A linear module, alike in all layers."""

    path: str
    """in its layer, such as self_attn.q_proj"""
    inputs: int
    outputs: int
    axis: int | None
    """of its weight [O, I], the one that the mesh's devices share"""

    def name(self, part: str) -> str:
        """That of DOWN, UP or ROWS among a layer's arrays."""
        return f"{self.path}.{part}"

    def shape(self, part: str, rank: int) -> tuple[int, int]:
        """One adapter's: A is [r, I], B is [O, r]."""
        return (rank, self.inputs) if part == DOWN else (self.outputs, rank)

    def spec(self, part: str) -> tuple[str | None, str | None]:
        """How that is split: shared inputs share A, shared outputs share B."""
        return (None, AXIS if self.axis == 1 else None) if part == DOWN else (AXIS if self.axis == 0 else None, None)


def sites_of(model: Decoder, mesh: Mesh) -> tuple[Site, ...]:
    """The matrices of attention and feed-forward, of a model that is not quantised yet. Experts and what chooses them,
    the head and the embedding have none.

    Raises RefusedError for a model whose layers are not alike.
    """
    if len(set(model.module_of_layer)) > 1:
        raise RefusedError("adapters need layers that are alike, and this model's are not; leave --max-adapters out")
    sites = []
    for path, module in model.layers[0].named_modules():
        own = path.rpartition(".")[2]
        if own in model.shard_axis and isinstance(module, Linear):
            axis = model.shared_axis(own, module.weight.shape, mesh.size)
            sites.append(Site(path, module.in_features, module.out_features, axis))
    return tuple(sites)


def adapt(model: Decoder, sites: tuple[Site, ...]) -> None:
    """Hangs a hook on each site's modules, as quantisation left them."""
    for module in (layer.get_submodule(site.path) for layer in model.layers for site in sites):
        for part in (DOWN, UP, ROWS):
            module.register_buffer(part, torch.empty(0, device="meta"))
        module.register_forward_hook(_add_term)


def adapted(layer: nn.Module) -> list[str]:
    """Paths of a layer's modules that have a site."""
    return [path for path, module in layer.named_modules() if ROWS in module._buffers]


def is_of_adapters(name: str) -> bool:
    """Whether an array of a layer belongs to a site rather than to a weight."""
    return name.endswith((DOWN, UP))


def of_rows(layer: nn.Module, adapter_R: jax.Array) -> dict[str, jax.Array]:
    """What the sites of a layer take beside their adapters: each row's."""
    return {f"{path}.{ROWS}": adapter_R for path in adapted(layer)}


def of_nobody(layer: nn.Module) -> dict[str, jax.Array]:
    """All that they take where no row has an adapter."""
    return {f"{path}.{part}": jnp.zeros((0,)) for path in adapted(layer) for part in (DOWN, UP, ROWS)}


def _add_term(module: nn.Module, arguments: tuple[Any, ...], out_RO: Tensor) -> Tensor:
    rows, down, up = (module._buffers[part] for part in (ROWS, DOWN, UP))
    assert rows is not None
    assert down is not None
    assert up is not None
    if not rows.shape[0]:
        return out_RO
    return out_RO + bridge.call_kernel(term, arguments[0], rows, down, up)


def term(x_RI: jax.Array, adapter_R: jax.Array, down_XrI: jax.Array, up_XOr: jax.Array) -> jax.Array:
    """B A x of each row's adapter: [R, O], exactly 0 for rows without one.

    One product with all adapters' columns, of which a row keeps its own: see docs/tpu-evidence.md for the others.

    Args:
        adapter_R: i32, from 1 on; 0 is none.
    """
    own_RX = adapter_R[:, None] == 1 + jnp.arange(down_XrI.shape[0])
    hidden_RXr = jnp.einsum("RI,XrI->RXr", x_RI, down_XrI)
    hidden_RXr = jnp.where(own_RX[..., None], hidden_RXr, 0)
    return jnp.einsum("RXr,XOr->RO", hidden_RXr, up_XOr, preferred_element_type=jnp.float32).astype(x_RI.dtype)
