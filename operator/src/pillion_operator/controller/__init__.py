"""
The controller: reports of jobs become status, Checkpoint objects and events, and requests of users become commands.

Called from: `__main__`. `app` is the process; `conditions`, `mirror` and `commands` are the decisions, as pure functions.
Must never: write to a pod or a job, or put a finalizer or an annotation on anything that it did not make.
"""
