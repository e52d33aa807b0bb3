"""How devices are chosen."""

import os

import pytest
from slipstream.engine_impl import loading
from slipstream.engine_impl.compiler.chips import GPU_MEMORY_SHARE


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
