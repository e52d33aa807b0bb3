"""Ports, TLS, bearer tokens."""
