"""Background tasks of an event loop, and blocking calls with a timeout. Nothing here knows checkpoints."""
