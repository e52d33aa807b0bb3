"""The application's arguments: flags of `slipstream serve`, in the spelling of its config file."""

import dataclasses
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ...engine_impl.config import EngineConfig
from ...engine_impl.errors import RefusedError
from ...engine_impl.hosts import HostsConfig
from ..config import ServerConfig
from ..flags import check_name, flag_of, flags_of, kinds_of

ENDS_AT_PROXY = "connections end at Serve's proxies: see ssl_keyfile and ssl_certfile in its http_options"
NOT_HERE = {
    "tls-cert": ENDS_AT_PROXY,
    "tls-key": ENDS_AT_PROXY,
    "tls-client-ca": ENDS_AT_PROXY,
    "orchestrator": "replicas have our own",
    "prefill-devices": "all devices of a replica do both",
    **dict.fromkeys(flags_of(HostsConfig), "a replica has one host"),
    "adapter-dir": "an adapter would be loaded into one replica of many: name it in adapters, and each loads it",
}
"""Flags that are none of a replica's, and why."""

WHERE = "args"


def configs(args: Mapping[str, Any]) -> tuple[EngineConfig, ServerConfig]:
    """A replica's. Values may be texts, as `serve run` has them. Raises RefusedError."""
    known = flags_of(EngineConfig) | flags_of(ServerConfig)
    for name in args:
        if name in NOT_HERE:
            raise RefusedError(f"{WHERE}: {name} is not for replicas under Ray Serve: {NOT_HERE[name]}")
        check_name(name, known, WHERE)
    # Callers do not come here; a port of 0 does not collide with that of another replica on the node.
    engine, server = built(EngineConfig, args), built(ServerConfig, {"port": 0, **args, "behind-proxy": True})
    server.check_adapters(engine.max_adapters)
    return engine, server


def built(command: type, args: Mapping[str, Any]) -> Any:
    """A dataclass, and those in its fields, of flags. Raises RefusedError."""
    values = {}
    for field, kind in kinds_of(command):
        if is_dataclass(kind) and isinstance(kind, type):
            values[field.name] = built(kind, args)
            continue
        name, kind = flag_of(field, kind)
        if name in args:
            values[field.name] = value_of(name, kind, args[name])
    return command(**values)


def value_of(name: str, kind: Any, value: Any) -> Any:
    """Raises RefusedError for one of another type."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise RefusedError(f"{WHERE}: {name}={value!r}: {error.errors(include_url=False)[0]['msg']}") from None


def with_sockets(server: ServerConfig, grpc: str, http: str) -> ServerConfig:
    """The same, listening for the replica's own clients too, on Unix sockets at these paths."""
    return dataclasses.replace(
        server, listen=(*server.listen, f"unix:{grpc}"), http_listen=(*server.http_listen, f"unix:{http}")
    )
