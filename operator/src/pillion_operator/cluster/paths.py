"""
The whole of: the resources of the API that the operator uses, and how their paths are spelled.

Called from: everything that sends a request, through `client`. Pure.
Must never: hold a resource that the chart grants no right to; tests/chart compares each of them with the roles.
Source: Kubernetes documentation, "Kubernetes API Concepts", "Resource URIs".
"""

from dataclasses import dataclass
from typing import Final

from pillion.wire import policy


@dataclass(frozen=True, slots=True)
class Resource:
    """One kind of object in one version of its API."""

    version: str
    """As in `apiVersion`: the group and its version, or `v1` alone."""
    plural: str
    """Name of the resource in paths, in the plural."""

    @property
    def everywhere(self) -> str:
        """Path of all objects: in every namespace, or of a kind that has no namespaces."""
        return f"{self._root}/{self.plural}"

    def within(self, namespace: str) -> str:
        """Path of all objects in one namespace."""
        return f"{self._root}/namespaces/{namespace}/{self.plural}"

    def one(self, namespace: str, name: str) -> str:
        """Path of one object; an empty `namespace` is for a kind that has none."""
        return f"{self.within(namespace) if namespace else self.everywhere}/{name}"

    @property
    def _root(self) -> str:
        # Only the oldest group has no name.
        return f"/apis/{self.version}" if "/" in self.version else f"/api/{self.version}"


PODS: Final = Resource("v1", "pods")
VOLUME_CLAIMS: Final = Resource("v1", "persistentvolumeclaims")
SECRETS: Final = Resource("v1", "secrets")
JOBS: Final = Resource("batch/v1", "jobs")
POLICIES: Final = Resource(policy.API_VERSION, "checkpointpolicies")
CHECKPOINTS: Final = Resource(policy.API_VERSION, "checkpoints")
LEASES: Final = Resource("coordination.k8s.io/v1", "leases")
EVENTS: Final = Resource("events.k8s.io/v1", "events")
ENDPOINT_SLICES: Final = Resource("discovery.k8s.io/v1", "endpointslices")
TOKEN_REVIEWS: Final = Resource("authentication.k8s.io/v1", "tokenreviews")
WEBHOOK_CONFIGURATIONS: Final = Resource("admissionregistration.k8s.io/v1", "mutatingwebhookconfigurations")
REPLICA_SETS: Final = Resource("apps/v1", "replicasets")
STATEFUL_SETS: Final = Resource("apps/v1", "statefulsets")
PYTORCH_JOBS: Final = Resource("kubeflow.org/v1", "pytorchjobs")
RAY_CLUSTERS: Final = Resource("ray.io/v1", "rayclusters")
VOLCANO_JOBS: Final = Resource("batch.volcano.sh/v1alpha1", "jobs")
ARGO_WORKFLOWS: Final = Resource("argoproj.io/v1alpha1", "workflows")
