"""
The whole of: which JSON values are pods to the injection.

Called from: pytest.
"""

from typing import Any

import pytest
from hypothesis import given, settings

from pillion_operator.injection import shape
from pillion_operator.webhook import review
from unit.operator.injection import pod_strategies

POD: dict[str, Any] = {"metadata": {}, "spec": {"containers": [{"name": "a"}]}}


@settings(max_examples=50, deadline=None)
@given(pod_strategies.pods)
def test_every_pod_is_one(pod: dict[str, Any]) -> None:
    """Nothing that the API server takes is refused for its shape."""
    assert shape.problem(pod) == ""


def test_a_null_is_an_absent_field() -> None:
    """As it is to the API server, whose own clients send them."""
    container = {"name": "a", "env": None, "resources": {"limits": None}, "securityContext": None}
    assert shape.problem({"metadata": {"labels": None}, "spec": {"containers": [container], "volumes": None}}) == ""


@pytest.mark.parametrize(
    ("pod", "told"),
    [
        ([], "metadata and spec"),
        ({"metadata": {}}, "metadata and spec"),
        (POD | {"spec": {"containers": {"a": 1}}}, "spec.containers must be a list"),
        (POD | {"spec": {"containers": [None]}}, "spec.containers[0] must be an object"),
        (POD | {"spec": {"containers": [{"image": "x"}]}}, "spec.containers[0] has no name"),
        (POD | {"spec": {"containers": [{"name": "a", "env": [{"name": []}]}]}}, "env[0].name"),
        (POD | {"spec": {"terminationGracePeriodSeconds": True}}, "terminationGracePeriodSeconds"),
        (POD | {"metadata": {"annotations": {"a": 1}}}, "metadata.annotations.a"),
        (POD | {"metadata": {"ownerReferences": ["Job"]}}, "metadata.ownerReferences[0]"),
    ],
)
def test_another_shape_is_told_with_its_place(pod: Any, told: str) -> None:
    """What reaches the injection has what the injection reads."""
    assert told in shape.problem(pod)
    with pytest.raises(shape.NotAPod, match=r"\w"):
        shape.require(pod)
    if isinstance(pod, dict):
        # An event about it can be told, whatever is wrong.
        question = review.Question(uid="1", namespace="a", pod=pod, is_dry_run=False)
        assert review.about(question)["kind"] == "Pod"


def test_a_value_nested_without_end_is_no_pod() -> None:
    """Each level costs a call within a call where a pod is copied."""
    nested: Any = "x"
    for _ in range(shape.MAX_DEPTH + 1):
        nested = [nested]
    assert "nested" in shape.problem(POD | {"x": nested})
