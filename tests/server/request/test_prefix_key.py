"""Prefix keys: equal for those who may share cached prefixes, and for nobody else."""

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st
from slipstream.server.request.prefix_key import prefix_key

PARTS = st.tuples(*[st.none() | st.text(max_size=4)] * 2)


@given(PARTS, PARTS)
def test_equal_parts_and_no_others_have_equal_keys(one, other):
    """Whatever characters they have: no salt can be written that takes another tenant's place."""
    assert (prefix_key(*one) == prefix_key(*other)) == (one == other)


def test_who_has_neither_shares_with_everybody():
    assert prefix_key() == prefix_key(None, None) == ""


def test_a_key_tells_nothing_of_its_token():
    """Not even to whoever knows all tokens: another process has other keys."""
    ours = prefix_key(None, "alpha")
    assert "alpha" not in ours
    code = "from slipstream.server.request.prefix_key import prefix_key; print(prefix_key(None, 'alpha'))"
    theirs = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    assert len(theirs) == len(ours)
    assert theirs != ours
