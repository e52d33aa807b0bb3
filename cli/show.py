"""Answers on a terminal, as they come: shared by the commands that ask."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..server.request.answer import Answer


def print_growing(growing: "Iterable[list[Answer]]", titles: list[str]) -> None:
    """In the order of `titles`, one a prompt: one sample streams, those after it wait for their turn.

    Titles are shown only when there are several texts to tell apart. The line ends whatever happens.
    """
    from ..server.request.answer import logprob_lines

    current, shown, answers = 0, "", []
    try:
        for answers in growing:
            texts = list(texts_of(answers, titles))
            while current < len(texts):
                title, text, is_whole = texts[current]
                if title and not shown and (text or is_whole):
                    print(title)
                print(text[len(shown) :], end="", flush=True)
                shown = text
                if not is_whole:
                    break
                print(flush=True)
                current, shown = current + 1, ""
    finally:
        if shown:
            print(flush=True)
    for answer in answers:
        for line in logprob_lines(answer):
            print(line, flush=True)


def texts_of(answers: "list[Answer]", titles: list[str]) -> "Iterator[tuple[str, str, bool]]":
    """(title, text, whether it is whole) of every sample; the title is empty when there is but one."""
    for answer, title in zip(answers, titles, strict=True):
        for number, sample in enumerate(answer.samples):
            several = len(answer.samples) > 1
            name = f"--- {title}" + (f" [{number}]" if several else "")
            yield name if several or len(answers) > 1 else "", sample.shown, sample.finish_reason is not None
