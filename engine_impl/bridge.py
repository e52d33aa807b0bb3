"""The border between torch and JAX: two verbs, and the only file that imports torchax.

`run` takes a torch module over with JAX arrays as its weights and inputs; `call_kernel` is the way back, for the one
JAX function that a model calls, `attend`.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import jax
import torch
from torch._ops import OpOverloadPacket

from .models.parts import grouped_matmul


@contextmanager
def _stand_ins_for_dropped_overloads() -> Iterator[None]:
    """torchax 0.0.13 names operator overloads (`aten.prod.dim_Dimname`, ...) that torch dropped with named tensors.

    While it is imported, a missing overload is answered by a fresh object: torchax only uses it as the key under which
    it files a lowering, which nothing then asks for.
    """
    original = OpOverloadPacket.__getattr__

    def lookup(packet: OpOverloadPacket, name: str) -> Any:
        try:
            return original(packet, name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return object()

    OpOverloadPacket.__getattr__ = cast(Any, lookup)
    try:
        yield
    finally:
        OpOverloadPacket.__getattr__ = original


with _stand_ins_for_dropped_overloads():
    import torchax
    from torchax.interop import jax_view, torch_view
    from torchax.tensor import XLADispatchMode

# torch wraps every dispatch mode so that torch.compile leaves it alone; the wrapper's first call imports that compiler,
# more than a second. Nothing here is compiled by torch.
XLADispatchMode.__torch_dispatch__ = inspect.unwrap(XLADispatchMode.__torch_dispatch__)


@functools.cache
def _environment() -> torchax.tensor.Environment:
    """Loads the lowerings, which name overloads too. Not at import: it starts JAX's backends, and which ones there are
    to be is decided by then (see `loading`)."""
    with _stand_ins_for_dropped_overloads():
        environment = torchax.default_env()
    environment.override_op_definition(grouped_matmul, functools.partial(call_kernel, jax.lax.ragged_dot))
    return environment


def run(module: torch.nn.Module, weights: Mapping[str, jax.Array], *args: Any) -> Any:
    """Call a torch module on JAX arrays.

    Args:
        module: any module; the values of its own parameters are ignored, they may be on the meta device.
        weights: one array for each of the module's parameters, by its name.
        args: JAX arrays, trees of them, or anything else (passed as it is).

    Returns:
        What the module returns, tensors as JAX arrays. Works under `jax.jit`.
    """
    with _environment():
        return jax_view(torch.func.functional_call(module, torch_view(dict(weights)), torch_view(args), strict=True))


def call_kernel(fn: Callable[..., jax.Array], *tensors: torch.Tensor) -> torch.Tensor:
    """Call a JAX function from inside a module that `run` runs."""
    return torch_view(fn(*jax_view(tensors)))
