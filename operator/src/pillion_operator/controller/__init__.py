"""
The controller: what is known of jobs becomes status, Checkpoint objects and events, and what people ask for becomes commands.

Called from: `__main__`. `app` is the process; `conditions`, `mirror` and `commands` are the decisions, as pure functions.
Must never: write to a pod or a job, or put a finalizer or an annotation on anything that it did not make.
"""
