"""Replicas under Ray Serve: `slipstream.server.ray:app` is the application (deploy/ray/README.md).

    caller -> Serve's HTTP or gRPC proxy -> Ingress -> PrefixRouter chooses -> EngineReplica: engine and both fronts

Each replica has a whole server, as `slipstream serve` runs one: reading, refusing and answering requests is the fronts'
work, here as there. What lies between passes on bytes. This room alone knows Ray.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """What Serve is told to import, and no more than it asks for: its proxies want `add_services` alone."""
    match name:
        case "app":
            from .application import app

            return app
        case "add_services":
            from .services import add_services

            return add_services
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
