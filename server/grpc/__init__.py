"""The gRPC front, and our client."""
