"""Whether a baseline computed what we did."""

from typing import Any

UNEQUAL_TOKENS = (
    "UNEQUAL TOKENS: where it says so, the baseline computes something else, and its ratio compares nothing "
    "(bfloat16 differs by rounding alone: see whether float32 is equal)"
)


def has_unequal_tokens(row: dict[str, Any]) -> bool:
    """Whether a baseline computed something else than we did: then its ratio compares nothing."""
    return row.get("equal_tokens") is False
