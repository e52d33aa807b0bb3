"""Alerts and dashboard ask for what the server tells."""

import json
import re
import subprocess

import pytest
import yaml

from tests.deploy.manifests import ROOT

MONITORING = ROOT / "deploy" / "monitoring"
(GROUP,) = yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"]
RULES = {rule["alert"]: rule for rule in GROUP["rules"]}
TESTS = yaml.safe_load((MONITORING / "rules_test.yaml").read_text())["tests"]
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
PANELS = DASHBOARD["panels"]
QUERIES = {f"{panel['title']} {target['refId']}": target["expr"] for panel in PANELS for target in panel["targets"]}
EXPRESSIONS = QUERIES | {name: rule["expr"] for name, rule in RULES.items()}

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
FUNCTIONS = {
    *("sum", "count", "max", "by", "without", "and", "rate", "increase", "deriv", "histogram_quantile"),
    *("max_over_time", "min_over_time"),
}  # fmt: skip
GIVEN_BY_PROMETHEUS = {"job", "instance"}


def asked(expression: str) -> list[tuple[str, dict[str, str]]]:
    """The series that an expression selects: names, and labels with the value that they must have."""
    bare = re.sub(r"\b(by|without) \([^)]*\)", "", expression)
    found = re.findall(rf"(?<![\w:$.])({NAME})(?:\{{(.*?)\}})?", re.sub(r"\[.*?\]", "", bare))
    return [(name, dict(re.findall(r'(\w+)=~?"(.*?)"', labels))) for name, labels in found if name not in FUNCTIONS]


def test_series_of_an_expression_are_found():
    expression = 'max by (a) (rate(b:c{d="e",f=~"$f"}[5m])) / sum without (g) (h) > 0.95 * i_j'
    assert asked(expression) == [("b:c", {"d": "e", "f": "$f"}), ("h", {}), ("i_j", {})]


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_every_series_is_in_a_real_scrape(where, series):
    names = asked(EXPRESSIONS[where])
    assert names
    for name, labels in names:
        assert name in series
        own = {label: value for label, value in labels.items() if label not in GIVEN_BY_PROMETHEUS}
        if own:
            assert any(own.items() <= one.items() for one in series[name]), f"{name} has no series with {own}"


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_labels_to_group_by_are_there(where, series):
    labels = {one for group in re.findall(r"(?:by|without) \((.*?)\)", EXPRESSIONS[where]) for one in group.split(", ")}
    known = {label for name, _ in asked(EXPRESSIONS[where]) for one in series[name] for label in one}
    assert labels - GIVEN_BY_PROMETHEUS - {"kind"} <= known  # CPUs tell no memory of their devices


def test_every_alert_is_tested_both_ways():
    cases = [(case["alertname"], bool(case["exp_alerts"])) for test in TESTS for case in test["alert_rule_test"]]
    assert set(cases) >= {(name, fires) for name in RULES for fires in (True, False)}
    assert {name for name, _ in cases} == set(RULES)


def test_panels_have_a_place_each():
    taken = [
        (x, y)
        for place in (panel["gridPos"] for panel in PANELS)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(taken) == len(set(taken))
    assert max(x for x, _ in taken) < 24
    assert [panel["id"] for panel in PANELS] == list(range(1, len(PANELS) + 1))


@pytest.mark.tools
def test_rules_hold_their_own_tests():
    for words in (["check", "rules", "rules.yaml"], ["test", "rules", "rules_test.yaml"]):
        done = subprocess.run(["promtool", *words], cwd=MONITORING, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.tools
def test_prometheus_reads_the_dashboards_queries(tmp_path):
    queries = [query.replace("$__rate_interval", "5m") for query in QUERIES.values()]
    rules = [{"record": f"dashboard:{number}", "expr": query} for number, query in enumerate(queries)]
    (tmp_path / "rules.yaml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", "rules.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
