"""
The webhook: the API server asks about each pod that opted in, and gets a patch, a refusal, or the pod as it is.

Called from: `pillion-operator webhook`, two replicas that know nothing of each other.
Must never: ask the API server about what is in the cache; let an error of ours keep a pod from starting that its policy lets start.
"""
