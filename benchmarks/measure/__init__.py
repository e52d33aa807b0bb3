"""Machines, statistics, tables, plots; the bytes and operations that cannot be avoided."""
