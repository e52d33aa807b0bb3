from slipstream.kernels import backend_for


def test_backend_for():
    assert [backend_for(platform) for platform in ("tpu", "cpu", "gpu")] == ["pallas", "xla", "xla_gpu"]
