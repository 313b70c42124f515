"""
The supervisor's process: an event loop that answers the trainers, assigns slots to saves, and sends requests to the executor.

No code here reads or writes checkpoints: that is the executor's work (`pillion_sidecar.executor`).
"""
