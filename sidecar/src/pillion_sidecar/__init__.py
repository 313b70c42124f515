"""The sidecar: keeps the arena, persists, commits, retains and gives back what the trainer staged. See ARCHITECTURE.md."""
