"""
The whole of: what holds for the injection of every pod.

Called from: pytest.
Must never: look at how a pod is injected; only at what is true of it before and after.
"""

import copy
from typing import Any, Final

from hypothesis import given, settings
from hypothesis import strategies as st

from pillion_operator.injection import apply, checkpoint_policy, decide
from pillion_operator.settings import Settings
from support import json_patch
from unit.operator.injection import pod_strategies

SETTINGS: Final = Settings(sidecar_image="example/pillion-sidecar:1", home_url="https://home", liveness="Exec")
POLICY: Final = checkpoint_policy.from_object(
    {
        "trigger": {"periodSeconds": 60},
        "staging": {"sizeLimit": "2Gi"},
        "storage": {
            "persistentVolumeClaim": {"claimName": "checkpoints"},
            "writer": {"name": "a:B", "arguments": {"x": "$(A)"}},
        },
        "sidecar": {
            "runAsUser": 0,
            "env": [{"name": "AWS_REGION", "value": "there"}, {"name": "EMPTY", "value": ""}],
            "envFrom": [{"secretRef": {"name": "own"}}, {"secretRef": {"name": "all"}}],
        },
    }
)


IN_A_BUCKET: Final = checkpoint_policy.from_object(
    {
        "trigger": {"periodSeconds": 60},
        "staging": {"sizeLimit": "2Gi"},
        "storage": {
            "objectStore": {
                "url": "s3://bucket/runs",
                "caBundle": {"configMap": "ca"},
                "credentials": {"awsRoleArn": "arn:aws:iam::123456789012:role/a"},
            },
        },
        "sidecar": {"envFrom": [{"secretRef": {"name": "own"}}]},
    }
)


def injected(pod: dict[str, Any], policy: checkpoint_policy.CheckpointPolicy = POLICY) -> decide.Inject:
    before = copy.deepcopy(pod)
    made = decide.inject(pod, policy, SETTINGS, namespace="team-a")
    assert pod == before, "what is given is not changed"
    assert isinstance(made, decide.Inject), decide.message(made)
    assert json_patch.apply(pod, made.patch) == made.pod
    return made


@settings(max_examples=80, deadline=None)
@given(pod_strategies.pods, st.sampled_from([POLICY, IN_A_BUCKET]))
def test_injection_is_a_patch_of_single_entries_that_can_be_taken_back(
    pod: dict[str, Any], policy: checkpoint_policy.CheckpointPolicy
) -> None:
    """The patch gives the pod, overwrites no list, says nothing the second time, and `remove` gives back what was there."""
    made = injected(pod, policy)
    assert {operation["op"] for operation in made.patch} <= {"add", "replace"}
    assert not any(operation["op"] == "replace" and isinstance(operation["value"], list) for operation in made.patch)
    again = injected(made.pod, policy)
    assert (again.patch, again.pod) == ([], made.pod)
    assert apply.remove(made.pod) == pod
    assert apply.remove(pod) == pod


@settings(max_examples=40, deadline=None)
@given(pod_strategies.pods)
def test_what_another_webhook_adds_in_between_stays(pod: dict[str, Any]) -> None:
    """After another webhook has put its own things everywhere, a second look keeps them all, and a third changes nothing."""
    pod["spec"].pop("terminationGracePeriodSeconds", None)
    changed = injected(pod).pod
    variable = {"name": "LWS_GROUP_SIZE", "value": "2"}
    spec = changed["spec"]
    for container in [*spec["containers"], *spec["initContainers"]]:
        container["env"] = [variable, *container.get("env", [])]
        container["terminationMessagePath"] = "/dev/termination-log"
        # A webhook with an older type of a pod loses what it does not know.
        container.pop("restartPolicy", None)
    spec["containers"].insert(0, {"name": "a-log-shipper", "image": "example/log:1"})
    spec["initContainers"].insert(0, {"name": "an-init", "image": "example/init:1"})
    spec["terminationGracePeriodSeconds"] = 4000

    again = injected(changed)
    after = again.pod["spec"]
    assert [each["name"] for each in after["containers"]] == [each["name"] for each in spec["containers"]]
    assert [each["name"] for each in after["initContainers"]] == [each["name"] for each in spec["initContainers"]]
    for container in [*after["containers"][1:], *after["initContainers"][1:]]:
        assert container["env"][0] == variable
        assert container["terminationMessagePath"] == "/dev/termination-log"
    sidecar = next(each for each in after["initContainers"] if each["name"] == "pillion-sidecar")
    assert sidecar["restartPolicy"] == "Always"
    assert after["terminationGracePeriodSeconds"] == 4300
    assert injected(again.pod).patch == []
