"""
The whole of: user, group and rights of the injected containers.

Called from: `sidecar_spec`; `doubts`, for a warning about an unknown user.
Must never: give more than the restricted Pod Security profile has, except to a sidecar that is root.
"""

from typing import Any, Final

from pillion.wire import policy
from pillion_operator.injection import pods
from pillion_operator.injection.pods import Json
from pillion_operator.settings import Settings

ROOT: Final = 0


def of_sidecar(
    section: policy.Sidecar, bare: Json, trainers: tuple[str, ...], declared: Json | None, settings: Settings
) -> Json:
    """
    The sidecar's security context: under the user that the pod declares for it, else the policy's, else the trainer's, so that both
    may open the arena's files and a volume that the trainer may write, else the operator's setting.

    A root sidecar may write where another user has written before, as root does; of root's rights it has that one.
    """
    own = (declared or {}).get("securityContext") or {}
    user = _first(
        own.get("runAsUser"), section.run_as_user, _of_first_trainer(bare, trainers, "runAsUser"), settings.run_as_user
    )
    # A root trainer without a group has root's.
    fallback = ROOT if user == ROOT else settings.run_as_group
    group_id = _of_first_trainer(bare, trainers, "runAsGroup")
    group = _first(
        own.get("runAsGroup"), section.run_as_group, group_id if group_id or user == ROOT else None, fallback
    )
    return _context(user, group, bare, trainers)


def of_client(section: policy.Sidecar, bare: Json, trainers: tuple[str, ...], settings: Settings) -> Json:
    """The security context of the container that lays out the client, which is never root: an empty volume takes any user's files."""
    users = (section.run_as_user, _of_first_trainer(bare, trainers, "runAsUser"))
    groups = (section.run_as_group, _of_first_trainer(bare, trainers, "runAsGroup"))
    user = next((each for each in users if each), settings.run_as_user)
    return _context(user, next((each for each in groups if each), settings.run_as_group), bare, trainers)


def is_unknown(bare: Json, trainers: tuple[str, ...]) -> bool:
    """Whether the trainer's user is that of its image, root perhaps, and its volumes are not made writable for a group."""
    user, not_root = _of_first_trainer(bare, trainers, "runAsUser"), _of_first_trainer(bare, trainers, "runAsNonRoot")
    return user is None and not not_root and _of_pod(bare).get("fsGroup") is None


def asks_for_no_more(key: str, value: Any, injected: Json) -> bool:
    """Whether a key of a declared security context sets what the sidecar gets anyway, or less."""
    match key:
        case "privileged":
            return value is False
        case "capabilities":
            return not (isinstance(value, dict) and value.get("add"))
        case "procMount":
            return bool(value == "Default")
        case _:
            return bool(value == injected.get(key))


def _context(user: Any, group: Any, bare: Json, trainers: tuple[str, ...]) -> Json:
    # Containers of other SELinux labels cannot open each other's files.
    selinux = _of_trainer(bare, trainers).get("seLinuxOptions")
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]} | ({"add": ["DAC_OVERRIDE"]} if user == ROOT else {}),
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": user != ROOT,
        "runAsUser": user,
        "runAsGroup": group,
        "seccompProfile": {"type": "RuntimeDefault"},
    } | ({"seLinuxOptions": pods.copied(selinux)} if selinux else {})


def _of_trainer(bare: Json, trainers: tuple[str, ...]) -> Json:
    trainer = pods.named(pods.containers(bare), trainers[0]) if trainers else None
    return (trainer or {}).get("securityContext") or {}


def _of_pod(bare: Json) -> Json:
    return pods.spec(bare).get("securityContext") or {}


def _of_first_trainer(bare: Json, trainers: tuple[str, ...], key: str) -> Any:
    """Return a value for the first trainer: from its container, else from the pod, else None."""
    return _first(_of_trainer(bare, trainers).get(key), _of_pod(bare).get(key))


def _first(*values: Any) -> Any:
    return next((each for each in values if each is not None), None)
