"""Microseconds of decode attention and of the flush alone, beside what else this backend runs.

Attention is timed over all layers, one after another as in a step: one layer's rows would stay in a CPU's cache.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..engine_impl.loading import choose_devices, choose_dtype
from ..engine_impl.weights.sharding import make_mesh
from ..kernels import Backend, backend_for, cache_flush, is_xla
from .baselines.attentions import AttentionVariant, Case, attentions
from .measure import machine
from .measure.stats import percentile
from .measure.table import Progress, table
from .measure.timing import timed
from .options.flags import facts
from .options.kernel import KernelOptions

Flush = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(cache_LBKSC, new_LBKC, position_B) -> cache_LBKSC, donated"""


def run(options: KernelOptions) -> dict[str, Any]:
    """{"attention": [a row each], "flush": [a row each], ...the flags and the machine}.

    Raises RefusedError where the platform has no devices.
    """
    load_average = machine.warn_if_busy()
    devices = choose_devices(options.platform)
    platform, bandwidth = devices[0].platform, machine.copy_bandwidth(devices[0])
    bench = KernelBench(options, make_mesh(devices[:1], options.heads, options.kv_heads, 1), backend_for(platform))
    attention = [row for live in options.lengths for row in bench.attention_rows(live, bandwidth)]
    flush = list(bench.flush_rows(options.lengths[0], bandwidth))
    for title, rows in (("attention, all layers", attention), ("flush, all layers", flush)):
        print(f"{title}\n{_table(rows)}\n")
    if platform == "cpu":
        print("On a CPU: JAX's paged and ragged kernels and our Pallas ones need an accelerator.")
    shape = facts(options) | {"dtype": bench.dtype.name, "copy_bandwidth_bytes_per_second": round(bandwidth)}
    shape["load_average"] = load_average
    return shape | {"attention": attention, "flush": flush} | machine.describe(machine.use_threads(None))


class KernelBench:
    """The arrays of one shape on one device."""

    def __init__(self, options: KernelOptions, mesh: jax.sharding.Mesh, backend: Backend) -> None:
        self.platform = mesh.devices.flat[0].platform
        self.dtype = choose_dtype(options.dtype, self.platform)
        self._options, self._mesh = options, mesh
        self._backend: Backend = backend
        length, lanes = options.cache_length, 2 * options.head_dim
        self._cache_shape = (options.layers, options.slots, options.kv_heads, length, lanes)

    def case(self, live_tokens: int) -> Case:
        """Every slot holds `live_tokens` rows."""
        _, slots, kv_heads, _, lanes = self._cache_shape
        keys = jax.random.split(jax.random.key(0), 3)
        return Case(
            q_BNH=jax.random.normal(keys[0], (slots, self._options.heads, lanes // 2), self.dtype),
            new_BKC=jax.random.normal(keys[1], (slots, kv_heads, lanes), self.dtype),
            cache_LBKSC=jax.random.normal(keys[2], self._cache_shape, self.dtype),
            length_B=jnp.full(slots, live_tokens, jnp.int32),
            mesh=self._mesh,
        )

    def attention_rows(self, live_tokens: int, bandwidth: float) -> Iterator[dict[str, Any]]:
        """One row an implementation; one that refuses the shape says why instead of a time."""
        progress, case, expected_BNH = Progress(), self.case(live_tokens), None
        L, B, K, _, C = self._cache_shape
        nbytes = L * B * K * (live_tokens + 1) * C * self.dtype.itemsize
        for attention in attentions(self.platform, self._backend, self._mesh):
            progress.show(f"{attention.name}, {live_tokens} live tokens ...")
            row: dict[str, Any] = {"name": attention.name, "live_tokens": live_tokens, "bytes": nbytes}
            try:
                us, out_BNH = self._time_attention(attention, case)
            except Exception as error:  # a rival's kernel may refuse in any way
                row |= _times([], nbytes, bandwidth) | {"max_error": None, "refused": str(error).split("\n")[0][:200]}
            else:
                expected_BNH = out_BNH if expected_BNH is None else expected_BNH
                row |= _times(us, nbytes, bandwidth)
                row |= {"max_error": float(np.abs(out_BNH - expected_BNH).max()), "refused": None}
            progress.clear()
            yield row

    def _time_attention(self, attention: AttentionVariant, case: Case) -> tuple[list[float], np.ndarray]:
        """(µs of each call, the first layer's output)."""
        arrays, layers = jax.block_until_ready(attention.prepare(case)), self._options.layers

        @jax.jit
        def all_layers(q_BNH: jax.Array, arrays: Any) -> jax.Array:
            for layer in range(layers):
                q_BNH = attention.attend(q_BNH, layer, arrays)  # the next layer waits for this one
            return q_BNH

        first_BNH = jax.jit(attention.attend, static_argnums=1)(case.q_BNH, 0, arrays)
        us = timed(lambda: all_layers(case.q_BNH, arrays), self._options.repeats)
        return us, np.asarray(first_BNH, np.float32)

    def flush_rows(self, live_tokens: int, bandwidth: float) -> Iterator[dict[str, Any]]:
        """One row an implementation, each on a cache of its own: rows that another has written would prove nothing.

        Compared are the rows that are written and their neighbours, which must stay as they are.
        """
        options, expected = self._options, None
        around = slice(max(0, live_tokens - 1), live_tokens + 2)
        for name, flush in self._flushes():
            case = self.case(live_tokens)
            new_LBKC = jnp.broadcast_to(case.new_BKC, (options.layers, *case.new_BKC.shape)).copy()
            nbytes = 2 * new_LBKC.nbytes
            compiled, cache_LBKSC, length_B = jax.jit(flush, donate_argnums=0), case.cache_LBKSC, case.length_B
            del case

            def step(compiled=compiled, new_LBKC=new_LBKC, length_B=length_B) -> jax.Array:
                nonlocal cache_LBKSC
                cache_LBKSC = compiled(cache_LBKSC, new_LBKC, length_B)
                return cache_LBKSC

            us = timed(step, options.repeats)
            written = np.asarray(cache_LBKSC[:, :, :, around], np.float32)
            expected = written if expected is None else expected
            row = {"name": name, "live_tokens": live_tokens, "bytes": nbytes} | _times(us, nbytes, bandwidth)
            yield row | {"max_error": float(np.abs(written - expected).max()), "refused": None}

    def _flushes(self) -> Iterator[tuple[str, Flush]]:
        def ours(backend: Backend) -> Flush:
            page_B1 = jnp.arange(self._options.slots, dtype=jnp.int32)[:, None]  # one page holds all of a slot's rows
            one_B = jnp.ones_like(page_B1[:, 0])
            return lambda cache, new, position: cache_flush(
                cache, new[:, :, None], position, one_B, page_B1, mesh=self._mesh, backend=backend
            )

        backend: Backend = "xla" if is_xla(self._backend) else self._backend  # what has no flush of its own
        yield f"slipstream ({backend})", ours(backend)
        if backend != "xla":
            yield "slipstream (xla scatter)", ours("xla")
        yield "dynamic_update_slice a slot", _update_slots
        yield "vmap of dynamic_update_slice", jax.vmap(_update_slot, in_axes=(1, 1, 0), out_axes=1)


def _update_slots(cache_LBKSC: jax.Array, new_LBKC: jax.Array, position_B: jax.Array) -> jax.Array:
    """In place, slot after slot: what one writes who knows that the vmap below copies the cache."""
    for slot in range(len(position_B)):
        at = (0, slot, 0, position_B[slot], 0)
        cache_LBKSC = jax.lax.dynamic_update_slice(cache_LBKSC, new_LBKC[:, slot, None, :, None], at)
    return cache_LBKSC


def _update_slot(slot_LKSC: jax.Array, new_LKC: jax.Array, position: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(slot_LKSC, new_LKC[:, :, None], (0, 0, position, 0))


def _times(us: list[float], nbytes: int, bandwidth: float) -> dict[str, Any]:
    p50, p99 = percentile(us, 50), percentile(us, 99)
    if p50 is None or p99 is None:
        return {"us_p50": None, "us_p99": None, "bytes_per_second": None, "mbu": None}
    speed = nbytes / p50 * 1e6
    return {
        "us_p50": round(p50, 2),
        "us_p99": round(p99, 2),
        "bytes_per_second": round(speed),
        "mbu": round(speed / bandwidth, 4),
    }


def _table(rows: list[dict[str, Any]]) -> str:
    headers = ["implementation", "live", "p50 us", "p99 us", "bytes", "MBU", "max error", "refused"]
    keys = ["name", "live_tokens", "us_p50", "us_p99", "bytes", "mbu", "max_error", "refused"]
    return table(headers, [[row[key] for key in keys] for row in rows])
