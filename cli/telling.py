"""What a command tells of its failure, and its exit status."""

import sys

BAD_INPUT = 2
FAILED = 1


def tell(error: Exception, status: int) -> int:
    """One line on stderr; returns the status."""
    # What a stranger's file is called, or holds, must not command the terminal.
    message = "".join(one if one.isprintable() or one == "\n" else ascii(one)[1:-1] for one in str(error))
    print(f"slipstream: {message}", file=sys.stderr)
    return status
