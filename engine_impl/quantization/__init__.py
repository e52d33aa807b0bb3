"""Quantised weights: codecs, modules, the swap."""
