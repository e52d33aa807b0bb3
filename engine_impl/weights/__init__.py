"""Weights onto the mesh."""
