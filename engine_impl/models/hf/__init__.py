"""Models that have no module of ours: transformers' own code computes their layers, around our attention."""
