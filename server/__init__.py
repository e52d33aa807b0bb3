"""The server: command line, gRPC front, orchestrator, lifecycle."""
