"""
The whole of: the forms of the entries that injection adds to a container and to a pod: variables, mounts, volumes of a token.

Called from: `sidecar_spec`, `storage_spec`.
Must never: know what an entry is for.
"""

from pillion.wire import policy
from pillion_operator.injection.pods import Json


def literal(name: str, value: str) -> Json:
    """A variable of a container with exactly this value."""
    # The kubelet expands $(NAME) in a value and reads $$ as one $.
    return {"name": name, "value": value.replace("$", "$$")}


def variable(given: policy.EnvVar) -> Json:
    """A variable of a container as a policy has it."""
    # The API server leaves an empty value out.
    return {key: value for key, value in policy.dump_section(given).items() if value != ""}


def from_field(name: str, path: str) -> Json:
    """A variable of a container with the value of a field of its pod."""
    return {"name": name, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}}


def mount(volume: str, path: str, *, is_read_only: bool = False) -> Json:
    """The mount of a volume in a container."""
    return {"name": volume, "mountPath": path} | ({"readOnly": True} if is_read_only else {})


def token_volume(name: str, audience: str, expiration_s: int, file: str) -> Json:
    """The volume of a service account token, which the kubelet renews after four fifths of its time."""
    token = {"audience": audience, "expirationSeconds": expiration_s, "path": file}
    # 0644: the sidecar's user is not known to the kubelet as the only one of the pod, and the volume is mounted nowhere else.
    return {"name": name, "projected": {"defaultMode": 0o644, "sources": [{"serviceAccountToken": token}]}}
