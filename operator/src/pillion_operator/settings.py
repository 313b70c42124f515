"""
The operator's settings: one frozen value, read from the environment in one place.

Called from: `__main__`, later the webhook and the controller; read by the injection, which gets it as an argument.
Must never: be read from the environment anywhere else. All problems are reported together.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from pillion.errors import SettingsError
from pillion.wire import policy


def _default_image() -> str:
    return "pillion-sidecar:" + metadata.version("pillion-operator")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What one operator runs with, and what the pods that it injects get from it."""

    sidecar_image: str = field(default_factory=_default_image, metadata={"env": "PILLION_SIDECAR_IMAGE"})
    """The sidecar's image. Default: the image of this release, from wherever the nodes look."""
    image_pull_policy: str = field(
        default="IfNotPresent",
        metadata={"env": "PILLION_IMAGE_PULL_POLICY", "allowed": ("Always", "IfNotPresent", "Never")},
    )
    """IfNotPresent by default: a registry that is down must not keep a training pod from starting again."""
    allowed_images: str = field(default="", metadata={"env": "PILLION_ALLOWED_IMAGES"})
    """Repositories that a pod may take another sidecar image from, separated by commas, as `registry/path`. Empty: the
    repository of `sidecar_image`, any tag or digest."""
    home_url: str = field(default="", metadata={"env": "PILLION_HOME_URL"})
    """Where sidecars call home, `https://service.namespace.svc:port`. Empty: they do not, and get no token."""
    home_ca: str = field(default="", metadata={"env": "PILLION_HOME_CA"})
    """Certificates, PEM, that the server at `home_url` is trusted by. Empty: the image's own."""
    token_audience: str = field(default="pillion.dev", metadata={"env": "PILLION_TOKEN_AUDIENCE"})
    """Audience of the tokens that sidecars call home with; a token of another audience is refused."""
    token_expiration_s: int = field(default=3600, metadata={"env": "PILLION_TOKEN_EXPIRATION_S", "least": 600})
    """Life of such a token, in seconds; the API server grants none that is shorter than ten minutes. The kubelet renews it."""
    liveness: str = field(default="Off", metadata={"env": "PILLION_LIVENESS", "allowed": ("Off", "Exec")})
    """Exec: the sidecar gets a generous liveness probe. Off by default: the supervisor watches its executor itself, and an
    interpreter that starts once a minute in each pod is not free."""
    run_as_user: int = field(default=65532, metadata={"env": "PILLION_RUN_AS_USER", "least": 1})
    """User of the sidecar where the trainer declares none, or root."""
    run_as_group: int = field(default=65532, metadata={"env": "PILLION_RUN_AS_GROUP", "least": 1})
    """Group of the sidecar where the trainer declares none."""
    failure_policy: policy.FailurePolicy = field(
        default=policy.FailurePolicy.FAIL,
        metadata={"env": "PILLION_FAILURE_POLICY", "allowed": tuple(policy.FailurePolicy)},
    )
    """What happens to a pod whose policy is missing or cannot be read, and so has no word in it."""
    log_level: str = field(
        default="INFO",
        metadata={"env": "PILLION_LOG_LEVEL", "allowed": ("DEBUG", "INFO", "WARNING", "ERROR")},
    )
    """Of the operator, and of the sidecars that it injects."""


def from_env(environ: Mapping[str, str]) -> Settings:
    """
    Read the environment; an empty variable is an absent one.

    Raises:
        SettingsError: everything that is wrong, at once.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for each in dataclasses.fields(Settings):
        name = each.metadata["env"]
        text = environ.get(name, "")
        if not text:
            continue
        allowed, least = each.metadata.get("allowed"), each.metadata.get("least")
        if least is not None:
            # isdecimal also takes digits of other scripts, and so does int: both agree.
            if text.isdecimal() and int(text) >= least:
                values[each.name] = int(text)
            else:
                problems.append(f"{name}={text!r}: a whole number of at least {least} is allowed")
        elif allowed is not None and text not in allowed:
            problems.append(f"{name}={text!r}: one of {', '.join(allowed)} is allowed")
        else:
            values[each.name] = text
    home_url = values.get("home_url", "")
    if home_url and not home_url.startswith("https://"):
        problems.append(
            f"PILLION_HOME_URL={home_url!r}: an https:// address is allowed; a token never goes in the clear"
        )
    if problems:
        raise SettingsError(problems)
    if "failure_policy" in values:
        values["failure_policy"] = policy.FailurePolicy(values["failure_policy"])
    return Settings(**values)
