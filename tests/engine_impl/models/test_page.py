"""docs/models.md against the tables of the code."""

import re
from pathlib import Path

import pytest
from slipstream.engine_impl.checkpoints.gguf import TURN_ENDS
from slipstream.engine_impl.checkpoints.gguf_architectures import ARCHITECTURES
from slipstream.engine_impl.checkpoints.merges import SPLITS
from slipstream.engine_impl.models.registry import FAMILIES, NOT_THERE
from slipstream.engine_impl.models.rope_scaling import READ, SCALINGS
from slipstream.engine_impl.text.pre_tokenizers import PRE_TOKENIZERS

PAGE = (Path(__file__).parents[3] / "docs/models.md").read_text()


def rows(column):
    """The lines of the table whose first column is called so."""
    table = PAGE.partition(f"| {column} |")[2].partition("\n\n")[0]
    return table.rstrip("\n").split("\n")[2:]


def names(column):
    return [name for row in rows(column) for name in re.findall("`([^`]+)`", row.split("|")[1])]


TABLES = {
    "model_type": FAMILIES,
    "missing model_type": NOT_THERE,
    "rope_type": SCALINGS,
    "general.architecture": ARCHITECTURES,
    "tokenizer.ggml.pre": PRE_TOKENIZERS,
    "tokenizer_class": SPLITS,
}


@pytest.mark.parametrize(("column", "table"), TABLES.items())
def test_the_page_lists_what_there_is(column, table):
    assert sorted(names(column)) == sorted(table)


def test_the_page_lists_the_parameters_of_ropes():
    told = {name.strip() for row in rows("rope_type") for name in row.split("|")[3].split(",")} - {""}
    assert told == READ - {"rope_type", "rope_theta", "partial_rotary_factor"}


def test_the_page_tells_what_each_architecture_becomes():
    told = {row.split("`")[1]: row.split("`")[3] for row in rows("general.architecture")}
    assert told == {name: architecture.model_type for name, architecture in ARCHITECTURES.items()}


def test_the_page_tells_why_a_family_is_missing():
    for row in rows("missing model_type"):
        _, these, why, _ = row.split("|")
        for name in re.findall("`([^`]+)`", these):
            assert NOT_THERE[name] == why.strip()


def test_the_page_lists_the_ends_of_turns():
    assert [end for end in TURN_ENDS if f"`{end}`" not in PAGE] == []
