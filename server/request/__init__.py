"""Requests: options, limits, events, answers."""
