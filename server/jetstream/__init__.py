"""JetStream's own orchestrator as the server."""
