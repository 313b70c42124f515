"""
Injection, pure: a pod and a policy go in, a decision and the new pod come out.

The whole of: what the webhook does to a pod. `decide.inject` is the way in, `apply.remove` the way back.
Called from: the webhook, and `pillion-operator inject` without a cluster.
Must never: read a clock, a file, the environment or an API server, or change what it is given.
"""
