"""OpenAI's HTTP endpoints: the second front, beside gRPC."""
