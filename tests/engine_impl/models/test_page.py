"""docs/models.md against the tables of the code."""

import re
from pathlib import Path

import pytest
from slipstream.engine_impl.models.registry import FAMILIES
from slipstream.engine_impl.models.rope_scaling import READ, SCALINGS

PAGE = (Path(__file__).parents[3] / "docs/models.md").read_text()


def rows(column):
    """The lines of the table whose first column is called so."""
    table = PAGE.partition(f"| {column} |")[2].partition("\n\n")[0]
    return table.split("\n")[2:]


def names(column):
    return [name for row in rows(column) for name in re.findall("`([^`]+)`", row.split("|")[1])]


@pytest.mark.parametrize(("column", "table"), [("model_type", FAMILIES), ("rope_type", SCALINGS)])
def test_the_page_lists_what_there_is(column, table):
    assert sorted(names(column)) == sorted(table)


def test_the_page_lists_the_parameters_of_ropes():
    told = {name.strip() for row in rows("rope_type") for name in row.split("|")[3].split(",")} - {""}
    assert told == READ - {"rope_type", "rope_theta", "partial_rotary_factor"}
