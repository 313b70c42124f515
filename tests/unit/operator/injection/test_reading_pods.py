"""
The whole of: what injection reads out of a pod: its job, its annotations, what it may override; and what it answers.

Called from: pytest.
Must never: compare whole messages; only what a reader needs from them.
"""

import json
from typing import Any

import pytest

from pillion.errors import SettingsError
from pillion.wire import policy
from pillion_operator import settings
from pillion_operator.injection import (
    annotations,
    checkpoint_policy,
    decide,
    overrides,
    quantities,
    reasons,
    status,
)
from support import reports

IMAGE = "example/pillion-sidecar:1"
SPEC: dict[str, Any] = {
    "trigger": {"periodSteps": 10},
    "staging": {"sizeLimit": "8Gi"},
    "storage": {"persistentVolumeClaim": {"claimName": "checkpoints"}},
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("policy", "No_Such"),
        ("inject", "no"),
        ("client", "injected"),
        ("containers", "a,,b"),
        ("containers", "a,a"),
        ("job-id", ".."),
        ("job-id", "a/b"),
        ("job-id", "x" * 254),
        ("sidecar-image", "a b"),
        ("job_id", "x"),
    ],
)
def test_a_bad_annotation_is_named_with_what_is_allowed(name: str, value: str) -> None:
    """One problem, which begins with the annotation."""
    _, problems = annotations.parse({f"pillion.dev/{name}": value})
    assert len(problems) == 1
    assert problems[0].startswith(f"pillion.dev/{name}: ")


def test_annotations_of_others_are_none_of_our_business() -> None:
    """Only our own prefix is read."""
    values, problems = annotations.parse({"example.com/inject": "no", "pillion.dev/policy": "llm"})
    assert problems == []
    assert (values.policy, values.inject) == ("llm", True)


def decided(**values: str) -> decide.Decision:
    given = {f"pillion.dev/{name.replace('_', '-')}": value for name, value in values.items()}
    metadata = {"name": "train", "annotations": {"pillion.dev/policy": "llm"} | given}
    pod = {"metadata": metadata, "spec": {"containers": [{"name": "trainer"}]}}
    return decide.inject(pod, checkpoint_policy.from_object(SPEC), settings.Settings(sidecar_image=IMAGE))


@pytest.mark.parametrize(
    "values",
    [
        {"staging_size_limit": "9Gi"},
        {"staging_size_limit": ""},
        {"sidecar_memory_limit": "2Gi"},
        {"sidecar_memory_request": "2Gi"},
        {"sidecar_memory_limit": "512Mi"},
        {"sidecar_cpu_limit": "100m"},
        {"sidecar_cpu_request": "0"},
        {"sidecar_image": "example/pillion-sidecar-of-mine:1"},
        {"sidecar_image": "other/pillion-sidecar:1"},
    ],
)
def test_an_override_above_the_policy_is_refused(values: dict[str, str]) -> None:
    """The policy is the ceiling, and requests stay below limits; the annotation that is to blame is named."""
    made = decided(**values)
    assert isinstance(made, decide.Deny)
    assert made.reason is reasons.Reason.BAD_ANNOTATION
    assert [each.split(":")[0] for each in made.details] == [f"pillion.dev/{next(iter(values)).replace('_', '-')}"]


@pytest.mark.parametrize(
    "values",
    [
        {"staging_size_limit": "1Gi"},
        {"sidecar_memory_limit": "512Mi", "sidecar_memory_request": "256Mi"},
        {"sidecar_cpu_limit": "16"},
        {"sidecar_image": "example/pillion-sidecar@sha256:" + "0" * 64},
    ],
)
def test_an_override_within_the_policy_is_taken(values: dict[str, str]) -> None:
    """What the policy leaves open, or more, a pod may have less of."""
    assert isinstance(decided(**values), decide.Inject)


def test_repositories_are_compared_without_tag_and_digest() -> None:
    """A port in the address is no tag."""
    assert overrides.repository("host:5000/a/b") == "host:5000/a/b"
    assert overrides.repository("host:5000/a/b:1@sha256:00") == "host:5000/a/b"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 2}', '{"version": 1}', '{"version": 1, "before": 3}'])
def test_a_status_that_cannot_be_read_is_no_status(text: str) -> None:
    """Anyone can write the annotation; nothing in it makes injection fail."""
    assert status.read({"metadata": {"annotations": {annotations.STATUS: text}}}) is None


def test_a_status_of_a_newer_release_is_read_without_its_new_fields() -> None:
    """While releases change, one replica sees pods that another has injected; a field that it does not know costs it nothing."""
    document = json.loads(reports.pod()["metadata"]["annotations"][annotations.STATUS])
    known = status.read(reports.pod())
    newer = document | {"added": [1]} | {"before": document["before"] | {"added": 1}}
    assert known is not None
    assert status.read({"metadata": {"annotations": {annotations.STATUS: json.dumps(newer)}}}) == known


def test_every_reason_has_a_code_of_its_own_and_a_sentence() -> None:
    """Codes are fit for an event's reason and for a metric's label; sentences are fit for a person."""
    for reason in reasons.Reason:
        assert reason.value.isalpha()
        assert reason.value[0].isupper()
        assert reason.sentence.endswith(".")
    assert len({reason.sentence for reason in reasons.Reason}) == len(reasons.Reason)


def test_a_policy_that_cannot_be_used_still_says_what_to_do_with_pods() -> None:
    """failurePolicy is read alone where the rest is refused."""
    found = checkpoint_policy.from_object({"kind": "x", "spec": {"failurePolicy": "Ignore"}})
    assert (found.spec, found.failure_policy) == (None, policy.FailurePolicy.IGNORE)
    assert checkpoint_policy.from_object({"failurePolicy": "Perhaps"}).failure_policy is None


def test_the_operator_decides_where_there_is_no_policy() -> None:
    """With Ignore a pod whose policy is missing starts untouched, and the reason is the same."""
    pod = {"metadata": {"name": "a", "annotations": {"pillion.dev/policy": "llm"}}}
    ignoring = settings.Settings(failure_policy=policy.FailurePolicy.IGNORE)
    made = decide.inject(pod, None, ignoring)
    assert isinstance(made, decide.Skip)
    assert made.reason is reasons.Reason.POLICY_MISSING


@pytest.mark.parametrize(
    ("name", "one", "other", "expected"),
    [
        ("cpu", "500m", "1", "1500m"),
        ("cpu", "0.5", 2, "2500m"),
        ("memory", "1Gi", "512Mi", "1536Mi"),
        ("memory", "1Gi", "many", None),
    ],
)
def test_amounts_are_added_whatever_their_spelling(name: str, one: object, other: object, expected: str | None) -> None:
    """A sum is exact, or it is not there."""
    assert quantities.add(name, one, other) == expected


def test_settings_report_all_problems_at_once() -> None:
    """Each bad variable is named with what is allowed; an empty one is an absent one."""
    bad = {
        "PILLION_LIVENESS": "Sometimes",
        "PILLION_TOKEN_EXPIRATION_S": "599",
        "PILLION_HOME_URL": "http://home",
        "PILLION_LOG_LEVEL": "",
    }
    with pytest.raises(SettingsError) as caught:
        settings.from_env(bad)
    assert [each.split("=")[0] for each in caught.value.problems] == [
        "PILLION_TOKEN_EXPIRATION_S",
        "PILLION_LIVENESS",
        "PILLION_HOME_URL",
    ]
    found = settings.from_env({"PILLION_FAILURE_POLICY": "Ignore", "PILLION_RUN_AS_USER": "7"})
    assert (found.failure_policy, found.run_as_user) == (policy.FailurePolicy.IGNORE, 7)
