"""
The story: the operator's access to an API server does what it says, and outlives the network between them.

Called from: pytest. tests/process/test_fake_api.py is the same for the fake that other tests use.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from cluster.conftest import Api
from support.api_contract import Access, ApiContract
from support.api_faults import ApiFaults, Network
from support.fake_api import write_kubeconfig
from support.proxy import Proxy
from support.release import Release


class TestContract(ApiContract):
    """The contract, on a real API server."""

    @pytest.fixture
    def access(self, api: Api, release: Release) -> Access:
        del release
        # A young server still knows the first version of what it has served from its start; ours it serves since the release.
        ours = f"/apis/pillion.dev/v1alpha1/namespaces/{api.namespace}/checkpoints"
        return Access(api.kubeconfig, api.namespace, younger=ours)


class TestFaults(ApiFaults):
    """The faults, before a real API server."""

    @pytest.fixture
    def network(self, api: Api, tmp_path: Path) -> Iterator[Network]:
        found = yaml.safe_load(api.kubeconfig.read_text())
        context = _named(found, "context", found["current-context"])
        cluster, user = _named(found, "cluster", context["cluster"]), _named(found, "user", context["user"])
        server = urlsplit(cluster["server"])
        assert server.hostname is not None
        with Proxy(server.hostname, server.port or 443) as proxy:
            way = {"server": f"https://127.0.0.1:{proxy.port}", "tls-server-name": server.hostname}
            through = write_kubeconfig(tmp_path, cluster | way, user)
            yield Network(proxy, Access(through, api.namespace), Access(api.kubeconfig, api.namespace))


def _named(kubeconfig: dict[str, Any], kind: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(each[kind] for each in kubeconfig[f"{kind}s"] if each["name"] == name)
    return found
