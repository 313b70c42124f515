"""
The sidecar: owns the arena, writes staged saves to storage, commits them, deletes old checkpoints, and serves loads. See ARCHITECTURE.md.

No code of the trainer's process, and no calls of the Kubernetes API: those are in `pillion` and in `pillion_operator`.
"""
