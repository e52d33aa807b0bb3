"""Drafts: where they come from, and which of them a step accepts. No token changes by them."""
