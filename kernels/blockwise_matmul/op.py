"""Activations times blockwise int4 weights, of one layer of a stack."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ..backend import AXIS, Backend, check_backend, interpret_params, is_xla
from .pallas_tpu import blockwise_matmul_tpu
from .reference import Blockwise, blockwise_matmul_reference

Split = Literal["inputs", "outputs"] | None
"""The axis of a weight that the devices share."""


def blockwise_matmul(
    x_RI: jax.Array, weight: Blockwise, layer: jax.Array | int = 0, *, split: Split, mesh: Mesh, backend: Backend
) -> jax.Array:
    """x @ weight[layer], unpacked tile by tile on the way to the multiplier; accumulates in f32.

    Args:
        x_RI: activations, bf16 or f32.
        weight: a stack of layers, each leaf [L, ...]; scale and offset in x's dtype. A block, I / Q inputs, is a
            multiple of 8.
        layer: which layer to multiply with, a Python int or an i32 scalar, traced or not. The stack is indexed in the
            kernel: a slice of it would be a copy, for a kernel's operand lies in memory. XLA:TPU lays a stack out
            anew in each program where a chip's share of outputs is not whole vectors of 128, or of blocks not whole
            eights.
        split: the weight's axis that the mesh's axis "tensor" shares: "outputs" (x whole, the result sharded on O),
            "inputs" (x sharded on I, the result summed over the chips), or None (every chip does it all).
        mesh: has the axis "tensor".
        backend: see `Backend`.

    Returns:
        [R, O], x's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit together, at trace time.
    """
    check_backend(backend)
    (L, half, O), I, Q = weight.packed.shape, x_RI.shape[1], weight.scale.shape[1]
    if half * 2 != I or weight.packed.dtype != jnp.int8:
        raise ValueError(
            f"packed must be i8 [L, I / 2, O] = [{L}, {I / 2}, {O}], got {weight.packed.dtype}{weight.packed.shape}"
        )
    for name, leaf in (("scale", weight.scale), ("offset", weight.offset)):
        if leaf.shape != (L, Q, O) or leaf.dtype != x_RI.dtype:
            raise ValueError(f"{name} must be {x_RI.dtype}{[L, Q, O]}, got {leaf.dtype}{list(leaf.shape)}")
    if I % Q or (I // Q) % 8:
        raise ValueError(f"{I=} inputs in {Q=} blocks: a block must be whole and a multiple of 8 inputs")
    shards = mesh.shape[AXIS]
    if split is not None and (Q if split == "inputs" else O) % shards:
        raise ValueError(f"{split=} needs {Q=} (inputs) or {O=} (outputs) to be divisible by {shards=}; use split=None")

    if is_xla(backend):
        matmul = blockwise_matmul_reference
    else:
        matmul = functools.partial(blockwise_matmul_tpu, interpret=interpret_params(backend))

    def of_shard(x_RI, weight, layer):
        out_RO = matmul(x_RI, weight, layer).astype(x_RI.dtype)
        return jax.lax.psum(out_RO, AXIS) if split == "inputs" else out_RO

    specs = {
        "inputs": (P(None, AXIS), P(None, AXIS), P()),
        "outputs": (P(), P(None, None, AXIS), P(None, AXIS)),
        None: (P(), P(), P()),
    }
    x_spec, weight_spec, out_spec = specs[split]
    sharded = jax.shard_map(
        of_shard,
        mesh=mesh,
        in_specs=(x_spec, weight_spec, P()),  # one spec for all three leaves
        out_specs=out_spec,
        check_vma=False,  # pallas_call's results carry no varying-axes type
    )
    return sharded(x_RI, weight, jnp.asarray(layer, jnp.int32))
