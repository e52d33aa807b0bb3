"""What Serve's gRPC proxy answers to: `grpc_servicer_functions: [slipstream.server.ray:add_services]`."""

import logging
from typing import Any

import grpc
from grpc_health.v1 import health

from ..grpc.service import add_to

SERVES_LOG = logging.getLogger("ray.serve")

CHECK = f"/{health.SERVICE_NAME}/Check"


def add_services(servicer: Any, server: grpc.aio.Server) -> None:
    """Our service under both its names, and grpc.health.v1's Check. Serve calls it with a stand-in for the servicer: it
    puts its own way to the ingress, to the method of the same name, behind each path."""
    be_brief()
    add_to(server, servicer)
    check = grpc.unary_unary_rpc_method_handler(servicer.Check)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(health.SERVICE_NAME, {"Check": check})])


class FailedCallError(Exception):
    """A gRPC call has ended with a status that is not OK. Raised for Serve, which sends the status that it is told."""


def be_brief() -> None:
    """Serve logs a traceback for each FailedCallError, in the proxy and in the ingress; strangers must not fill the log
    with them. Each call's end is a line of its access log all the same."""
    SERVES_LOG.addFilter(is_kept)


def is_kept(record: logging.LogRecord) -> bool:
    """Whether a record is to be kept: all but those of calls that failed as they were to."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(getattr(error, "original_exception", error), FailedCallError)
