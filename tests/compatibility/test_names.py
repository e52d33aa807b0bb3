"""What users rely on stays: the wire's fields, the metrics' names, the command line's flags.

The files beside this one list what there is. More may come; what is listed may go only with a major release.
"""

import json
import re
from pathlib import Path

import pytest
from slipstream.cli import main as cli
from slipstream.protos import orchestrator_pb2 as pb
from slipstream.server.observe.metrics import Metrics
from slipstream.server.observe.routers import RouterNames

HERE = Path(__file__).parent
WIRE_FIELDS = json.loads((HERE / "wire_fields.json").read_text())
"""message: {field: [number, type as in google.protobuf.FieldDescriptor]}"""
WIRE_ENUMS = json.loads((HERE / "wire_enums.json").read_text())
FLAGS = json.loads((HERE / "flags.json").read_text())
METRICS = (HERE / "metrics.txt").read_text().split()


@pytest.mark.parametrize("name", WIRE_FIELDS)
def test_fields_of_the_wire_keep_their_numbers_and_types(name):
    message = pb.DESCRIPTOR.pool.FindMessageTypeByName(name)
    today = {field.name: [field.number, field.type] for field in message.fields}
    assert {field: today.get(field) for field in WIRE_FIELDS[name]} == WIRE_FIELDS[name]


@pytest.mark.parametrize("name", WIRE_ENUMS)
def test_values_of_enums_keep_their_numbers(name):
    values = pb.DESCRIPTOR.pool.FindEnumTypeByName(name).values_by_name
    assert {value: values[value].number for value in WIRE_ENUMS[name]} == WIRE_ENUMS[name]


def test_metrics_keep_their_names():
    metrics = Metrics()
    metrics.watch(queue_depth=lambda: 0, slots_in_use=lambda: 0, slots=1, pages=dict)
    metrics.watch_for_routers(
        RouterNames(model="m", page_rows=1, waiting=int, running=int, slots_used=float, pages=dict)
    )
    metrics.watch_devices([], lambda: 0)
    assert set(METRICS) <= {family.name for family in metrics.registry.collect()}


@pytest.mark.parametrize("command", FLAGS)
def test_commands_keep_their_flags(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.parse([*command.split(), "--help"])
    assert set(FLAGS[command]) <= set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", capsys.readouterr().out))
