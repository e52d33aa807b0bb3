"""Tokens become text, text becomes events."""
