"""The rules, as promtool judges them; that none is without a case in which it fires, one in which it is silent, and its
section for the operator.
"""

import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from tests.conftest import CHECKOUT
from vllm_unified.cli import cli

pytestmark = pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool")

RULES = CHECKOUT / "monitoring" / "rules"
OPERATIONS = (CHECKOUT / "docs" / "operations.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+)\n\n((?:(?!## ).*\n)*)", OPERATIONS, re.MULTILINE))


def rules(file: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load((RULES / file).read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules("alerts.yml")}
RECORDED = {rule["record"]: rule for rule in rules("recording.yml")}


def cases(kind: str) -> list[dict[str, Any]]:
    """`kind`: alert_rule_test or promql_expr_test."""
    files = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (RULES / "tests").glob("*.yml")]
    return [case for file in files for test in file["tests"] for case in test.get(kind, [])]


def promtool(*arguments: Any) -> str:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_rules_are_right() -> None:
    files = sorted(RULES.glob("*.yml"))
    assert len(files) == 2
    assert promtool("check", "rules", "--lint=all", "--lint-fatal", *files).count("SUCCESS") == 2


def test_the_configuration_is_right() -> None:
    promtool("check", "config", "--syntax-only", CHECKOUT / "monitoring" / "prometheus.yml")


def test_every_case() -> None:
    files = sorted((RULES / "tests").glob("*.yml"))
    assert promtool("test", "rules", *files).count("SUCCESS") == len(files)


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_fires_in_one_case_and_is_silent_in_another(alert: str) -> None:
    fires = {bool(case["exp_alerts"]) for case in cases("alert_rule_test") if case["alertname"] == alert}
    assert fires == {True, False}


@pytest.mark.parametrize("record", RECORDED)
def test_every_recorded_rule_has_a_value_in_one_case_and_none_in_another(record: str) -> None:
    has_value = {bool(case["exp_samples"]) for case in cases("promql_expr_test") if case["expr"] == record}
    assert has_value == {True, False}


def test_every_recorded_rule_is_of_use() -> None:
    asked = " ".join(str(rule["expr"]) for rule in (*ALERTS.values(), *RECORDED.values()))
    assert [record for record in RECORDED if record not in asked] == []


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_tells_who_is_to_act_and_how(alert: str) -> None:
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    assert "$value" in rule["annotations"]["description"]
    assert rule["annotations"]["runbook"] == f"docs/operations.md#{alert.lower()}"


def test_every_alert_has_its_section_and_every_section_its_alert() -> None:
    assert list(SECTIONS) == list(ALERTS)
    for alert, section in SECTIONS.items():
        assert re.findall(r"^\*\*(Means|Look)", section, re.MULTILINE) == ["Means", "Look"], alert
        assert re.search(r"\*\*[Dd]o", section), alert


def test_the_operators_commands_and_links_lead_somewhere() -> None:
    verbs = set(re.findall(r"^verb_(\w+)\(\)", (CHECKOUT / "deploy.sh").read_text(), re.MULTILINE))
    told = set(re.findall(r"\./deploy\.sh\s+(\w+)", OPERATIONS))
    assert told
    assert told <= verbs | set(cli.commands)
    assert set(re.findall(r"`\./deploy\.sh (?:restart|start|stop)\s([^`]+)`", OPERATIONS)) == {
        "MODEL"
    }  # no program else
    links = set(re.findall(r"\]\(#(\w+)\)", OPERATIONS))
    assert links <= {alert.lower() for alert in ALERTS}
