"""What a model's parameters are of a checkpoint's tensors (see `Decoder.sources`)."""

import numpy as np

from ..models.decoder import Pairs, RowRange, Transposed


def taken(tensor: np.ndarray, source: str) -> np.ndarray:
    """What the model takes of a checkpoint's tensor."""
    if isinstance(source, Transposed):
        return tensor.T
    if isinstance(source, Pairs):
        return tensor.take(source.order(tensor.shape[source.axis]), axis=source.axis)
    return tensor[source.start : source.stop] if isinstance(source, RowRange) else tensor


def halves_from_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k for a rope that turns neighbours (2i, 2i+1), as Llama's authors store them, for one that turns
    halves (i, i + H/2)."""
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def repeat_heads(weight: np.ndarray, heads: int, wanted: int) -> np.ndarray:
    """Rows of k or v, each head `wanted / heads` times: with more devices than kv heads, a device's query heads find
    their kv head on the device."""
    if heads == wanted:
        return weight
    by_head = weight.reshape(heads, -1, *weight.shape[1:])
    return by_head.repeat(wanted // heads, axis=0).reshape(-1, *weight.shape[1:])
