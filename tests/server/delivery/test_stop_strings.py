"""The text is cut at the first stop string, wherever the pieces begin and end."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slipstream.server.delivery.delivery import Text
from slipstream.server.delivery.stop_strings import StopStrings

from tests.fakes import FakeTextStream, FakeTokenizer


def stream(pieces, stops):
    """What is shown, piece by piece, and at the end."""
    found = StopStrings(stops)
    return [found.feed(piece) for piece in pieces] + [found.finish()], found.met is not None


def cut(text, stops):
    """By hand: the stop string that is complete first, of two that end together the longer."""
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(ends)[1]] if ends else text


@pytest.mark.parametrize(
    ("pieces", "stops", "shown"),
    [
        (["abc"], [], ["abc", ""]),
        (["ab", "c"], ["x"], ["ab", "c", ""]),
        (["a#", "#b"], ["##"], ["a", "", ""]),
        (["a#", "b"], ["##"], ["a", "#b", ""]),
        (["a#"], ["##"], ["a", "#"]),
        (["one", " STOP", " two", "three"], ["STOP"], ["one", " ", "", "", ""]),
        (["aa", "aac"], ["aac"], ["", "aa", ""]),
        (["aaab"], ["aab"], ["a", ""]),
        (["xabcd"], ["abcd", "c"], ["xab", ""]),
        (["xab", "cd"], ["abcd", "c"], ["x", "ab", ""]),
        (["xbc"], ["c", "bc"], ["x", ""]),
        (["\n", "\n", "x"], ["\n\n"], ["", "", "", ""]),
    ],
)
def test_by_hand(pieces, stops, shown):
    assert stream(pieces, stops)[0] == shown


LETTERS = st.text(alphabet="ab€", max_size=12)


@settings(deadline=None, max_examples=300)
@given(st.lists(LETTERS, max_size=8), st.lists(st.text(alphabet="ab€", min_size=1, max_size=4), max_size=4))
def test_any_pieces_show_the_text_up_to_the_first_stop(pieces, stops):
    shown, found = stream(pieces, stops)
    text = "".join(pieces)
    assert "".join(shown) == cut(text, stops)
    assert found == any(stop in text for stop in stops)
    assert not any(stop in "".join(shown) for stop in stops)


@settings(deadline=None, max_examples=300)
@given(
    st.text(alphabet="ab é€😀", max_size=12),
    st.lists(st.text(alphabet="ab é€😀", min_size=1, max_size=3), max_size=3),
)
def test_a_token_a_byte_gives_whole_characters_and_the_same_cut(text, stops):
    """One token a byte: characters and stop strings go across tokens all the time."""
    answer, shown = Text(ByteStream(ByteTokenizer()), tuple(stops)), []
    for byte in text.encode():
        shown.append(answer.feed(byte).text)
        if answer.is_stopped:
            break
    shown.append(answer.finish().text)
    assert "".join(shown) == cut(text, stops)
    assert "\ufffd" not in "".join(shown)


class ByteTokenizer(FakeTokenizer):
    def decode(self, token_ids):
        return bytes(token_ids).decode(errors="replace")


class ByteStream(FakeTextStream):
    pass


def test_a_character_that_is_never_whole_is_told_at_the_end():
    answer = Text(ByteStream(ByteTokenizer()), ("x",))
    assert [answer.feed(byte).text for byte in "a€".encode()[:-1]] == ["a", "", ""]
    assert answer.finish().text == "\ufffd"
