"""gpt-oss': an answer is written in messages, each with a channel and perhaps a recipient.

    <|channel|>analysis<|message|>a thought<|end|>
    <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{"city": "Paris"}<|call|>
    <|start|>assistant<|channel|>final<|message|>the content<|return|>

The prompt ends with the first <|start|>assistant. <|call|> and <|return|> are stop tokens.
"""

import re
from typing import NamedTuple

from .calls import Calls, arguments_of
from .source import Prose, Reading, Source, begins

CHANNEL, MESSAGE, END, START, CONSTRAIN = MARKS = (
    "<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|constrain|>",
)  # fmt: skip
ANALYSIS, COMMENTARY, FINAL = CHANNELS = ("analysis", "commentary", "final")
ROLE, TO, FUNCTIONS = "assistant", "to=", "functions."
"""A header's words: who speaks, and before and in the recipient's name."""
BEGINNINGS = (CHANNEL, START, MESSAGE, TO)
LONGEST = 256
"""A header has at most (characters)."""
WORD = re.compile(r"<\|\w+\|>|[^\s<]+|<")
APART = "\n\n"
"""Between two messages of one kind."""


class Header(NamedTuple):
    """What stands before a message."""

    length: int
    """With <|message|> (characters)."""
    channel: str
    to: str
    """Recipient, without `functions.`; "" is none."""


def read(source: Source, calls: Calls, prose: Prose, thought: Prose, *, goes_on: bool = False) -> Reading[None]:
    """`thought`: where thoughts are told; `prose` itself where they are no other than content. `goes_on`: it begins
    within a message, of content."""
    thought.is_trimmed = True
    while True:
        header = None if goes_on else (yield from _header(source))
        goes_on = False
        kind = prose
        if header is not None and header.to in calls.offered and header.channel != FINAL:
            source.take(header.length)
            prose.is_trimmed = True
            yield from _call(source, header.to, calls)
            if calls.are_enough:
                return
        elif header is not None:
            kind = thought if header.channel == ANALYSIS else prose
            kind.part(APART)
            written = source.take(header.length)
            if header.to:  # nobody who is there
                yield from kind.show(written)
        if not (yield from kind.until(source, END)):
            return
        source.take(len(END))
        yield from begins(source, START)  # waits for more than blanks
        source.text = source.text.lstrip()


def _header(source: Source) -> Reading[Header | None]:
    """That of the message that comes, not read yet; None: there is none, and what comes is content."""
    while True:
        rest = source.text.lstrip()
        is_one = rest.startswith(BEGINNINGS)
        end = source.text.find(MESSAGE, 0, LONGEST)
        if is_one and end >= 0:
            return _parsed(source.text[:end])
        is_too_long = is_one and len(source.text) >= LONGEST
        if source.is_whole or is_too_long or not (is_one or any(one.startswith(rest) for one in BEGINNINGS)):
            return None
        yield None


def _parsed(text: str) -> Header | None:
    """None for words that no header has. The recipient may stand before the channel or behind it."""
    words, said = WORD.findall(text), {"channel": "", "to": ""}
    if words[:1] == [START]:
        if words[1:2] != [ROLE]:
            return None
        words = words[2:]
    while words:
        word, *words = words
        if word == CHANNEL and words and words[0] in CHANNELS and not said["channel"]:
            said["channel"], *words = words
        elif word.startswith(TO) and not said["to"]:
            said["to"] = word.removeprefix(TO).removeprefix(FUNCTIONS)
        elif word == CONSTRAIN and len(words) == 1:
            words = []
        elif words or not word.isalnum():  # what the message is in, such as json, stands last
            return None
    return Header(len(text) + len(MESSAGE), **said)


def _call(source: Source, name: str, calls: Calls) -> Reading[None]:
    yield calls.begin(name)
    if not (yield from begins(source, "{")):
        yield calls.more("{}")
        return
    source.text = source.text.lstrip()
    yield from arguments_of(source, calls)
