"""JetStream's Engine over ours, 0.2.2's and the last source's: the only room of the engine that imports jetstream."""

from .engine import JetStreamEngine, create_engine

__all__ = ["JetStreamEngine", "create_engine"]
