"""The KV cache's axes and physical layout: the one place that knows.

One letter per logical axis, used as suffix of every array's name (after Noam Shazeer's shape suffixes):

    L layers   B decode slots   S cache length (rows a slot)   T prompt tokens in a bucket
    N query heads   K kv heads   H head dim   C = 2 H, k and v side by side in one row
    D model dim   F feed-forward dim   V vocabulary;   a digit is a size
"""
