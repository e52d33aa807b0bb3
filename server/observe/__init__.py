"""Metrics, logs, status, profiles."""
