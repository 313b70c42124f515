"""
The whole of: what injection does to one pod of each kind, recorded, so that a change of it is seen in review.

Called from: pytest. ``--update-golden`` writes the records anew.
Must never: accept a record of another outcome beside the right one.
"""

import json
from pathlib import Path
from typing import Any, Final

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from pillion_operator import offline
from pillion_operator.injection import checkpoint_policy, decide
from pillion_operator.settings import Settings
from support import json_patch

CASES: Final = sorted(path.parent for path in Path(__file__).parent.glob("*/pod.yaml"))
SETTINGS: Final = Settings(
    sidecar_image="example/pillion-sidecar:1.0",
    home_url="https://pillion-operator.pillion-system.svc:8443",
    token_audience="pillion.dev",
)
RECORDS: Final = ("patch.json", "warnings.json", "skip.json", "deny.json")
OLDEST, NEWEST = "1.29.0", "1.37.0"
"""Of Kubernetes: the first release with native sidecars on, and the newest that the validator knows."""


def decision(case: Path) -> decide.Decision:
    pod = yaml.safe_load((case / "pod.yaml").read_text())
    path = case / "policy.yaml"
    policy = checkpoint_policy.from_object(yaml.safe_load(path.read_text())) if path.exists() else None
    return decide.inject(pod, policy, SETTINGS)


def records(made: decide.Decision) -> dict[str, Any]:
    """The files that record a decision, with their content."""
    if isinstance(made, decide.Inject):
        return {"patch.json": made.patch} | ({"warnings.json": list(made.warnings)} if made.warnings else {})
    name = "skip.json" if isinstance(made, decide.Skip) else "deny.json"
    return {name: {"reason": made.reason.value, "details": list(made.details)}}


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_decision_is_the_recorded_one(case: Path, update_golden: bool) -> None:
    """A pod of this kind gets the patch and the warnings, or the reason, that its folder holds."""
    texts = {name: json.dumps(content, indent=2) + "\n" for name, content in records(decision(case)).items()}
    if update_golden:
        for name in RECORDS:
            (case / name).unlink(missing_ok=True)
        for name, text in texts.items():
            (case / name).write_text(text)
    assert [each for each in RECORDS if (case / each).exists()] == [each for each in RECORDS if each in texts]
    assert {name: (case / name).read_text() for name in texts} == texts


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_without_a_cluster_the_decision_is_the_same(case: Path) -> None:
    """`pillion-operator inject` does to a pod of a file what the webhook does to it."""
    made, path = decision(case), case / "policy.yaml"
    if isinstance(made, decide.Inject):
        # The webhook cuts a longer one off, and the remedy stands at its end.
        assert all(len(each) <= 240 for each in made.warnings)
    found = [checkpoint_policy.from_object(yaml.safe_load(path.read_text()))] if path.exists() else []
    documents, (outcome,) = offline.inject([yaml.safe_load((case / "pod.yaml").read_text())], found, SETTINGS)
    assert outcome.decision == made
    if isinstance(made, decide.Inject):
        assert documents == [made.pod]


INJECTED: Final = [case for case in CASES if (case / "patch.json").exists()]


@pytest.mark.parametrize("case", INJECTED, ids=[case.name for case in INJECTED])
def test_the_patched_pod_is_one_that_kubernetes_knows(case: Path) -> None:
    """The pod after the recorded patch has no field or type that the schemas of the oldest and newest release refuse."""
    pod = yaml.safe_load((case / "pod.yaml").read_text())
    patched = json_patch.apply(pod, json.loads((case / "patch.json").read_text()))
    for version in (NEWEST,) if {"resources", "resourceClaims"} & pod["spec"].keys() else (OLDEST, NEWEST):
        # Pod-level resources, and claims as they are now, are newer than the oldest release.
        kubernetes_validate.validate(patched, version, strict=True)
