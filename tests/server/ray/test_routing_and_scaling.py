"""What is decided in Ray's own processes: which replica a call goes to, and how many there should be."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from slipstream.engine_impl.errors import RefusedError
from slipstream.server.ray.calls import HttpCall

pytestmark = pytest.mark.usefixtures("handles")  # which imports Ray


def call(*chain):
    return HttpCall("POST", "/v1/completions", (), b"", chain)


def made_router(slack):
    """And what it is asked to choose from: two replicas."""
    from ray.serve._private.common import DeploymentHandleSource, DeploymentID
    from ray.serve.request_router import ReplicaID
    from slipstream.server.ray.router import PrefixRouter

    deployment = DeploymentID(name="Engine", app_name="slipstream")
    router = PrefixRouter(deployment, DeploymentHandleSource.UNKNOWN)
    router.initialize_state(slack=slack)
    replicas: list[Any] = [SimpleNamespace(replica_id=ReplicaID(name, deployment_id=deployment)) for name in "ab"]
    return router, replicas


def pending(*chain):
    from ray.serve._private.common import RequestMetadata
    from ray.serve.request_router import PendingRequest

    return PendingRequest(args=[call(*chain)], kwargs={}, metadata=RequestMetadata("r", "internal"))


def test_a_prompt_is_sent_after_one_that_began_alike_until_that_replica_is_busier():
    async def run():
        router, (a, b) = made_router(slack=2)

        async def first(*chain):
            ranks = await router.choose_replicas([a, b], pending(*chain))
            assert sorted(replica.replica_id.unique_id for (replica,) in ranks) == ["a", "b"]
            return ranks[0][0]

        router.on_request_routed(pending(b"1", b"2"), b.replica_id, None)
        assert await first(b"1", b"3") is b
        for _ in range(2):
            router.on_send_request(b.replica_id)
        assert await first(b"1", b"3") is b
        router.on_send_request(b.replica_id)
        assert await first(b"1", b"3") is a
        router.on_request_completed(b.replica_id, "internal")
        assert await first(b"1", b"3") is b
        for _ in range(2):
            router.on_request_completed(b.replica_id, "internal")
        router.on_send_request(b.replica_id)
        assert await first() is a  # the least busy one
        router.on_request_routed(pending(b"1", b"2"), a.replica_id, None)
        assert await first(b"1", b"2", b"4") is a

    asyncio.run(run())


def test_a_request_that_all_refuse_backs_off_and_serves_own_probes_may_ask():
    async def run():
        router, replicas = made_router(slack=2)
        request = pending(b"1")
        await router.choose_replicas(replicas, request)
        assert request.routing_context.should_backoff
        assert len(await router.choose_replicas(replicas, None)) == 2

    asyncio.run(run())


@pytest.mark.parametrize(
    ("told", "waiting", "replicas"),
    [
        ({}, 0, 0),
        (None, 3, 0.75),
        ({"queued": {"a": 5, "b": 0}, "running": {"a": 8, "b": 3}}, 0, 4),
        ({"queued": {"a": 5}, "running": {"a": 8}, "other": {"a": 100}}, 3, 4),
    ],
)
def test_replicas_for_the_requests_that_wait_and_run(told, waiting, replicas):
    from ray.serve.config import AutoscalingConfig
    from slipstream.server.ray.scaling import replicas_for_load

    config = AutoscalingConfig(min_replicas=1, max_replicas=9, target_ongoing_requests=4)
    context = SimpleNamespace(aggregated_metrics=told, total_queued_requests=waiting, config=config)
    assert replicas_for_load(context) == (replicas, {})  # pyright: ignore[reportArgumentType]


def test_the_application_has_a_replicas_limits_from_its_flags():
    from slipstream.server.ray import app
    from slipstream.server.ray.application import ingress, replicas
    from slipstream.server.ray.settings import configs

    engine, server = configs({"slots": 8, "max-queued": 10, "grace": 7, "probe-timeout": 3})
    deployment = replicas(engine, server)
    assert (deployment.name, deployment.max_ongoing_requests) == ("Engine", 8 + 10 + 64)
    config = deployment._deployment_config
    assert config.request_router_config.request_router_class == "slipstream.server.ray.router.PrefixRouter"
    assert config.request_router_config.request_router_kwargs == {"slack": 2}
    assert (config.graceful_shutdown_timeout_s, config.health_check_timeout_s) == (17, 13)
    assert (ingress(server).ray_actor_options or {})["num_cpus"] == 0
    assert type(app({})).__name__ == "Application"
    with pytest.raises(RefusedError, match="no flag"):
        app({"slot": 1})


def test_the_proxy_is_told_each_path():
    from slipstream.server.ray import add_services

    added = []
    add_services(
        SimpleNamespace(Decode=1, HealthCheck=2, Check=3), SimpleNamespace(add_generic_rpc_handlers=added.append)
    )
    # Serve reads the first handler of each call, and no more.
    paths = {path for (handler,) in added for path in handler._method_handlers}
    assert paths == {
        *(f"/{name}/{method}" for name in ("slipstream.v1.Orchestrator", "jetstream_proto.Orchestrator")
          for method in ("Decode", "HealthCheck")),
        "/grpc.health.v1.Health/Check",
    }  # fmt: skip
