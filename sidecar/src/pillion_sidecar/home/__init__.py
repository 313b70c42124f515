"""Calling home: what the coordinator's sidecar tells the controller, and what it is told. The protocol: `pillion.wire.home`."""
