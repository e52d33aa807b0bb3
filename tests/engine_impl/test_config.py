"""The engine's config checks itself."""

from typing import Any

import pytest
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.errors import RefusedError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots=0 must be at least 1"),
        ({"cache_length": 1000}, "cache_length=1000 must be a multiple of 128; nearest: 1024"),
        ({"cache_length": 0}, "nearest: 128"),
        ({"cache_tokens": 1000}, r"cache_tokens=1000 must be a multiple of 128 .*; nearest: 896 and 1024"),
        ({"cache_tokens": 5}, r"cache_tokens=5 must be a multiple of 128 .*; nearest: 128$"),
        ({"cache_tokens": -130}, r"cache_tokens=-130 must be a multiple of 128 .*; nearest: 128$"),
        ({"prefill_chunk": 64}, r"prefill_chunk=64 must be a multiple of 128 .*; nearest: 128$"),
        ({"max_prefill_length": 0}, "max_prefill_length=0 must be from 1 to the cache length"),
        ({"cache_length": 1024, "max_prefill_length": 1025}, "from 1 to cache_length=1024"),
        ({"tensor_parallel": 0}, "tensor_parallel=0 must be at least 1"),
    ],
)
def test_what_cannot_work_is_refused_with_the_limit(options, message):
    with pytest.raises(RefusedError, match=message):
        EngineConfig(**options)


def test_prompts_may_have_any_length():
    assert EngineConfig(cache_length=1024, max_prefill_length=1000).max_prefill_length == 1000


@pytest.mark.parametrize("missing", ["slots", "cache_length", "cache_tokens"])
def test_sizes_that_were_left_out_are_told_of_before_they_are_used(missing):
    sizes: dict[str, Any] = {"slots": 3, "cache_length": 256, "cache_tokens": 512}
    assert EngineConfig(**sizes).chosen == (3, 256, 512)
    sizes[missing] = None
    with pytest.raises(ValueError, match=f"self.{missing}=None.* not all chosen yet"):
        _ = EngineConfig(**sizes).chosen
