"""What goes wrong in a stranger's files, told in one line, whatever it is."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import RefusedError
from ..runtime.workers import WorkerError
from ..text.tokenizer import NoTokenizer, Tokenizer

SAMPLE = "Hello, world!  12345 \n\tnaïve 東京 🥚 \u0627\u0644 " + "a" * 64 + " " * 64 + "<s></s>"
"""A text of what tokenizers stumble over."""
SAMPLE_S = 2.0
"""How long it may take (seconds); it takes microseconds."""
PANIC = "PanicException"
"""What a library written in Rust raises when it is at its wits' end; no Exception, and it can be imported nowhere."""
LONGEST = 300
"""Of what is quoted (characters)."""


@contextmanager
def damage_told(what: str) -> Iterator[None]:
    """Turns whatever is raised inside into a RefusedError that begins with `what`."""
    try:
        yield
    except RefusedError:
        raise
    except WorkerError as error:
        raise RefusedError(f"{what} {error}; fetch it anew") from error
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        reason = printable(f"{type(error).__name__}: {error}")
        raise RefusedError(f"{what} cannot be read ({reason}); fetch it anew") from error


def printable(text: str) -> str:
    """One line, short, and nothing that a terminal would obey."""
    return "".join(character if character.isprintable() else " " for character in text[:LONGEST])


def try_out(tokenizer: Tokenizer) -> None:
    """Raises what the tokenizer raises when it is used, and WorkerError for one that takes too long."""
    if isinstance(tokenizer, NoTokenizer):
        return
    begin = time.monotonic()
    token_ids = tokenizer.encode(SAMPLE)
    if not tokenizer.decode(token_ids):
        raise ValueError("its vocabulary has no token for a plain text")
    stream = tokenizer.stream()
    for token_id in token_ids:
        stream.feed(token_id)
    stream.finish()
    if (seconds := time.monotonic() - begin) > SAMPLE_S:
        raise WorkerError(f"takes {seconds:.0f} s for a text of {len(SAMPLE)} characters")
