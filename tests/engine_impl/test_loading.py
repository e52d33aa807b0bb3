"""How devices are chosen, and what an engine refuses to be built of."""

import os

import pytest
from slipstream.engine_impl import loading
from slipstream.engine_impl.compiler.chips import GPU_MEMORY_SHARE
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.runtime import compilations
from slipstream.engine_impl.sampling.params import MAX_MODEL_STOP_IDS
from slipstream.engine_impl.text.tokenizer import NoTokenizer

from tests.engine_impl.tiny_models import TINY, RandomCheckpoint


@pytest.fixture
def environment(monkeypatch):
    for name in loading.MEMORY_SHARES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_gpus_memory_is_taken_but_for_a_rest(environment):
    environment.setenv(loading.MEMORY_SHARES[0], "")
    assert loading.choose_devices("cpu")
    assert float(os.environ[loading.MEMORY_SHARES[0]]) == GPU_MEMORY_SHARE


@pytest.mark.parametrize("name", loading.MEMORY_SHARES)
def test_another_share_is_respected(environment, name):
    """JAX refuses to be told twice."""
    environment.setenv(name, "0.5")
    assert loading.choose_devices("cpu")
    assert [os.environ.get(each) for each in loading.MEMORY_SHARES if each in os.environ] == ["0.5"]


@pytest.mark.parametrize("stops", [MAX_MODEL_STOP_IDS, MAX_MODEL_STOP_IDS + 1])
def test_a_model_has_room_for_so_many_stop_tokens(stops):
    """The device keeps them in rows of a fixed length."""

    class Checkpoint(RandomCheckpoint):
        def tokenizer(self):
            return NoTokenizer("random", vocab_size=101, bos_id=None, stop_ids=frozenset(range(stops)))

    config = EngineConfig(platform="cpu", slots=1, cache_length=128, tensor_parallel=1)
    if stops <= MAX_MODEL_STOP_IDS:
        assert len(loading.build_engine(config, Checkpoint(TINY)).get_tokenizer().stop_ids) == stops
    else:
        with pytest.raises(RefusedError, match="random has 17 stop tokens, more than 16; list fewer"):
            loading.build_engine(config, Checkpoint(TINY))


def engine_of(**given):
    config = EngineConfig(platform="cpu", cache_length=128, tensor_parallel=1, **given)
    return loading.build_engine(config, RandomCheckpoint(TINY))


@pytest.mark.parametrize(("told", "kept"), [("/there", "/there"), ("", "home/compiled")])
def test_programs_are_kept_where_jax_is_told(told, kept, monkeypatch):
    folders = []
    monkeypatch.setattr(compilations, "keep_in", folders.append)
    monkeypatch.setenv(compilations.FOLDER, told)
    monkeypatch.setenv("SLIPSTREAM_HOME", "home")
    engine_of(slots=1)
    assert [str(folder) for folder in folders] == [kept]


def test_a_cache_that_memory_cannot_hold_beside_the_weights_is_refused_with_the_largest_that_it_can():
    engine = engine_of(slots=2, cache_tokens=1024)
    size = engine.parameters.bytes + engine.layout.bytes
    for memory, free in ((size, 1), (None, size), (None, None)):
        loading.check_memory(engine, memory, free)
    for memory, free in ((size - 1, None), (None, size - 1)):
        with pytest.raises(RefusedError, match=r"cache_tokens=1024 take .* at most 896, or leave --cache-tokens out"):
            loading.check_memory(engine, memory, free)


def test_slots_whose_state_memory_cannot_hold_are_refused_with_the_most_that_it_can():
    engine = engine_of(slots=100_000, cache_tokens=128)
    size = 100_000 * 2 * engine.sizes.vocab_size
    assert engine.layout.bytes < size
    size += engine.parameters.bytes
    loading.check_memory(engine, None, size)
    with pytest.raises(RefusedError, match=r"slots=100000 take .* use at most 99999, or leave --slots out"):
        loading.check_memory(engine, None, size - 1)


def test_weights_that_memory_cannot_hold_are_refused():
    engine = engine_of(slots=1)
    for memory, free in ((2**10, None), (None, 2**10)):
        with pytest.raises(RefusedError, match=r"weights take 0 MiB and there are 0 MiB: give --quantize-weights int8"):
            loading.check_memory(engine, memory, free)
