"""
The whole of: the settings of the processes in the cluster.

Called from: pytest.
"""

from pathlib import Path

import pytest

from pillion.errors import SettingsError
from pillion_operator import settings


def test_a_process_in_the_cluster_needs_to_know_its_namespace(tmp_path: Path) -> None:
    """The variable wins over the kubelet's file; without both, only what needs no cluster can run."""
    file, missing = tmp_path / "namespace", str(tmp_path / "missing")
    file.write_text("from-the-kubelet\n")
    assert settings.from_env({}, namespace_file=str(file), in_cluster=True).namespace == "from-the-kubelet"
    given = {"PILLION_NAMESPACE": "given"}
    assert settings.from_env(given, namespace_file=str(file), in_cluster=True).namespace == "given"
    assert settings.from_env({}, namespace_file=missing).namespace == ""
    with pytest.raises(SettingsError, match="PILLION_NAMESPACE is missing"):
        settings.from_env({}, namespace_file=missing, in_cluster=True)


def test_every_mistake_is_told_at_once() -> None:
    """All problems come together, each with what is allowed."""
    environ = {
        "PILLION_NAMESPACE": "system",
        "PILLION_WEBHOOK_LISTEN_PORT": "70000",
        "PILLION_HOME_ENABLED": "yes",
        "PILLION_CERTIFICATE_MODE": "self",
        "PILLION_SHUTDOWN_GRACE_S": "-1",
    }
    with pytest.raises(SettingsError) as refused:
        settings.from_env(environ)
    problems = refused.value.problems
    assert sorted(problem.split("=")[0] for problem in problems) == sorted(environ.keys() - {"PILLION_NAMESPACE"})
    text = "\n".join(problems)
    assert "at most 65535" in text
    assert "Self, CertManager, Provided" in text
    assert "true, false" in text


def test_values_have_their_own_types() -> None:
    """What is read is what the processes work with."""
    found = settings.from_env(
        {
            "PILLION_NAMESPACE": "system",
            "PILLION_HOME_ENABLED": "false",
            "PILLION_CERTIFICATE_MODE": "Provided",
            "PILLION_WEBHOOK_LISTEN_PORT": "0",
        }
    )
    assert found.home_enabled is False
    assert found.certificate_mode is settings.CertificateMode.PROVIDED
    assert found.webhook_port == 0


def test_the_certificate_is_for_both_services_and_for_where_sidecars_call() -> None:
    """The names follow from the services, the namespace, and the address that is laid into pods; none twice."""
    environ = {"PILLION_NAMESPACE": "system", "PILLION_HOME_URL": "https://home.example.org:8444"}
    assert settings.from_env(environ).server_names() == (
        "pillion-webhook.system.svc",
        "pillion-home.system.svc",
        "home.example.org",
    )
    environ["PILLION_HOME_URL"] = "https://pillion-home.system.svc"
    assert len(settings.from_env(environ).server_names()) == 2
