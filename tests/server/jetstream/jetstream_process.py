"""JetStream's orchestrator over the tiny model: run as a module with DEVICES and flags of `serve` as arguments.

A process of its own, since JetStream's threads hold theirs.
"""

import asyncio
import sys

import jax
from slipstream.cli.main import parse
from slipstream.cli.serve import Serve
from slipstream.engine_impl.jetstream.engine import JetStreamEngine
from slipstream.server.jetstream import host as jetstream_host

from tests.engine_impl.text_models import byte_tokenizer, text_engine


def main() -> int:
    """Exits as `slipstream serve` does."""
    devices = jax.devices()[: int(sys.argv[1])]
    jetstream_host.choose_devices = lambda platform: devices
    jetstream_host.create_engine = lambda devices, config: JetStreamEngine(
        *text_engine(devices, byte_tokenizer(), slots=config.slots)
    )
    command = parse(["serve", "--orchestrator", "jetstream", "--port", "0", *sys.argv[2:]])
    assert isinstance(command, Serve)
    return asyncio.run(jetstream_host.host(command.engine, command.server))


if __name__ == "__main__":
    sys.exit(main())
