"""What an answer's text may hold beside its content, and its reader."""

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

from ...engine_impl.text.chat import GEMMA, HERMES, LLAMA, MISTRAL
from . import gemma, harmony, hermes, llama, mistral
from .calls import Calls, new_id
from .parts import Brought, Content, Part, Thought
from .source import Prose, Reading, Source, begins, skip

FORMATS = MappingProxyType({HERMES: hermes, LLAMA: llama, MISTRAL: mistral, GEMMA: gemma})
"""How calls are written: each reads them, and names its marks."""


@dataclass(frozen=True, kw_only=True)
class AnswerSyntax:
    """Of one request's answers."""

    tool_format: str | None = None
    """One of FORMATS; None: no calls are looked for."""
    tools: frozenset[str] = frozenset()
    """Names of those that may be called."""
    at_most_one_call: bool = False
    """The answer ends behind its first one."""
    channels: bool = False
    """The answer is written in messages with channels, see harmony.py: these tell calls, thoughts and content apart, so
    that there is neither a tool_format nor think_tags."""
    shows_thoughts: bool = False
    """There: thoughts are content too."""
    goes_on: bool = False
    """There: the prompt ends within a message, and the answer begins with the rest of it."""
    think_tags: tuple[str, str] | None = None
    """What stands around a thought at the answer's beginning; None: no thought is looked for."""
    is_thinking: bool = False
    """The prompt ends within the thought: the answer begins there, without the first tag."""

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that have to be seen, though a vocabulary may have them as control tokens."""
        if self.channels:
            return harmony.MARKS
        return (FORMATS[self.tool_format].MARKS if self.tool_format else ()) + (self.think_tags or ())

    @property
    def is_plain(self) -> bool:
        """Its text is its content."""
        return not self.marks


class AnswerReader:
    """feed() it one answer's text as it comes, and finish() it. Where the pieces end changes nothing but when a part is
    told; no text but blanks and marks is left out."""

    def __init__(self, syntax: AnswerSyntax, make_id: Callable[[], str] = new_id) -> None:
        self._source = Source()
        self._calls = Calls(syntax.tools, at_most_one=syntax.at_most_one_call, make_id=make_id)
        self._reading = _answer(self._source, syntax, self._calls)
        self.is_done = False
        """Whatever follows is not read."""

    @property
    def has_calls(self) -> bool:
        return self._calls.count > 0

    def feed(self, text: str) -> Brought:
        self._source.text += text
        return Brought.of(self._parts())

    def finish(self) -> Brought:
        """What was held back, once nothing more comes."""
        self._source.is_whole = True
        return Brought.of(self._parts())

    def _parts(self) -> list[Part]:
        parts = []
        if not self.is_done:
            for part in self._reading:
                if part is None:
                    return parts
                parts.append(part)
            self.is_done = True
        return parts


def _answer(source: Source, syntax: AnswerSyntax, calls: Calls) -> Reading[None]:
    prose = Prose(Content)
    if syntax.channels:
        thought = prose if syntax.shows_thoughts else Prose(Thought)
        yield from harmony.read(source, calls, prose, thought, goes_on=syntax.goes_on)
        yield from prose.finish()
        return
    if syntax.think_tags is not None:
        yield from _thought(source, *syntax.think_tags, is_begun=syntax.is_thinking)
    if syntax.tool_format is None:
        yield from _everything(source)
        return
    yield from FORMATS[syntax.tool_format].read(source, calls, prose)
    yield from prose.finish()


def _thought(source: Source, opening: str, closing: str, *, is_begun: bool) -> Reading[None]:
    """With the blanks around it."""
    if is_begun or (yield from skip(source, opening)):
        thought = Prose(Thought)
        yield from begins(source, closing)  # waits for more than blanks
        source.text = source.text.lstrip()
        yield from thought.until(source, closing)
        thought.is_trimmed = True
        source.take(len(closing))
        yield from begins(source, closing)
        source.text = source.text.lstrip()


def _everything(source: Source) -> Reading[None]:
    while source.text or not source.is_whole:
        if source.text:
            yield Content(source.take(len(source.text)))
        else:
            yield None
