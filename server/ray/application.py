"""The application: an ingress in front of replicas, each with an engine of its own."""

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from ...engine_impl.config import EngineConfig
from ..config import ServerConfig
from .ingress import Ingress
from .replica import EngineReplica
from .router import PrefixRouter
from .settings import configs

MOST_CALLS = 10_000
"""Under way at one ingress (calls). Behind it a replica's own queue decides who waits and who is refused."""
DEFAULT_SLOTS = 256
"""A replica's for this reckoning, where `slots` is left out (requests)."""
SPARE = 64
"""Calls that a replica takes beyond all requests that it can hold: those that it is to refuse, and those that ask for
nothing of its engine (calls)."""
MARGIN_S = 10.0
"""What Serve waits beyond our own limits (seconds)."""


def app(args: dict[str, Any]) -> Application:
    """For `import_path: slipstream.server.ray:app`. `args`: flags of `slipstream serve`, see settings.py.

    How many replicas there are, and on which devices, is said in Serve's own terms, under `deployments`: `Engine` and
    `Ingress` (deploy/ray/). Raises RefusedError.
    """
    engine, server = configs(args)
    return ingress(server).bind(replicas(engine, server).bind(engine, server), server.security)


def ingress(server: ServerConfig) -> serve.Deployment:
    return serve.deployment(Ingress, name="Ingress").options(
        max_ongoing_requests=MOST_CALLS,
        graceful_shutdown_timeout_s=server.grace_s + MARGIN_S,
        ray_actor_options={"num_cpus": 0},  # it only passes on; a node whose CPUs the engines have is good enough
    )


def replicas(engine: EngineConfig, server: ServerConfig) -> serve.Deployment:
    slots = engine.slots or DEFAULT_SLOTS
    router: dict[str, Any] = {
        "request_router_class": PrefixRouter,
        "request_router_kwargs": {"slack": max(1, slots // 4)},
    }
    return serve.deployment(EngineReplica, name="Engine").options(
        max_ongoing_requests=slots + server.max_queued + SPARE,
        request_router_config=RequestRouterConfig(**router),
        health_check_timeout_s=server.probe_timeout_s + MARGIN_S,
        graceful_shutdown_timeout_s=server.grace_s + MARGIN_S,
    )
