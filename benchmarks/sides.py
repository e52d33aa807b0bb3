"""Ways to the servers that a benchmark was given."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from .load.caller import Caller
from .load.grpc_caller import GrpcCaller
from .load.http_caller import HttpCaller
from .options.targets import Side, Targets


def caller_of(side: Side, options: Targets, *, ignore_eos: bool) -> Caller:
    """By the target's scheme: HTTP where it has one, else gRPC. Raises RefusedError for files that cannot be used."""
    if "://" in side.target:
        return HttpCaller(side.target, options.timeout_s, options.channel, model=side.model, ignore_eos=ignore_eos)
    return GrpcCaller(side.target, options.timeout_s, options.channel, ignore_eos=ignore_eos)


@asynccontextmanager
async def callers_of(options: Targets, *, ignore_eos: bool) -> AsyncIterator[list[Caller]]:
    """A way to each side. Raises UnavailableError where nobody answers."""
    async with AsyncExitStack() as stack:
        made = [caller_of(side, options, ignore_eos=ignore_eos) for side in options.sides]
        yield [await stack.enter_async_context(caller) for caller in made]
