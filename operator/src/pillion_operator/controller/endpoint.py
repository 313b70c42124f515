"""
The whole of: the address of the active controller: the EndpointSlice of a Service without a selector.

Called from: the controller that holds the Lease. A selector would send half of the reports to the waiting replica.
Must never: leave its address behind on an orderly stop.
Source: Kubernetes documentation, "Services without selectors", "EndpointSlices".
"""

import asyncio
import contextlib
import ipaddress
import logging
import random
from typing import Final

from pillion_operator.cluster import client, paths
from pillion_operator.cluster.client import Json
from pillion_operator.settings import Settings

AGAIN_S: Final = 60.0
"""Interval between two writes of the EndpointSlice, in case somebody removed it."""
RETRY_S: Final = 2.0
PORT_NAME: Final = "https"
MANAGED_BY: Final = "pillion.dev"

_log = logging.getLogger(__name__)


class Endpoint:
    """The leader's EndpointSlice."""

    def __init__(self, api: client.Client, settings: Settings, port: int) -> None:
        self.is_written = False
        """Whether sidecars are sent here, as far as is known."""
        self._api = api
        self._settings = settings
        self._port = port
        self._path = paths.ENDPOINT_SLICES.one(settings.namespace, settings.home_service)

    async def run(self) -> None:
        """Maintain it. Blocks: until it is cancelled."""
        while True:
            pause_s = AGAIN_S
            try:
                await self._write([self._settings.pod_ip])
                self.is_written = True
            except (client.ApiError, client.Unreachable) as err:
                _log.warning("could not write the EndpointSlice of Service %s: %s", self._settings.home_service, err)
                pause_s = RETRY_S
            await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))

    async def remove(self) -> None:
        """Remove the address; the next leader writes its own."""
        self.is_written = False
        try:
            await self._write([])
        except (client.ApiError, client.Unreachable) as err:
            _log.warning("could not clear the EndpointSlice of Service %s: %s", self._settings.home_service, err)

    async def _write(self, addresses: list[str]) -> None:
        body = endpoint_slice(self._settings, addresses, self._port)
        try:
            await self._api.patch(self._path, body, kind=client.PatchKind.APPLY)
        except client.ApiError as err:
            # The family of its addresses cannot be changed.
            if err.status != 422:
                raise
            with contextlib.suppress(client.NotFound):
                await self._api.delete(self._path)
            await self._api.patch(self._path, body, kind=client.PatchKind.APPLY)


def endpoint_slice(settings: Settings, addresses: list[str], port: int) -> Json:
    """The object, with the leader's address, or with none."""
    is_v6 = ipaddress.ip_address(settings.pod_ip).version == 6
    target = {"kind": "Pod", "namespace": settings.namespace, "name": settings.pod_name}
    return {
        "apiVersion": paths.ENDPOINT_SLICES.version,
        "kind": "EndpointSlice",
        "metadata": {
            "name": settings.home_service,
            "namespace": settings.namespace,
            "labels": {
                "kubernetes.io/service-name": settings.home_service,
                "endpointslice.kubernetes.io/managed-by": MANAGED_BY,
            },
        },
        "addressType": "IPv6" if is_v6 else "IPv4",
        "endpoints": [
            {"addresses": [address], "conditions": {"ready": True}, "targetRef": target} for address in addresses
        ],
        "ports": [{"name": PORT_NAME, "port": port, "protocol": "TCP"}],
    }
