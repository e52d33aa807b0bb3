"""Requests at once and their ceiling, against numbers worked out by hand."""

from typing import Any

import numpy as np
import pytest
from slipstream.engine_impl.compiler.budget import Budget
from slipstream.engine_impl.compiler.chips import CHIPS
from slipstream.engine_impl.compiler.headroom import StepCosts, fitting, headroom, headroom_of
from slipstream.engine_impl.compiler.lengths import length_mix
from slipstream.engine_impl.compiler.plan import abstract_engine
from slipstream.engine_impl.compiler.presets import preset
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.errors import RefusedError

COSTS = StepCosts(weights=0.01, row=1e-4, page=1e-6)
SIZES: dict[str, Any] = {"pages": 350, "page_rows": 4, "slots": 1000}


def test_a_mix_by_hand():
    """10 to 13 tokens live, a quarter of the requests each. They hold 3, 3, 4, 4 pages of 4 rows: 3.5, deviation 0.5.

    96 requests hold 336 + 2.326 x 0.5 x 9.80 = 347.4 pages in all but 1 % of moments, 97 hold 351.0. A step reads 3, 3,
    3, 4 pages: 3.25. 96 rows are bound by the weights' bytes, 96 + 240 of prompts by their multiplications.
    """
    room = headroom(length_mix("fixed:10,4"), COSTS, **SIZES)
    assert (room.requests, room.running, room.whole_requests, room.pool_tokens) == (96, 96, 87, 1400)
    assert (room.prompt_tokens, room.answer_tokens, room.live_tokens) == (10, 4, pytest.approx(11.5))
    attention = 96 * 3.25e-6
    assert room.step_ms == pytest.approx((0.01 + attention) * 1e3)
    assert room.decode_tokens_per_second == pytest.approx(96 / (0.01 + attention))
    assert room.tokens_per_second_ceiling == pytest.approx(96 / (0.0336 + attention))


def test_slots_bound_what_runs():
    room = headroom(length_mix("fixed:10,4"), COSTS, **{**SIZES, "slots": 50})
    assert (room.requests, room.running) == (96, 50)
    assert room.decode_tokens_per_second == pytest.approx(50 / (0.01 + 50 * 3.25e-6))


def test_a_window_is_read_from_its_first_page_on():
    """Layers that see 5 tokens, the step's own among them, read 2, 2, 1, 2 pages of 4; half of the layers see all."""
    room = headroom(length_mix("fixed:10,4"), COSTS, **SIZES, windows=(5, None))
    assert room.step_ms == pytest.approx((0.01 + 96 * (1.75 + 3.25) / 2 * 1e-6) * 1e3)
    short = headroom(length_mix("fixed:10,4"), COSTS, **SIZES, windows=(100,))  # sees all there is
    assert short.step_ms == pytest.approx((0.01 + 96 * 3.25e-6) * 1e3)


def test_an_empty_cache_is_not_read_but_takes_a_page():
    """A prompt of one token: its step reads row 0 and stores row 1."""
    share = length_mix("fixed:1,1").live_share
    assert share == pytest.approx([0, 1])
    assert headroom(length_mix("fixed:1,1"), COSTS, **SIZES).requests == 350


def test_requests_of_one_size_fill_the_pool():
    share, held = np.array([0.0, 1.0]), np.array([1, 3])
    assert [fitting(share, held, pages) for pages in (2, 3, 8, 9, 300)] == [0, 1, 2, 3, 100]


def test_one_request_runs_where_the_longest_fits():
    """Two lengths far apart: by the normal sum not one would be sure of its pages."""
    share, held = np.array([0.5, 0.5]), np.array([1, 100])
    assert fitting(share, held, 100) == 1
    assert fitting(share, held, 99) == 0


def planned(**fields):
    config = EngineConfig(slots=96, cache_length=2048, max_prefill_length=256, **fields)
    return Budget(abstract_engine(preset("llama-3.1-8b"), "v5e:2x4", config), CHIPS["v5e"])


def test_costs_of_a_preset_by_hand():
    """Llama 3.1 8B on 8 chips of a v5e: 1/8 of all matrices but the embedding, whose norms every chip has; one kv head
    of 128, k and v, 32 layers, 2 bytes."""
    matrices = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336) + 128256 * 4096
    norms = (2 * 32 + 1) * 4096
    costs = StepCosts.of(planned())
    assert costs.weights == pytest.approx(2 * (matrices / 8 + norms) / 819e9)
    assert costs.row == pytest.approx(2 * matrices / 8 / 197e12)
    rows = planned().engine.layout.page_rows
    assert costs.page == pytest.approx(rows * 32 * 2 * 128 * 2 / 819e9)


def test_the_pool_and_its_pages_are_the_plans():
    layout = planned().engine.layout
    room = headroom_of(planned(), length_mix("fixed:1000,48"))
    assert (room.page_rows, room.pool_tokens) == (layout.page_rows, layout.pages * layout.page_rows)
    assert room.whole_requests == layout.pages // 5
    # 1,000 to 1,047 tokens, in pages of 256: 4 pages up to 1,023 tokens, 5 beyond.
    assert layout.page_rows == 256
    held = np.array([4] * 24 + [5] * 24)
    assert room.requests == fitting(np.full(48, 1 / 48), held, layout.pages)


def test_requests_longer_than_the_cache_are_refused():
    with pytest.raises(RefusedError, match=r"requests of 2049 tokens, and cache_length=2048; add --cache-length 2176"):
        headroom_of(planned(), length_mix("fixed:2000,49"))
    assert headroom_of(planned(), length_mix("fixed:2000,48")).requests > 0
