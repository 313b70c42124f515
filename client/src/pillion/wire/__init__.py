"""
The contract that client, sidecar and operator share. Standard library only; importable without torch.

Producer and consumer of each part are named at the top of its module, with two lists: what breaks the contract and what
does not. `PROTOCOL_VERSION` counts breaking changes of the control channel and of the arena together: both sides of a pod
must agree on it exactly. The on-storage format has a version of its own (`pillion.wire.manifest.FORMAT_VERSION`),
because checkpoints outlive releases.
"""

from typing import Final

PROTOCOL_VERSION: Final = 1
"""Sent in `hello` and answered in `welcome`; a difference is a `ProtocolMismatch` that names both."""
