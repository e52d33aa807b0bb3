"""Which implementation runs, and the checks every op shares."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from . import native

Backend = Literal["pallas", "pallas_interpret", "xla", "xla_gpu", "native_cpu"]
"""`pallas`: Mosaic, TPU only. `xla`: the reference, and what runs where nothing else does. `xla_gpu`: the same, but for
attention, which has forms of its own there. `native_cpu`: the same, but for attention and products with weights in
panels, which are C++ of ours (native/) in float32; where the package was built with a compiler. `pallas_interpret`:
the TPU kernel, simulated, for tests on a device or two: on more virtual devices than CPU cores the simulator may wait
for itself forever."""

AXIS = "tensor"  # the mesh axis that heads are sharded on


def backend_for(platform: str) -> Backend:
    """The implementation to use on a JAX platform ("tpu", "cpu", "gpu", ...)."""
    if platform == "cpu":
        return "native_cpu" if native.is_built() else "xla"
    backends: dict[str, Backend] = {"tpu": "pallas", "gpu": "xla_gpu"}
    return backends.get(platform, "xla")


def is_xla(backend: Backend) -> bool:
    """Whether ops run in XLA's own layouts, without what the tiles of a TPU's kernels ask of shapes."""
    return backend in ("xla", "xla_gpu", "native_cpu")


def interpret_params(backend: Backend) -> pltpu.InterpretParams | bool:
    """What `pallas_call(interpret=...)` gets: False, or a simulated TPU that finds races and poisons unset memory."""
    if backend == "pallas_interpret":
        return pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    return False


def check_backend(backend: str) -> None:
    """Raises ValueError for a name that is no Backend."""
    if backend not in get_args(Backend):
        raise ValueError(f"{backend=} must be one of {get_args(Backend)}; backend_for(platform) chooses one")


def check_shape(name: str, array: jax.Array, shape: tuple[int, ...], axes: str) -> None:
    """Raises ValueError unless `array` has `shape`; `axes` names the shape's letters."""
    if array.shape != shape:
        raise ValueError(f"{name} must be [{', '.join(axes)}] = {shape}, got {array.shape}")


def check_pages(name: str, table: jax.Array, *, texts: int, rows: int, is_tiled: bool) -> None:
    """Raises ValueError unless `table` has a row of pages for every text, and a page whole tiles of rows, of 128 where
    it `is_tiled`."""
    if table.ndim != 2 or table.shape[0] != texts or not table.shape[1]:
        raise ValueError(f"{name} must be [{', '.join(name[-2:])}] = ({texts}, pages of a text), got {table.shape}")
    if not jnp.issubdtype(table.dtype, jnp.integer):
        raise ValueError(f"{name} must have integers, got {table.dtype}")
    tile = 128 if is_tiled else 16
    if rows % tile:
        raise ValueError(f"a page of {rows=} must have a multiple of {tile}; nearest above: {-(-rows // tile) * tile}")


def check_cache(
    cache_LPKRC: jax.Array,
    scale_LPK2R: jax.Array | None,
    layer: jax.Array | int,
    *,
    head_dim: int,
    backend: Backend,
) -> None:
    """Raises ValueError for a cache that no attention over heads of H = `head_dim` reads, and a layer it has not."""
    (L, pool, K, R, C), H = cache_LPKRC.shape, head_dim
    if scale_LPK2R is not None:
        check_shape("scale_LPK2R", scale_LPK2R, (L, pool, K, 2, R), "LPK2R")
        if (cache_LPKRC.dtype, scale_LPK2R.dtype) != (jnp.int8, jnp.float32):
            raise ValueError(
                f"a cache with scales has int8 codes and float32 scales, got {cache_LPKRC.dtype=} and "
                f"{scale_LPK2R.dtype=}"
            )
    if C != 2 * H:
        raise ValueError(f"the cache's rows have {C=} lanes, but k and v side by side need 2 * {H=}")
    if not is_xla(backend) and C % 128:
        padded = -(-C // 128) * 64
        raise ValueError(
            f"{H=} makes rows of {C=} lanes, not whole tiles of 128, and the TPU compiler would copy the cache at "
            f"every call; pad heads to {padded} with zeros and scale q by ({padded} / {H})**0.5"
        )
    if isinstance(layer, int) and not 0 <= layer < L:
        raise ValueError(f"{layer=} must be in [0, {L=})")


def check_dtypes(**arrays: jax.Array) -> None:
    """Raises ValueError unless all arrays share one floating dtype."""
    dtypes = {name: str(array.dtype) for name, array in arrays.items()}
    if len(set(dtypes.values())) != 1 or not all(jnp.issubdtype(x.dtype, jnp.floating) for x in arrays.values()):
        raise ValueError(f"dtypes must be one and the same floating type, got {dtypes}; cast before the call")


def heads_per_shard(mesh: jax.sharding.Mesh, num_kv_heads: int, num_q_heads: int | None = None) -> int:
    """kv heads that one chip holds.

    Raises ValueError when the mesh has no axis "tensor", the kv heads do not divide by it, or the query heads do not
    divide by the kv heads.
    """
    if AXIS not in mesh.shape:
        raise ValueError(f'mesh has axes {tuple(mesh.shape)}; heads are sharded on "{AXIS}", so name one axis that')
    shards = mesh.shape[AXIS]
    if num_kv_heads % shards:
        raise ValueError(f"{num_kv_heads=} must be divisible by {shards=}; replicate kv heads when loading the weights")
    if num_q_heads is not None and num_q_heads % num_kv_heads:
        raise ValueError(f"{num_q_heads=} must be divisible by {num_kv_heads=}; nearest below: "
                         f"{num_q_heads // num_kv_heads * num_kv_heads}")  # fmt: skip
    return num_kv_heads // shards
