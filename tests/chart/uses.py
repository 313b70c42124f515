"""
The whole of: what the operator asks of the API server, by account: each right with the module that needs it, and why.

Called from: `test_rights`, which compares it with the chart on one side and with the operator's source on the other.
Must never: be made from either of them; it is what people review.
"""

from dataclasses import dataclass
from typing import Final

PILLION: Final = "pillion.dev"
FOLLOWED: Final = ("list", "watch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """Some verbs on one resource, needed by one module."""

    account: str
    group: str
    resource: str
    verbs: tuple[str, ...]
    module: str
    """Under operator/src/pillion_operator; `helm test` for its own program."""
    why: str

    @property
    def rights(self) -> set[tuple[str, str, str]]:
        """Group, resource, verb."""
        return {(self.group, self.resource, verb) for verb in self.verbs}


def _webhook(group: str, resource: str, verbs: tuple[str, ...], module: str, why: str) -> Use:
    return Use(account="pillion-webhook", group=group, resource=resource, verbs=verbs, module=module, why=why)


def _controller(group: str, resource: str, verbs: tuple[str, ...], module: str, why: str) -> Use:
    return Use(account="pillion-controller", group=group, resource=resource, verbs=verbs, module=module, why=why)


_HOOKS: Final = ("admissionregistration.k8s.io", "mutatingwebhookconfigurations")
_SLICES: Final = ("discovery.k8s.io", "endpointslices")
_LEASES: Final = ("coordination.k8s.io", "leases")
_EVENTS: Final = ("events.k8s.io", "events")
_POLICIES: Final = (PILLION, "checkpointpolicies")
_CHECKPOINTS: Final = (PILLION, "checkpoints")
_SECRETS: Final = ("", "secrets")

USES: Final = (
    _webhook(*_POLICIES, FOLLOWED, "webhook/policies.py", "the cache of all policies"),
    _webhook(*_POLICIES, ("get",), "webhook/policies.py", "a policy that the cache does not have yet"),
    _webhook(*_SECRETS, FOLLOWED, "certificates/serving.py", "the certificate that is served"),
    _webhook(*_EVENTS, ("create", "patch"), "cluster/events.py", "a decision, and how often it was made"),
    *(
        _webhook(group, resource, ("get",), "webhook/refusals.py", "whether the owner of a refused pod exists")
        for group, resource in (
            ("batch", "jobs"),
            ("apps", "replicasets"),
            ("apps", "statefulsets"),
            ("kubeflow.org", "pytorchjobs"),
            ("ray.io", "rayclusters"),
            ("batch.volcano.sh", "jobs"),
            ("argoproj.io", "workflows"),
        )
    ),
    _controller(*_POLICIES, FOLLOWED, "controller/handlers.py", "kopf, and the list that makes it good"),
    _controller(PILLION, "checkpointpolicies/status", ("patch",), "controller/reconcile.py", "a policy's conditions"),
    _controller(*_CHECKPOINTS, FOLLOWED, "controller/app.py", "the objects that there are, requests among them"),
    _controller(*_CHECKPOINTS, ("create", "delete"), "controller/reconcile.py", "one for each checkpoint on storage"),
    _controller(PILLION, "checkpoints/status", ("patch",), "controller/reconcile.py", "what became of each"),
    _controller("", "pods", FOLLOWED, "controller/app.py", "injected pods: how many, and who asks for a save"),
    _controller("", "pods", ("get",), "home/injected.py", "a pod that reports before the cache knows it"),
    _controller(
        "", "persistentvolumeclaims", ("get",), "controller/claims.py", "whether a policy's claim is for one node"
    ),
    _controller("batch", "jobs", FOLLOWED, "controller/app.py", "Jobs that ask for a save by annotation"),
    _controller("authentication.k8s.io", "tokenreviews", ("create",), "home/authenticate.py", "whose a token is"),
    _controller(*_EVENTS, ("create", "patch"), "cluster/events.py", "what happened, and how often"),
    _controller(*_LEASES, ("get", "create", "update"), "cluster/lease.py", "which replica is active"),
    _controller(*_SLICES, ("patch", "create"), "controller/endpoint.py", "the leader's address; an apply makes it too"),
    _controller(
        "discovery.k8s.io", "endpointslices/restricted", ("create",), "controller/endpoint.py", "OpenShift asks for it"
    ),
    _controller(*_SLICES, ("delete",), "controller/endpoint.py", "an address of another family"),
    _controller(*_SECRETS, FOLLOWED, "certificates/serving.py", "the certificate that is served"),
    _controller(*_SECRETS, FOLLOWED, "certificates/rotation.py", "somebody deletes or changes a Secret of ours"),
    _controller(*_SECRETS, ("get", "create", "update"), "certificates/rotation.py", "authority and certificate"),
    _controller(*_HOOKS, FOLLOWED, "certificates/rotation.py", "an upgrade takes the caBundle away"),
    _controller(*_HOOKS, ("get", "patch"), "certificates/rotation.py", "the caBundle"),
    _controller(*_HOOKS, ("get",), "controller/app.py", "ready only once the API server trusts the webhook"),
    Use(
        account="pillion-test",
        group="",
        resource="pods",
        verbs=("create",),
        module="helm test",
        why="a dry run that the webhook has to refuse",
    ),
)
USED: Final = {
    account: set().union(*(each.rights for each in USES if each.account == account))
    for account in sorted({each.account for each in USES})
}
"""By account: group, resource and verb of all that it uses, with certificates.mode Self."""
SELF_ONLY: Final = {
    *((*_HOOKS, verb) for verb in ("get", "list", "watch", "patch")),
    *((*_SECRETS, verb) for verb in ("get", "create", "update")),
}
"""What the controller needs no right to where others make the certificate."""
