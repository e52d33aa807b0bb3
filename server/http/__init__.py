"""The HTTP front: OpenAI's endpoints."""
