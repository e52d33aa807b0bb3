"""How a token is chosen, and what is told of it."""
