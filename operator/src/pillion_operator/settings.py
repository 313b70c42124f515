"""
The operator's settings: one frozen value, read from the environment in one place.

Called from: `__main__`, for the injection without a cluster, the webhook and the controller, which get it as an argument.
Must never: be read from the environment anywhere else. All problems are reported together.
"""

import dataclasses
import pathlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import metadata
from typing import Any, Final
from urllib.parse import urlsplit

from pillion.errors import SettingsError
from pillion.wire import policy

NAMESPACE_FILE: Final = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"
"""File in which the kubelet writes the namespace of a pod."""
_PORT: Final = {"least": 0, "most": 65535}
# Their variables end in LISTEN_PORT: PILLION_WEBHOOK_PORT is what the kubelet calls the address of a Service `pillion-webhook`.


class CertificateMode(StrEnum):
    """Source of the serving certificate of the webhook and of the report endpoint."""

    SELF = "Self"
    """The controller that holds the Lease: an authority of its own, renewed long before its end."""
    CERT_MANAGER = "CertManager"
    """cert-manager, which also writes the authority into the webhook configuration."""
    PROVIDED = "Provided"
    """The user who installs the chart. The operator reads the Secret, and writes nothing."""


def _default_image() -> str:
    return "pillion-sidecar:" + metadata.version("pillion-operator")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of one operator, and of the sidecars that it injects."""

    sidecar_image: str = field(default_factory=_default_image, metadata={"env": "PILLION_SIDECAR_IMAGE"})
    """Image of the sidecar. Default: the image of this release, from the nodes' default registry."""
    image_pull_policy: str = field(
        default="IfNotPresent",
        metadata={"env": "PILLION_IMAGE_PULL_POLICY", "allowed": ("Always", "IfNotPresent", "Never")},
    )
    """Pull policy. With IfNotPresent, a training pod restarts on its node also while the registry is down."""
    allowed_images: str = field(default="", metadata={"env": "PILLION_ALLOWED_IMAGES"})
    """Repositories that a pod may take another sidecar image from, separated by commas, as `registry/path`. Empty: the
    repository of `sidecar_image`, any tag or digest."""
    home_url: str = field(default="", metadata={"env": "PILLION_HOME_URL"})
    """URL to which sidecars report, `https://service.namespace.svc:port`. Empty: they do not report, and get no token."""
    home_ca: str = field(default="", metadata={"env": "PILLION_HOME_CA"})
    """Certificates, PEM, that the server at `home_url` is trusted by. Empty: the image's own."""
    token_audience: str = field(default="pillion.dev", metadata={"env": "PILLION_TOKEN_AUDIENCE"})
    """Audience of the tokens in sidecars' reports; a token of another audience is refused."""
    token_expiration_s: int = field(default=3600, metadata={"env": "PILLION_TOKEN_EXPIRATION_S", "least": 600})
    """Life of such a token, in seconds; the API server grants none that is shorter than ten minutes. The kubelet renews it."""
    liveness: str = field(default="Off", metadata={"env": "PILLION_LIVENESS", "allowed": ("Off", "Exec")})
    """Exec: the sidecar gets a generous liveness probe. Off by default: the supervisor watches its executor itself, and an
    interpreter that starts once a minute in each pod is not free."""
    sidecar_metrics_port: int = field(default=0, metadata={"env": "PILLION_SIDECAR_METRICS_PORT", **_PORT})
    """Port of the sidecar's Prometheus endpoint. 0: none is opened; the controller has the series of each job."""
    run_as_user: int = field(default=65532, metadata={"env": "PILLION_RUN_AS_USER", "least": 1})
    """User of the sidecar where neither policy nor pod sets one."""
    run_as_group: int = field(default=65532, metadata={"env": "PILLION_RUN_AS_GROUP", "least": 1})
    """Group of the sidecar where neither policy nor pod sets one and the sidecar is not root."""
    failure_policy: policy.FailurePolicy = field(
        default=policy.FailurePolicy.FAIL,
        metadata={"env": "PILLION_FAILURE_POLICY", "allowed": tuple(policy.FailurePolicy)},
    )
    """Failure policy for pods whose policy is missing or cannot be read."""
    log_level: str = field(
        default="INFO",
        metadata={"env": "PILLION_LOG_LEVEL", "allowed": ("DEBUG", "INFO", "WARNING", "ERROR")},
    )
    """Log level of the operator, and of the sidecars that it injects."""

    # --- of the processes in the cluster; `inject` without a cluster needs none of these

    namespace: str = field(default="", metadata={"env": "PILLION_NAMESPACE"})
    """Namespace of the operator. Default: the kubelet's file in the pod."""
    pod_name: str = field(default_factory=platform.node, metadata={"env": "PILLION_POD_NAME"})
    """Names this replica: holder of the Lease, reporter of events. Default: the host's name, which in a pod is the pod's."""
    pod_ip: str = field(default="", metadata={"env": "PILLION_POD_IP"})
    """Address at which other pods reach this one. Empty: the leader writes no endpoint, and sidecars cannot report."""
    listen_address: str = field(default="", metadata={"env": "PILLION_LISTEN_ADDRESS"})
    """Address that all ports are opened on. Empty: every one of the pod, IPv4 and IPv6."""
    webhook_port: int = field(default=8443, metadata={"env": "PILLION_WEBHOOK_LISTEN_PORT", **_PORT})
    """TLS port of the webhook. 0: any free port; the log has its number."""
    webhook_client_ca: str = field(default="", metadata={"env": "PILLION_WEBHOOK_CLIENT_CA"})
    """Certificates, PEM, that the API server's own is signed by. Empty: the webhook answers every client that reaches its port."""
    webhook_client_names: str = field(default="", metadata={"env": "PILLION_WEBHOOK_CLIENT_NAMES"})
    """Common or DNS names of that certificate, separated by commas. Empty: any certificate of that authority is accepted."""
    home_port: int = field(default=8444, metadata={"env": "PILLION_HOME_LISTEN_PORT", **_PORT})
    """TLS port for the sidecars' reports."""
    health_port: int = field(default=8080, metadata={"env": "PILLION_HEALTH_PORT", **_PORT})
    """Port of health, readiness and metrics, in the clear."""
    job_series: bool = field(default=False, metadata={"env": "PILLION_JOB_SERIES", "allowed": ("true", "false")})
    """Whether /metrics has the series of jobs and policies, with their names: every client that reaches the port can read them."""
    home_enabled: bool = field(default=True, metadata={"env": "PILLION_HOME_ENABLED", "allowed": ("true", "false")})
    """Whether the controller serving reports of sidecars."""
    certificate_mode: CertificateMode = field(
        default=CertificateMode.SELF,
        metadata={"env": "PILLION_CERTIFICATE_MODE", "allowed": tuple(CertificateMode)},
    )
    secret_name: str = field(default="pillion-tls", metadata={"env": "PILLION_SECRET_NAME"})
    """Secret with tls.crt, tls.key and ca.crt, in the operator's namespace."""
    authority_secret_name: str = field(default="pillion-authority", metadata={"env": "PILLION_AUTHORITY_SECRET_NAME"})
    """Secret of the certificate authority in the mode `Self`, in the same namespace. Apart from the other, so that the webhook's
    account cannot read its key, and deleting a certificate to renew it does not end the trust in the operator."""
    lease_name: str = field(default="pillion-controller", metadata={"env": "PILLION_LEASE_NAME"})
    """Lease whose holder is the active controller."""
    webhook_configuration: str = field(default="pillion", metadata={"env": "PILLION_WEBHOOK_CONFIGURATION"})
    """The one MutatingWebhookConfiguration whose caBundle the leader writes."""
    webhook_service: str = field(default="pillion-webhook", metadata={"env": "PILLION_WEBHOOK_SERVICE"})
    home_service: str = field(default="pillion-home", metadata={"env": "PILLION_HOME_SERVICE"})
    shutdown_grace_s: int = field(default=10, metadata={"env": "PILLION_SHUTDOWN_GRACE_S", "least": 0})
    """Time for which a stopping webhook serves requests, in seconds: the API server and kube-proxy learn of an endpoint's
    end in one or two. Less than the pod's terminationGracePeriodSeconds."""

    def server_names(self) -> tuple[str, ...]:
        """The names that the serving certificate has to be for."""
        services = [f"{service}.{self.namespace}.svc" for service in (self.webhook_service, self.home_service)]
        home = urlsplit(self.home_url).hostname
        return tuple(dict.fromkeys([*services, *([home] if home else [])]))


def from_env(environ: Mapping[str, str], *, namespace_file: str = NAMESPACE_FILE, in_cluster: bool = False) -> Settings:
    """
    Read the environment; an empty variable is an absent one.

    Args:
        environ: the environment.
        namespace_file: what names the namespace where no variable does.
        in_cluster: whether a namespace has to be known.

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
        allowed, least, most = (each.metadata.get(key) for key in ("allowed", "least", "most"))
        if least is not None:
            # isdecimal also takes digits of other scripts, and so does int: both agree.
            if text.isdecimal() and least <= int(text) <= (most or int(text)):
                values[each.name] = int(text)
            else:
                limit = f" and at most {most}" if most else ""
                problems.append(f"{name}={text!r}: a whole number of at least {least}{limit} is allowed")
        elif allowed is not None and text not in allowed:
            problems.append(f"{name}={text!r}: one of {', '.join(allowed)} is allowed")
        else:
            values[each.name] = text
    home_url = values.get("home_url", "")
    if home_url and not home_url.startswith("https://"):
        problems.append(
            f"PILLION_HOME_URL={home_url!r}: an https:// address is allowed; a token never goes in the clear"
        )
    if "namespace" not in values:
        try:
            values["namespace"] = pathlib.Path(namespace_file).read_text(encoding="utf-8").strip()
        except OSError:
            # No pod of a cluster, or one without a token.
            if in_cluster:
                problems.append("PILLION_NAMESPACE is missing: the namespace that the operator runs in is needed")
    if problems:
        raise SettingsError(problems)
    if "failure_policy" in values:
        values["failure_policy"] = policy.FailurePolicy(values["failure_policy"])
    if "certificate_mode" in values:
        values["certificate_mode"] = CertificateMode(values["certificate_mode"])
    for name in ("home_enabled", "job_series"):
        if name in values:
            values[name] = values[name] == "true"
    return Settings(**values)
