"""
The whole of: what others are told of how the API server is reached.

Called from: pytest.
"""

import asyncio

import pytest
from kubernetes.aio.client import configuration

from pillion_operator.cluster.client import Client


@pytest.mark.parametrize("scheme", ["bearer", "Bearer"])
def test_the_token_is_told_without_its_scheme(scheme: str) -> None:
    """In a pod the loader writes "bearer", from a kubeconfig "Bearer": kopf gets the bare token of both."""

    async def token() -> str:
        found = configuration.Configuration()
        found.api_key["BearerToken"] = f"{scheme} abc.def"
        async with Client(found) as api:
            return (await api.connection()).token

    assert asyncio.run(token()) == "abc.def"
