"""
The whole of: the sets of values that the chart is rendered with: the defaults, and each switch turned.

Called from: the tests of the chart.
Must never: hold what is not allowed; that is in `test_values`.
"""

from typing import Any, Final

CA: Final = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
"""Looks like a certificate; nobody reads it here."""
CERT_MANAGER: Final = {"certificates": {"mode": "CertManager"}}
PROVIDED: Final = {"certificates": {"mode": "Provided", "caBundle": CA}}
MONITORING: Final = {
    "monitoring": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
        "dashboard": {"enabled": True},
    }
}
VARIANTS: Final[dict[str, dict[str, Any]]] = {
    "defaults": {},
    "cert-manager": CERT_MANAGER,
    "cert-manager-issuer": {
        "certificates": {"mode": "CertManager", "issuerRef": {"kind": "ClusterIssuer", "name": "private"}}
    },
    "provided": PROVIDED,
    "monitoring": MONITORING,
    "network-policy": {"networkPolicy": {"enabled": True}},
    "network-policy-of-networks": {
        "networkPolicy": {
            "enabled": True,
            "apiServerCIDRs": ["10.0.0.0/28", "fd00::/8"],
            "metricsCIDRs": ["10.1.0.0/16"],
        },
        "webhook": {"port": 10250, "apiServer": {"clientCA": CA, "clientNames": ["kube-apiserver", "other"]}},
    },
    "of-an-umbrella": {"enabled": True, "global": {"any": "thing"}},
    "no-validation": {"validation": {"enabled": False}},
    "no-crds": {"crds": {"enabled": False}},
    "crds-not-kept": {"crds": {"keep": False, "annotations": {"example.com/note": "ours"}}},
    "one-replica": {"webhook": {"replicas": 1}, "controller": {"replicas": 1}},
    "no-user-roles": {"userRoles": {"enabled": False}},
    "no-disruption-budget": {"podDisruptionBudget": {"enabled": False}},
    "placed": {
        "imagePullSecrets": [{"name": "registry"}],
        "priorityClassName": "system-cluster-critical",
        "webhook": {
            "hostNetwork": True,
            "excludedNamespaces": ["vault"],
            "podAnnotations": {"example.com/note": "ours"},
            "tolerations": [{"key": "example.com/ours", "operator": "Exists"}],
            "affinity": {"podAntiAffinity": {}},
        },
        "sidecar": {"allowedImages": ["registry.example/a", "registry.example/b"], "metricsPort": 9464},
    },
}
"""By name: what a test's output shows."""
