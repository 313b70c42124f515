"""
The whole of: that rules, dashboard and page are about metrics that exist, and that alerts fire when they should and not before.

Called from: pytest. promtool is a part of Prometheus; where it is not, what needs it is skipped.
Must never: list a metric by hand.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from chart import exported
from chart.variants import MONITORING
from support import helm
from support.deadlines import Deadline
from support.release import ROOT

PAGE: Final = ROOT / "docs" / "reference" / "metrics.md"
OF_A_TARGET: Final = {"service", "le"}
"""Labels that a scrape or a histogram adds."""
JOB: Final = {"namespace": "team", "job": "llm", "policy": "hourly"}
AS_LABELS: Final = "{" + ",".join(f'{name}="{value}"' for name, value in JOB.items()) + "}"
FAILED: Final = f'pillion_job_saves_total{AS_LABELS[:-1]},outcome="failed"}}'
BUCKET: Final = 'pillion_admission_duration_seconds_bucket{{le="{}"}}'
HOUR: Final = 60
"""Samples, one a minute."""

CASES: Final[dict[str, dict[str, Any]]] = {
    "a job that commits": {
        "alert": "PillionNoCheckpoint",
        "series": {f"pillion_job_recovery_point_seconds{AS_LABELS}": "0+60x59 0+60x59"},
        "at": {"1h59m": None},
    },
    "a job whose last commit is old": {
        "alert": "PillionNoCheckpoint",
        "series": {f"pillion_job_recovery_point_seconds{AS_LABELS}": "0+60x80"},
        "at": {"1h": None, "1h5m": "Job team/llm has committed nothing for 1h 5m 0s."},
        "labels": JOB,
    },
    "a job that never commits": {
        "alert": "PillionNoFirstCheckpoint",
        "series": {f"pillion_job_pods{AS_LABELS}": "2x80"},
        "at": {"59m": None, "1h1m": "Job team/llm is running but has never committed a checkpoint."},
        "labels": JOB,
    },
    "a job that commits late": {
        "alert": "PillionNoFirstCheckpoint",
        "series": {
            f"pillion_job_pods{AS_LABELS}": "2x80",
            f"pillion_job_recovery_point_seconds{AS_LABELS}": "_x50 0+60x30",
        },
        "at": {"1h10m": None},
    },
    "a load that found one corrupt before the first scrape": {
        "alert": "PillionCorruptCheckpoint",
        "series": {f"pillion_job_checkpoints_refused_total{AS_LABELS}": "_x10 1x120"},
        "at": {"9m": None, "12m": "A load of job team/llm skipped a corrupt checkpoint.", "1h30m": None},
        "labels": JOB,
    },
    "a load that found one corrupt later": {
        "alert": "PillionCorruptCheckpoint",
        "series": {f"pillion_job_checkpoints_refused_total{AS_LABELS}": "0x99 1x120"},
        "at": {"1h30m": None, "1h42m": "A load of job team/llm skipped a corrupt checkpoint.", "2h50m": None},
        "labels": JOB,
    },
    "loads that find nothing corrupt": {
        "alert": "PillionCorruptCheckpoint",
        "series": {f"pillion_job_checkpoints_refused_total{AS_LABELS}": "_x10 0x120"},
        "at": {"12m": None, "1h30m": None},
    },
    "a save that failed before the first scrape": {
        "alert": "PillionSavesFail",
        "series": {FAILED: "_x10 1x60"},
        "at": {"9m": None, "12m": "Saves of job team/llm fail; see the condition Degraded of its policy.", "40m": None},
        "labels": JOB | {"outcome": "failed"},
    },
    "a save that failed later": {
        "alert": "PillionSavesFail",
        "series": {FAILED: "0x29 1x60", FAILED.replace("failed", "committed"): "0+1x89"},
        "at": {
            "25m": None,
            "32m": "Saves of job team/llm fail; see the condition Degraded of its policy.",
            "50m": None,
        },
        "labels": JOB | {"outcome": "failed"},
    },
    "saves that are committed": {
        "alert": "PillionSavesFail",
        "series": {FAILED: "0x60", FAILED.replace("failed", "committed"): "1+1x60"},
        "at": {"2m": None, "30m": None},
    },
    "a storage that is away": {
        "alert": "PillionStorageUnreachable",
        "series": {f"pillion_job_storage_reachable{AS_LABELS}": "1x9 0x20 1x10"},
        "at": {
            "9m": None,
            "11m": None,
            "13m": "The sidecars of job team/llm cannot use their storage.",
            "32m": None,
        },
        "labels": JOB,
    },
    "a storage that was away for a minute": {
        "alert": "PillionStorageUnreachable",
        "series": {f"pillion_job_storage_reachable{AS_LABELS}": "1x9 0x0 1x20"},
        "at": {"10m": None, "13m": None},
    },
    "a webhook that answers in 20 ms": {
        "alert": "PillionWebhookSlow",
        "series": {BUCKET.format("0.02"): "0+60x30", BUCKET.format("0.5"): "0+60x30", BUCKET.format("+Inf"): "0+60x30"},
        "at": {"20m": None},
    },
    "a webhook that takes a second for one in twenty": {
        "alert": "PillionWebhookSlow",
        "series": {
            BUCKET.format("0.5"): "0+60x9 600+57x30",
            BUCKET.format("1.0"): "0+60x39",
            BUCKET.format("+Inf"): "0+60x39",
        },
        "at": {"9m": None, "12m": None, "25m": "One admission in a hundred takes longer than half a second."},
        "labels": {},
    },
    "the first error of the webhook": {
        "alert": "PillionInjectionErrors",
        "series": {'pillion_admission_requests_total{decision="deny",reason="InternalError"}': "_x10 1x60"},
        "at": {
            "9m": None,
            "12m": "The webhook failed with an internal error; its log has the traceback.",
            "40m": None,
        },
        "labels": {"decision": "deny", "reason": "InternalError"},
    },
    "pods that are denied for what they say": {
        "alert": "PillionInjectionErrors",
        "series": {'pillion_admission_requests_total{decision="deny",reason="BadAnnotation"}': "_x10 1+1x60"},
        "at": {"12m": None, "40m": None},
    },
    "a cache that is filled within five minutes": {
        "alert": "PillionPolicyCacheNotSynced",
        "series": {'pillion_policy_cache_synced{service="pillion-webhook"}': "0x4 1x20"},
        "at": {"4m": None, "6m": None, "15m": None},
    },
    "a cache that is not filled": {
        "alert": "PillionPolicyCacheNotSynced",
        "series": {
            'pillion_policy_cache_synced{service="pillion-webhook"}': "0x20",
            'pillion_policy_cache_synced{service="pillion-controller"}': "0x20",
        },
        "at": {
            "4m": None,
            "6m": "A replica of the webhook has not listed the policies; each admission asks the API server.",
        },
        "labels": {"service": "pillion-webhook"},
    },
    "a leader and one that waits": {
        "alert": "PillionNoLeader",
        "series": {'pillion_leader{pod="a"}': "1x20", 'pillion_leader{pod="b"}': "0x20"},
        "at": {"10m": None},
    },
    "no leader": {
        "alert": "PillionNoLeader",
        "series": {'pillion_leader{pod="a"}': "1x5 0x20", 'pillion_leader{pod="b"}': "0x25"},
        "at": {
            "7m": None,
            "9m": "No controller holds the Lease; running jobs continue, but their Checkpoint objects are not updated.",
        },
        "labels": {},
    },
    "nobody who could lead": {
        "alert": "PillionNoLeader",
        "series": {'pillion_leader{pod="a"}': "1x5"},
        "at": {
            "5m": None,
            "15m": "No controller holds the Lease; running jobs continue, but their Checkpoint objects are not updated.",
        },
        "labels": {},
    },
    "no webhook, while there is a controller": {
        "alert": "PillionWebhookGone",
        "series": {
            'pillion_policy_cache_synced{service="pillion-webhook"}': "1x5",
            'pillion_policy_cache_synced{service="pillion-controller"}': "0x30",
        },
        "at": {
            "12m": None,
            "20m": "No replica of the webhook answers Prometheus; pods that opt in are probably refused or start"
            " without a sidecar.",
        },
        "labels": {"service": "pillion-webhook"},
    },
    "a webhook that is being rolled out": {
        "alert": "PillionWebhookGone",
        "series": {
            'pillion_policy_cache_synced{service="pillion-webhook",pod="a"}': "1x5",
            'pillion_policy_cache_synced{service="pillion-webhook",pod="b"}': "_x8 1x20",
        },
        "at": {"7m": None, "20m": None},
    },
    "a certificate that is renewed": {
        "alert": "PillionCertificateExpires",
        "series": {
            'pillion_certificate_expiry_timestamp_seconds{pod="a"}': f"{30 * 86400}x{30 * HOUR}",
            'pillion_certificate_expiry_timestamp_seconds{pod="waits"}': f"0x{30 * HOUR}",
        },
        "at": {"1h": None, "29h": None},
    },
    "a certificate of eight days": {
        "alert": "PillionCertificateExpires",
        "series": {
            'pillion_certificate_expiry_timestamp_seconds{pod="a"}': f"{8 * 86400}x{30 * HOUR}",
            'pillion_certificate_expiry_timestamp_seconds{pod="waits"}': f"0x{30 * HOUR}",
        },
        "at": {"1h": None, "25h": "A certificate expires within a week; its renewal is overdue."},
        "labels": {},
    },
}
"""By what happens: series, a sample a minute; and at which moment the alert says what. None: it is silent."""


@pytest.fixture
def promtool() -> str:
    """The program, or a reason to skip."""
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("needs promtool, a part of Prometheus (Debian: prometheus)")
    return found


def groups() -> list[dict[str, Any]]:
    """The groups of alerts, as the chart renders them."""
    found: list[dict[str, Any]] = helm.one(helm.render(MONITORING), "PrometheusRule", "pillion")["spec"]["groups"]
    return found


def alerts() -> dict[str, dict[str, Any]]:
    """The alerts by name."""
    return {rule["alert"]: rule for group in groups() for rule in group["rules"]}


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana's sidecar finds it."""
    found: dict[str, Any] = json.loads(
        helm.one(helm.render(MONITORING), "ConfigMap", "pillion-dashboard")["data"]["pillion.json"]
    )
    return found


def queries() -> Iterator[str]:
    """Every expression of rules and dashboard."""
    yield from (rule["expr"] for rule in alerts().values())
    for panel in dashboard()["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]


def test_prometheus_takes_the_rules(promtool: str, tmp_path: Path) -> None:
    """`promtool check rules` finds as many rules as the chart renders, and nothing wrong with them."""
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": groups()}))
    said = _run(promtool, "check", "rules", str(tmp_path / "rules.yaml"))
    assert f"{len(alerts())} rules found" in said


@pytest.mark.parametrize("case", CASES)
def test_an_alert_fires_when_it_should_and_not_before(case: str, promtool: str, tmp_path: Path) -> None:
    """Prometheus itself evaluates the rules over the series of a story: the alert is silent, then says what people read."""
    story = CASES[case]
    rule = alerts()[story["alert"]]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": groups()}))
    firing = {"exp_labels": story.get("labels", {}) | rule["labels"]}
    test = {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in story["series"].items()],
                "alert_rule_test": [
                    {
                        "eval_time": at,
                        "alertname": story["alert"],
                        "exp_alerts": [firing | {"exp_annotations": {"summary": text}}] if text else [],
                    }
                    for at, text in story["at"].items()
                ],
            }
        ],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
    assert "SUCCESS" in _run(promtool, "test", "rules", str(tmp_path / "test.yaml"))


def test_each_alert_has_a_story_in_which_it_fires_and_one_in_which_it_never_does() -> None:
    """An alert that nobody has seen fire may never do so; one that was only seen to fire may always do so."""
    fires = {case["alert"] for case in CASES.values() if any(case["at"].values())}
    never = {case["alert"] for case in CASES.values() if not any(case["at"].values())}
    assert fires == never == set(alerts())


def test_the_dashboard_shows_what_a_save_costs_and_what_a_loss_would_cost() -> None:
    """Stall, queueing, lag, throughput and recovery point have a panel each."""
    asked = " ".join(target["expr"] for panel in dashboard()["panels"] for target in panel["targets"])
    for name in (
        "stall_seconds_total",
        "queue_seconds_total",
        "lag_steps",
        "persisted_bytes_total",
        "recovery_point_seconds",
    ):
        assert f"pillion_job_{name}" in asked


def test_the_picture_in_the_page_is_of_this_dashboard() -> None:
    """Its panels are those of the dashboard, in this order, and each of them had data."""
    drawn = (PAGE.parent / "dashboard.svg").read_text()
    assert re.findall(r'font-weight="bold">([^<]*)<', drawn) == [panel["title"] for panel in dashboard()["panels"]]
    assert "no data" not in drawn


def test_every_alert_says_how_bad_it_is_and_what_happened() -> None:
    """Each alert has one of two severities, and a sentence for people."""
    for name, rule in alerts().items():
        assert name.startswith("Pillion")
        assert rule["labels"]["severity"] in ("warning", "critical"), name
        assert rule["annotations"]["summary"].endswith("."), name


def test_the_bound_of_the_recovery_point_is_that_of_the_values() -> None:
    """`recoveryPointSeconds` is in the alerts about it, also when it is a large number."""
    values = {"monitoring": {"prometheusRule": {"enabled": True, "recoveryPointSeconds": 86400000}}}
    found = helm.one(helm.render(values), "PrometheusRule", "pillion")["spec"]["groups"]
    rules = {rule["alert"]: rule for group in found for rule in group["rules"]}
    assert rules["PillionNoCheckpoint"]["expr"].endswith("> 86400000")
    assert rules["PillionNoFirstCheckpoint"]["for"] == "86400000s"


def test_rules_and_dashboard_ask_for_metrics_that_exist() -> None:
    """Every series that is named in a query is one of the operator's."""
    series = {name for each in exported.of_operator() for name in each.series}
    asked = {name for query in queries() for name in re.findall(rf"\b{exported.OURS}\w+", query)}
    assert asked
    assert sorted(asked - series) == []


def test_rules_and_dashboard_ask_for_labels_that_exist() -> None:
    """Every label that a series is selected by is one that it has, and what is grouped by is one of the query's series'."""
    labels = {name: set(each.labels) | OF_A_TARGET for each in exported.of_operator() for name in each.series}
    selected = [
        (name, label)
        for query in queries()
        for name, inside in re.findall(rf"\b({exported.OURS}\w+)\{{([^}}]*)\}}", query)
        for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", inside)
    ]
    assert selected
    assert [(name, label) for name, label in selected if label not in labels[name]] == []
    for query in queries():
        names = re.findall(rf"\b{exported.OURS}\w+", query)
        grouped = {word for each in re.findall(r"(?:by|on) \(([^)]*)\)", query) for word in each.split(", ")}
        assert all(grouped <= labels[name] for name in names), query


def test_panels_have_ids_and_places_of_their_own() -> None:
    """No two panels share an id or a place, and each has a title and a query."""
    panels = dashboard()["panels"]
    ids = [each["id"] for each in panels]
    assert len(ids) == len(set(ids))
    for each in panels:
        assert each["title"]
        assert each["targets"]
    cells = [
        (x, y)
        for place in (each["gridPos"] for each in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_prometheus_finds_the_port_that_the_services_have() -> None:
    """The ServiceMonitor selects the Services of the release, by a port that both Deployments' Services name."""
    objects = helm.render(MONITORING)
    spec = helm.one(objects, "ServiceMonitor", "pillion")["spec"]
    (endpoint,) = spec["endpoints"]
    scraped = {
        each["metadata"]["name"]
        for each in helm.of_kind(objects, "Service")
        if spec["selector"]["matchLabels"].items() <= each["metadata"]["labels"].items()
        and endpoint["port"] in {port["name"] for port in each["spec"]["ports"]}
    }
    assert scraped == {"pillion-webhook", "pillion-controller"}
    assert endpoint["honorLabels"] is True


@pytest.mark.parametrize("section", ["Operator", "Sidecar"])
def test_the_page_lists_the_metrics_that_exist(section: str) -> None:
    """The page has a row for each metric, with its type and its labels, and for no other."""
    found = exported.of_operator() if section == "Operator" else exported.of_sidecar()
    written = set(_metrics_of(section))
    assert written == {(each.name, each.kind, each.labels) for each in found}
    assert len(written) == len(list(_rows(section)))


def test_the_page_lists_the_alerts_that_exist() -> None:
    """The page has a row for each alert, with its severity, and for no other."""
    written = {name.strip("`"): severity for name, severity, _ in _rows("Alerts")}
    assert written == {name: rule["labels"]["severity"] for name, rule in alerts().items()}


def _metrics_of(section: str) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    for name, kind, labels, meaning in _rows(section):
        assert meaning, name
        yield name.strip("`"), kind, tuple(re.findall(r"`(\w+)`", labels))


def _rows(section: str) -> Iterator[list[str]]:
    text = PAGE.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    table = [line for line in text.splitlines() if line.startswith("|")]
    # The first two are the head.
    yield from ([cell.strip() for cell in line.strip("|").split("|")] for line in table[2:])


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=Deadline.PROCESS_START.s)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
