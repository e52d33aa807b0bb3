"""JSON that comes in pieces: how far a text is the beginning of a JSON object."""

import re

MAX_DEPTH = 64
"""How deep objects and lists may lie within each other (levels)."""

BLANKS = " \t\n\r"
PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
"""Of a string, what needs no look."""
LITERALS = {"t": "rue", "f": "alse", "n": "ull"}
ENDS = {"}": "{", "]": "["}

DIGITS = dict.fromkeys("0123456789")
NUMBER: dict[str, dict[str, str]] = {
    # where a number has come to, and by which character it gets where
    "-": dict.fromkeys("123456789", "int") | {"0": "zero"},
    "zero": {".": "point", "e": "e", "E": "e"},
    "int": dict.fromkeys(DIGITS, "int") | {".": "point", "e": "e", "E": "e"},
    "point": dict.fromkeys(DIGITS, "fraction"),
    "fraction": dict.fromkeys(DIGITS, "fraction") | {"e": "e", "E": "e"},
    "e": dict.fromkeys(DIGITS, "power") | {"+": "sign", "-": "sign"},
    "sign": dict.fromkeys(DIGITS, "power"),
    "power": dict.fromkeys(DIGITS, "power"),
}
WHOLE_NUMBERS = {"zero", "int", "fraction", "power"}


class JsonText:
    """One object. scan() its text, as much as there is."""

    def __init__(self, *, within: bool = False) -> None:
        """`within`: it begins behind a value of the object, whose beginning was read elsewhere."""
        self.is_whole = self.is_broken = False
        self._open = ["{"] if within else []
        self._state = "after" if within else "begin"
        self._is_key, self._left = False, ""  # of a string; of a literal or an escape

    def scan(self, text: str, at: int) -> int:
        """From `at` on, where it stopped before. Returns how far it came: to the text's end, to the object's, or to a
        character that cannot be there."""
        while at < len(text) and not self.is_whole:
            if self._state == "string":
                at = self._plain(text, at)
                if at == len(text):
                    break
            if not self._take(text[at]):
                self.is_broken = True
                break
            at += 1
        return at

    def _plain(self, text: str, at: int) -> int:
        found = PLAIN.match(text, at)
        assert found is not None
        return found.end()

    def _take(self, char: str) -> bool:
        """Whether it can be there."""
        match self._state:
            case "string":
                return self._in_string(char)
            case "escape":
                return self._escaped(char)
            case "hex":
                self._left = self._left[1:]
                self._state = "hex" if self._left else "string"
                return char in "0123456789abcdefABCDEF"
            case "literal":
                expected, self._left = self._left[0], self._left[1:]
                self._state = "literal" if self._left else "after"
                return char == expected
            case state if state in NUMBER:
                if char in NUMBER[state]:
                    self._state = NUMBER[state][char]
                    return True
                if state not in WHOLE_NUMBERS:
                    return False
                self._state = "after"
        return char in BLANKS or self._between(char)

    def _in_string(self, char: str) -> bool:
        if char == '"':
            self._state = "colon" if self._is_key else "after"
            return True
        self._state = "escape"
        return char == "\\"

    def _escaped(self, char: str) -> bool:
        self._state, self._left = ("hex", "uuuu") if char == "u" else ("string", "")
        return char in '"\\/bfnrtu'

    def _between(self, char: str) -> bool:
        """A character between tokens, or a token's first."""
        match self._state, char:
            case (("begin" | "value" | "first item"), "{"):
                return self._begin(char, "first key")
            case (("value" | "first item"), "["):
                return self._begin(char, "first item")
            case (("first key" | "key"), '"'):
                self._state, self._is_key = "string", True
            case (("value" | "first item"), '"'):
                self._state, self._is_key = "string", False
            case "colon", ":":
                self._state = "value"
            case "after", ",":
                self._state = "key" if self._open[-1] == "{" else "value"
            case (("after" | "first key"), "}"):
                return self._end(char)
            case (("after" | "first item"), "]"):
                return self._end(char)
            case (("value" | "first item"), _) if char in LITERALS:
                self._state, self._left = "literal", LITERALS[char]
            case (("value" | "first item"), "-"):
                self._state = "-"
            case (("value" | "first item"), _) if char in NUMBER["-"]:
                self._state = NUMBER["-"][char]
            case _:
                return False
        return True

    def _begin(self, char: str, state: str) -> bool:
        self._open.append(char)
        self._state = state
        return len(self._open) <= MAX_DEPTH

    def _end(self, char: str) -> bool:
        if self._open[-1] != ENDS[char]:
            return False
        self._open.pop()
        self._state, self.is_whole = "after", not self._open
        return True
