"""
The whole of: the Event that a pod was injected, on the pod's owner.

Called from: the controller that leads, with each pod that its watch brings. The webhook posts no such Event: every client that reaches its port could
make it announce pods that never existed.
Must never: announce pods again that existed before this replica led.
"""

from collections.abc import Callable
from typing import Final

from pillion_operator.home import injected, times
from pillion_operator.injection.reasons import Reason

NEW_S: Final = 60.0
"""
Maximum age of a pod that is announced. An older pod comes with the first list of a new leader, and was announced by its
predecessor.
"""


def arrived(pod: injected.Pod, post: Callable[..., None], now_s: float) -> None:
    """
    Say that a pod was injected, where it is new.

    Args:
        pod: as it is now.
        post: `cluster.events.Events.post`.
        now_s: seconds since 1970.
    """
    made_s = times.parse(pod.created)
    if made_s is None or abs(now_s - made_s) > NEW_S:
        return
    message = f"{Reason.INJECTED.sentence} (policy {pod.policy}, job {pod.job_id})"
    # A Job's controller makes the pod, so its author sees no warning of the API request.
    message += "".join(f" Warning: {each}." for each in pod.warnings)
    post(about(pod), Reason.INJECTED.value, message)


def about(pod: injected.Pod) -> dict[str, str]:
    """The object that the Event is on: the pod's owner, or the pod itself where nobody owns it."""
    if pod.owner is None:
        return {"apiVersion": "v1", "kind": "Pod", "namespace": pod.namespace, "name": pod.name, "uid": pod.uid}
    return {
        "apiVersion": pod.owner.api_version,
        "kind": pod.owner.kind,
        "namespace": pod.namespace,
        "name": pod.owner.name,
        "uid": pod.owner.uid,
    }
