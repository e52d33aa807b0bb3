"""JetStream's Engine over ours: the only room of the engine that imports jetstream."""

from .engine import JetStreamEngine, create_engine

__all__ = ["JetStreamEngine", "create_engine"]
