"""
The webhook: the API server calls it for each pod that opted in, and gets a patch, a refusal, or no change.

Called from: `pillion-operator webhook`, two replicas that know nothing of each other.
Must never: look up in the API server what is in the cache; let an internal error stop a pod that its policy allows to start.
"""
