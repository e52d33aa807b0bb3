"""Every program of serving is compiled by running it once, over texts without a meaning."""

import jax
import numpy as np

from .api import Engine, Opening, ParamsT, Piece, PrefixT, StateT
from .sampling.params import GREEDY
from .shapes import Shapes


def warm_up_prefills(
    engine: Engine[ParamsT, PrefixT, StateT], shapes: Shapes, params: ParamsT, decode_state: StateT
) -> StateT:
    """What brings texts into slots."""
    for shape in shapes.prefills:
        prefix, page_NJ = blank(engine, params, decode_state, shape)
        decode_state = engine.insert(prefix, decode_state, [None] * len(page_NJ), page_NJ)
    return decode_state


def blank(
    engine: Engine[ParamsT, PrefixT, StateT], params: ParamsT, decode_state: StateT, shape: tuple[int, int]
) -> tuple[PrefixT, np.ndarray]:
    """A prefix of one of `Shapes.prefills`, and a page table for it."""
    count, tokens = shape
    page_NJ = np.zeros((count, 0), np.int32)
    pieces = [Piece(token_T=np.zeros(tokens, np.int32), start=0, page_J=page_J) for page_J in page_NJ]
    prefix = engine.prefill(params, decode_state, pieces)
    opening = Opening(text=[0], prompt_length=1, sampling=GREEDY)
    prefix, _ = engine.first_tokens(prefix, [opening] * count)
    return prefix, page_NJ


def warm_up_steps(
    engine: Engine[ParamsT, PrefixT, StateT], shapes: Shapes, params: ParamsT, decode_state: StateT
) -> StateT:
    """Steps of every size and width, and those that carry a piece along."""
    for size, width in [*((size, 1) for size in shapes.steps), *shapes.wide_steps]:
        nobody, no_pages = np.full(size, shapes.slots, np.int32), np.zeros((size, 0), np.int32)
        decode_state, result = engine.generate(params, decode_state, nobody, no_pages, width=width)
    for size, tokens in shapes.carries:
        nobody, page_J = np.full(size, shapes.slots, np.int32), np.zeros(0, np.int32)
        piece = Piece(token_T=np.zeros(tokens, np.int32), start=0, page_J=page_J)
        page_NJ = np.zeros((size, 0), np.int32)
        decode_state, result, _ = engine.carry(params, decode_state, nobody, page_NJ, [piece])
    jax.block_until_ready(result.count_B)
    return decode_state
