"""One answer's text: stop strings wait for min_tokens."""

import pytest
from slipstream.server.delivery.delivery import Text

from tests.fakes import BEFORE_LONG, LONG_TEXT, FakeTokenizer


def shown(tokens, stops, min_tokens):
    """(the text, tokens fed until a stop string was found)"""
    text, pieces = Text(FakeTokenizer().stream(), stops, min_tokens), []
    for token_id in tokens:
        pieces.append(text.feed(token_id).text)
        if text.is_stopped:
            break
    return "".join(pieces) + text.finish().text, len(pieces)


@pytest.mark.parametrize(
    ("stops", "min_tokens", "expected"),
    [
        (("c",), 0, ("ab", 3)),
        (("c",), 2, ("ab", 3)),
        (("c",), 3, ("abcab", 6)),
        (("c",), 9, ("abcabcabc", 9)),
        (("c",), 20, ("abcabcabc", 9)),
        (("bc",), 1, ("a", 3)),
        (("bc",), 2, ("abca", 6)),
        (("bca", "cab"), 3, ("abca", 7)),
        ((), 3, ("abcabcabc", 9)),
    ],
)
def test_a_stop_string_lies_wholly_behind_the_first_tokens(stops, min_tokens, expected):
    assert shown(b"abcabcabc", stops, min_tokens) == expected


def test_a_character_belongs_to_the_token_that_completes_it():
    """The euro sign's last byte is the fifth token."""
    tokens = range(BEFORE_LONG + 1, BEFORE_LONG + 1 + len(LONG_TEXT.encode()))
    assert shown(tokens, ("€",), 4) == ("é", 5)
    assert shown(tokens, ("€",), 5) == (LONG_TEXT, 9)
