"""
The whole of: what the stories of a lost node need: pods that leave such a node soon, and are not spread to it.

Called from: the tests of the level cluster.
Must never: taint a node; the story does, and the fixture `in_service` takes it back.
"""

from typing import Final

from support.kube import Json, Kube, condition

OUT_OF_SERVICE: Final = "node.kubernetes.io/out-of-service"
"""The taint by which a platform team says that nothing runs there any more. Source: Kubernetes documentation, "Node Shutdowns"."""
LEAVES_AFTER_S: Final = 5
"""A pod's patience with a node that is gone: so short that the story is about us, and not about Kubernetes' five minutes."""
GRACE_S: Final = 5
"""Of the trainer; injection adds the drain's time."""

POD: Json = {
    "terminationGracePeriodSeconds": GRACE_S,
    "tolerations": [
        {"key": f"node.kubernetes.io/{key}", "effect": "NoExecute", "tolerationSeconds": LEAVES_AFTER_S}
        | {"operator": "Exists"}
        for key in ("not-ready", "unreachable")
    ],
    "topologySpreadConstraints": [
        {
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "DoNotSchedule",
            # A node that is gone takes no pod, so it is no place to spread to.
            "nodeTaintsPolicy": "Honor",
            "labelSelector": {"matchLabels": {"job-name": "train"}},
        }
    ],
}


def ready(kube: Kube, node: str) -> bool:
    """Whether the control plane takes the node for alive."""
    return condition(kube.get("node", node), "Ready").get("status") == "True"
