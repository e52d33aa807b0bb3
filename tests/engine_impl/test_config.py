"""The engine's config checks itself."""

import pytest
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.errors import RefusedError


def test_buckets_are_powers_of_two_up_to_the_longest_prompt():
    assert EngineConfig(cache_length=128).buckets == (16, 32, 64, 128)
    assert EngineConfig(cache_length=384).buckets == (16, 32, 64, 128, 256)
    assert EngineConfig(max_prefill_length=16).buckets == (16,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots=0 must be at least 1"),
        ({"cache_length": 1000}, "cache_length=1000 must be a multiple of 128; nearest: 1024"),
        ({"cache_length": 0}, "nearest: 128"),
        ({"max_prefill_length": 100}, "max_prefill_length=100 must be a power of two"),
        ({"cache_length": 1024, "max_prefill_length": 2048}, "to cache_length=1024"),
        ({"max_prefill_length": 3000}, "from 16 to the cache length"),
        ({"max_prefill_length": 8}, "from 16"),
        ({"tensor_parallel": 0}, "tensor_parallel=0 must be at least 1"),
    ],
)
def test_what_cannot_work_is_refused_with_the_limit(options, message):
    with pytest.raises(RefusedError, match=message):
        EngineConfig(**options)


def test_sizes_that_were_left_out_are_told_of_before_they_are_used():
    config = EngineConfig()
    for sizes in (lambda: config.chosen, lambda: config.buckets):
        with pytest.raises(ValueError, match="not chosen yet"):
            sizes()
    assert EngineConfig(slots=3, cache_length=256).chosen == (3, 256)
