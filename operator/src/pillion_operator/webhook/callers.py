"""
The whole of: the clients that the webhook accepts, where the API server has a client certificate.

Called from: `server`, before a body is read. That a certificate is of the right authority, TLS has seen to by then.
Must never: let somebody through because a certificate has no name.
Source: Kubernetes documentation, "Dynamic Admission Control", "Authenticate API servers".
"""

from collections.abc import Mapping
from typing import Any


def names(certificate: Mapping[str, Any] | None) -> set[str]:
    """
    The names that a certificate is for: its common names and its DNS names.

    Args:
        certificate: as `ssl.SSLSocket.getpeercert` gives it; None: there is none.
    """
    if not certificate:
        return set()
    common = {
        value for part in certificate.get("subject") or () for name, value in part if name == "commonName" and value
    }
    return common | {value for kind, value in certificate.get("subjectAltName") or () if kind == "DNS" and value}


def may_ask(certificate: Mapping[str, Any] | None, allowed: str) -> bool:
    """
    Whether the webhook accepts a client by its certificate.

    Args:
        certificate: see `names`.
        allowed: names, separated by commas. Empty: every certificate of the authority is accepted.
    """
    allowed_names = {name.strip() for name in allowed.split(",")} - {""}
    return bool(certificate) and (not allowed_names or bool(allowed_names & names(certificate)))
