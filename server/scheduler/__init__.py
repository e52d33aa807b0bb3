"""Whose turn it is, and the loop that runs the engine."""
