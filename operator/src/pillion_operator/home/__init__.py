"""
Reports of sidecars, on the controller's side: authentication, authorization, and the state of each job.

Called from: the controller, while it is the active replica.
Must never: write to the cluster, or let one job speak for another.
"""
