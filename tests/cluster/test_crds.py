"""
The whole of: what a real API server makes of the two CRDs.

Called from: pytest. The documents are those of the unit tests, which prove that schema and Python model agree.
Must never: accept that a document was refused without looking at what the API server said of it.
"""

import json

import pytest

from support.jobs import policy
from support.kube import Json, Kube, KubectlFailed
from unit.crds.documents import BAD, EXPLAINED, GOOD


def _policy(spec: Json) -> Json:
    return policy() | {"spec": spec}


def test_the_api_server_accepts_every_good_policy(kube: Kube) -> None:
    """Each good document is stored."""
    for name, spec in GOOD.items():
        try:
            kube.create(_policy(spec))
        except KubectlFailed as err:
            raise AssertionError(f"{name}: {err}") from err
        kube.delete("checkpointpolicy", "llm")


def test_the_api_server_refuses_every_bad_policy(kube: Kube) -> None:
    """Each bad document is refused, and the answer names the object's part or the rule."""
    for name, spec in BAD.items():
        with pytest.raises(KubectlFailed) as refused:
            kube.run("create", "-f", "-", "--validate=strict", given=json.dumps(_policy(spec)))
        assert "spec" in str(refused.value), name
        assert EXPLAINED.get(name, "") in str(refused.value), name
    assert kube.all("checkpointpolicies") == []


def test_defaults_are_filled_in(kube: Kube) -> None:
    """A policy that says the least is stored with every default, so that `kubectl get -o yaml` shows what holds."""
    kube.create(_policy(GOOD["the least"]))
    stored = kube.get("checkpointpolicy", "llm")
    assert stored is not None
    spec = stored["spec"]
    assert spec["restore"] == {"mode": "Latest", "onMissing": "Fresh"}
    assert spec["staging"] == {"sizeLimit": "96Gi", "slots": 2, "overlap": "Wait", "memoryAccounting": "Sidecar"}
    assert (spec["drain"], spec["failurePolicy"], spec["suspend"]) == (
        {"timeoutSeconds": 300, "endTrainer": True},
        "Fail",
        False,
    )


def test_a_checkpoint_never_changes_its_job(kube: Kube) -> None:
    """The spec of a Checkpoint is immutable, and the answer says what to do instead."""
    checkpoint = {
        "apiVersion": "pillion.dev/v1alpha1",
        "kind": "Checkpoint",
        "metadata": {"name": "now"},
        "spec": {"jobID": "run-1"},
    }
    kube.create(checkpoint)
    with pytest.raises(KubectlFailed, match="the spec of a Checkpoint never changes"):
        kube.patch("checkpoint", "now", {"spec": {"jobID": "run-2"}})


def test_short_names_and_the_category_work(kube: Kube) -> None:
    """`kubectl get ckptpol`, `ckpt` and `checkpointing` find them, with the columns that a person looks for."""
    kube.create(_policy(GOOD["the least"]))
    header = kube.run("get", "ckptpol").splitlines()[0].split("  ")
    assert [column.strip() for column in header if column.strip()][:4] == ["NAME", "STEPS", "SECONDS", "CLAIM"]
    assert "llm" in kube.run("get", "checkpointing")
    assert kube.run("get", "ckpt") == ""
