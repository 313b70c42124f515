"""
The command line `pillion`, for people and their scripts: looks at the checkpoints of a root, checks, copies, exports, pins and removes them.

It needs no running sidecar and no torch. Called from: `cli.main`, which is the entry point of `pillion` and of `kubectl pillion`.
"""
