import pytest
from slipstream.kernels import backend_for, native


@pytest.mark.parametrize(("is_built", "of_cpus"), [(True, "native_cpu"), (False, "xla")])
def test_backend_for(is_built, of_cpus, monkeypatch):
    monkeypatch.setattr(native, "is_built", lambda: is_built)
    assert [backend_for(platform) for platform in ("tpu", "cpu", "gpu")] == ["pallas", of_cpus, "xla_gpu"]
