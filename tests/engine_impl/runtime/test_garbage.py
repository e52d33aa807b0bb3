import gc

import pytest
from slipstream.engine_impl.runtime import garbage


@pytest.fixture(autouse=True)
def restored():
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


def test_a_process_that_started_looks_at_new_objects_alone_and_as_often_as_python_does():
    garbage.seldom()
    assert gc.get_threshold() == garbage.SELDOM
    gc.unfreeze()
    garbage.as_usual()
    assert gc.get_threshold() == garbage.USUAL
    assert gc.get_freeze_count()
