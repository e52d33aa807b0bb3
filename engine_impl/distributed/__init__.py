"""Several hosts that serve one model: the leader calls its engine's verbs, the followers replay them.

The only room of the engine that knows a network: gRPC, and its own proto, protos/hosts.proto.
"""
