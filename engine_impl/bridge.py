"""The border between torch and JAX: two verbs, and the only file that imports torchax.

`run` takes a torch module over with JAX arrays as its weights and inputs; `call_kernel` is the way back, for the one
JAX function that a model calls, `attend`. What torch's own `linear` becomes is said here, too.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import jax
import torch
from torch._ops import OpOverloadPacket


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
    environment.override_op_definition(torch.nn.functional.linear, functools.partial(call_kernel, linear))
    return environment


def linear(x_RI: jax.Array, weight_OI: jax.Array, bias_O: jax.Array | None = None) -> jax.Array:
    """x W^T + b; without a bias kept apart from what comes after, as the bias keeps it.

    Left alone, XLA:TPU moves a split into heads before the product, onto the weight, and a layer's slice of a weight in
    that form is first copied out of the stack: 36 k estimated cycles for a product of 4 MiB instead of 16 k. What it
    makes of whole programs (libtpu 0.0.42, v5e:2x4, bf16, millions of static cycles, before and after): a step of 96
    slots of llama-2-7b 9.98, 7.92; llama-3.1-8b 8.90, 8.37; of 32 slots of phi-3-mini 5.84, 4.63; gemma-2-9b 10.4, 9.8;
    qwen2.5-7b, which has biases, 11.5, 11.7 if they are kept apart as well. A prefill of 512 tokens of llama-2-7b 18.1,
    16.0. XLA:CPU makes the same of both.
    """
    out_RO = jax.lax.dot_general(x_RI, weight_OI, (((x_RI.ndim - 1,), (1,)), ((), ())))
    return jax.lax.optimization_barrier(out_RO) if bias_O is None else out_RO + bias_O


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
