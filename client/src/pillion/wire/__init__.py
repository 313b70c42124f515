"""
The contract that client, sidecar and operator share: messages, byte layouts, file formats, names and the policy. No code of one side alone.

Standard library only; importable without torch. Each module names its producer and its consumer, and lists breaking and non-breaking
changes. `PROTOCOL_VERSION` counts the breaking changes of the control channel and of the arena together. Both sides of a pod must have the
same version. The format on storage has its own version (`pillion.wire.manifest.FORMAT_VERSION`), because checkpoints outlive releases.
"""

from typing import Final

PROTOCOL_VERSION: Final = 1
"""Version of the protocol, which `hello` and `welcome` contain. A difference raises a `ProtocolMismatch` with both versions."""
