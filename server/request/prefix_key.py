"""What keeps the cached prefixes of requests apart, so that timing tells no tenant what another asked."""

import json
import secrets
from hashlib import blake2b

_HASH_KEY = secrets.token_bytes(32)
"""Of this process: whoever reads a prefix key can try no guesses at the token behind it."""


def prefix_key(cache_salt: str | None = None, token: str | None = None) -> str:
    """A digest of a request's salt and of the bearer token that it came with; "" without both.

    Equal within one process for equal arguments, and only for them. None is no salt, or no token that is told apart.
    """
    if cache_salt is None and token is None:
        return ""
    return blake2b(json.dumps([cache_salt, token]).encode(), digest_size=16, key=_HASH_KEY).hexdigest()
