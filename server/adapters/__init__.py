"""Adapters by their names: loaded, listed and unloaded while the server runs."""
