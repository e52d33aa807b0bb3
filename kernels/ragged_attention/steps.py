"""The grid of the TPU kernel: which pages are read, in which order, and for which slot.

The lists are as long as the pool and the slots allow, not as slots times pages of the longest: they stand in the 1 MiB
of scalar memory. They are made by the scalar core, in as many turns as there are live pages, since XLA has only one-hot
products for it: 8B's step on v5e:2x4 has 9.185 M static cycles with this kernel, 9.209 M with the lists made by XLA.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..scores import rows_seen


class Steps(NamedTuple):
    """The grid's steps, a list for each core. The lists stand one behind the other, each as long as any may get, N.

    A list's entries behind its last step repeat it, as far as the longest core's list goes.
    """

    count: jax.Array
    """[cores]: steps there are"""
    slot: jax.Array
    """[cores * N]: whose query and answer"""
    block: jax.Array
    """[cores * N]: which of the slot's pages, counted from its first token; 0 for a slot without rows to see"""
    page: jax.Array
    """[cores * N]: which page of the pool is in VMEM; where the slot has none to see, the one that is there anyway"""


def live_steps(
    length_B: jax.Array,
    window: jax.Array | None,
    page_BJ: jax.Array,
    *,
    rows: int,
    max_pages: int,
    cores: int | None = None,
    interpret: pltpu.InterpretParams | bool = False,
) -> Steps:
    """Every page that holds a row to be seen, slot by slot, and one step for each slot without any. Core b % cores
    has slot b.

    Args:
        window: i32 scalar, as in `op.ragged_attention`.
        rows: of a page.
        max_pages: entries of the page table that are live at once, at most.
        cores: TensorCores that share the slots; None: all of a JAX device (two on v5p), where they divide the slots.
    """
    B, J = page_BJ.shape
    if cores is None:
        cores = pltpu.get_tpu_info().num_cores
        cores = cores if B % cores == 0 else 1
    max_steps = min(max_pages, B // cores * J) + B // cores
    first_B, end_B = rows_seen(length_B, window)
    first_B = jnp.broadcast_to(jnp.asarray(first_B, jnp.int32), (B,))
    end_B = jnp.minimum(end_B, J * rows)
    in_smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    shapes = [jax.ShapeDtypeStruct((size,), jnp.int32) for size in (cores, *3 * [cores * max_steps])]
    listed = pl.pallas_call(
        functools.partial(_list_kernel, cores=cores, max_steps=max_steps),
        in_specs=[in_smem] * 3,
        out_specs=[in_smem] * 4,
        out_shape=shapes,
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=4 * (B * J + 4 * cores * max_steps)),
        interpret=interpret,
        name=f"live_steps_{B}x{J}",
    )(first_B // rows, (end_B + rows - 1) // rows, page_BJ.reshape(-1))  # flat: rows of a table are padded in SMEM
    return Steps(*listed)


def _list_kernel(
    first_ref,  # [B]: a slot's first page that is seen
    end_ref,  # [B]: behind its last; not above the first where none is
    table_ref,  # [B * J]
    count_ref,  # [cores]
    slot_ref,  # [cores * N]
    block_ref,  # [cores * N]
    page_ref,  # [cores * N]
    *,
    cores: int,
    max_steps: int,
):
    slots = first_ref.shape[0]
    pages_per_slot = table_ref.shape[0] // slots

    def list_core(core: int) -> jax.Array:
        start = core * max_steps

        def put(step, slot, block, page):
            at = start + jnp.minimum(step, max_steps - 1)  # a table with more live pages than promised ends here
            slot_ref[at], block_ref[at], page_ref[at] = slot, block, page

        def list_slot(index, carry):
            slot = index * cores + core
            step, last_page = carry  # -1 until there is one
            first, end = first_ref[slot], end_ref[slot]

            def list_page(block, carry):
                step, last_page = carry
                page = table_ref[slot * pages_per_slot + block]

                # Slots without rows that stand before all others wait for the page that is wanted first.
                def wait(earlier, _):
                    page_ref[start + earlier] = page

                jax.lax.fori_loop(0, jnp.where(last_page < 0, step, 0), wait, None)
                put(step, slot, block, page)
                return step + 1, page

            step, last_page = jax.lax.fori_loop(first, end, list_page, (step, last_page))

            @pl.when(end <= first)
            def _():
                put(step, slot, 0, jnp.maximum(last_page, 0))

            return jnp.where(end <= first, step + 1, step), last_page

        step, _ = jax.lax.fori_loop(0, slots // cores, list_slot, (jnp.int32(0), jnp.int32(-1)))
        return jnp.minimum(step, max_steps)

    counts = [list_core(core) for core in range(cores)]
    longest = functools.reduce(jnp.maximum, counts)
    for core, count in enumerate(counts):
        count_ref[core] = count
        if cores > 1:
            last = core * max_steps + count - 1

            def repeat(step, _, core=core, last=last):
                at = core * max_steps + step
                slot_ref[at], block_ref[at], page_ref[at] = slot_ref[last], block_ref[last], page_ref[last]

            jax.lax.fori_loop(count, longest, repeat, None)
